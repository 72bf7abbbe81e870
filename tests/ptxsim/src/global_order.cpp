// Order through fences and atomics in global memory: between blocks as sets of blocks, between the warps of one block
// as clocks, which are joined at the acquiring side.
#include "global_memory.h"

void GlobalMemory::fence(u32 block, WarpClock& clock, u32 warp, bool wide) {
  fenced_ = clock.fenced = true;
  if (!clock.pending.empty()) {
    join_clocks(clock.seen, clock.pending);
    clock.pending.clear();
    clock.update_limits(warp);
  }
  if (!wide) return;
  Order& o = order_[block];
  o.fenced = true;
  for (auto& p : o.pending) o.acquired[p.first] = true;
  o.pending.clear();
}

void GlobalMemory::synchronise(u32 block, WarpClock& clock, u32 warp, u64 address, bool acquire, bool release) {
  if (!acquire && !release && !fenced_ && released_.empty()) return;
  Order& o = order_[block];
  Released& at = released_[address];
  for (auto& p : at.blocks) (acquire ? o.acquired : o.pending)[p.first] = true;
  if (at.block == block) {
    join_clocks(acquire ? clock.seen : clock.pending, at.known);
    clock.update_limits(warp);
  }
  if (release || o.fenced) {
    at.blocks[block] = true;
    for (auto& p : o.acquired) at.blocks[p.first] = true;
  }
  if (release || clock.fenced) {
    if (at.block != block) at.known.clear();
    at.block = block;
    join_clocks(at.known, clock.seen);
    if (at.known[warp] < clock.tick) at.known[warp] = clock.tick;
    clock.advance();
  }
}

bool GlobalMemory::ordered(u32 writer, u32 block) const {
  auto it = order_.find(block);
  if (it == order_.end()) return false;
  if (writer != kMany) return it->second.acquired.count(writer - 1) > 0;
  // Several atomic writers are not named one by one; a block that has acquired is given the benefit.
  return !it->second.acquired.empty();
}
