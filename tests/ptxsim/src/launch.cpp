// One launch: blocks in shuffled order, warps and slice lengths by the seed, faults turned into text.
#include <algorithm>
#include <numeric>

#include "machine.h"

namespace {

void fill_special(Warp& w, const std::string& key, Ref r) {
  if (key == "<carry>") {
    *w.at<u32>(r) = 0;
    return;
  }
  const size_t colon = key.find(':');
  const std::string name = key.substr(0, colon), suffix = colon == std::string::npos ? "" : key.substr(colon);
  const Launch& L = *w.launch;
  const Block& b = *w.block;
  const u32 warps = (u32)b.warps.size();
  const auto axis = [&](const char* prefix, int* d) {
    const size_t n = std::strlen(prefix);
    if (name.size() != n + 1 || name.compare(0, n, prefix)) return false;
    *d = name[n] - 'x';
    return true;
  };
  for (int i = 0; i < kLanes; ++i) {
    const u32 t = w.id_lane(i);
    const u32 tid[3] = {t % L.block[0], t / L.block[0] % L.block[1], t / (L.block[0] * L.block[1])};
    u64 v = 0;
    int d;
    if (axis("%tid.", &d))
      v = tid[d];
    else if (axis("%ntid.", &d))
      v = L.block[d];
    else if (axis("%ctaid.", &d))
      v = b.coord[d];
    else if (axis("%nctaid.", &d))
      v = L.grid[d];
    else if (name == "%laneid")
      v = (u32)i;
    else if (name == "%warpid")
      v = w.id;
    else if (name == "%nwarpid")
      v = warps;
    else if (name == "%lanemask_eq")
      v = 1u << i;
    else if (name == "%lanemask_lt")
      v = (1u << i) - 1;
    else if (name == "%lanemask_le")
      v = (2ull << i) - 1;
    else if (name == "%lanemask_gt")
      v = ~((2ull << i) - 1) & kFullMask;
    else if (name == "%lanemask_ge")
      v = ~((1u << i) - 1) & kFullMask;
    else if (name == "%dynamic_smem_size")
      v = L.dynamic_shared;
    else if (name == "%total_smem_size")
      v = L.dynamic_shared + L.program->static_shared;
    else if (name == "%nsmid" || name == "%cluster_nctarank")
      v = 1;
    const bool wide = suffix == ":64" || (name.size() > 2 && name.compare(name.size() - 2, 2, "64") == 0);
    if (wide)
      w.at<u64>(r)[i] = v;
    else if (suffix == ":16")
      w.at<u16>(r)[i] = (u16)v;
    else
      w.at<u32>(r)[i] = (u32)v;
  }
}

}  // namespace

std::unique_ptr<Block> Launch::start_block(u32 index) {
  const u32 threads = block[0] * block[1] * block[2], warps = (threads + kLanes - 1) / kLanes;
  std::unique_ptr<Block> b;
  if (!free_.empty())
    b = std::move(free_.back()), free_.pop_back();
  else
    b = std::make_unique<Block>();
  b->launch = this;
  b->index = index;
  b->coord[0] = index % grid[0], b->coord[1] = index / grid[0] % grid[1], b->coord[2] = index / (grid[0] * grid[1]);
  b->live_threads = threads;
  b->steps = 0;
  b->mbarriers.clear();
  b->wgmmas.assign(program->uses_wgmma ? warps / 4 : 0, {});
  for (auto& bar : b->barriers) bar = BarrierState();
  b->shared.reset(program->static_shared + dynamic_shared, program->shared_granule, warps);
  for (auto* list : {&program->module->globals, &program->kernel->variables})
    for (auto& v : *list)
      if (v->space == Space::Shared) b->shared.allow((u32)v->address, v->dynamic ? dynamic_shared : (u32)v->size);
  b->warps.resize(warps);
  for (u32 k = 0; k < warps; ++k) {
    Warp& w = b->warps[k];
    w.block = b.get();
    w.launch = this;
    w.id = k;
    w.pc = w.split_slices = 0;
    w.registers.resize(program->register_bytes + 64);
    w.base[0] = (char*)(((uintptr_t)w.registers.data() + 63) / 64 * 64);
    w.base[1] = (char*)program->constants.data();
    w.local.assign((size_t)program->kernel->local_bytes * kLanes, 0);
    w.live = threads - k * kLanes >= kLanes ? kFullMask : (1u << (threads - k * kLanes)) - 1;
    w.fragments.assign(1, {Fragment::Ready, 0, 0, w.live});
    w.clock =
        WarpClock(memory.ticks(), index, warps, program->async_agents, program->uses_wgmma || program->async_agents);
    w.async.reset();
    w.wgmma = WgmmaState();
    if (program->uses_wgmma) {
      const size_t registers = program->kernel->registers.size();
      w.wgmma.held.assign(registers, 0), w.wgmma.shape.assign(registers, 0), w.wgmma.touched.assign(registers, kNone);
    }
    for (auto& s : program->specials) fill_special(w, s.name, s.ref);
  }
  return b;
}

