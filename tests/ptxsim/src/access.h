// Addresses of a warp's memory instruction: computing, checking and counting them.
#pragma once
#include "lower.h"

struct Address {
  Ref base = kNone;
  bool wide = true;  // 64-bit base register
  u64 offset = 0;
  Space space = Space::Generic;
};

// Reads the operand and fits the space: a parameter variable of an inlined call lives in local memory.
Address take_address(Lower& l, const ptx::Arg& a, Space space);
// Takes ".shared", ".shared::cta", ".global", ... ; Generic where none is written.
Space take_space(Lower& l);

inline void compute_addresses(const Warp& w, const Address& a, u64* out) {
  if (a.base == kNone) {
    for (int i = 0; i < kLanes; ++i) out[i] = a.offset;
  } else if (a.wide) {
    const u64* b = w.at<u64>(a.base);
    for (int i = 0; i < kLanes; ++i) out[i] = b[i] + a.offset;
  } else {
    const u32* b = w.at<u32>(a.base);
    for (int i = 0; i < kLanes; ++i) out[i] = (u32)(b[i] + (u32)a.offset);
  }
}

// The space of generic addresses (all lanes must agree) with the window taken off.
Space resolve_generic(u32 mask, u64* address);

// One access of `bytes` bytes (all its vector elements) per lane. Fills `at` with host pointers.
// Global memory is checked and counted.
void access_global(Warp& w, const Inst& I, u32 mask, const u64* address, u32 bytes, Access kind, u8** at);
void count_shared(Warp& w, const Inst& I, u32 mask, const u64* address, u32 bytes);
void check_shared_bounds(Warp& w, u32 mask, const u64* address, u32 bytes);
void access_local(Warp& w, u32 mask, const u64* address, u32 bytes, u8** at);

inline Cost& cost_of(Warp& w) { return w.launch->costs[w.pc]; }
