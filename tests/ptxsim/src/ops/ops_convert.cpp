// cvt: every pair of types and rounding modes by one general path, the common pairs by loops.
#include <algorithm>

#include "floats.h"
#include "lower.h"

namespace {

struct Convert {
  Ty to, from;
  Round round = Round::Nearest;
  bool to_integral = false, ftz = false, sat = false, relu = false, packed = false;
  int to_bytes = 0, from_bytes = 0;  // of the registers, which may be wider than the types
};

bool is_float(Ty t) { return t == Ty::F16 || t == Ty::BF16 || t == Ty::F32 || t == Ty::F64 || t == Ty::TF32; }
bool is_signed(Ty t) { return t == Ty::S8 || t == Ty::S16 || t == Ty::S32 || t == Ty::S64; }

double round_integral(double x, Round r) {
  switch (r) {
    case Round::Nearest: return std::nearbyint(x);
    case Round::Zero: return std::trunc(x);
    case Round::Down: return std::floor(x);
    default: return std::ceil(x);
  }
}

double read_float(u64 bits, Ty t) {
  switch (t) {
    case Ty::F16: return from_half((u16)bits);
    case Ty::BF16: return from_bfloat((u16)bits);
    case Ty::F64: return bits_as<double>(bits);
    default: return bits_as<float>((u32)bits);
  }
}

u64 write_float(double x, const Convert& c) {
  if (c.relu) x = x != x ? x : x > 0 ? x : 0.0;
  if (c.sat) x = x > 0 ? (x < 1 ? x : 1) : 0;
  switch (c.to) {
    case Ty::F16: return to_half(x, c.round);
    case Ty::BF16: return to_bfloat(x, c.round);
    case Ty::TF32: return to_tf32(x, c.round);
    case Ty::F64: return bits_as<u64>(x);
    default: {
      RoundScope scope(c.round);
      volatile double d = x;
      volatile float f = (float)d;
      float y = canonical(f);
      return bits_as<u32>(c.ftz ? flush(y) : y);
    }
  }
}

u64 integer_to_float(u64 bits, const Convert& c) {
  RoundScope scope(c.round);
  const int shift = 64 - 8 * ptx::bytes_of(c.from);
  volatile s64 s = (s64)(bits << shift) >> shift;
  volatile u64 u = bits << shift >> shift;
  if (c.to == Ty::F32) {
    volatile float f = is_signed(c.from) ? (float)s : (float)u;
    return bits_as<u32>((float)f);
  }
  volatile double d = is_signed(c.from) ? (double)s : (double)u;
  if (c.to == Ty::F64) return bits_as<u64>((double)d);
  // 64-bit integers are inexact in double, but then far beyond f16 and bf16's precision alike: a
  // sticky bit keeps the narrow rounding right.
  u64 b = bits_as<u64>((double)d);
  if (is_signed(c.from) ? (__int128)(double)d != (__int128)s : (unsigned __int128)(double)d != (unsigned __int128)u)
    b |= 1;
  return write_float(bits_as<double>(b), c);
}

u64 float_to_integer(double x, const Convert& c) {
  const int bits = 8 * ptx::bytes_of(c.to);
  if (x != x) return bits == 64 ? 1ull << 63 : 0;  // NaN: 0 for up to 32 bits, the top bit for 64
  x = round_integral(x, c.round);
  if (is_signed(c.to)) {
    const double top = std::ldexp(1.0, bits - 1);
    return x >= top ? (1ull << (bits - 1)) - 1 : x < -top ? (u64)-1 << (bits - 1) : (u64)(s64)x;
  }
  const double top = std::ldexp(1.0, bits);
  return x >= top ? (bits == 64 ? ~0ull : (1ull << bits) - 1) : x <= 0 ? 0 : (u64)x;
}

u64 integer_to_integer(u64 bits, const Convert& c) {
  const int shift = 64 - 8 * ptx::bytes_of(c.from);
  const __int128 v = is_signed(c.from) ? (__int128)((s64)(bits << shift) >> shift) : (__int128)(bits << shift >> shift);
  if (!c.sat) return (u64)v;
  const int to = 8 * ptx::bytes_of(c.to);
  const __int128 low = is_signed(c.to) ? -((__int128)1 << (to - 1)) : 0;
  const __int128 high = is_signed(c.to) ? ((__int128)1 << (to - 1)) - 1 : ((__int128)1 << to) - 1;
  return (u64)(v < low ? low : v > high ? high : v);
}

u64 load_lane(const Warp& w, Ref r, int bytes, int lane) {
  switch (bytes) {
    case 2: return w.at<u16>(r)[lane];
    case 4: return w.at<u32>(r)[lane];
    default: return w.at<u64>(r)[lane];
  }
}
void store_lane(const Warp& w, Ref r, int bytes, int lane, u64 v) {
  switch (bytes) {
    case 2: w.at<u16>(r)[lane] = (u16)v; break;
    case 4: w.at<u32>(r)[lane] = (u32)v; break;
    default: w.at<u64>(r)[lane] = v;
  }
}

void general(Warp& w, const Inst& I, u32 m) {
  const Convert& c = *(const Convert*)I.x;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const u64 a = load_lane(w, I.r[1], c.from_bytes, i);
    u64 r;
    if (is_float(c.from)) {
      double x = read_float(a, c.from);
      if (c.ftz && c.from == Ty::F32) x = flush((float)x);
      if (!is_float(c.to)) {
        r = float_to_integer(x, c);
        const int shift = 64 - 8 * ptx::bytes_of(c.to);
        r = is_signed(c.to) ? (u64)((s64)(r << shift) >> shift) : r << shift >> shift;
      } else {
        Convert plain = c;
        if (c.to_integral) x = x != x ? x : std::copysign(round_integral(x, c.round), x), plain.round = Round::Nearest;
        r = write_float(x, plain);
      }
    } else if (is_float(c.to)) {
      r = integer_to_float(a, c);
    } else {
      r = integer_to_integer(a, c);
      const int shift = 64 - 8 * ptx::bytes_of(c.to);  // into a wider register: extended by the type
      r = is_signed(c.to) ? (u64)((s64)(r << shift) >> shift) : r << shift >> shift;
    }
    store_lane(w, I.r[0], c.to_bytes, i, r);
  }
}

