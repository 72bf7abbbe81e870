// cp.async.bulk from global to shared memory: the source is read when the copy is issued; the destination changes when
// the mbarrier's phase completes, and belongs to those who have waited for it.
#include <algorithm>

#include "access.h"

namespace {

constexpr u32 kAgents = 16;  // mbarriers whose copies are told apart

struct Plan {
  Address to, from, mbarrier;
};

void copy_one(Warp& w, const Inst& I, int lane, u64 to, u64 from, u32 bytes, u64 at) {
  if (bytes % 16 || to % 16 || from % 16)
    throw Violation{"misaligned", "bulk copies take addresses and sizes that are multiples of 16", lane,
                    to % 16 ? to : from};
  Mbarrier& b = find_mbarrier(w, at, lane);
  if (b.init_tick > w.clock.proxied[b.init_warp * kLanes + b.init_lane])
    throw Violation{"async", "bulk copy on an mbarrier whose init no fence has shown to the async proxy", lane, at};
  BulkCopy c;
  c.to = (u32)to;
  c.data.resize(bytes);
  for (u32 done = 0; done < bytes;) {  // 32 pieces at a time, as if each lane copied one
    u64 source[kLanes], target[kLanes];
    u8* host[kLanes];
    const u32 n = std::min<u32>(kLanes, (bytes - done) / 16), mask = n == kLanes ? kFullMask : (1u << n) - 1;
    for (u32 i = 0; i < n; ++i) source[i] = from + done + 16 * i, target[i] = to + done + 16 * i;
    check_shared_bounds(w, mask, target, 16);
    access_global(w, I, mask, source, 16, Access::Read, host);
    for (u32 i = 0; i < n; ++i) {
      std::memcpy(c.data.data() + done + 16 * i, host[i], 16);
      w.block->shared.check_proxy((u32)target[i], 16, w.clock, "bulk copy over");
      w.block->shared.begin_copy((u32)target[i], 16, w.id, lane, w.clock);
    }
    done += 16 * n;
  }
  b.bulk.push_back(std::move(c));
  b.bytes -= bytes;
  complete_phase_if_due(w, b);
}

void copy(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 to[kLanes], from[kLanes], at[kLanes];
  compute_addresses(w, p.to, to);
  compute_addresses(w, p.from, from);
  compute_addresses(w, p.mbarrier, at);
  check_shared_bounds(w, m, at, 8);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    copy_one(w, I, i, to[i], from[i], w.at<u32>(I.r[0])[i], at[i]);
  }
}

}  // namespace

void lower_bulk_copy(Lower& l) {
  l.take("bulk");
  const std::string to = l.peek();
  if (!l.take("shared::cluster") && !l.take("shared::cta")) l.fail("unsupported bulk copy");
  if (to.rfind("shared", 0)) l.fail("unsupported bulk copy: the destination is shared");
  if (!l.take("global")) l.fail("unsupported bulk copy: the source is global");
  if (!l.take("mbarrier::complete_tx::bytes")) l.fail("needs .mbarrier::complete_tx::bytes");
  l.take("L2::cache_hint");  // its operand comes last and is not looked at
  Plan* p = l.program.make<Plan>();
  p->to = take_address(l, l.arg(0), Space::Shared);
  p->from = take_address(l, l.arg(1), Space::Global);
  p->mbarrier = take_address(l, l.arg(3), Space::Shared);
  l.operands({l.use(l.arg(2), Ty::U32)});
  l.inst.x = p;
  l.inst.fn = copy;
  l.program.async_agents = kAgents;
  l.program.global_granule = std::min(l.program.global_granule, 16u);
  l.program.shared_granule = std::min(l.program.shared_granule, 16u);
}
