// The .approx functions. The hardware's are table look-ups with a stated maximum error; these are the
// C library's, rounded to float: as accurate or better, never bit-equal by promise.
#include "floats.h"
#include "lower.h"

namespace {

using Fn = float (*)(float);
struct Plan {
  Fn fn;
  bool ftz;
};

Fn function(const std::string& op) {
  if (op == "ex2") return [](float x) { return std::exp2(x); };
  if (op == "lg2") return [](float x) { return std::log2(x); };
  if (op == "sin") return [](float x) { return std::sin(x); };
  if (op == "cos") return [](float x) { return std::cos(x); };
  if (op == "tanh") return [](float x) { return std::tanh(x); };
  return [](float x) { return (float)(1.0 / std::sqrt((double)x)); };
}

void approx(Lower& l) {
  l.take("approx");
  Plan* p = l.program.make<Plan>();
  p->fn = function(l.s.op[0]);
  p->ftz = l.take("ftz");
  const Ty t = l.take_type();
  l.inst.cls = Class::Float;
  l.inst.x = p;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  switch (t) {
    case Ty::F32:
      l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
        const Plan& p = *(const Plan*)I.x;
        float* d = w.at<float>(I.r[0]);
        const float* a = w.at<float>(I.r[1]);
        for_lanes(m, [&](int i) {
          const float y = canonical(p.fn(p.ftz ? flush(a[i]) : a[i]));
          d[i] = p.ftz ? flush(y) : y;
        });
      };
      return;
    case Ty::F64:
      if (l.s.op[0] != "rsqrt") l.fail("unsupported type");
      l.inst.fn = unary<double, double>([](double a) { return 1.0 / std::sqrt(a); });
      return;
    case Ty::F16:
      l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
        for_lanes(m, [&](int i) {
          w.at<u16>(I.r[0])[i] = float_to_half(((const Plan*)I.x)->fn(from_half(w.at<u16>(I.r[1])[i])));
        });
      };
      return;
    case Ty::BF16:
      l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
        for_lanes(m, [&](int i) {
          w.at<u16>(I.r[0])[i] = float_to_bfloat(((const Plan*)I.x)->fn(from_bfloat(w.at<u16>(I.r[1])[i])));
        });
      };
      return;
    case Ty::F16x2:
      l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
        const Fn f = ((const Plan*)I.x)->fn;
        for_lanes(m, [&](int i) {
          const u32 a = w.at<u32>(I.r[1])[i];
          w.at<u32>(I.r[0])[i] = float_to_half(f(from_half((u16)a))) | (u32)float_to_half(f(from_half((u16)(a >> 16))))
                                                                           << 16;
        });
      };
      return;
    case Ty::BF16x2:
      l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
        const Fn f = ((const Plan*)I.x)->fn;
        for_lanes(m, [&](int i) {
          const u32 a = w.at<u32>(I.r[1])[i];
          w.at<u32>(I.r[0])[i] =
              float_to_bfloat(f(from_bfloat((u16)a))) | (u32)float_to_bfloat(f(from_bfloat((u16)(a >> 16)))) << 16;
        });
      };
      return;
    default: l.fail("unsupported type");
  }
}

}  // namespace

void add_approx_ops(Table& t) {
  for (const char* op : {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt"}) t[op] = approx;
}
