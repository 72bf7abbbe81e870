// Block barriers, warp synchronisation, and what is said when nothing can run any more.
#include <algorithm>

#include "machine.h"

namespace {

u32 threads_of(const Block& b) { return b.launch->block[0] * b.launch->block[1] * b.launch->block[2]; }

void publish(Warp& w, std::vector<u32>& known, std::vector<u32>& proxied) {
  join_clocks(proxied, w.clock.proxied);
  join_clocks(known, w.clock.seen);
  known[w.id] = std::max(known[w.id], w.clock.tick);
}

void release(Block& b, BarrierState& bar) {
  for (const auto& waiting : bar.waiting) {
    Warp& w = b.warps[waiting.warp];
    join_clocks(w.clock.seen, bar.known);
    join_clocks(w.clock.proxied, bar.proxied);
    w.clock.update_limits(w.id);
    const Inst& I = b.launch->program->code[waiting.pc];
    if (I.n == 2) for_lanes(waiting.mask, [&](int i) { w.at<u32>(I.r[2])[i] = bar.reduced_count; });
    if (I.n > 2) {
      const bool value = I.n == 3 ? bar.reduced_and : bar.reduced_or;
      u32& d = *w.at<u32>(I.r[2]);
      d = (d & ~waiting.mask) | (value ? waiting.mask : 0);
    }
    for (Fragment& f : w.fragments)
      if (f.state == Fragment::AtBarrier && f.pc == waiting.pc + 1) f.state = Fragment::Ready;
  }
  bar = BarrierState();
}

}  // namespace

void synchronise_warp(Warp& w, u32 mask) {
  WarpClock& c = w.clock;
  if (mask == w.live) {
    c.warp_sync = c.tick;
    c.update_limits(w.id);
  } else {
    if (!c.pairs) c.pairs = std::make_unique<u32[]>(kLanes * kLanes);
    for (u32 a = mask; a; a &= a - 1)
      for (u32 b = mask; b; b &= b - 1) c.pairs[__builtin_ctz(a) * kLanes + __builtin_ctz(b)] = c.tick;
  }
  c.advance();
}

bool arrive_at_barrier(Warp& w, const Inst& I, u32 m, u32 pc) {
  Block& b = *w.block;
  const int lane = __builtin_ctz(m);
  const u32 id = w.at<u32>(I.r[0])[lane], named = w.at<u32>(I.r[1])[lane];
  if (id > 15) throw Violation{"barrier", "barrier " + std::to_string(id) + " does not exist", lane};
  if (named % kLanes) throw Violation{"barrier", "thread count of a barrier must be a multiple of 32", lane};
  // Warps arrive whole: a barrier with a count takes 32 for each, as the hardware does.
  const u32 expected = named ? named : threads_of(b);
  const u32 arriving = named && (I.imm & 1) ? kLanes : (u32)__builtin_popcount(m);
  BarrierState& bar = b.barriers[id];
  if (bar.arrived && bar.expected != expected)
    throw Violation{"barrier",
                    "barrier " + std::to_string(id) + " is awaited with different thread counts (" +
                        std::to_string(bar.expected) + " and " + std::to_string(expected) + ")",
                    lane};
  bar.expected = expected;
  if (I.n > 1) {
    const u32 p = (w.pred(I.r[3]) ^ (I.imm & 2 ? kFullMask : 0)) & m;
    bar.reduced_count += (u32)__builtin_popcount(p);
    bar.reduced_or |= p != 0;
    bar.reduced_and &= p == m;
  }
  publish(w, bar.known, bar.proxied);
  synchronise_warp(w, m);
  bar.arrived += arriving;
  if (I.n != 1) bar.waiting.push_back({w.id, m, pc});
  if (bar.arrived < bar.expected) return I.n != 1;
  if (bar.arrived > bar.expected)
    throw Violation{"barrier", "more threads arrive at barrier " + std::to_string(id) + " than it expects", lane};
  release(b, bar);
  return false;
}

Violation explain_deadlock(Block& b, Warp** at) {
  u32 exited = threads_of(b) - b.live_threads;
  std::string parked;
  const Fragment* collective = nullptr;
  Warp *collective_warp = nullptr, *barrier_warp = nullptr;
  const Fragment* barrier = nullptr;
  for (Warp& w : b.warps)
    for (const Fragment& f : w.fragments) {
      if (f.state == Fragment::AtCollective && !collective) collective = &f, collective_warp = &w;
      if (f.state == Fragment::AtBarrier && !barrier) barrier = &f, barrier_warp = &w;
    }
  if (collective) {
    *at = collective_warp;
    collective_warp->pc = collective->pc;
    const bool is_barrier = b.launch->program->code[collective->pc].control == Control::Barrier;
    u32 missing = collective_warp->live & ~collective->mask;
    std::string where;
    for (const Fragment& f : collective_warp->fragments)
      if (&f != collective)
        where += (where.empty() ? "" : ", ") + std::string("PTX line ") +
                 std::to_string(b.launch->program->kernel->body[f.state == Fragment::AtBarrier ? f.pc - 1 : f.pc].line);
    return {is_barrier ? "barrier" : "divergence",
            std::string(is_barrier ? "barrier" : "collective") + " missed by " +
                std::to_string(__builtin_popcount(missing)) + " lanes of the warp" +
                (where.empty() ? "" : ", which wait at " + where),
            __builtin_ctz(collective->mask)};
  }
  if (barrier) {
    *at = barrier_warp;
    barrier_warp->pc = barrier->pc - 1;
    const BarrierState& bar = b.barriers[barrier->barrier];
    std::string text = "barrier " + std::to_string(barrier->barrier) + ": " + std::to_string(bar.arrived) + " of " +
                       std::to_string(bar.expected) + " threads arrived";
    if (exited)
      return {"barrier", text + "; missed by " + std::to_string(exited) + " threads that have exited",
              __builtin_ctz(barrier->mask)};
    return {"deadlock", text + ", and no other thread can run", __builtin_ctz(barrier->mask)};
  }
  // Where bytes are missing is closer to the cause than where arrivals are.
  const Fragment* asleep = nullptr;
  bool lacks_bytes = false;
  for (Warp& w : b.warps)
    for (const Fragment& f : w.fragments) {
      if (f.state != Fragment::AtMbarrier || (asleep && lacks_bytes)) continue;
      const bool bytes = mbarrier_lacks_bytes(w, b.launch->program->code[f.pc], f.mask);
      if (asleep && !bytes) continue;
      asleep = &f, lacks_bytes = bytes, *at = &w, w.pc = f.pc;
    }
  if (asleep)
    return {"deadlock", describe_mbarrier_wait(**at, b.launch->program->code[asleep->pc], asleep->mask),
            __builtin_ctz(asleep->mask)};
  *at = &b.warps[0];
  return {"deadlock", "no thread can run"};
}
