// Basic types shared by every file of the simulator.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kFullMask = 0xffffffffu;
constexpr u32 kNone = 0xffffffffu;

// State spaces of PTX. Generic addresses are told apart by the windows below.
enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

constexpr u64 kSharedWindow = 0x0000'5000'0000'0000ull;
constexpr u64 kLocalWindow = 0x0000'6000'0000'0000ull;
constexpr u64 kWindowBytes = 0x0000'0001'0000'0000ull;
constexpr u64 kGlobalBase = 0x0000'7f00'0000'0000ull;
// Shared variables start above zero so that a null shared pointer is a fault; a multiple of 1024
// keeps bank numbers and swizzles as on the machine.
constexpr u32 kSharedBase = 1024;

// A scalar type of PTX, as written after the dot.
enum class Ty : u8 {
  None,
  Pred,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  BF16,
  TF32,
  F32,
  F64,
  F16x2,
  BF16x2,
  U16x2,
  S16x2
};

// Text that is not PTX the simulator knows: raised while a kernel is read, before it runs.
struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a running kernel did wrong. `kind` is one word tests match on.
struct Violation {
  std::string kind, what;
  int lane = -1;
  u64 address = 0;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Copies 1, 2, 4, 8 or 16 bytes; anything else goes through memcpy.
inline void copy_bytes(void* to, const void* from, u32 bytes) {
  switch (bytes) {
    case 16: std::memcpy(to, from, 16); break;
    case 8: std::memcpy(to, from, 8); break;
    case 4: std::memcpy(to, from, 4); break;
    case 2: std::memcpy(to, from, 2); break;
    default: std::memcpy(to, from, bytes);
  }
}
