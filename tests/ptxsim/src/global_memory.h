// Global memory: the launch's buffers at simulated addresses with guard gaps between them, and a
// shadow that knows, for every granule, who wrote it and who read it in this launch.
#pragma once
#include <cstdlib>
#include <unordered_map>

#include "clock.h"

// One shadow entry covers the smallest aligned access the kernel makes to global memory, so that
// neighbouring elements written by different blocks never share an entry.
struct Granule {
  u32 writer = 0;  // kInitialised, kAtomic, block + 1
  u32 reader = 0;  // block + 1, or kMany
};
constexpr u32 kInitialised = 1u << 31, kAtomic = 1u << 30, kBlockBits = kAtomic - 1, kMany = kBlockBits;

// The same among the warps of a block: tick << 5 | warp of the last write, of the last read, and of the last read by
// another warp than that one. Two reads are enough where warps meet at barriers of the whole block: a read that the
// writer is not ordered after was followed by no such barrier, so neither was the last read of any warp but the writer.
struct Trace {
  u32 write, read, other_read;
};
struct Free {
  void operator()(void* p) const { std::free(p); }
};

// The lane that accesses.
struct Accessor {
  u32 block, warp;
  int lane;
  const WarpClock& clock;

  u32 stamp() const { return clock.tick << 5 | warp; }
  bool after(u32 stamp) const { return (stamp & 31) == warp || stamp >> 5 <= clock.seen[stamp & 31]; }
};

struct Buffer {
  std::string name;
  u64 base = 0, size = 0;
  u8* host = nullptr;
  u8* init = nullptr;  // one byte per byte of data, 0 = never written; null = all initialised
  bool output = false;  // every byte must have been written when the launch ends
  bool constant = false;
  std::unique_ptr<Granule[]> shadow;
  std::unique_ptr<Trace[], Free> traces;  // zero pages that cost nothing until they are touched
  u64 requests = 0;
};

enum class Access : u8 { Read, ReadOnce /* ld.nc */, ReadSync, Write, WriteSync, Atomic };

class GlobalMemory {
 public:
  void add(Buffer buffer);
  void prepare(u32 granule_bytes);

  // The buffer that holds [address, address + bytes), or null.
  Buffer* find(u64 address, u64 bytes) {
    if (last_ && address - last_->base < last_->size && last_->size - (address - last_->base) >= bytes) return last_;
    return search(address, bytes);
  }
  // Checks one lane's access against the shadow and updates it.
  void check(Buffer& buffer, u64 address, u32 bytes, Access kind, const Accessor& by);
  // The common case of check(), inline: a plain read of what the launch found initialised.
  void check_read(Buffer& b, u64 address, u32 bytes, const Accessor& by) {
    const u32 me = by.block + 1, stamp = by.stamp();
    const u64 first = b.base >> shift_;
    u64 k = (address >> shift_) - first;
    const u64 end = ((address + bytes - 1) >> shift_) - first;
    for (; k <= end; ++k) {
      Granule& g = b.shadow[k];
      if (__builtin_expect(g.writer != kInitialised, 0)) return check(b, address, bytes, Access::Read, by);
      g.reader = !g.reader || g.reader == me ? me : kMany;
      trace_read(b.traces[k], stamp);
    }
  }
  std::string describe(u64 address) const;

  // Ordering through atomics and fences (the "last block reduces" pattern): a fence publishes all a block has written;
  // an atomic on the same address after it carries that to others. Between the warps of a block the same, with clocks.
  void fence(u32 block, WarpClock& clock, u32 warp, bool wide);
  void synchronise(u32 block, WarpClock& clock, u32 warp, u64 address, bool acquire, bool release);
  bool ordered(u32 writer, u32 block) const;

  std::vector<Buffer>& buffers() { return buffers_; }
  u32 granule() const { return 1u << shift_; }
  Ticks& ticks() { return ticks_; }

 private:
  struct Order {
    bool fenced = false;
    std::unordered_map<u32, bool> pending, acquired;
  };
  struct Released {
    std::unordered_map<u32, bool> blocks;
    u32 block = kNone;  // whose warps last released here, and what they knew
    std::vector<u32> known;
  };
  static void trace_read(Trace& t, u32 stamp) {
    if (t.read == stamp) return;
    if ((t.read ^ stamp) & 31) t.other_read = t.read;
    t.read = stamp;
  }
  Buffer* search(u64 address, u64 bytes);
  void check_readers(const Buffer& b, u64 address, const Trace& t, const Accessor& by) const;
  [[noreturn]] void conflict(const Buffer& b, u64 address, int lane, const char* what, u32 other) const;
  [[noreturn]] void race(const Buffer& b, u64 address, int lane, const char* what, u32 stamp) const;

  std::vector<Buffer> buffers_;
  Buffer* last_ = nullptr;
  u32 shift_ = 2;
  Ticks ticks_;
  bool fenced_ = false;
  std::unordered_map<u32, Order> order_;
  std::unordered_map<u64, Released> released_;
};
