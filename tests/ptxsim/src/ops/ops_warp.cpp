// Exchange within a warp: shfl, vote, match, redux, activemask, elect. They wait for the lanes of
// their member mask but, as PTX has it, order no memory.
#include <algorithm>

#include "lower.h"

namespace {

void shfl(Lower& l) {
  if (!l.take("sync")) l.fail("shfl without .sync does not exist on this target");
  const std::string mode = l.take_any();
  if (l.take_type() != Ty::B32) l.fail("shfl needs .b32");
  l.inst.n = mode == "up" ? 0 : mode == "down" ? 1 : mode == "bfly" ? 2 : mode == "idx" ? 3 : 255;
  if (l.inst.n == 255) l.fail("unknown mode");
  Ref p = kNone;
  if (l.arg(0).reg2 >= 0) {
    ptx::Arg a = l.arg(0);
    a.reg = a.reg2;
    p = l.pred_dest(a);
  }
  l.operands(
      {l.dest(l.arg(0), Ty::B32), p, l.use(l.arg(1), Ty::B32), l.use(l.arg(2), Ty::B32), l.use(l.arg(3), Ty::B32)});
  l.inst.members = l.use(l.arg(4), Ty::B32);
  l.inst.control = Control::Members;
  l.inst.cls = Class::Warp;
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    u32 out[kLanes], valid = 0;
    const u32 *a = w.at<u32>(I.r[2]), *b = w.at<u32>(I.r[3]), *c = w.at<u32>(I.r[4]);
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const int bound = (int)(c[i] & 31), segment = (int)(c[i] >> 8 & 31), delta = (int)(b[i] & 31);
      const int low = i & segment, high = low | (bound & ~segment);
      int j;
      bool ok;
      switch (I.n) {
        case 0:
          j = i - delta;
          ok = j >= high;
          break;  // for .up the bound is the low end
        case 1:
          j = i + delta;
          ok = j <= high;
          break;
        case 2:
          j = i ^ delta;
          ok = j <= high;
          break;
        default: j = low | (delta & ~segment); ok = j <= high;
      }
      if (!ok) j = i;
      if (!(m >> j & 1))
        throw Violation{"divergence", "shfl reads lane " + std::to_string(j) + ", which does not take part", i};
      out[i] = a[j];
      valid |= (u32)ok << i;
    }
    u32* d = w.at<u32>(I.r[0]);
    for_lanes(m, [&](int i) { d[i] = out[i]; });
    if (I.r[1] != kNone) {
      u32& p = *w.at<u32>(I.r[1]);
      p = (p & ~m) | valid;
    }
  };
}

void vote(Lower& l) {
  if (!l.take("sync")) l.fail("vote without .sync does not exist on this target");
  const std::string mode = l.take_any();
  const Ty t = l.take_type();
  bool n;
  const Ref a = l.pred_use(l.arg(1), &n);
  l.inst.n = mode == "all" ? 0 : mode == "any" ? 1 : mode == "uni" ? 2 : mode == "ballot" ? 3 : 255;
  if (l.inst.n == 255) l.fail("unknown mode");
  l.inst.imm = n;
  l.operands({l.inst.n == 3 ? l.dest(l.arg(0), t) : l.pred_dest(l.arg(0)), a});
  l.inst.members = l.use(l.arg(2), Ty::B32);
  l.inst.control = Control::Members;
  l.inst.cls = Class::Warp;
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    const u32 p = (I.imm ? ~w.pred(I.r[1]) : w.pred(I.r[1])) & m;
    if (I.n == 3) {
      for_lanes(m, [&](int i) { w.at<u32>(I.r[0])[i] = p; });
      return;
    }
    const bool r = I.n == 0 ? p == m : I.n == 1 ? p != 0 : p == m || p == 0;
    u32& d = *w.at<u32>(I.r[0]);
    d = (d & ~m) | (r ? m : 0);
  };
}

