// mbarriers: init, arrive (with a count, without completion, expecting transactions), test and try waits by token or
// parity, and the arrival of cp.async. Phases carry clocks, as block barriers do. Bulk copies are in ops_bulk.cpp.
#include <algorithm>

#include "access.h"

namespace {

struct Plan {
  Address address;
  bool parity = false, count = false, no_complete = false, no_increment = false, expect = false;
};

constexpr s64 kMostTransactions = (1 << 20) - 1;

void expect_bytes(Mbarrier& b, u32 bytes, int lane, u64 address) {
  b.bytes += bytes;
  if (b.bytes > kMostTransactions)
    throw Violation{"barrier", "an mbarrier expects more than 2^20 - 1 bytes", lane, address};
}

bool is_complete(Warp& w, const Inst& I, const Mbarrier& b, int lane) {
  return ((const Plan*)I.x)->parity ? (b.phase & 1) != (w.at<u32>(I.r[1])[lane] & 1)
                                    : b.phase != (u32)(w.at<u64>(I.r[1])[lane] >> 32);
}

}  // namespace

Mbarrier& find_mbarrier(Warp& w, u64 address, int lane) {
  auto it = w.block->mbarriers.find((u32)address);
  if (it == w.block->mbarriers.end()) throw Violation{"barrier", "mbarrier used before mbarrier.init", lane, address};
  const Mbarrier& b = it->second;
  if (b.init_warp != w.id && b.init_tick > w.clock.seen[b.init_warp])
    throw Violation{"race", "mbarrier used, not ordered after its mbarrier.init by warp " + std::to_string(b.init_warp),
                    lane, address};
  return it->second;
}

void complete_phase_if_due(Warp& w, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  if (!b.bulk.empty()) {
    const u32 tick = w.clock.ticks->next(w.block->index);
    for (const BulkCopy& c : b.bulk)
      w.block->shared.land_bulk_copy(c.to, (u32)c.data.size(), c.data.data(), b.agent, tick);
    b.known[b.agent] = tick;
    b.bulk.clear();
  }
  for (Warp& other : w.block->warps)
    for (Fragment& f : other.fragments)
      if (f.state == Fragment::AtMbarrier) f.state = Fragment::Ready;
  // Copies whose arrival completed the phase have landed.
  for (MbarrierCopy& c : b.copies)
    for (u32 m = c.copy.mask; m; m &= m - 1) {
      const int i = __builtin_ctz(m);
      w.block->shared.land_copy(c.copy.to[i], c.copy.bytes, c.copy.data[i], c.warp, i, w.block->warps[c.warp].clock);
    }
  // A landed copy is ordered before those who see the phase: their knowledge includes its writer.
  for (MbarrierCopy& c : b.copies) {
    Warp& writer = w.block->warps[c.warp];
    b.known[c.warp] = std::max(b.known[c.warp], writer.clock.tick);
    writer.clock.advance();
  }
  b.copies.clear();
}

bool mbarrier_is_complete(Warp& w, const Inst& I, u32 m) {
  u64 address[kLanes];
  compute_addresses(w, ((const Plan*)I.x)->address, address);
  check_shared_bounds(w, m, address, 8);
  bool any = false;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    any |= is_complete(w, I, find_mbarrier(w, address[i], i), i);
  }
  return any || !m;
}

bool mbarrier_lacks_bytes(Warp& w, const Inst& I, u32 m) {
  u64 address[kLanes];
  compute_addresses(w, ((const Plan*)I.x)->address, address);
  return w.block->mbarriers.at((u32)address[__builtin_ctz(m)]).bytes != 0;
}

std::string describe_mbarrier_wait(Warp& w, const Inst& I, u32 m) {
  u64 address[kLanes];
  compute_addresses(w, ((const Plan*)I.x)->address, address);
  const u64 at = address[__builtin_ctz(m)];
  const Mbarrier& b = w.block->mbarriers.at((u32)at);
  return "mbarrier at shared + " + std::to_string(at - kSharedBase) + ": its phase " + std::to_string(b.phase) +
         " lacks " + std::to_string(b.pending) + " of " + std::to_string(b.expected) + " arrivals and " +
         std::to_string(b.bytes) + " bytes, and no other thread can run";
}

namespace {

void arrive(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  compute_addresses(w, p.address, address);
  check_shared_bounds(w, m, address, 8);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    Mbarrier& b = find_mbarrier(w, address[i], i);
    const u32 n = p.count ? w.at<u32>(I.r[1])[i] : 1;
    if (p.expect) expect_bytes(b, w.at<u32>(I.r[2])[i], i, address[i]);
    if (n > b.pending) throw Violation{"barrier", "more arrivals at an mbarrier than it expects", i, address[i]};
    if (I.r[0] != kNone) w.at<u64>(I.r[0])[i] = (u64)b.phase << 32 | b.pending;
    join_clocks(b.known, w.clock.seen);
    join_clocks(b.proxied, w.clock.proxied);
    b.known[w.id] = std::max(b.known[w.id], w.clock.tick);
    b.pending -= n;
    complete_phase_if_due(w, b);
  }
  w.clock.advance();
}

