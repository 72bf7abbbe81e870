// f32 and f64 arithmetic: rounding modes, ftz, sat, NaN rules. IEEE exact, .approx division and
// square root included (they are as good or better than the hardware's).
#include "floats.h"
#include "lower.h"

void add_half_arithmetic(Lower& l);  // ops_half.cpp

namespace {

enum Flag : u8 { kFtz = 1, kSat = 2 };

struct Options {
  Round round = Round::Nearest;
  bool ftz = false, sat = false;
};

Options take_options(Lower& l) {
  Options o;
  if (l.take("rz"))
    o.round = Round::Zero;
  else if (l.take("rm"))
    o.round = Round::Down;
  else if (l.take("rp"))
    o.round = Round::Up;
  else
    l.take("rn");
  o.ftz = l.take("ftz");
  o.sat = l.take("sat");
  return o;
}

template <bool kF, bool kS>
float in(float x) {
  return kF ? flush(x) : x;
}
template <bool kF, bool kS>
float out(float x) {
  x = canonical(x);
  if (kF) x = flush(x);
  return kS ? saturate(x) : x;
}
template <bool kF, bool kS>
double in(double x) {
  return x;
}
template <bool kF, bool kS>
double out(double x) {
  return x;
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Rcp {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};

template <class T, class F, bool kF, bool kS>
Handler rounded2() {
  return [](Warp& w, const Inst& I, u32 m) {
    RoundScope scope((Round)I.n);
    T* d = w.at<T>(I.r[0]);
    const T *a = w.at<T>(I.r[1]), *b = w.at<T>(I.r[2]);
    for_lanes(m, [&](int i) { d[i] = out<kF, kS>(F{}(in<kF, kS>(a[i]), in<kF, kS>(b[i]))); });
  };
}
template <class T, class F, bool kF, bool kS>
Handler rounded1() {
  return [](Warp& w, const Inst& I, u32 m) {
    RoundScope scope((Round)I.n);
    T* d = w.at<T>(I.r[0]);
    const T* a = w.at<T>(I.r[1]);
    for_lanes(m, [&](int i) { d[i] = out<kF, kS>(F{}(in<kF, kS>(a[i]))); });
  };
}
template <class T, bool kF, bool kS>
Handler rounded_fma() {
  return [](Warp& w, const Inst& I, u32 m) {
    RoundScope scope((Round)I.n);
    T* d = w.at<T>(I.r[0]);
    const T *a = w.at<T>(I.r[1]), *b = w.at<T>(I.r[2]), *c = w.at<T>(I.r[3]);
    for_lanes(m, [&](int i) { d[i] = out<kF, kS>((T)std::fma(in<kF, kS>(a[i]), in<kF, kS>(b[i]), in<kF, kS>(c[i]))); });
  };
}

template <class F>
Handler pick2(Ty t, const Options& o) {
  if (t == Ty::F64) return rounded2<double, F, false, false>();
  return o.ftz ? (o.sat ? rounded2<float, F, true, true>() : rounded2<float, F, true, false>())
               : (o.sat ? rounded2<float, F, false, true>() : rounded2<float, F, false, false>());
}
template <class F>
Handler pick1(Ty t, const Options& o) {
  if (t == Ty::F64) return rounded1<double, F, false, false>();
  return o.ftz ? rounded1<float, F, true, false>() : rounded1<float, F, false, false>();
}

// min and max: a NaN loses against a number unless .NaN asks for it; -0 < +0.
template <class T, bool kMin, bool kNan, bool kF>
T select(T a, T b) {
  if constexpr (sizeof(T) == 4 && kF) a = flush(a), b = flush(b);
  const T nan = sizeof(T) == 4 ? (T)bits_as<float>(kNaN32) : (T)bits_as<double>(0x7ff8000000000000ull);
  const bool a_first = kMin ? (a < b || (a == b && std::signbit(a))) : (a > b || (a == b && !std::signbit(a)));
  T r = a_first ? a : b;
  if (kNan)
    r = a != a || b != b ? nan : r;
  else
    r = a != a ? (b != b ? nan : b) : b != b ? a : r;
  return r;
}

template <class T, bool kMin>
Handler min_max_handler(bool nan, bool ftz) {
  if (nan)
    return ftz ? binary<T, T, T>([](T a, T b) { return select<T, kMin, true, true>(a, b); })
               : binary<T, T, T>([](T a, T b) { return select<T, kMin, true, false>(a, b); });
  return ftz ? binary<T, T, T>([](T a, T b) { return select<T, kMin, false, true>(a, b); })
             : binary<T, T, T>([](T a, T b) { return select<T, kMin, false, false>(a, b); });
}

void min_max(Lower& l) {
  const bool is_min = l.s.op[0] == "min", ftz = l.take("ftz"), nan = l.take("NaN");
  const bool xorsign = l.take("xorsign") && l.take("abs");
  const Ty t = l.take_type();
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t)});
  if (xorsign) l.fail("unsupported modifier .xorsign.abs");
  if (l.count() != 3) l.fail("three-operand min/max needs a newer target");
  if (t == Ty::F64)
    l.inst.fn = is_min ? min_max_handler<double, true>(nan, false) : min_max_handler<double, false>(nan, false);
  else
    l.inst.fn = is_min ? min_max_handler<float, true>(nan, ftz) : min_max_handler<float, false>(nan, ftz);
}

