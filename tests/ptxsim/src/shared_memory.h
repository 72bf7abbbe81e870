// Shared memory of one block with its shadow: initialisation, copies in flight, and
// races found by happens-before clocks. Only what the programming model orders counts as order:
// block barriers, bar.warp.sync, mbarriers; not luck, not lockstep, not shuffles.
#pragma once
#include "clock.h"

// Stands for "some lane of the warp": what ldmatrix and wmma.load read reaches lanes other than the
// one that names the address.
constexpr int kAnyLane = 63;

class SharedMemory {
 public:
  void reset(u32 bytes, u32 granule_bytes, u32 warps);
  void allow(u32 offset, u32 bytes);  // makes a variable addressable; the rest are guard gaps

  bool inside(u32 address, u32 bytes) const {
    const u32 o = address - kSharedBase;
    if (o >= size_ || size_ - o < bytes) return false;
    return (cells_[o >> shift_].flags & cells_[(o + bytes - 1) >> shift_].flags & kAddressable) != 0;
  }
  u8* at(u32 address) { return data_.get() + (address - kSharedBase); }

  void read(u32 address, u32 bytes, u32 warp, int lane, const WarpClock& c) {
    const u32 o = address - kSharedBase, me = warp << 5 | (u32)lane;
    for (u32 g = o >> shift_, end = (o + bytes - 1) >> shift_; g <= end; ++g) {
      const Cell& cell = cells_[g];
      const u32 who = cell.writer, ww = who >> 5;
      const bool plain = (cell.flags & (kWritten | kInFlight)) == kWritten;
      const bool ordered = cell.stamp <= (ww == warp ? c.warp_sync : c.seen[ww]);
      if (__builtin_expect(!plain || !(ordered || who == me), 0)) read_slow(g, address, warp, lane, c);
      u32& r = reads_[(size_t)g * warps_ + warp];
      const u32 mine = c.tick << 6 | (u32)lane;
      r = (r >> 6) == c.tick && r != mine ? c.tick << 6 | kAnyLane : mine;
    }
  }
  void write(u32 address, u32 bytes, const void* value, u32 warp, int lane, const WarpClock& clock);
  void atomic(u32 address, u32 bytes, u32 warp, int lane, const WarpClock& clock);
  void begin_copy(u32 address, u32 bytes, u32 warp, int lane, const WarpClock& clock);
  void land_copy(u32 address, u32 bytes, const void* value, u32 warp, int lane, const WarpClock& clock);

  // The async proxy: 16 bytes that a wgmma reads from its issue to the wait that covers it, and bulk copies, which
  // write as an agent of their own (a number above the warps').
  void begin_async_read(u32 address, u32 warp, const WarpClock& clock);
  void end_async_read(u32 address, u32 warp, const WarpClock& clock);
  void check_proxy(u32 address, u32 bytes, const WarpClock& clock, const char* what) const;
  void land_bulk_copy(u32 address, u32 bytes, const void* value, u32 agent, u32 tick);

  u32 size() const { return size_; }

 private:
  enum : u8 { kAddressable = 1, kWritten = 2, kInFlight = 4, kAtomicWrite = 8 };
  struct Cell {
    u32 stamp = 0;  // of the last write
    u16 writer = 0;  // warp << 5 | lane
    u8 flags = 0;

    void write(u32 tick, u32 warp, int lane) {
      flags = (flags | kWritten) & ~(kInFlight | kAtomicWrite);
      stamp = tick;
      writer = (u16)(warp << 5 | (u32)lane);
    }
  };
  void read_slow(u32 g, u32 address, u32 warp, int lane, const WarpClock& clock) const;
  void check_readers(const u32* reads, u32 address, u32 warp, int lane, const WarpClock& clock) const;
  void check_write(u32 g, u32 address, const void* value, u32 offset_in_access, u32 n, u32 warp, int lane,
                   const WarpClock& clock, bool is_atomic);
  bool lanes_ordered(const WarpClock& c, u32 stamp, int a, int b) const {
    return stamp <= c.warp_sync || (b != kAnyLane && c.pairs && stamp <= c.pairs[a * kLanes + b]);
  }
  [[noreturn]] void race(const char* what, u32 address, u32 warp, int lane, u32 other_warp, int other_lane) const;
  [[noreturn]] void fault(const char* kind, const char* what, u32 address, int lane) const;

  u32 size_ = 0, capacity_ = 0, shift_ = 2, warps_ = 1;
  std::unique_ptr<u8[]> data_;
  std::vector<Cell> cells_;
  std::vector<u16> async_readers_;  // [granule]: wgmmas that still read it; empty until the first
  std::vector<u32> reads_;  // [granule][warp]: tick << 6 | lane, kAnyLane = several
};
