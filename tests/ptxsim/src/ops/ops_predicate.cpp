// setp and set: comparisons, ordered and unordered, with the optional boolean of a third predicate.
#include "floats.h"
#include "lower.h"

namespace {

enum Cmp : u8 { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, NaN };

template <class T, Cmp kC>
bool compare(T a, T b) {
  if constexpr (kC == Eq) return a == b;
  if constexpr (kC == Ne) return a < b || a > b;
  if constexpr (kC == Lt) return a < b;
  if constexpr (kC == Le) return a <= b;
  if constexpr (kC == Gt) return a > b;
  if constexpr (kC == Ge) return a >= b;
  if constexpr (kC == Equ) return !(a < b || a > b);
  if constexpr (kC == Neu) return !(a == b);
  if constexpr (kC == Ltu) return !(a >= b);
  if constexpr (kC == Leu) return !(a > b);
  if constexpr (kC == Gtu) return !(a <= b);
  if constexpr (kC == Geu) return !(a < b);
  if constexpr (kC == Num) return a == a && b == b;
  if constexpr (kC == NaN) return a != a || b != b;
}

using Compare = u32 (*)(const void*, const void*);

// 32 booleans to a mask: the multiplication gathers the low bits of eight bytes.
u32 gather(const u8* t) {
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u64 x;
    std::memcpy(&x, t + 8 * k, 8);
    r |= (u32)((x * 0x0102040810204080ull) >> 56) << (8 * k);
  }
  return r;
}

template <class T, Cmp kC>
u32 compare_lanes(const void* a, const void* b) {
  alignas(32) u8 t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = compare<T, kC>(((const T*)a)[i], ((const T*)b)[i]);
  return gather(t);
}

template <class T>
Compare comparison(Cmp c) {
  static constexpr Compare kAll[] = {
      compare_lanes<T, Eq>,  compare_lanes<T, Ne>,  compare_lanes<T, Lt>,  compare_lanes<T, Le>,  compare_lanes<T, Gt>,
      compare_lanes<T, Ge>,  compare_lanes<T, Equ>, compare_lanes<T, Neu>, compare_lanes<T, Ltu>, compare_lanes<T, Leu>,
      compare_lanes<T, Gtu>, compare_lanes<T, Geu>, compare_lanes<T, Num>, compare_lanes<T, NaN>};
  return kAll[c];
}

struct Plan {
  Compare compare;
  char boolean = 0;  // a, o, x
  bool negate_c = false, ftz = false;
  Ty type;
  Ty result;  // of set
};

Cmp take_comparison(Lower& l) {
  static const std::pair<const char*, Cmp> kNames[] = {
      {"eq", Eq},   {"ne", Ne},   {"lt", Lt},   {"le", Le},   {"gt", Gt},   {"ge", Ge},
      {"lo", Lt},   {"ls", Le},   {"hi", Gt},   {"hs", Ge},   {"equ", Equ}, {"neu", Neu},
      {"ltu", Ltu}, {"leu", Leu}, {"gtu", Gtu}, {"geu", Geu}, {"num", Num}, {"nan", NaN}};
  const std::string name = l.take_any();
  for (auto& [text, c] : kNames)
    if (name == text) return c;
  l.fail("unknown comparison '." + name + "'");
}

Compare pick(Lower& l, Ty t, Cmp c) {
  switch (t) {
    case Ty::B16:
    case Ty::U16: return comparison<u16>(c);
    case Ty::B32:
    case Ty::U32: return comparison<u32>(c);
    case Ty::B64:
    case Ty::U64: return comparison<u64>(c);
    case Ty::S16: return comparison<s16>(c);
    case Ty::S32: return comparison<s32>(c);
    case Ty::S64: return comparison<s64>(c);
    case Ty::F64: return comparison<double>(c);
    case Ty::F32:
    case Ty::F16:
    case Ty::BF16:
    case Ty::F16x2:
    case Ty::BF16x2: return comparison<float>(c);
    default: l.fail("unsupported type");
  }
}

void widen(const Warp& w, Ref r, const Plan& p, int half, float* out) {
  const bool bf = p.type == Ty::BF16 || p.type == Ty::BF16x2;
  const bool packed = p.type == Ty::F16x2 || p.type == Ty::BF16x2;
  for (int i = 0; i < kLanes; ++i) {
    const u16 h = packed ? (u16)(w.at<u32>(r)[i] >> (16 * half)) : w.at<u16>(r)[i];
    out[i] = bf ? from_bfloat(h) : from_half(h);
  }
}

u32 evaluate(const Warp& w, const Inst& I, const Plan& p, Ref a, Ref b, int half) {
  u32 r;
  if (p.type == Ty::F16 || p.type == Ty::BF16 || p.type == Ty::F16x2 || p.type == Ty::BF16x2) {
    float x[kLanes], y[kLanes];
    widen(w, a, p, half, x);
    widen(w, b, p, half, y);
    r = p.compare(x, y);
  } else if (p.ftz && p.type == Ty::F32) {
    float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = flush(w.at<float>(a)[i]), y[i] = flush(w.at<float>(b)[i]);
    r = p.compare(x, y);
  } else {
    r = p.compare(w.at<char>(a), w.at<char>(b));
  }
  return r;
}