bool Launch::step_block(Block& b, u32 slices) {
  while (slices-- && b.live_threads) {
    const u32 n = (u32)b.warps.size();
    u32 at = (u32)(random() % n), tried = 0;
    while (tried < n && !runnable(b.warps[at])) at = (at + 1) % n, ++tried;
    if (tried == n) {
      const Violation v = explain_deadlock(b, &running_);
      throw v;
    }
    running_ = &b.warps[at];
    run_warp(*running_, 16 + (u32)(random() % 496));
    ++b.steps;
  }
  if (!b.live_threads) check_warpgroups(b);
  return b.live_threads != 0;
}

void Launch::set_fault(const Violation& v, const Warp* w) {
  fault_kind = v.kind;
  fault_text = v.what;
  fault_address = v.address;
  fault_pc = w ? w->pc : kNone;
  if (!w) return;
  for (int d = 0; d < 3; ++d) fault_block[d] = w->block->coord[d];
  const u32 t = w->id_lane(v.lane < 0 || v.lane >= kLanes ? 0 : v.lane);
  fault_thread[0] = t % block[0], fault_thread[1] = t / block[0] % block[1],
  fault_thread[2] = t / (block[0] * block[1]);
}

void Launch::check_outputs() {
  for (Buffer& b : memory.buffers()) {
    if (!b.init) continue;
    const u32 unit = memory.granule();
    u64 missing = 0, first_missing = 0;
    const u64 first = b.base / unit;
    for (u64 g = first; b.size && g <= (b.base + b.size - 1) / unit; ++g) {
      const u32 w = b.shadow[g - first].writer;
      const u64 from = std::max(g * unit, b.base), to = std::min((g + 1) * unit, b.base + b.size);
      if (w & kBlockBits)
        std::memset(b.init + (from - b.base), 1, to - from);
      else if (b.output && !(w & kInitialised)) {
        if (!missing) first_missing = from - b.base;
        missing += to - from;
      }
    }
    if (missing)
      throw Violation{"unwritten",
                      std::to_string(missing) + " of " + std::to_string(b.size) + " bytes of output " + b.name +
                          " were never written, the first at + " + std::to_string(first_missing),
                      -1, b.base + first_missing};
  }
}

bool Launch::run() {
  costs.assign(program->code.size(), Cost());
  random.state = seed;
  const u64 total = (u64)grid[0] * grid[1] * grid[2];
  std::vector<u32> order(total);
  std::iota(order.begin(), order.end(), 0u);
  for (u64 i = total; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  std::deque<std::unique_ptr<Block>> resident;
  std::unique_ptr<Block> b;  // outlives the try: a fault is told from its warp
  try {
    // One block at a time; where blocks may wait for each other, a long-running one makes room.
    size_t next = 0;
    while (next < total || !resident.empty()) {
      if (resident.empty()) resident.push_back(start_block(order[next++]));
      b = std::move(resident.front());
      resident.pop_front();
      const u32 slices = program->synchronises_blocks ? 64 : kNone;
      if (!step_block(*b, slices)) {
        free_.push_back(std::move(b));
        continue;
      }
      if (b->steps > 1024 * (resident.size() + 1) && next < total && resident.size() < 512) {
        b->steps = 0;
        resident.push_back(start_block(order[next++]));
      }
      resident.push_back(std::move(b));
    }
    running_ = nullptr;
    check_outputs();
  } catch (const Violation& v) {
    set_fault(v, running_);
    return false;
  }
  return true;
}
