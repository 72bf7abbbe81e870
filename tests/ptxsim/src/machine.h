// The machine: decoded instructions, warps, blocks, one launch.
//
// A warp's registers are arrays of 32 lanes, so that a handler is a loop over lanes the compiler
// vectorises. Lanes of one warp that stand at different places are kept as separate fragments
// (program counter + lane mask); the lowest program counter runs first, which reconverges
// structured code, and collectives wait for the lanes they name, whatever the order.
#pragma once
#include <deque>
#include <map>

#include "global_memory.h"
#include "ptx.h"
#include "shared_memory.h"

struct Warp;
struct Block;
struct Launch;
struct Inst;

// Where an operand's 32 lanes live: byte offset * 2, plus 1 for the constants of the program.
using Ref = u32;
using Handler = void (*)(Warp&, const Inst&, u32 mask);

enum class Control : u8 {
  None,
  Branch,
  BranchTable,
  Exit,
  Collective /* full warp */,
  Members /* mask operand */,
  Barrier,
  Trap,
  Yield,
  TryWait /* sleeps until an mbarrier completes a phase */
};
// Classes of the counters.
enum class Class : u8 {
  Integer,
  Float,
  Half,
  Convert,
  Move,
  Predicate,
  Branch,
  LoadGlobal,
  StoreGlobal,
  AtomicGlobal,
  LoadShared,
  StoreShared,
  AtomicShared,
  LoadLocal,
  StoreLocal,
  LoadParam,
  AsyncCopy,
  Matrix,
  Mma,
  Warp,
  Barrier,
  Other,
  kCount
};

// A register that wgmmas of the kernel use, where another instruction touches it.
struct Touch {
  int reg;
  bool writes;
};

struct Inst {
  Handler fn = nullptr;
  const Ref* r = nullptr;  // operands, destinations first
  Ref guard = kNone;
  bool guard_negated = false;
  Control control = Control::None;
  Class cls = Class::Other;
  u8 n = 0;  // operand count, vector length or the like
  u32 target = 0;  // branch
  Ref members = kNone;  // Control::Members: the membermask
  u64 imm = 0;
  const void* x = nullptr;  // what else the handler needs, in a struct of its own
  const std::vector<Touch>* touches = nullptr;
};

// Per instruction: what it cost. `units` are sectors (global), wavefronts (shared), divergent
// executions (branches); `ideal` what perfect addresses would have cost.
struct Cost {
  u64 warps = 0, lanes = 0, units = 0, ideal = 0, bytes = 0;
};

struct Program {
  std::unique_ptr<ptx::Module> module;
  ptx::Kernel* kernel = nullptr;
  std::vector<Inst> code;
  std::vector<u8> constants;  // broadcast to 32 lanes each
  u32 register_bytes = 0;
  struct SpecialSlot {
    std::string name;
    Ref ref;
  };
  std::vector<SpecialSlot> specials;
  u32 static_shared = 0;
  bool has_dynamic = false;
  u32 global_granule = 16, shared_granule = 16;
  u32 async_agents = 0;  // bulk copies: clock rows for what the mbarriers complete
  bool uses_wgmma = false;
  bool synchronises_blocks = false;  // uses volatile, acquire or atomic accesses: blocks may wait for each other
  std::vector<std::shared_ptr<void>> arena;
  template <class T>
  T* make() {
    auto p = std::make_shared<T>();
    arena.push_back(p);
    return p.get();
  }
};

struct Fragment {
  enum State : u8 { Ready, AtCollective, AtBarrier, AtMbarrier } state = Ready;
  u8 barrier = 0;
  u32 pc = 0, mask = 0;
};

// cp.async issued by one warp instruction: 32 private copies until their lanes wait for them.
struct PendingCopy {
  u32 mask = 0, bytes = 0;
  u32 to[kLanes], group[kLanes];
  u8 data[kLanes][16];
};

struct AsyncQueue {
  std::vector<PendingCopy> copies;  // in order of issue; those before `first` have landed
  size_t first = 0;
  u32 committed[kLanes] = {};

  void reset() {
    copies.clear();
    first = 0;
    std::memset(committed, 0, sizeof committed);
  }
  PendingCopy& push() {
    if (first >= 64) copies.erase(copies.begin(), copies.begin() + (long)first), first = 0;
    return copies.emplace_back();
  }
};

// A wgmma under way: what it reads in shared memory and which registers it holds, until a wait covers its group.
struct PendingWgmma {
  u32 group = kNone;  // kNone until it is committed
  const std::vector<int>*accumulators, *fragments;
  std::vector<u32> operands;  // addresses of 16 bytes each
};

