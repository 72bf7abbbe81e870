// Running one warp for a slice: fragments, branches, exits, and waiting at collectives.
#include "machine.h"

bool runnable(const Warp& w) {
  for (const Fragment& f : w.fragments)
    if (f.state == Fragment::Ready) return true;
  return false;
}

namespace {

// The ready fragment to run next, after merging those that stand at the same place. Lowest program
// counter first; if lanes stay apart for long (one spins on what another must do), any of them.
int choose(Warp& w) {
  int best = -1, ready = 0;
  for (size_t i = 0; i < w.fragments.size(); ++i) {
    if (w.fragments[i].state != Fragment::Ready) continue;
    for (size_t j = w.fragments.size() - 1; j > i; --j)
      if (w.fragments[j].state == Fragment::Ready && w.fragments[j].pc == w.fragments[i].pc) {
        w.fragments[i].mask |= w.fragments[j].mask;
        w.fragments.erase(w.fragments.begin() + (long)j);
      }
    ++ready;
    if (best < 0 || w.fragments[i].pc < w.fragments[best].pc) best = (int)i;
  }
  if (ready < 2) {
    w.split_slices = 0;
  } else if (++w.split_slices > 512) {
    u32 pick = (u32)(w.launch->random() % (u64)ready);
    for (size_t i = 0; i < w.fragments.size(); ++i)
      if (w.fragments[i].state == Fragment::Ready && pick-- == 0) best = (int)i;
  }
  return best;
}

u32 next_meeting(const Warp& w, int self) {
  u32 limit = kNone;
  for (size_t i = 0; i < w.fragments.size(); ++i)
    if ((int)i != self && w.fragments[i].state == Fragment::Ready && w.fragments[i].pc > w.fragments[self].pc)
      limit = std::min(limit, w.fragments[i].pc);
  return limit;
}

// Lanes that must wait at a collective leave the fragment; those already waiting at the same
// instruction join them and try again together.
void park(Warp& w, int self, u32 pc, u32 waiting) {
  Fragment& f = w.fragments[self];
  const u32 rest = f.mask & ~waiting;
  for (Fragment& other : w.fragments)
    if (&other != &f && other.state == Fragment::AtCollective && other.pc == pc) {
      other.mask |= waiting;
      other.state = Fragment::Ready;
      waiting = 0;
      break;
    }
  if (rest) {
    f.mask = rest;
    f.pc = pc + 1;
    if (waiting) w.fragments.push_back({Fragment::AtCollective, 0, pc, waiting});
  } else if (waiting) {
    f.state = Fragment::AtCollective;
    f.pc = pc;
  } else {
    w.fragments.erase(w.fragments.begin() + self);
  }
}

void leave(Warp& w, int self, u32 pc, u32 lanes) {
  w.live &= ~lanes;
  w.block->live_threads -= (u32)__builtin_popcount(lanes);
  Fragment& f = w.fragments[self];
  f.mask &= ~lanes;
  f.pc = pc + 1;
  if (!f.mask) w.fragments.erase(w.fragments.begin() + self);
  // Collectives wait for lanes that have not exited.
  for (Fragment& other : w.fragments)
    if (other.state == Fragment::AtCollective) other.state = Fragment::Ready;
}

// Executes a collective for every group of lanes that is complete; returns the lanes that must wait.
u32 run_groups(Warp& w, const Inst& I, u32 m) {
  const u32* named = w.at<u32>(I.members);
  u32 waiting = 0;
  for (u32 rest = m; rest;) {
    const int first = __builtin_ctz(rest);
    const u32 members = named[first];
    u32 group = 0;
    for (u32 r = rest; r; r &= r - 1)
      if (named[__builtin_ctz(r)] == members) group |= 1u << __builtin_ctz(r);
    rest &= ~group;
    if (group & ~members)
      throw Violation{"divergence", "lane executes a collective whose member mask does not name it",
                      __builtin_ctz(group & ~members)};
    if ((members & w.live) == group)
      I.fn(w, I, group);
    else
      waiting |= group;
  }
  return waiting;
}

// The control instruction at the fragment's pc. True: go on with the same fragment at *pc.
bool control(Warp& w, int self, const Inst& I, u32 m, u32* pc) {
  Fragment& f = w.fragments[self];
  const u32 mask = f.mask;
  switch (I.control) {
    case Control::Branch:
      if (m == mask) return *pc = I.target, true;
      if (!m) return ++*pc, true;
      ++w.launch->costs[*pc].units;
      f.mask = mask & ~m;
      f.pc = *pc + 1;
      w.fragments.push_back({Fragment::Ready, 0, I.target, m});
      return false;
    case Control::BranchTable: {
      const auto& table = *(const std::vector<u64>*)I.x;
      const u32* index = w.at<u32>(I.r[0]);
      u32 done = 0;
      for (u32 rest = m; rest; rest &= ~done) {
        const u32 k = index[__builtin_ctz(rest)];
        if (k >= table.size())
          throw Violation{"out-of-bounds", "branch table index " + std::to_string(k), __builtin_ctz(rest)};
        u32 same = 0;
        for (u32 r = rest; r; r &= r - 1)
          if (index[__builtin_ctz(r)] == k) same |= 1u << __builtin_ctz(r);
        done |= same;
        if (same == mask) return *pc = (u32)table[k], true;
        w.fragments.push_back({Fragment::Ready, 0, (u32)table[k], same});
      }
      ++w.launch->costs[*pc].units;
      if (mask & ~m) {
        w.fragments[self].mask = mask & ~m;
        w.fragments[self].pc = *pc + 1;
      } else {
        w.fragments.erase(w.fragments.begin() + self);
      }
      return false;
    }
    case Control::Exit:
      if (!m) return ++*pc, true;
      leave(w, self, *pc, m);
      return false;
    case Control::Collective:
      if (!m) return ++*pc, true;
      if (m == w.live) return I.fn(w, I, m), ++*pc, true;
      park(w, self, *pc, m);
      return false;
    case Control::Members: {
      if (!m) return ++*pc, true;
      const u32 waiting = run_groups(w, I, m);
      if (!waiting) return ++*pc, true;
      park(w, self, *pc, waiting);
      return false;
    }
    case Control::Barrier: {
      if (!m) return ++*pc, true;
      if ((I.imm & 1) && m != w.live) return park(w, self, *pc, m), false;
      if (!arrive_at_barrier(w, I, m, *pc)) return ++*pc, true;
      const u8 id = (u8)w.at<u32>(I.r[0])[__builtin_ctz(m)];
      if (m == mask) {
        f.state = Fragment::AtBarrier;
        f.barrier = id;
        f.pc = *pc + 1;
      } else {
        f.mask = mask & ~m;
        f.pc = *pc + 1;
        w.fragments.push_back({Fragment::AtBarrier, id, *pc + 1, m});
      }
      return false;
    }
    case Control::Trap:
      if (!m) return ++*pc, true;
      throw Violation{I.imm ? "assertion" : "trap", I.imm ? "device assertion failed" : "the kernel executed a trap",
                      __builtin_ctz(m)};
    case Control::TryWait:
      // A wait that would fail for all lanes may give up, or sleep: what cannot end is then a deadlock, not a long run.
      if (m == mask && !mbarrier_is_complete(w, I, m) && w.launch->random() % 2) {
        f.state = Fragment::AtMbarrier;
        f.pc = *pc;
        return false;
      }
      f.pc = *pc + 1;
      if (m) I.fn(w, I, m);
      return false;
    case Control::Yield:
      f.pc = *pc + 1;
      if (m) I.fn(w, I, m);
      return false;
    case Control::None: break;
  }
  return ++*pc, true;
}

}  // namespace

