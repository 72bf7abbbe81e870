// Branches, exits, barriers, fences. What they do to a warp is in warp.cpp and barrier.cpp.
#include "lower.h"

namespace {

void nothing(Warp&, const Inst&, u32) {}

void bra(Lower& l) {
  l.take("uni");
  if (l.arg(0).kind != ptx::Arg::Label) l.fail("label expected");
  l.inst.cls = Class::Branch;
  l.inst.control = Control::Branch;
  l.inst.target = (u32)l.arg(0).imm;
}

void brx(Lower& l) {
  if (!l.take("idx")) l.fail("brx needs .idx");
  l.take("uni");
  l.inst.cls = Class::Branch;
  l.inst.control = Control::BranchTable;
  l.operands({l.use(l.arg(0), Ty::U32)});
  l.inst.x = &l.s.table;
}

void leave(Lower& l) {
  l.take("uni");
  l.inst.cls = Class::Branch;
  l.inst.control = Control::Exit;
}

void trap(Lower& l) {
  l.inst.control = Control::Trap;
  l.inst.imm = l.s.op[0] == "assertfail";
}

// bar{.cta}.sync / .arrive / .red.op, bar.warp.sync
void bar(Lower& l) {
  const bool is_barrier = l.s.op[0] == "barrier";
  l.inst.cls = Class::Barrier;
  if (!is_barrier && l.take("warp")) {
    if (!l.take("sync")) l.fail("bar.warp needs .sync");
    l.inst.control = Control::Members;
    l.inst.members = l.use(l.arg(0), Ty::U32);
    l.inst.cls = Class::Warp;
    l.inst.fn = [](Warp& w, const Inst&, u32 m) { synchronise_warp(w, m); };
    return;
  }
  l.take("cta");
  const bool aligned = l.take("aligned") || !is_barrier;
  l.inst.control = Control::Barrier;
  int at = 0;
  u8 mode = 0;  // 1 arrive, 2.. red
  Ref result = kNone, input = kNone;
  bool negate = false;
  if (l.take("arrive"))
    mode = 1;
  else if (l.take("red")) {
    mode = l.take("popc") ? 2 : l.take("and") ? 3 : l.take("or") ? 4 : 0;
    if (!mode) l.fail("unknown reduction");
    const Ty t = l.take_type();
    result = mode == 2 ? l.dest(l.arg(0), t) : l.pred_dest(l.arg(0));
    input = l.pred_use(l.arg(l.count() - 1), &negate);
    at = 1;
  } else if (!l.take("sync")) {
    l.fail("unknown barrier");
  }
  const int last = l.count() - (mode >= 2 ? 1 : 0);
  const Ref id = l.use(l.arg(at), Ty::U32);
  const Ref threads = at + 1 < last ? l.use(l.arg(at + 1), Ty::U32) : l.constant(0, 4);
  if (mode == 1 && at + 1 >= last) l.fail("bar.arrive needs a thread count");
  l.operands({id, threads, result, input});
  l.inst.n = mode;
  l.inst.imm = (aligned ? 1 : 0) | (negate ? 2 : 0);
}

void fence(Lower& l) {
  // Of the scopes, the block's own orders its warps only.
  l.inst.n = l.take("gl") || l.take("sys") || l.take("gpu");
  l.drop({"cta", "sc", "acq_rel", "acquire", "release", "cluster"});
  bool async_proxy = l.take("mbarrier_init");  // what makes an mbarrier known to the async proxy
  if (l.take("proxy")) {
    const bool other_memory = l.take("async::global") || l.take("alias");
    async_proxy = !other_memory && l.take("async");
    l.drop({"shared::cta", "shared::cluster", "async::shared::cta"});
    if (l.take("global")) async_proxy = false;
  }
  l.inst.cls = Class::Other;
  l.inst.imm = async_proxy;
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    w.launch->memory.fence(w.block->index, w.clock, w.id, I.n != 0);
    if (I.imm) fence_async_proxy(w.clock, w.id, m);
  };
}

}  // namespace

void add_control_ops(Table& t) {
  t["bra"] = bra;
  t["brx"] = brx;
  t["ret"] = t["exit"] = leave;
  t["trap"] = t["assertfail"] = t["brkpt"] = trap;
  t["bar"] = t["barrier"] = bar;
  t["membar"] = t["fence"] = fence;
  t["nop"] = [](Lower& l) { l.inst.fn = nothing; };
  t["nanosleep"] = [](Lower& l) {
    l.take_type();
    l.inst.control = Control::Yield;
    l.inst.fn = nothing;
  };
  t["setmaxnreg"] = [](Lower& l) {  // registers of the simulator are as many as the kernel names
    if (!l.take("inc") && !l.take("dec")) l.fail("needs .inc or .dec");
    if (!l.take("sync") || !l.take("aligned") || !l.take("u32")) l.fail("needs .sync.aligned.u32");
    const u64 n = l.immediate(l.arg(0));
    if (n < 24 || n > 256 || n % 8) l.fail("count must be a multiple of 8 from 24 to 256");
    l.inst.control = Control::Collective;
    l.inst.fn = nothing;
  };
  t["griddepcontrol"] = [](Lower& l) {  // one launch at a time: nothing to wait for
    l.take_any();
    l.inst.fn = nothing;
  };
}
