// Number formats: f16, bf16 and tf32 to and from float and double, rounding, flushing, NaNs.
// Everything narrow is rounded once, from a double that holds the exact result (or carries a sticky
// bit), so there is no double rounding.
#pragma once
#include <cfenv>
#include <cmath>

#include "types.h"

enum class Round : u8 { Nearest, Zero, Down, Up, Away /* .rna: nearest, ties away */ };

constexpr u32 kNaN32 = 0x7fffffffu;  // what arithmetic makes of any NaN
constexpr u16 kNaN16 = 0x7fff;  // f16 and bf16 alike

inline float canonical(float x) { return x == x ? x : bits_as<float>(kNaN32); }
inline float flush(float x) {
  const u32 b = bits_as<u32>(x);
  return bits_as<float>((b & 0x7f800000u) ? b : b & 0x80000000u);
}
inline float saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN becomes 0

// Rounds a double to a format of `mantissa` stored bits and `exponent` bits; returns its encoding.
inline u32 encode(double x, int mantissa, int exponent, Round mode) {
  const u64 b = bits_as<u64>(x);
  const u32 sign = (u32)(b >> 63);
  const int bias = (1 << (exponent - 1)) - 1, max_e = (1 << exponent) - 1;
  const u32 top = sign << (mantissa + exponent);
  const u32 inf = top | (u32)max_e << mantissa;
  if (x != x) return mantissa == 10 && exponent == 8 ? kNaN32 : kNaN16;
  if (std::isinf(x)) return inf;
  if (x == 0) return top;
  int e = (int)(b >> 52 & 0x7ff) - 1023;
  u64 m = (b & 0xfffffffffffffull) | 1ull << 52;
  if (e == -1023) {  // a subnormal double: far below every format here
    e = -1022;
    m &= ~(1ull << 52);
  }
  int drop = 52 - mantissa, field = e + bias;
  if (field < 1) drop += 1 - field, field = 0;
  u64 kept, rest, half;
  if (drop > 63)
    kept = 0, rest = 1, half = 2;
  else
    kept = m >> drop, rest = m & ((1ull << drop) - 1), half = 1ull << (drop - 1);
  bool up = false;
  switch (mode) {
    case Round::Nearest: up = rest > half || (rest == half && (kept & 1)); break;
    case Round::Away: up = rest >= half; break;
    case Round::Zero: break;
    case Round::Down: up = sign && rest; break;
    case Round::Up: up = !sign && rest; break;
  }
  kept += up;
  u64 out = field ? ((u64)(field - 1) << mantissa) + kept : kept;  // a carry runs into the exponent
  if (out >> mantissa >= (u64)max_e) {
    const bool to_inf =
        mode == Round::Nearest || mode == Round::Away || (mode == Round::Down && sign) || (mode == Round::Up && !sign);
    return to_inf ? inf : top | (((u32)max_e << mantissa) - 1);
  }
  return top | (u32)out;
}

inline u16 to_half(double x, Round r = Round::Nearest) { return (u16)encode(x, 10, 5, r); }
inline u16 to_bfloat(double x, Round r = Round::Nearest) { return (u16)encode(x, 7, 8, r); }
inline u32 to_tf32(double x, Round r) {
  const u32 t = encode(x, 10, 8, r);
  return x != x ? kNaN32 : t << 13;
}

// Branch-free, so that loops over lanes vectorise.
inline float from_half(u16 h) {
  const u32 sign = (u32)(h & 0x8000) << 16, body = h & 0x7fff;
  const float scaled = bits_as<float>(body << 13) * 0x1p112f;  // exponent rebias; subnormals come out right
  const u32 bits = body >= 0x7c00 ? 0x7f800000u | (body & 0x3ff) << 13 : bits_as<u32>(scaled);
  return bits_as<float>(bits | sign);
}
inline float from_bfloat(u16 b) { return bits_as<float>((u32)b << 16); }

// Nearest-even from float, the common case, without the trip through double.
inline u16 float_to_bfloat(float x) {
  const u32 b = bits_as<u32>(x);
  const u16 r = (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
  return (b & 0x7fffffff) > 0x7f800000u ? kNaN16 : r;
}
inline u16 float_to_half(float x) {
  const u32 b = bits_as<u32>(x), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
  // Below 2^-14 adding 0.5 lets the float adder round at the subnormal's last place.
  const u32 tiny = bits_as<u32>(bits_as<float>(a) + 0.5f) - 0x3f000000u;
  const u32 normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000u) >> 13;
  u32 r = a < 0x38800000u ? tiny : normal;
  r = a >= 0x477ff000u ? 0x7c00 : r;
  r = a > 0x7f800000u ? kNaN16 : r | sign;
  return (u16)r;
}

// a + b in double with a sticky last bit, so that rounding it again to a narrow format is exact.
inline double add_sticky(double a, double b) {
  const double s = a + b;
  if (!(std::fabs(s) < HUGE_VAL)) return s;
  const double bb = s - a, err = (a - (s - bb)) + (b - bb);
  u64 bits = bits_as<u64>(s);
  if (err != 0 && !(bits & 1)) bits += ((err > 0) == (s > 0)) ? 1 : (u64)-1;
  return bits_as<double>(bits);
}

// Sets the processor's rounding mode while a handler runs its lanes.
class RoundScope {
 public:
  explicit RoundScope(Round r) : change_(r != Round::Nearest) {
    if (change_) std::fesetround(r == Round::Zero ? FE_TOWARDZERO : r == Round::Down ? FE_DOWNWARD : FE_UPWARD);
  }
  ~RoundScope() {
    if (change_) std::fesetround(FE_TONEAREST);
  }

 private:
  bool change_;
};