u32 combine(const Plan& p, u32 r, u32 c) {
  if (p.negate_c) c = ~c;
  return p.boolean == 'a' ? r & c : p.boolean == 'o' ? r | c : p.boolean == 'x' ? r ^ c : r;
}

Plan* common(Lower& l, Cmp* c) {
  Plan* p = l.program.make<Plan>();
  *c = take_comparison(l);
  if (l.take("and"))
    p->boolean = 'a';
  else if (l.take("or"))
    p->boolean = 'o';
  else if (l.take("xor"))
    p->boolean = 'x';
  p->ftz = l.take("ftz");
  l.inst.x = p;
  l.inst.cls = Class::Predicate;
  return p;
}

void setp(Lower& l) {
  Cmp c;
  Plan* p = common(l, &c);
  p->type = l.take_type();
  p->compare = pick(l, p->type, c);
  const Ref third = p->boolean ? l.pred_use(l.arg(3), &p->negate_c) : l.constant(0, 4);
  Ref second = kNone;
  if (l.arg(0).reg2 >= 0) {
    ptx::Arg a = l.arg(0);
    a.reg = a.reg2;
    second = l.pred_dest(a);
  }
  const Ref first = l.arg(0).kind == ptx::Arg::Ignore ? kNone : l.pred_dest(l.arg(0));
  l.operands({first, second, l.use(l.arg(1), p->type), l.use(l.arg(2), p->type), third});
  if (!p->boolean && second == kNone && first != kNone && !p->ftz &&
      (p->type == Ty::F32 || p->type == Ty::F64 ||
       (p->type != Ty::F16 && p->type != Ty::BF16 && p->type != Ty::F16x2 && p->type != Ty::BF16x2))) {
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      const u32 r = ((const Plan*)I.x)->compare(w.at<char>(I.r[2]), w.at<char>(I.r[3]));
      u32& d = *w.at<u32>(I.r[0]);
      d = (d & ~m) | (r & m);
    };
    return;
  }
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    const Plan& p = *(const Plan*)I.x;
    const bool packed = p.type == Ty::F16x2 || p.type == Ty::BF16x2;
    const u32 c = w.pred(I.r[4]);
    const u32 r = evaluate(w, I, p, I.r[2], I.r[3], 0), other = packed ? evaluate(w, I, p, I.r[2], I.r[3], 1) : ~r;
    const u32 first = combine(p, r, c), second = combine(p, other, c);
    if (I.r[0] != kNone) {
      u32& d = *w.at<u32>(I.r[0]);
      d = (d & ~m) | (first & m);
    }
    if (I.r[1] != kNone) {
      u32& d = *w.at<u32>(I.r[1]);
      d = (d & ~m) | (second & m);
    }
  };
}

void set(Lower& l) {
  Cmp c;
  Plan* p = common(l, &c);
  p->result = l.take_type();
  p->type = l.take_type();
  p->compare = pick(l, p->type, c);
  const Ref third = p->boolean ? l.pred_use(l.arg(3), &p->negate_c) : l.constant(0, 4);
  l.operands({l.dest(l.arg(0), p->result), l.use(l.arg(1), p->type), l.use(l.arg(2), p->type), third});
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    const Plan& p = *(const Plan*)I.x;
    const u32 c = w.pred(I.r[3]);
    const bool packed = p.type == Ty::F16x2 || p.type == Ty::BF16x2;
    const u32 r = combine(p, evaluate(w, I, p, I.r[1], I.r[2], 0), c);
    const u32 hi = packed ? combine(p, evaluate(w, I, p, I.r[1], I.r[2], 1), c) : 0;
    const u32 half_one = p.result == Ty::F16x2 || p.result == Ty::F16     ? 0x3c00
                         : p.result == Ty::BF16x2 || p.result == Ty::BF16 ? 0x3f80
                                                                          : 0xffff;
    for_lanes(m, [&](int i) {
      const u32 a = r >> i & 1, b = hi >> i & 1;
      if (packed && ptx::bytes_of(p.result) == 4 && p.result != Ty::F32 && p.result != Ty::U32 && p.result != Ty::S32)
        w.at<u32>(I.r[0])[i] = a * half_one | (b * half_one) << 16;
      else if (ptx::bytes_of(p.result) == 2)
        w.at<u16>(I.r[0])[i] = (u16)(a * half_one);
      else if (p.result == Ty::F32)
        w.at<u32>(I.r[0])[i] = a ? 0x3f800000u : 0;
      else if (packed)
        w.at<u32>(I.r[0])[i] = a * 0xffffu | (b * 0xffffu) << 16;
      else
        w.at<u32>(I.r[0])[i] = a ? kFullMask : 0;
    });
  };
}

}  // namespace

void add_predicate_ops(Table& t) {
  t["setp"] = setp;
  t["set"] = set;
}