void abs_neg(Lower& l) {
  const bool absolute = l.s.op[0] == "abs", ftz = l.take("ftz");
  const Ty t = l.take_type();
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  if (t == Ty::F64) {
    l.inst.fn = absolute ? unary<u64, u64>([](u64 a) { return a & ~(1ull << 63); })
                         : unary<u64, u64>([](u64 a) { return a ^ 1ull << 63; });
  } else if (ftz) {
    l.inst.fn = absolute
                    ? unary<float, float>([](float a) { return bits_as<float>(bits_as<u32>(flush(a)) & 0x7fffffffu); })
                    : unary<float, float>([](float a) { return bits_as<float>(bits_as<u32>(flush(a)) ^ 0x80000000u); });
  } else {
    l.inst.fn = absolute ? unary<u32, u32>([](u32 a) { return a & 0x7fffffffu; })
                         : unary<u32, u32>([](u32 a) { return a ^ 0x80000000u; });
  }
}

void fma(Lower& l) {
  const Options o = take_options(l);
  const Ty t = l.take_type();
  l.inst.cls = Class::Float;
  l.inst.n = (u8)o.round;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), t)});
  if (t == Ty::F64)
    l.inst.fn = rounded_fma<double, false, false>();
  else
    l.inst.fn = o.ftz ? (o.sat ? rounded_fma<float, true, true>() : rounded_fma<float, true, false>())
                      : (o.sat ? rounded_fma<float, false, true>() : rounded_fma<float, false, false>());
}

bool narrow(const Lower& l) {
  for (const auto& m : l.s.op)
    if (m == "f16" || m == "f16x2" || m == "bf16" || m == "bf16x2") return true;
  return false;
}

void root(Lower& l) {
  if (l.take("approx")) {
  }
  const Options o = take_options(l);
  const Ty t = l.take_type();
  l.inst.cls = Class::Float;
  l.inst.n = (u8)o.round;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  l.inst.fn = l.s.op[0] == "sqrt" ? pick1<Sqrt>(t, o) : pick1<Rcp>(t, o);
}

void copysign(Lower& l) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Float;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t)});
  l.inst.fn = t == Ty::F64 ? binary<u64, u64, u64>([](u64 a, u64 b) { return (a & 1ull << 63) | (b & ~(1ull << 63)); })
                           : binary<u32, u32, u32>([](u32 a, u32 b) { return (a & 0x80000000u) | (b & 0x7fffffffu); });
}

void testp(Lower& l) {
  const std::string what = l.take_any();
  const Ty t = l.take_type();
  static const std::vector<std::string> kinds = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  l.inst.n = 255;
  for (size_t k = 0; k < kinds.size(); ++k)
    if (kinds[k] == what) l.inst.n = (u8)k;
  if (l.inst.n == 255) l.fail("unknown test");
  l.inst.cls = Class::Predicate;
  l.inst.imm = t == Ty::F64;
  l.operands({l.pred_dest(l.arg(0)), l.use(l.arg(1), t)});
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    u32 r = 0;
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const int c = I.imm ? std::fpclassify(w.at<double>(I.r[1])[i]) : std::fpclassify(w.at<float>(I.r[1])[i]);
      const bool yes = I.n == 0   ? c != FP_NAN && c != FP_INFINITE
                       : I.n == 1 ? c == FP_INFINITE
                       : I.n == 2 ? c != FP_NAN
                       : I.n == 3 ? c == FP_NAN
                       : I.n == 4 ? c == FP_NORMAL
                                  : c == FP_SUBNORMAL;
      r |= (u32)yes << i;
    }
    u32& d = *w.at<u32>(I.r[0]);
    d = (d & ~m) | r;
  };
}

}  // namespace

// Opcodes shared with the integers arrive here when their type is a float.
void add_float_arithmetic(Lower& l) {
  if (narrow(l)) return add_half_arithmetic(l);
  l.inst.cls = Class::Float;
  const std::string& op = l.s.op[0];
  if (op == "min" || op == "max") return min_max(l);
  if (op == "abs" || op == "neg") return abs_neg(l);
  if (op == "mad") return fma(l);
  if (op == "div") l.take("full"), l.take("approx");
  const Options o = take_options(l);
  const Ty t = l.take_type();
  if (t != Ty::F32 && t != Ty::F64) l.fail("unsupported type");
  l.inst.n = (u8)o.round;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t)});
  l.inst.fn = op == "add"   ? pick2<Add>(t, o)
              : op == "sub" ? pick2<Sub>(t, o)
              : op == "mul" ? pick2<Mul>(t, o)
                            : pick2<Div>(t, o);
}

void add_float_ops(Table& t) {
  t["fma"] = [](Lower& l) { narrow(l) ? add_half_arithmetic(l) : fma(l); };
  t["sqrt"] = t["rcp"] = root;
  t["copysign"] = copysign;
  t["testp"] = testp;
}
