// What orders the accesses of a block's warps: clocks that barriers, mbarriers and fences join.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "types.h"

// Ticks are handed out once in a launch, so that a tick names its block: shadows of global memory outlive blocks.
class Ticks {
 public:
  u32 next(u32 block) {
    // Shadows pack a tick with a lane or a warp in 32 bits.
    if (block_.size() >= 1u << 26) throw Violation{"limit", "the run passed 67 million synchronisations"};
    block_.push_back(block);
    return (u32)block_.size();  // from 1: zero is "never"
  }
  u32 block_of(u32 tick) const { return block_[tick - 1]; }

 private:
  std::vector<u32> block_;
};

// What one warp knows of the others. `tick` is its own time, advanced whenever it synchronises.
struct WarpClock {
  Ticks* ticks = nullptr;
  u32 block = 0;
  u32 tick = 0, warp_sync = 0;  // warp_sync: time of the last full bar.warp.sync
  std::vector<u32> seen;  // per warp: the latest tick ordered before now
  std::vector<u32> limits;  // per warp: the largest entry of SharedMemory's reads_ that is ordered before now
  std::unique_ptr<u32[]> pairs;  // [32][32], for bar.warp.sync of part of a warp; made when needed
  bool fenced = false;  // what it has done is published by its next atomic
  std::vector<u32> pending;  // what atomics brought from other warps, waiting for a fence
  std::vector<u32> proxied;  // per lane: the latest tick whose writes a fence.proxy.async on the way here has covered

  WarpClock() = default;
  // `agents`: rows for what writes on its own, copies that an mbarrier completes; they follow those of the warps.
  WarpClock(Ticks& t, u32 b, u32 warps, u32 agents, bool async_proxy)
      : ticks(&t), block(b), seen(warps + agents, 0), limits(warps, 63), proxied(async_proxy ? 32 * warps : 0, 0) {
    advance();
  }
  void advance() { tick = ticks->next(block); }
  void update_limits(u32 self) {  // after any change of the above
    for (size_t w = 0; w < limits.size(); ++w) limits[w] = (w == self ? warp_sync : seen[w]) << 6 | 63;
  }
};

// Writes known to these lanes become visible to the async proxy: those of other warps, those that the warp's last
// synchronisation ordered, and the lanes' own.
inline void fence_async_proxy(WarpClock& c, u32 self, u32 mask) {
  for (u32 k = 0; k < c.proxied.size(); ++k) {
    const u32 known = k / 32 != self ? c.seen[k / 32] : mask >> k % 32 & 1 ? c.tick : c.warp_sync;
    c.proxied[k] = std::max(c.proxied[k], known);
  }
  c.advance();
}

inline void join_clocks(std::vector<u32>& into, const std::vector<u32>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i)
    if (from[i] > into[i]) into[i] = from[i];
}