struct WgmmaState {
  std::deque<PendingWgmma> pending;
  u32 committed = 0;
  u64 issued = 0;  // by this warp, for the agreement of the warpgroup
  u32 fences = 0;
  // Per register: wgmmas that hold it, the shape they have, the number of fences when it was last touched otherwise.
  std::vector<u16> held;
  std::vector<u32> shape, touched;
};

struct Warp {
  char* base[2];  // [0] registers, [1] constants
  Block* block;
  Launch* launch;
  u32 id = 0, live = 0;
  std::vector<Fragment> fragments;
  u32 current = 0;
  u32 pc = 0, split_slices = 0;
  WarpClock clock;
  AsyncQueue async;
  WgmmaState wgmma;
  std::vector<u8> local;
  std::vector<u8> registers;

  template <class T>
  T* at(Ref r) const {
    return (T*)(base[r & 1] + (r >> 1));
  }
  u32 pred(Ref r) const { return *at<u32>(r); }
  u32 id_lane(int lane) const { return id * kLanes + (u32)lane; }
};

struct BarrierState {
  u32 arrived = 0, expected = 0;
  u32 reduced_or = 0, reduced_and = 1, reduced_count = 0;
  struct Waiting {
    u32 warp, mask, pc;
  };
  std::vector<Waiting> waiting;
  std::vector<u32> arrivals;  // warps that came by bar.arrive
  std::vector<u32> known;  // joined clocks of all that have arrived
  std::vector<u32> proxied;
};

struct BulkCopy {
  u32 to;
  std::vector<u8> data;
};
struct MbarrierCopy {
  u32 warp;
  PendingCopy copy;
};
struct Mbarrier {
  u32 expected = 0, pending = 0, phase = 0;
  s64 bytes = 0;  // transactions expected and not yet complete
  u32 agent = 0;  // the clock row of its bulk copies
  u32 init_warp = 0, init_lane = 0, init_tick = 0;
  std::vector<u32> known, proxied;
  std::vector<MbarrierCopy> copies;
  std::vector<BulkCopy> bulk;
};

// What the four warps of a warpgroup have issued: they must agree.
struct WgmmaIssue {
  u32 pc;
  u64 a, b;
};

struct Block {
  Launch* launch;
  u32 index = 0;  // linear
  u32 coord[3];
  std::vector<Warp> warps;
  SharedMemory shared;
  BarrierState barriers[16];
  std::map<u32, Mbarrier> mbarriers;
  std::vector<std::vector<WgmmaIssue>> wgmmas;  // per warpgroup
  u32 live_threads = 0;
  u64 steps = 0;
};

// splitmix64: every value of the seed is a good one.
struct Random {
  u64 state = 0;
  u64 operator()() {
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
};

struct Launch {
  Program* program;
  u32 grid[3], block[3];
  u32 dynamic_shared = 0;
  std::vector<u8> params;
  GlobalMemory memory;
  std::vector<Cost> costs;
  u64 seed = 0, limit = 0, executed = 0;
  Random random;
  std::string fault_kind, fault_text;  // set when run() returns false
  u32 fault_pc = 0, fault_block[3] = {}, fault_thread[3] = {};
  u64 fault_address = 0;
  bool has_address = false;

  bool run();

 private:
  std::vector<std::unique_ptr<Block>> free_;
  std::unique_ptr<Block> start_block(u32 index);
  bool step_block(Block& b, u32 slices);  // false when the block has ended
  void set_fault(const Violation& v, const Warp* w);
  void check_outputs();
  Warp* running_ = nullptr;
};

// warp.cpp / barrier.cpp
void run_warp(Warp& w, u32 budget);
bool runnable(const Warp& w);
bool arrive_at_barrier(Warp& w, const Inst& inst, u32 mask, u32 pc);  // true: the lanes must wait
Violation explain_deadlock(Block& b, Warp** at);
// ops_async.cpp
void land_copies(Warp& w, u32 mask, u32 keep_groups, bool all);
void synchronise_warp(Warp& w, u32 mask);
// ops_mbarrier.cpp
bool mbarrier_lacks_bytes(Warp& w, const Inst& inst, u32 mask);
std::string describe_mbarrier_wait(Warp& w, const Inst& inst, u32 mask);
bool mbarrier_is_complete(Warp& w, const Inst& inst, u32 mask);
Mbarrier& find_mbarrier(Warp& w, u64 address, int lane);
void complete_phase_if_due(Warp& w, Mbarrier& b);
// wgmma_order.cpp
void touch_registers(Warp& w, const Inst& inst);
void check_warpgroups(Block& b);

// Runs f(lane) for the lanes of a mask. The full mask is the loop that vectorises; ivdep because
// destination and source may be the same register, lane by lane.
template <class F>
inline __attribute__((always_inline)) void for_lanes(u32 mask, F f) {
  if (mask == kFullMask) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) f(i);
  } else {
    for (u32 m = mask; m; m &= m - 1) f(__builtin_ctz(m));
  }
}
