// Register placement. PTX registers are virtual and almost in SSA form: an unrolled kernel has
// thousands, and 32 lanes of each would not fit the caches. Liveness by dataflow, then one interval
// per register over the statement order, then first fit.
#include <algorithm>
#include <queue>

#include "lower.h"

namespace {

void collect(const ptx::Arg& a, std::vector<int>& into) {
  if (a.kind == ptx::Arg::Reg) into.push_back(a.reg);
  for (const auto& e : a.elems) collect(e, into);
  if (a.reg2 >= 0) into.push_back(a.reg2);
}

bool writes_nothing(const std::string& op) {
  static const char* kOps[] = {"st",
                               "bra",
                               "brx",
                               "ret",
                               "exit",
                               "bar",
                               "barrier",
                               "membar",
                               "fence",
                               "red",
                               "cp",
                               "trap",
                               "nop",
                               "stmatrix",
                               "prefetch",
                               "prefetchu",
                               "discard",
                               "applypriority",
                               "griddepcontrol",
                               "nanosleep",
                               "assertfail",
                               "brkpt",
                               "pmevent",
                               "setmaxnreg"};
  return std::find(std::begin(kOps), std::end(kOps), op) != std::end(kOps);
}

}  // namespace

void registers_of(const ptx::Statement& s, std::vector<int>& writes, std::vector<int>& reads) {
  if (s.guard >= 0) reads.push_back(s.guard);
  const std::string& op = s.op[0];
  bool store = writes_nothing(op);
  if (op == "bar" || op == "barrier")
    store = s.op.size() < 2 || (s.op[1] != "red" && !(s.op.size() > 2 && s.op[2] == "red"));
  if (op == "wmma" && s.op[1] == "store") store = true;
  if (op == "mbarrier" &&
      (s.op[1] == "init" || s.op[1] == "inval" || s.op[1] == "expect_tx" || s.op[1] == "complete_tx"))
    store = true;
  if (op == "wgmma" && s.op[1] == "mma_async") collect(s.args[0], reads);  // accumulators
  for (size_t i = 0; i < s.args.size(); ++i) {
    const bool address = s.args[i].kind == ptx::Arg::Addr;
    collect(s.args[i], i == 0 && !store && !address ? writes : reads);
  }
}

std::vector<u32> place_registers(const ptx::Kernel& k, u32* total) {
  const size_t n = k.body.size(), regs = k.registers.size(), words = (regs + 63) / 64;
  // Basic blocks.
  std::vector<char> leader(n + 1, 0);
  leader[0] = 1;
  auto targets = [&](const ptx::Statement& s) {
    std::vector<u64> t = s.table;
    if (s.op[0] == "bra" && !s.args.empty()) t.push_back(s.args[0].imm);
    return t;
  };
  for (size_t i = 0; i < n; ++i) {
    const std::string& op = k.body[i].op[0];
    if (op == "bra" || op == "brx" || op == "exit" || op == "ret") leader[i + 1] = 1;
    for (u64 t : targets(k.body[i]))
      if (t <= n) leader[t] = 1;
  }
  std::vector<size_t> first;
  std::vector<int> block_of(n + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    if (leader[i]) first.push_back(i);
    block_of[i] = (int)first.size() - 1;
  }
  const size_t blocks = first.size();
  first.push_back(n);
  std::vector<std::vector<int>> successors(blocks);
  using Bits = std::vector<u64>;
  std::vector<Bits> use(blocks, Bits(words)), def(blocks, Bits(words)), in(blocks, Bits(words)),
      out(blocks, Bits(words));
  auto set = [](Bits& b, int r) { b[r >> 6] |= 1ull << (r & 63); };
  auto has = [](const Bits& b, int r) { return b[r >> 6] >> (r & 63) & 1; };
  std::vector<int> writes, reads;
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t i = first[b]; i < first[b + 1]; ++i) {
      writes.clear(), reads.clear();
      registers_of(k.body[i], writes, reads);
      for (int r : reads)
        if (!has(def[b], r)) set(use[b], r);
      for (int r : writes)
        if (k.body[i].guard >= 0) {
          if (!has(def[b], r)) set(use[b], r);
        }  // keeps the old value where the guard is false
        else
          set(def[b], r);
    }
    const ptx::Statement& last = k.body[first[b + 1] - 1];
    for (u64 t : targets(last))
      if (t < n) successors[b].push_back(block_of[t]);
    const bool ends =
        (last.op[0] == "bra" || last.op[0] == "brx" || last.op[0] == "exit" || last.op[0] == "ret") && last.guard < 0;
    if (!ends && b + 1 < blocks) successors[b].push_back((int)b + 1);
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;)
      for (size_t w = 0; w < words; ++w) {
        u64 o = 0;
        for (int s : successors[b]) o |= in[s][w];
        const u64 i = use[b][w] | (o & ~def[b][w]);
        if (o != out[b][w] || i != in[b][w]) out[b][w] = o, in[b][w] = i, changed = true;
      }
  }
  std::vector<u32> begin(regs, kNone), end(regs, 0);
  auto touch = [&](int r, size_t i) {
    begin[r] = std::min(begin[r], (u32)i);
    end[r] = std::max(end[r], (u32)i);
  };
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t r = 0; r < regs; ++r) {
      if (has(in[b], (int)r)) touch((int)r, first[b]);
      if (has(out[b], (int)r)) touch((int)r, first[b + 1] - 1);
    }
    for (size_t i = first[b]; i < first[b + 1]; ++i) {
      writes.clear(), reads.clear();
      registers_of(k.body[i], writes, reads);
      for (int r : reads) touch(r, i);
      for (int r : writes) touch(r, i);
    }
  }
  std::vector<int> order;
  for (size_t r = 0; r < regs; ++r)
    if (begin[r] != kNone) order.push_back((int)r);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return begin[a] < begin[b]; });
  std::vector<u32> place(regs, 0);
  u32 used = 0;
  std::map<int, std::vector<u32>> free;
  using Active = std::pair<u32, int>;
  std::priority_queue<Active, std::vector<Active>, std::greater<>> active;
  for (int r : order) {
    // Strictly before: a destination never shares storage with a source of the same instruction,
    // because some handlers write a destination before they have read every source.
    while (!active.empty() && active.top().first < begin[r]) {
      const int dead = active.top().second;
      free[k.registers[dead].bytes].push_back(place[dead]);
      active.pop();
    }
    auto& pool = free[k.registers[r].bytes];
    if (!pool.empty()) {
      place[r] = pool.back();
      pool.pop_back();
    } else {
      place[r] = used;
      used += (u32)std::max(64, k.registers[r].bytes * kLanes);
    }
    active.push({end[r], r});
  }
  *total = used;
  return place;
}
