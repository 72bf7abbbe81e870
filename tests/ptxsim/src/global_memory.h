// Global memory: the launch's buffers at simulated addresses with guard gaps between them, and a
// shadow that knows, for every granule, who wrote it and who read it in this launch.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "types.h"

// One shadow entry covers the smallest aligned access the kernel makes to global memory, so that
// neighbouring elements written by different blocks never share an entry.
struct Granule {
  u32 writer = 0;  // kInitialised, kAtomic, block + 1
  u32 reader = 0;  // block + 1, or kMany
};
constexpr u32 kInitialised = 1u << 31, kAtomic = 1u << 30, kBlockBits = kAtomic - 1, kMany = kBlockBits;

struct Buffer {
  std::string name;
  u64 base = 0, size = 0;
  u8* host = nullptr;
  u8* init = nullptr;  // one byte per byte of data, 0 = never written; null = all initialised
  bool output = false;  // every byte must have been written when the launch ends
  bool constant = false;
  std::unique_ptr<Granule[]> shadow;
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
  void check(Buffer& buffer, u64 address, u32 bytes, Access kind, u32 block, int lane);
  // The common case of check(), inline: a plain read of what the launch found initialised or this
  // block wrote.
  void check_read(Buffer& b, u64 address, u32 bytes, u32 block, int lane) {
    const u32 me = block + 1;
    const u64 first = b.base >> shift_;
    Granule* g = &b.shadow[(address >> shift_) - first];
    Granule* end = &b.shadow[((address + bytes - 1) >> shift_) - first] + 1;
    for (; g != end; ++g) {
      const u32 id = g->writer & kBlockBits;
      if (__builtin_expect(!g->writer || (id && id != me), 0))
        return check(b, address, bytes, Access::Read, block, lane);
      g->reader = !g->reader || g->reader == me ? me : kMany;
    }
  }
  std::string describe(u64 address) const;

  // Ordering between blocks through atomics and fences (the "last block reduces" pattern): a fence
  // publishes all a block wrote; an atomic on the same address after it carries that to others.
  void fence(u32 block);
  void synchronise(u32 block, u64 address, bool acquire, bool release);
  bool ordered(u32 writer, u32 block) const;

  std::vector<Buffer>& buffers() { return buffers_; }
  u32 granule() const { return 1u << shift_; }

 private:
  struct Order {
    bool fenced = false;
    std::unordered_map<u32, bool> pending, acquired;
  };
  Buffer* search(u64 address, u64 bytes);
  [[noreturn]] void conflict(const Buffer& b, u64 address, int lane, const char* what, u32 other) const;

  std::vector<Buffer> buffers_;
  Buffer* last_ = nullptr;
  u32 shift_ = 2;
  std::unordered_map<u32, Order> order_;
  std::unordered_map<u64, std::unordered_map<u32, bool>> released_;
};
