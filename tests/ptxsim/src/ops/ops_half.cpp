// f16, bf16 and their packed pairs. Sums and products of halves are exact in float or double, so
// one rounding at the end gives the correctly rounded result.
#include "floats.h"
#include "lower.h"

namespace {

template <bool kBf>
float widen(u16 h) {
  return kBf ? from_bfloat(h) : from_half(h);
}
template <bool kBf>
u16 narrow(double x) {
  return kBf ? to_bfloat(x) : to_half(x);
}
// Float results of f16 add, sub and mul round to the same half as the exact value would (float has
// more than 2p + 2 bits); for bf16 the sum may span more than a float, so it goes through double.
template <bool kBf>
u16 narrow_float(float x) {
  return kBf ? float_to_bfloat(x) : float_to_half(x);
}

template <bool kBf>
u16 sum(u16 a, u16 b) {
  if constexpr (kBf)
    return narrow<true>(add_sticky(widen<true>(a), widen<true>(b)));
  else
    return narrow_float<false>(widen<false>(a) + widen<false>(b));
}
template <bool kBf>
u16 difference(u16 a, u16 b) {
  return sum<kBf>(a, (b & 0x7fff) > (kBf ? 0x7f80 : 0x7c00) ? b : b ^ 0x8000);
}
// A product of two bf16 has 16 bits and may be a subnormal float: exact in double only.
template <bool kBf>
u16 product(u16 a, u16 b) {
  if constexpr (kBf)
    return narrow<true>((double)widen<true>(a) * widen<true>(b));
  else
    return narrow_float<false>(widen<false>(a) * widen<false>(b));
}
template <bool kBf>
u16 multiply_add(u16 a, u16 b, u16 c) {
  return narrow<kBf>(add_sticky((double)widen<kBf>(a) * widen<kBf>(b), widen<kBf>(c)));
}
template <bool kBf, bool kMin, bool kNan>
u16 choose(u16 a, u16 b) {
  const float x = widen<kBf>(a), y = widen<kBf>(b);
  if (x != x || y != y) return kNan || (x != x && y != y) ? kNaN16 : x != x ? b : a;
  if (x == y) return kMin == (a >> 15 != 0) ? a : b;
  return (x < y) == kMin ? a : b;
}
template <bool kBf>
u16 relu(u16 a) {
  const float x = widen<kBf>(a);
  return x != x ? kNaN16 : a & 0x8000 ? 0 : a;
}
template <bool kBf>
u16 clamp01(u16 a) {
  const float x = widen<kBf>(a);
  return x > 0.f ? (x < 1.f ? a : (u16)(kBf ? 0x3f80 : 0x3c00)) : 0;
}
u16 flush_half(u16 a) { return a & 0x7c00 ? a : a & 0x8000; }

using Op3 = u16 (*)(u16, u16, u16);
struct Plan {
  Op3 op;
  bool packed, relu, sat, ftz, bf, two;
};

template <bool kBf>
u16 finish(const Plan& p, u16 x) {
  if (p.ftz) x = flush_half(x);
  if (p.sat) x = clamp01<kBf>(x);
  return p.relu ? relu<kBf>(x) : x;
}

template <bool kBf>
void run(Warp& w, const Inst& I, u32 m) {
  const Plan& p = *(const Plan*)I.x;
  const auto one = [&](u16 a, u16 b, u16 c) {
    if (p.ftz) a = flush_half(a), b = flush_half(b), c = flush_half(c);
    return finish<kBf>(p, p.op(a, b, c));
  };
  if (p.packed) {
    u32* d = w.at<u32>(I.r[0]);
    const u32 *a = w.at<u32>(I.r[1]), *b = w.at<u32>(I.r[2]), *c = w.at<u32>(I.r[3]);
    for_lanes(m, [&](int i) {
      d[i] = one((u16)a[i], (u16)b[i], (u16)c[i]) | (u32)one((u16)(a[i] >> 16), (u16)(b[i] >> 16), (u16)(c[i] >> 16))
                                                        << 16;
    });
  } else {
    u16* d = w.at<u16>(I.r[0]);
    const u16 *a = w.at<u16>(I.r[1]), *b = w.at<u16>(I.r[2]), *c = w.at<u16>(I.r[3]);
    for_lanes(m, [&](int i) { d[i] = one(a[i], b[i], c[i]); });
  }
}

template <bool kBf>
Op3 operation(const std::string& op, bool nan) {
  if (op == "add") return [](u16 a, u16 b, u16) { return sum<kBf>(a, b); };
  if (op == "sub") return [](u16 a, u16 b, u16) { return difference<kBf>(a, b); };
  if (op == "mul") return [](u16 a, u16 b, u16) { return product<kBf>(a, b); };
  if (op == "fma") return [](u16 a, u16 b, u16 c) { return multiply_add<kBf>(a, b, c); };
  if (op == "min") return nan ? (Op3)[](u16 a, u16 b, u16) {
      return choose<kBf, true, true>(a, b);
    } : (Op3)[](u16 a, u16 b, u16) { return choose<kBf, true, false>(a, b); };
  if (op == "max") return nan ? (Op3)[](u16 a, u16 b, u16) {
      return choose<kBf, false, true>(a, b);
    } : (Op3)[](u16 a, u16 b, u16) { return choose<kBf, false, false>(a, b); };
  if (op == "abs") return [](u16 a, u16, u16) { return (u16)(a & 0x7fff); };
  if (op == "neg") return [](u16 a, u16, u16) { return (u16)(a ^ 0x8000); };
  return nullptr;
}

}  // namespace

void add_half_arithmetic(Lower& l) {
  const std::string& op = l.s.op[0];
  Plan* p = l.program.make<Plan>();
  l.take("rn");
  p->relu = l.take("relu");
  p->sat = l.take("sat");
  p->ftz = l.take("ftz");
  const bool nan = l.take("NaN");
  const Ty t = l.take_type();
  p->bf = t == Ty::BF16 || t == Ty::BF16x2;
  p->packed = t == Ty::F16x2 || t == Ty::BF16x2;
  p->op = p->bf ? operation<true>(op, nan) : operation<false>(op, nan);
  if (!p->op) l.fail("unsupported in 16-bit floats");
  if (p->bf && p->ftz) l.fail(".ftz does not exist for bf16");
  l.inst.cls = Class::Half;
  l.inst.x = p;
  const int sources = op == "fma" ? 3 : op == "abs" || op == "neg" ? 1 : 2;
  const Ref a = l.use(l.arg(1), t), b = sources > 1 ? l.use(l.arg(2), t) : a, c = sources > 2 ? l.use(l.arg(3), t) : a;
  l.operands({l.dest(l.arg(0), t), a, b, c});
  l.inst.fn = p->bf ? run<true> : run<false>;
}

void add_half_ops(Table&) {}
