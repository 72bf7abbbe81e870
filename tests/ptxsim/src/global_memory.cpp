#include "global_memory.h"

#include <algorithm>

void GlobalMemory::add(Buffer b) { buffers_.push_back(std::move(b)); }

void GlobalMemory::prepare(u32 granule_bytes) {
  std::sort(buffers_.begin(), buffers_.end(), [](auto& a, auto& b) { return a.base < b.base; });
  shift_ = granule_bytes >= 16 ? 4 : granule_bytes >= 8 ? 3 : granule_bytes >= 4 ? 2 : granule_bytes >= 2 ? 1 : 0;
  for (Buffer& b : buffers_) {
    const u64 first = b.base >> shift_, n = ((b.base + b.size - 1) >> shift_) - first + 1;
    b.shadow = std::make_unique<Granule[]>(b.size ? n : 1);
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

void GlobalMemory::check(Buffer& b, u64 address, u32 bytes, Access kind, u32 block, int lane) {
  const u32 me = block + 1;
  const u64 first = b.base >> shift_;
  Granule* g = &b.shadow[(address >> shift_) - first];
  Granule* end = &b.shadow[((address + bytes - 1) >> shift_) - first] + 1;
  for (; g != end; ++g) {
    const u32 w = g->writer, id = w & kBlockBits;
    const bool foreign = id && id != me;
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
        if (kind != Access::ReadSync)
          g->reader = !g->reader || g->reader == me ? me : kMany;
        else if (!g->reader)
          g->reader = me;
        break;
      case Access::Write:
        if (foreign && !ordered(id, block)) conflict(b, address, lane, "overwrites data of", id);
        if (g->reader && g->reader != me && !ordered(g->reader, block))
          conflict(b, address, lane, "overwrites data read by", g->reader);
        g->writer = (w & kInitialised) | me;
        break;
      case Access::WriteSync:
      case Access::Atomic:
        if (kind == Access::Atomic && !w)
          throw Violation{
              "uninitialised",
              "atomic on " + b.name + " + " + std::to_string(address - b.base) + ", which nothing has written", lane,
              address};
        if (foreign && !(w & kAtomic) && !ordered(id, block)) conflict(b, address, lane, "atomic on plain data of", id);
        g->writer = (w & kInitialised) | kAtomic | (foreign ? kMany : me);
        if (kind == Access::Atomic && !g->reader) g->reader = me;
        break;
    }
  }
}

void GlobalMemory::fence(u32 block) {
  Order& o = order_[block];
  o.fenced = true;
  for (auto& p : o.pending) o.acquired[p.first] = true;
  o.pending.clear();
}

void GlobalMemory::synchronise(u32 block, u64 address, bool acquire, bool release) {
  auto it = order_.find(block);
  if (!acquire && !release && it == order_.end() && released_.empty()) return;
  Order& o = order_[block];
  auto& at = released_[address];
  for (auto& p : at) (acquire ? o.acquired : o.pending)[p.first] = true;
  if (release || o.fenced) {
    at[block] = true;
    for (auto& p : o.acquired) at[p.first] = true;
  }
}

bool GlobalMemory::ordered(u32 writer, u32 block) const {
  auto it = order_.find(block);
  if (it == order_.end()) return false;
  if (writer != kMany) return it->second.acquired.count(writer - 1) > 0;
  // Several atomic writers are not named one by one; a block that has acquired is given the benefit.
  return !it->second.acquired.empty();
}
