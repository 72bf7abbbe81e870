// mov, selection, and the address-space conversions.
#include "lower.h"

namespace {

template <class T>
Handler copy() {
  return unary<T, T>([](T a) { return a; });
}

Handler copy_of(Lower& l, Ty t) {
  return by_bits(l, t, [](auto z) { return copy<decltype(z)>(); });
}

// mov.b32 d, {lo, hi} and its inverse, for any split of a wide register into narrower ones.
template <class Wide, class Narrow>
void pack(Warp& w, const Inst& I, u32 m) {
  Wide* d = w.at<Wide>(I.r[0]);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    Wide v = 0;
    for (int k = 0; k < I.n; ++k) v |= (Wide)w.at<Narrow>(I.r[1 + k])[i] << (8 * sizeof(Narrow) * k);
    d[i] = v;
  }
}
template <class Wide, class Narrow>
void unpack(Warp& w, const Inst& I, u32 m) {
  const Wide* a = w.at<Wide>(I.r[I.n]);
  for (int k = 0; k < I.n; ++k) {
    if (I.r[k] == kNone) continue;
    Narrow* d = w.at<Narrow>(I.r[k]);
    for_lanes(m, [&](int i) { d[i] = (Narrow)(a[i] >> (8 * sizeof(Narrow) * k)); });
  }
}

void mov_vector(Lower& l, Ty t) {
  const bool packs = l.arg(1).kind == ptx::Arg::Vec;
  const auto& v = packs ? l.arg(1).elems : l.arg(0).elems;
  const int wide = ptx::bytes_of(t), narrow = wide / (int)v.size();
  const Ty part = narrow == 4 ? Ty::B32 : narrow == 2 ? Ty::B16 : Ty::None;
  if (part == Ty::None || narrow * (int)v.size() != wide) l.fail("unsupported vector move");
  std::vector<Ref> refs;
  if (packs) refs.push_back(l.dest(l.arg(0), t));
  for (const auto& e : v) refs.push_back(e.kind == ptx::Arg::Ignore ? kNone : packs ? l.use(e, part) : l.dest(e, part));
  if (!packs) refs.push_back(l.use(l.arg(1), t));
  l.operands(refs);
  l.inst.n = (u8)v.size();
  if (packs)
    l.inst.fn = wide == 4 ? pack<u32, u16> : narrow == 4 ? pack<u64, u32> : pack<u64, u16>;
  else
    l.inst.fn = wide == 4 ? unpack<u32, u16> : narrow == 4 ? unpack<u64, u32> : unpack<u64, u16>;
}

void mov(Lower& l) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Move;
  if (t == Ty::Pred) {
    bool n;
    const Ref a = l.pred_use(l.arg(1), &n);
    l.operands({l.pred_dest(l.arg(0)), a});
    l.inst.n = n;
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      u32& d = *w.at<u32>(I.r[0]);
      d = (d & ~m) | ((I.n ? ~w.pred(I.r[1]) : w.pred(I.r[1])) & m);
    };
    return;
  }
  if (l.arg(0).kind == ptx::Arg::Vec || l.arg(1).kind == ptx::Arg::Vec) return mov_vector(l, t);
  const ptx::Arg& from = l.arg(1);
  if (from.kind == ptx::Arg::Special &&
      (from.name.rfind("%clock", 0) == 0 || from.name.rfind("%globaltimer", 0) == 0)) {
    l.operands({l.dest(l.arg(0), t)});  // simulated time: instructions executed so far
    l.inst.fn = ptx::bytes_of(t) == 8 ? (Handler)[](Warp & w, const Inst& I, u32 m) {
      for_lanes(m, [&](int i) { w.at<u64>(I.r[0])[i] = w.launch->executed; });
    }
                                      : (Handler)[](Warp& w, const Inst& I, u32 m) {
                                        for_lanes(m, [&](int i) { w.at<u32>(I.r[0])[i] = (u32)w.launch->executed; });
                                      };
                                      return;
  }
  l.operands({l.dest(l.arg(0), t), l.use(from, t)});
  l.inst.fn = copy_of(l, t);
}

template <class T>
void select(Warp& w, const Inst& I, u32 m) {
  T* d = w.at<T>(I.r[0]);
  const T *a = w.at<T>(I.r[1]), *b = w.at<T>(I.r[2]);
  const u32 p = w.pred(I.r[3]) ^ (I.n ? kFullMask : 0);
  for_lanes(m, [&](int i) { d[i] = p >> i & 1 ? a[i] : b[i]; });
}

void selp(Lower& l) {
  const Ty t = l.take_type();
  bool n;
  const Ref p = l.pred_use(l.arg(3), &n);
  l.inst.cls = Class::Move;
  l.inst.n = n;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), p});
  l.inst.fn = by_bits(l, t, [](auto z) -> Handler { return select<decltype(z)>; });
}

void slct(Lower& l) {
  l.drop({"ftz"});
  const Ty t = l.take_type(), c = l.take_type();
  l.inst.cls = Class::Move;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), c)});
  l.inst.fn = by_bits(l, t, [&](auto z) {
    using T = decltype(z);
    return c == Ty::F32 ? ternary<T, T, T, float>([](T a, T b, float x) { return x >= 0 ? a : b; })
                        : ternary<T, T, T, s32>([](T a, T b, s32 x) { return x >= 0 ? a : b; });
  });
}

// cvta: global addresses are generic as they are; shared, local get their window added or removed.
void cvta(Lower& l) {
  const bool to = l.take("to");
  const std::string space = l.take_any();
  l.take("cta");
  const Ty t = l.take_type();
  if (ptx::bytes_of(t) != 8) l.fail("32-bit generic addresses are not supported");
  l.inst.cls = Class::Integer;
  u64 window;
  if (space == "global" || space == "const" || space == "param")
    window = 0;
  else if (space.rfind("shared", 0) == 0)
    window = kSharedWindow;
  else if (space == "local")
    window = kLocalWindow;
  else
    l.fail("unknown state space");
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.constant(to ? 0 - window : window, 8)});
  l.inst.fn = binary<u64, u64, u64>([](u64 a, u64 b) { return a + b; });
}

void isspacep(Lower& l) {
  const std::string space = l.take_any();
  l.drop({"cta"});
  l.inst.cls = Class::Predicate;
  l.inst.imm = space == "global"               ? 0
               : space.rfind("shared", 0) == 0 ? kSharedWindow
               : space == "local"              ? kLocalWindow
                                               : 1;
  if (l.inst.imm == 1) l.fail("unsupported state space");
  l.operands({l.pred_dest(l.arg(0)), l.use(l.arg(1), Ty::U64)});
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    u32 r = 0;
    const u64* a = w.at<u64>(I.r[1]);
    for (int i = 0; i < kLanes; ++i) {
      const bool window = a[i] >= kSharedWindow && a[i] < kLocalWindow + kWindowBytes;
      r |= (u32)(I.imm ? a[i] - I.imm < kWindowBytes : !window) << i;
    }
    u32& d = *w.at<u32>(I.r[0]);
    d = (d & ~m) | (r & m);
  };
}

}  // namespace

void add_move_ops(Table& t) {
  t["mov"] = mov;
  t["selp"] = selp;
  t["slct"] = slct;
  t["cvta"] = cvta;
  t["isspacep"] = isspacep;
}
