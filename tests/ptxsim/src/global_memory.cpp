#include "global_memory.h"

#include <algorithm>
#include <new>

void GlobalMemory::add(Buffer b) { buffers_.push_back(std::move(b)); }

void GlobalMemory::prepare(u32 granule_bytes) {
  std::sort(buffers_.begin(), buffers_.end(), [](auto& a, auto& b) { return a.base < b.base; });
  shift_ = granule_bytes >= 16 ? 4 : granule_bytes >= 8 ? 3 : granule_bytes >= 4 ? 2 : granule_bytes >= 2 ? 1 : 0;
  for (Buffer& b : buffers_) {
    const u64 first = b.base >> shift_, n = ((b.base + b.size - 1) >> shift_) - first + 1;
    b.shadow = std::make_unique<Granule[]>(b.size ? n : 1);
    b.traces.reset((Trace*)std::calloc(b.size ? n : 1, sizeof(Trace)));
    if (!b.traces) throw std::bad_alloc();
    if (!b.size) continue;
    if (!b.init) {
      for (u64 g = 0; g < n; ++g) b.shadow[g].writer = kInitialised;
    } else {
      for (u64 g = 0; g < n; ++g) {
        bool all = true;
        for (u64 a = std::max(b.base, (first + g) << shift_), e = std::min(b.base + b.size, (first + g + 1) << shift_);
             a < e; ++a)
          all &= b.init[a - b.base] != 0;
        b.shadow[g].writer = all ? kInitialised : 0;
      }
    }
  }
}

Buffer* GlobalMemory::search(u64 address, u64 bytes) {
  auto it =
      std::upper_bound(buffers_.begin(), buffers_.end(), address, [](u64 a, const Buffer& b) { return a < b.base; });
  if (it == buffers_.begin()) return nullptr;
  --it;
  if (address - it->base >= it->size || it->size - (address - it->base) < bytes) return nullptr;
  return last_ = &*it;
}

std::string GlobalMemory::describe(u64 address) const {
  if (address < 65536) return "a null pointer" + (address ? " + " + std::to_string(address) : std::string());
  const Buffer* near = nullptr;
  u64 best = ~0ull;
  for (const Buffer& b : buffers_) {
    const u64 d = address < b.base ? b.base - address : address >= b.base + b.size ? address - (b.base + b.size) : 0;
    if (d < best) best = d, near = &b;
  }
  if (!near) return "no buffer";
  if (address < near->base) return std::to_string(near->base - address) + " bytes before " + near->name;
  const s64 past = (s64)(address - near->base - near->size);
  if (past >= 0)
    return std::to_string(past) + " bytes past the end of " + near->name + " (" + std::to_string(near->size) +
           " bytes)";
  return near->name + " + " + std::to_string(address - near->base);
}

void GlobalMemory::conflict(const Buffer& b, u64 address, int lane, const char* what, u32 other) const {
  std::string who = other == kMany ? "other blocks" : "block " + std::to_string(other - 1);
  throw Violation{
      "block-conflict",
      std::string(what) + " " + who + " in the same launch, at " + b.name + " + " + std::to_string(address - b.base),
      lane, address};
}

void GlobalMemory::race(const Buffer& b, u64 address, int lane, const char* what, u32 stamp) const {
  throw Violation{"race",
                  std::string(what) + " at " + b.name + " + " + std::to_string(address - b.base) +
                      ", not ordered after warp " + std::to_string(stamp & 31),
                  lane, address};
}

// A read by another warp of this block that no barrier puts before this write.
void GlobalMemory::check_readers(const Buffer& b, u64 address, const Trace& t, const Accessor& by) const {
  for (const u32 read : {t.read, t.other_read})
    if (read && !by.after(read) && ticks_.block_of(read >> 5) == by.block)
      race(b, address, by.lane, "write over data read", read);
}

void GlobalMemory::check(Buffer& b, u64 address, u32 bytes, Access kind, const Accessor& by) {
  const u32 me = by.block + 1, block = by.block;
  const int lane = by.lane;
  const u64 first = b.base >> shift_;
  for (u64 k = (address >> shift_) - first, end = ((address + bytes - 1) >> shift_) - first; k <= end; ++k) {
    Granule* g = &b.shadow[k];
    Trace& t = b.traces[k];
    const u32 w = g->writer, id = w & kBlockBits;
    const bool foreign = id && id != me;
    // The write of another warp of this block that no barrier puts before this access.
    const bool unordered = id == me && t.write && !by.after(t.write);
    switch (kind) {
      case Access::Read:
      case Access::ReadOnce:
      case Access::ReadSync:
        if (!w)
          throw Violation{
              "uninitialised",
              "read of " + b.name + " + " + std::to_string(address - b.base) + ", which nothing has written", lane,
              address};
        if (kind == Access::ReadOnce && id) conflict(b, address, lane, "ld.global.nc of data written by", id);
        if (kind == Access::Read && foreign && !ordered(id, block))
          conflict(b, address, lane, "read of data written by", id);
        if (kind == Access::Read && unordered) race(b, address, lane, "read of data written", t.write);
        if (kind != Access::ReadSync) {
          g->reader = !g->reader || g->reader == me ? me : kMany;
          trace_read(t, by.stamp());
        } else if (!g->reader) {
          g->reader = me;
        }
        break;
      case Access::Write:
        if (foreign && !ordered(id, block)) conflict(b, address, lane, "overwrites data of", id);
        if (g->reader && g->reader != me && !ordered(g->reader, block))
          conflict(b, address, lane, "overwrites data read by", g->reader);
        if (unordered) race(b, address, lane, "write over data written", t.write);
        check_readers(b, address, t, by);
        g->writer = (w & kInitialised) | me;
        t.write = by.stamp();
        break;
      case Access::WriteSync:
      case Access::Atomic:
        if (kind == Access::Atomic && !w)
          throw Violation{
              "uninitialised",
              "atomic on " + b.name + " + " + std::to_string(address - b.base) + ", which nothing has written", lane,
              address};
        if (foreign && !(w & kAtomic) && !ordered(id, block)) conflict(b, address, lane, "atomic on plain data of", id);
        if (unordered && !(w & kAtomic)) race(b, address, lane, "atomic on data written", t.write);
        check_readers(b, address, t, by);
        g->writer = (w & kInitialised) | kAtomic | (foreign ? kMany : me);
        t.write = by.stamp();
        if (kind == Access::Atomic && !g->reader) g->reader = me;
        break;
    }
  }
}