// cvt.rn.f16x2.f32 d, a, b: a goes to the upper half.
void pack(Warp& w, const Inst& I, u32 m) {
  const Convert& c = *(const Convert*)I.x;
  u32* d = w.at<u32>(I.r[0]);
  const float *a = w.at<float>(I.r[1]), *b = w.at<float>(I.r[2]);
  for_lanes(m, [&](int i) { d[i] = (u32)write_float(b[i], c) | (u32)write_float(a[i], c) << 16; });
}

Handler common(const Convert& c) {
  const int tb = ptx::bytes_of(c.to), fb = ptx::bytes_of(c.from);
  if (c.sat || c.ftz || c.relu || c.round != Round::Nearest || c.to_integral || tb != c.to_bytes || fb != c.from_bytes)
    return nullptr;
  if (c.from == Ty::F32 && c.to == Ty::BF16) return unary<u16, float>([](float x) { return float_to_bfloat(x); });
  if (c.from == Ty::F32 && c.to == Ty::F16) return unary<u16, float>([](float x) { return float_to_half(x); });
  if (c.from == Ty::F16 && c.to == Ty::F32) return unary<float, u16>([](u16 x) { return canonical(from_half(x)); });
  if (c.from == Ty::BF16 && c.to == Ty::F32) return unary<float, u16>([](u16 x) { return canonical(from_bfloat(x)); });
  if (is_float(c.from) || is_float(c.to)) return nullptr;
  if (fb == 8 && tb == 4) return unary<u32, u64>([](u64 x) { return (u32)x; });
  if (fb == 4 && tb == 8)
    return is_signed(c.from) ? unary<s64, s32>([](s32 x) { return (s64)x; })
                             : unary<u64, u32>([](u32 x) { return (u64)x; });
  if (fb == 2 && tb == 4)
    return is_signed(c.from) ? unary<s32, s16>([](s16 x) { return (s32)x; })
                             : unary<u32, u16>([](u16 x) { return (u32)x; });
  if (fb == 4 && tb == 2) return unary<u16, u32>([](u32 x) { return (u16)x; });
  return nullptr;
}

void cvt(Lower& l) {
  Convert* c = l.program.make<Convert>();
  bool integral = false, rounded = true;
  if (l.take("rni"))
    integral = true;
  else if (l.take("rzi"))
    integral = true, c->round = Round::Zero;
  else if (l.take("rmi"))
    integral = true, c->round = Round::Down;
  else if (l.take("rpi"))
    integral = true, c->round = Round::Up;
  else if (l.take("rn")) {
  } else if (l.take("rz"))
    c->round = Round::Zero;
  else if (l.take("rm"))
    c->round = Round::Down;
  else if (l.take("rp"))
    c->round = Round::Up;
  else if (l.take("rna"))
    c->round = Round::Away;
  else
    rounded = false;
  c->ftz = l.take("ftz");
  c->sat = l.take("sat");
  c->relu = l.take("relu");
  if (l.take("satfinite")) l.fail("unsupported modifier .satfinite");
  c->to = l.take_type();
  c->from = l.take_type();
  c->to_integral = integral;
  l.inst.cls = Class::Convert;
  l.inst.x = c;
  if (c->to == Ty::F16x2 || c->to == Ty::BF16x2) {
    if (c->from != Ty::F32) l.fail("unsupported conversion");
    c->to = c->to == Ty::F16x2 ? Ty::F16 : Ty::BF16;
    l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::F32), l.use(l.arg(2), Ty::F32)});
    l.inst.fn = pack;
    return;
  }
  if (c->to == Ty::B32 || c->from == Ty::B32 || ptx::bytes_of(c->to) == 0) l.fail("unsupported conversion");
  if (is_float(c->from) && !is_float(c->to) && !integral) l.fail("float to integer needs an integer rounding");
  if (!is_float(c->from) && is_float(c->to) && !rounded) l.fail("integer to float needs a rounding");
  c->to_bytes = l.bytes(l.arg(0));
  c->from_bytes = l.bytes(l.arg(1));
  if (c->from_bytes < 0) {  // a constant or special register
    c->from_bytes = std::max(2, ptx::bytes_of(c->from));
    l.operands({l.reg(l.arg(0)), l.use(l.arg(1), c->from)});
  } else {
    if (c->from_bytes < ptx::bytes_of(c->from) || c->to_bytes < ptx::bytes_of(c->to)) l.fail("register too narrow");
    l.operands({l.reg(l.arg(0)), l.reg(l.arg(1))});
  }
  const Handler fast = common(*c);
  l.inst.fn = fast ? fast : general;
}

}  // namespace

void add_convert_ops(Table& t) { t["cvt"] = cvt; }