template <class T>
void match_lanes(Warp& w, const Inst& I, u32 m) {
  const T* a = w.at<T>(I.r[2]);
  u32 out[kLanes];
  u32 all = 1;
  const int first = __builtin_ctz(m);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    out[i] = 0;
    for (u32 r = m; r; r &= r - 1)
      if (a[__builtin_ctz(r)] == a[i]) out[i] |= 1u << __builtin_ctz(r);
    all &= a[i] == a[first];
  }
  u32* d = w.at<u32>(I.r[0]);
  for_lanes(m, [&](int i) { d[i] = I.n ? (all ? m : 0) : out[i]; });
  if (I.r[1] != kNone) {
    u32& p = *w.at<u32>(I.r[1]);
    p = (p & ~m) | (all ? m : 0);
  }
}

void match(Lower& l) {
  const bool all = l.take("all");
  if (!all && !l.take("any")) l.fail("match needs .any or .all");
  if (!l.take("sync")) l.fail("match needs .sync");
  const Ty t = l.take_type();
  Ref p = kNone;
  if (l.arg(0).reg2 >= 0) {
    ptx::Arg a = l.arg(0);
    a.reg = a.reg2;
    p = l.pred_dest(a);
  }
  l.inst.n = all;
  l.operands({l.dest(l.arg(0), Ty::B32), p, l.use(l.arg(1), t)});
  l.inst.members = l.use(l.arg(2), Ty::B32);
  l.inst.control = Control::Members;
  l.inst.cls = Class::Warp;
  l.inst.fn = ptx::bytes_of(t) == 8 ? match_lanes<u64> : match_lanes<u32>;
}

void redux(Lower& l) {
  if (!l.take("sync")) l.fail("redux needs .sync");
  const std::string op = l.take_any();
  const Ty t = l.take_type();
  static const std::vector<std::string> kOps = {"add", "min", "max", "and", "or", "xor"};
  const auto it = std::find(kOps.begin(), kOps.end(), op);
  if (it == kOps.end() || t == Ty::F32) l.fail("unsupported reduction");
  l.inst.n = (u8)(it - kOps.begin());
  l.inst.imm = t == Ty::S32;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  l.inst.members = l.use(l.arg(2), Ty::B32);
  l.inst.control = Control::Members;
  l.inst.cls = Class::Warp;
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    const u32* a = w.at<u32>(I.r[1]);
    u32 r = a[__builtin_ctz(m)];
    for (u32 rest = m & (m - 1); rest; rest &= rest - 1) {
      const u32 x = a[__builtin_ctz(rest)];
      switch (I.n) {
        case 0: r += x; break;
        case 1: r = I.imm ? (u32)std::min((s32)r, (s32)x) : std::min(r, x); break;
        case 2: r = I.imm ? (u32)std::max((s32)r, (s32)x) : std::max(r, x); break;
        case 3: r &= x; break;
        case 4: r |= x; break;
        default: r ^= x;
      }
    }
    for_lanes(m, [&](int i) { w.at<u32>(I.r[0])[i] = r; });
  };
}

}  // namespace

void add_warp_ops(Table& t) {
  t["shfl"] = shfl;
  t["vote"] = vote;
  t["match"] = match;
  t["redux"] = redux;
  t["elect"] = [](Lower& l) {
    if (!l.take("sync")) l.fail("elect needs .sync");
    ptx::Arg p = l.arg(0);
    p.kind = ptx::Arg::Reg, p.reg = p.reg2;
    if (p.reg < 0) l.fail("predicate expected");
    l.operands({l.arg(0).kind == ptx::Arg::Reg ? l.dest(l.arg(0), Ty::B32) : kNone, l.pred_dest(p)});
    l.inst.members = l.use(l.arg(1), Ty::B32);
    l.inst.control = Control::Members;
    l.inst.cls = Class::Warp;
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      if (I.r[0] != kNone) for_lanes(m, [&](int i) { w.at<u32>(I.r[0])[i] = (u32)__builtin_ctz(m); });
      u32& d = *w.at<u32>(I.r[1]);
      d = (d & ~m) | (m & -m);
    };
  };
  t["activemask"] = [](Lower& l) {
    l.take_type();
    l.inst.cls = Class::Warp;
    l.operands({l.dest(l.arg(0), Ty::B32)});
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) { for_lanes(m, [&](int i) { w.at<u32>(I.r[0])[i] = m; }); };
  };
}