void run_warp(Warp& w, u32 budget) {
  Launch& launch = *w.launch;
  const Inst* code = launch.program->code.data();
  Cost* costs = launch.costs.data();
  const u32 start = budget;
  while (budget) {
    const int self = choose(w);
    if (self < 0) break;
    const u32 limit = next_meeting(w, self), mask = w.fragments[self].mask;
    u32 pc = w.fragments[self].pc;
    bool stay = true;
    while (stay && budget && pc < limit) {
      --budget;
      const Inst& I = code[pc];
      u32 m = mask;
      if (I.guard != kNone) m &= I.guard_negated ? ~w.pred(I.guard) : w.pred(I.guard);
      w.pc = pc;
      costs[pc].warps += 1;
      costs[pc].lanes += (u64)__builtin_popcount(m);
      if (__builtin_expect(I.touches && m, 0)) touch_registers(w, I);
      if (I.control == Control::None) {
        if (m) I.fn(w, I, m);
        ++pc;
      } else {
        stay = control(w, self, I, m, &pc);
      }
    }
    if (stay) w.fragments[self].pc = pc;
  }
  launch.executed += start - budget;
  if (launch.executed > launch.limit)
    throw Violation{"limit", "the run passed its limit of " + std::to_string(launch.limit) + " warp instructions"};
}
