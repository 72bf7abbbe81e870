// What orders wgmmas: their registers between issue and wait, the fence before them, the agreement of the four warps.
#include <algorithm>
#include <unordered_set>

#include "lower.h"

namespace {

void collect(const ptx::Arg& a, std::vector<int>& into) {
  if (a.kind == ptx::Arg::Reg) into.push_back(a.reg);
  for (const auto& e : a.elems) collect(e, into);
}

bool is_wgmma(const ptx::Statement& s) { return s.op[0] == "wgmma" && s.op[1] == "mma_async"; }

}  // namespace

void find_touches(Program& p) {
  std::vector<int> used;
  for (const auto& s : p.kernel->body)
    if (is_wgmma(s)) {
      collect(s.args[0], used);
      if (s.args[1].kind == ptx::Arg::Vec) collect(s.args[1], used);
    }
  const std::unordered_set<int> of_wgmmas(used.begin(), used.end());
  std::vector<int> writes, reads;
  for (size_t pc = 0; pc < p.code.size(); ++pc) {
    const auto& s = p.kernel->body[pc];
    if (is_wgmma(s)) continue;
    writes.clear(), reads.clear();
    registers_of(s, writes, reads);
    std::vector<Touch> touches;
    for (int r : writes)
      if (of_wgmmas.count(r)) touches.push_back({r, true});
    for (int r : reads)
      if (of_wgmmas.count(r)) touches.push_back({r, false});
    if (touches.empty()) continue;
    *p.make<std::vector<Touch>>() = touches;
    p.code[pc].touches = (const std::vector<Touch>*)p.arena.back().get();
  }
}

void touch_registers(Warp& w, const Inst& I) {
  WgmmaState& s = w.wgmma;
  for (const Touch& t : *I.touches) {
    if (s.held[t.reg])
      throw Violation{"async", std::string(t.writes ? "write to" : "read of") + " register " +
                                   w.launch->program->kernel->registers[t.reg].name +
                                   ", which a wgmma holds until a wait covers it"};
    s.touched[t.reg] = s.fences;
  }
}

void check_warpgroups(Block& b) {
  for (size_t g = 0; g < b.wgmmas.size(); ++g)
    for (size_t k = 0; k < 4; ++k)
      if (b.warps[4 * g + k].wgmma.issued != b.wgmmas[g].size())
        throw Violation{"divergence", "warp " + std::to_string(4 * g + k) + " ended after " +
                                          std::to_string(b.warps[4 * g + k].wgmma.issued) +
                                          " wgmmas, another of its "
                                          "warpgroup after " +
                                          std::to_string(b.wgmmas[g].size())};
}