void async_arrive(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  compute_addresses(w, p.address, address);
  check_shared_bounds(w, m, address, 8);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    Mbarrier& b = find_mbarrier(w, address[i], i);
    if (!p.no_increment) ++b.pending;
    b.known.resize(w.clock.seen.size());
    for (PendingCopy& c : w.async.copies)
      if (c.mask >> i & 1) {
        b.copies.push_back({w.id, c});
        b.copies.back().copy.mask = 1u << i;
        c.mask &= ~(1u << i);
      }
    if (!b.pending) throw Violation{"barrier", "more arrivals at an mbarrier than it expects", i, address[i]};
    --b.pending;
    complete_phase_if_due(w, b);
  }
}

void wait(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  u64 address[kLanes];
  compute_addresses(w, p.address, address);
  check_shared_bounds(w, m, address, 8);
  u32 done = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    Mbarrier& b = find_mbarrier(w, address[i], i);
    if (!is_complete(w, I, b, i)) continue;
    done |= 1u << i;
    join_clocks(w.clock.seen, b.known);
    join_clocks(w.clock.proxied, b.proxied);
    w.clock.warp_sync = std::max(w.clock.warp_sync, b.known.empty() ? 0 : b.known[w.id]);
    w.clock.update_limits(w.id);
  }
  u32& d = *w.at<u32>(I.r[0]);
  d = (d & ~m) | done;
}

void mbarrier(Lower& l) {
  Plan* p = l.program.make<Plan>();
  l.inst.cls = Class::Barrier;
  l.inst.x = p;
  const std::string op = l.take_any();
  p->expect = op == "arrive" && l.take("expect_tx");
  l.drop({"release", "acquire", "relaxed", "cta", "cluster"});
  if (op == "arrive") p->no_complete = l.take("noComplete");
  if (op == "test_wait" || op == "try_wait") p->parity = l.take("parity");
  const Space space = take_space(l);
  if (space != Space::Shared) l.fail("mbarriers must be named in shared memory");
  if (l.take_type() != Ty::B64) l.fail("mbarrier needs .b64");
  if (op == "init") {
    p->address = take_address(l, l.arg(0), space);
    l.operands({l.use(l.arg(1), Ty::U32)});
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      u64 address[kLanes];
      compute_addresses(w, ((const Plan*)I.x)->address, address);
      check_shared_bounds(w, m, address, 8);
      for (u32 rest = m; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        Mbarrier b;
        b.expected = b.pending = w.at<u32>(I.r[0])[i];
        b.known.assign(w.clock.seen.size(), 0);
        b.proxied.assign(w.clock.proxied.size(), 0);
        b.init_warp = w.id, b.init_lane = (u32)i, b.init_tick = w.clock.tick;
        const u32 warps = (u32)w.block->warps.size(), agents = w.launch->program->async_agents;
        if (agents) b.agent = warps + (u32)w.block->mbarriers.size() % agents;
        w.block->mbarriers[(u32)address[i]] = b;
      }
    };
  } else if (op == "inval") {
    p->address = take_address(l, l.arg(0), space);
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      u64 address[kLanes];
      compute_addresses(w, ((const Plan*)I.x)->address, address);
      for (u32 rest = m; rest; rest &= rest - 1) w.block->mbarriers.erase((u32)address[__builtin_ctz(rest)]);
    };
  } else if (op == "arrive") {
    const bool returns = l.arg(0).kind != ptx::Arg::Addr;
    p->address = take_address(l, l.arg(returns ? 1 : 0), space);
    const int at = returns ? 2 : 1;
    p->count = l.count() > at && !p->expect;
    l.operands({returns && l.arg(0).kind == ptx::Arg::Reg ? l.dest(l.arg(0), Ty::B64) : kNone,
                p->count ? l.use(l.arg(at), Ty::U32) : kNone, p->expect ? l.use(l.arg(at), Ty::U32) : kNone});
    l.inst.fn = arrive;
  } else if (op == "test_wait" || op == "try_wait") {
    p->address = take_address(l, l.arg(1), space);
    l.operands({l.pred_dest(l.arg(0)), l.use(l.arg(2), p->parity ? Ty::U32 : Ty::B64)});
    l.inst.fn = wait;
    // A failed test spins: let others run. A failed try sleeps.
    l.inst.control = op == "try_wait" ? Control::TryWait : Control::Yield;
  } else if (op == "expect_tx") {
    p->address = take_address(l, l.arg(0), space);
    l.operands({l.use(l.arg(1), Ty::U32)});
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      u64 address[kLanes];
      compute_addresses(w, ((const Plan*)I.x)->address, address);
      check_shared_bounds(w, m, address, 8);
      for (u32 rest = m; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        expect_bytes(find_mbarrier(w, address[i], i), w.at<u32>(I.r[0])[i], i, address[i]);
      }
    };
  } else {
    l.fail("unsupported mbarrier operation");
  }
}

}  // namespace

void lower_async_arrive(Lower& l) {
  if (!l.take("mbarrier") || !l.take("arrive")) l.fail("unknown cp.async");
  Plan* p = l.program.make<Plan>();
  p->no_increment = l.take("noinc");
  const Space space = take_space(l);
  if (space != Space::Shared || l.take_type() != Ty::B64) l.fail("mbarriers must be named in shared memory");
  p->address = take_address(l, l.arg(0), space);
  l.inst.x = p;
  l.inst.fn = async_arrive;
}

void add_mbarrier_ops(Table& t) { t["mbarrier"] = mbarrier; }
