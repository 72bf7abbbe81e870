// cp.async: the source is read when the copy is issued, the destination changes only at the wait
// that covers it. In between any touch of the destination is a fault (shared_memory.cpp).
#include <algorithm>

#include "access.h"

namespace {

struct Plan {
  Address to, from;
  u32 bytes = 16;
};

void copy(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 to[kLanes], from[kLanes];
  u8* at[kLanes];
  compute_addresses(w, p.to, to);
  compute_addresses(w, p.from, from);
  const u32* size = I.r[0] == kNone ? nullptr : w.at<u32>(I.r[0]);
  const u32 ignored = I.r[1] == kNone ? 0 : w.pred(I.r[1]) ^ (I.n ? kFullMask : 0);
  check_shared_bounds(w, m, to, p.bytes);
  PendingCopy& c = w.async.push();
  c.mask = m;
  c.bytes = p.bytes;
  // Only the bytes asked for are read; the rest of the destination becomes zero.
  u32 whole = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const u32 n = ignored >> i & 1 ? 0 : size ? size[i] : p.bytes;
    if (n > p.bytes) throw Violation{"async", "cp.async with a source size above its copy size", i, from[i]};
    if (n == p.bytes) {
      whole |= 1u << i;
    } else {
      std::memset(c.data[i], 0, sizeof c.data[i]);
      for (u32 k = 0; k < n; ++k) {
        u64 one[kLanes];
        one[i] = from[i] + k;
        access_global(w, I, 1u << i, one, 1, Access::Read, at);
        c.data[i][k] = *at[i];
      }
    }
    c.to[i] = (u32)to[i];
    c.group[i] = w.async.committed[i];
    w.block->shared.begin_copy((u32)to[i], p.bytes, w.id, i, w.clock);
  }
  if (whole) access_global(w, I, whole, from, p.bytes, Access::Read, at);
  for (u32 rest = whole; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    copy_bytes(c.data[i], at[i], p.bytes);
  }
}

void async_copy(Lower& l) {
  if (l.take("commit_group")) {
    l.inst.fn = [](Warp& w, const Inst&, u32 m) { for_lanes(m, [&](int i) { ++w.async.committed[i]; }); };
    return;
  }
  if (l.take("wait_group")) {
    l.inst.imm = l.immediate(l.arg(0));
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) { land_copies(w, m, (u32)I.imm, false); };
    return;
  }
  if (l.take("wait_all")) {
    l.inst.fn = [](Warp& w, const Inst&, u32 m) { land_copies(w, m, 0, true); };
    return;
  }
  const bool bypass = l.take("cg");
  if (!bypass && !l.take("ca")) l.fail("needs .ca, .cg or .bulk");
  if (!l.take("shared") && !l.take("shared::cta")) l.fail("destination must be shared");
  if (!l.take("global")) l.fail("source must be global");
  l.drop({"L2::64B", "L2::128B", "L2::256B"});
  const bool hint = l.take("L2::cache_hint");
  Plan* p = l.program.make<Plan>();
  p->to = take_address(l, l.arg(0), Space::Shared);
  p->from = take_address(l, l.arg(1), Space::Global);
  p->bytes = (u32)l.immediate(l.arg(2));
  if (p->bytes != 16 && (bypass || (p->bytes != 4 && p->bytes != 8))) l.fail("copy size must be 4, 8 or 16 (.cg: 16)");
  Ref size = kNone, ignore = kNone;
  const int last = l.count() - (hint ? 1 : 0);
  if (last > 3) {
    const ptx::Arg& a = l.arg(3);
    bool negated = false;
    if (l.bytes(a) == 0)
      ignore = l.pred_use(a, &negated), l.inst.n = negated;
    else
      size = l.use(a, Ty::U32);
  }
  if (size != kNone) l.program.global_granule = std::min(l.program.global_granule, size & 1 ? p->bytes : 4u);
  l.operands({size, ignore});
  l.inst.x = p;
  l.inst.fn = copy;
  l.program.global_granule = std::min(l.program.global_granule, p->bytes);
  l.program.shared_granule = std::min(l.program.shared_granule, p->bytes);
}

}  // namespace

// Lands the copies of these lanes: all of them, or those of groups older than the newest `keep`.
void land_copies(Warp& w, u32 mask, u32 keep, bool all) {
  auto& q = w.async.copies;
  for (size_t k = w.async.first; k < q.size(); ++k) {
    PendingCopy& c = q[k];
    for (u32 m = c.mask & mask; m; m &= m - 1) {
      const int i = __builtin_ctz(m);
      if (!all && !(c.group[i] + keep < w.async.committed[i])) continue;
      w.block->shared.land_copy(c.to[i], c.bytes, c.data[i], w.id, i, w.clock);
      c.mask &= ~(1u << i);
    }
  }
  while (w.async.first < q.size() && !q[w.async.first].mask) ++w.async.first;
}

void add_async_ops(Table& t) {
  t["cp"] = [](Lower& l) {
    if (!l.take("async")) l.fail("only cp.async exists on this target");
    l.inst.cls = Class::AsyncCopy;
    if (l.has("bulk")) {
      void lower_bulk_copy(Lower&);
      return lower_bulk_copy(l);
    }
    if (l.has("mbarrier")) {
      void lower_async_arrive(Lower&);
      return lower_async_arrive(l);
    }
    async_copy(l);
  };
}
