// Integer arithmetic. Overflow wraps; carries follow the hardware: a subtraction is a + ~b + 1 and
// leaves the carry of that sum, so add.cc, subc.cc and addc.cc may be chained in any order (nvcc's
// 128-bit division does).
#include <algorithm>

#include "lower.h"

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr int kBits = sizeof(T) * 8;

template <class T>
T mul_high(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    if constexpr (std::is_signed_v<T>)
      return (T)(((__int128)a * b) >> 64);
    else
      return (T)(((unsigned __int128)a * b) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
    return (T)(((Wide)a * (Wide)b) >> kBits<T>);
  }
}
template <class T>
T mul_low(T a, T b) {
  return (T)((u64)a * (u64)b);
}

void three(Lower& l, Ty t) { l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t)}); }

// u16x2 and s16x2: two halves of one register.
template <class T, class F>
Handler halves() {
  return binary<u32, u32, u32>(
      [](u32 a, u32 b) { return (u32)(u16)F{}((T)a, (T)b) | (u32)(u16)F{}((T)(a >> 16), (T)(b >> 16)) << 16; });
}

// The carry flag of a thread lives beside its registers, one mask per warp.
u32& carry_of(Warp& w, const Inst& I) { return *w.at<u32>((Ref)I.imm); }

Ref carry_slot(Lower& l) {
  for (auto& sp : l.program.specials)
    if (sp.name == "<carry>") return sp.ref;
  const u32 at = (l.program.register_bytes + 63) / 64 * 64;
  l.program.register_bytes = at + 64;
  l.program.specials.push_back({"<carry>", at * 2});
  return at * 2;
}

template <class T, bool kSubtract>
Handler with_carry() {
  return [](Warp& w, const Inst& I, u32 m) {
    T* d = w.at<T>(I.r[0]);
    const T* a = w.at<T>(I.r[1]);
    const T* b = w.at<T>(I.r[2]);
    const bool use = I.n & 1, set = I.n & 2;
    u32& carry = carry_of(w, I);
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      const u64 in = use ? carry >> i & 1 : kSubtract ? 1 : 0;
      const unsigned __int128 sum = (unsigned __int128)a[i] + (T)(kSubtract ? ~b[i] : b[i]) + in;
      d[i] = (T)sum;
      if (set) carry = (carry & ~(1u << i)) | (u32)((sum >> kBits<T>)&1) << i;
    }
  };
}

void carried(Lower& l, bool subtract, bool use) {
  const bool set = l.take("cc");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  three(l, t);
  l.inst.imm = carry_slot(l);
  l.inst.n = (u8)((use ? 1 : 0) | (set ? 2 : 0));
  const bool wide = ptx::bytes_of(t) == 8;
  l.inst.fn = subtract ? (wide ? with_carry<u64, true>() : with_carry<u32, true>())
                       : (wide ? with_carry<u64, false>() : with_carry<u32, false>());
}

template <class T, bool kHigh>
Handler mad_carry() {
  return [](Warp& w, const Inst& I, u32 m) {
    T* d = w.at<T>(I.r[0]);
    const T *a = w.at<T>(I.r[1]), *b = w.at<T>(I.r[2]), *c = w.at<T>(I.r[3]);
    u32& carry = carry_of(w, I);
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      using U = Unsigned<T>;
      const U product = (U)(kHigh ? mul_high(a[i], b[i]) : mul_low(a[i], b[i]));
      const unsigned __int128 sum = (unsigned __int128)product + (U)c[i] + (I.n & 1 ? carry >> i & 1 : 0);
      d[i] = (T)sum;
      if (I.n & 2) carry = (carry & ~(1u << i)) | (u32)((sum >> kBits<T>)&1) << i;
    }
  };
}

void add_sub(Lower& l) {
  const bool subtract = l.s.op[0] == "sub";
  if (l.has("cc")) return carried(l, subtract, false);
  const bool sat = l.take("sat");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  three(l, t);
  if (t == Ty::U16x2 || t == Ty::S16x2) {
    l.inst.fn = subtract ? halves<u16, decltype([](u16 a, u16 b) { return u16(a - b); })>()
                         : halves<u16, decltype([](u16 a, u16 b) { return u16(a + b); })>();
    return;
  }
  if (sat) {
    if (t != Ty::S32) l.fail(".sat needs .s32");
    l.inst.fn =
        subtract
            ? binary<s32, s32, s32>([](s32 a, s32 b) { return (s32)std::clamp<s64>((s64)a - b, INT32_MIN, INT32_MAX); })
            : binary<s32, s32, s32>(
                  [](s32 a, s32 b) { return (s32)std::clamp<s64>((s64)a + b, INT32_MIN, INT32_MAX); });
    return;
  }
  l.inst.fn = by_bits(l, t, [&](auto z) {
    using T = decltype(z);
    return subtract ? binary<T, T, T>([](T a, T b) { return T(a - b); })
                    : binary<T, T, T>([](T a, T b) { return T(a + b); });
  });
}

template <class T, class W>
Handler wide_mul() {
  return binary<W, T, T>([](T a, T b) { return (W)((W)a * (W)b); });
}
template <class T, class W>
Handler wide_mad() {
  return ternary<W, T, T, W>(
      [](T a, T b, W c) { return (W)((std::make_unsigned_t<W>)((W)a * (W)b) + (std::make_unsigned_t<W>)c); });
}

Ty widened(Lower& l, Ty t) {
  switch (t) {
    case Ty::U16: return Ty::U32;
    case Ty::S16: return Ty::S32;
    case Ty::U32: return Ty::U64;
    case Ty::S32: return Ty::S64;
    default: l.fail(".wide needs a 16 or 32-bit type");
  }
}

void mul(Lower& l) {
  const bool lo = l.take("lo"), hi = l.take("hi"), wide = l.take("wide");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  if (!lo && !hi && !wide) l.fail("integer mul needs .lo, .hi or .wide");
  if (wide) {
    l.operands({l.dest(l.arg(0), widened(l, t)), l.use(l.arg(1), t), l.use(l.arg(2), t)});
    l.inst.fn = t == Ty::U16   ? wide_mul<u16, u32>()
                : t == Ty::S16 ? wide_mul<s16, s32>()
                : t == Ty::U32 ? wide_mul<u32, u64>()
                               : wide_mul<s32, s64>();
    return;
  }
  three(l, t);
  l.inst.fn = lo ? by_bits(l, t,
                           [](auto z) {
                             using T = decltype(z);
                             return binary<T, T, T>([](T a, T b) { return mul_low(a, b); });
                           })
                 : by_integer(l, t, [](auto z) {
                     using T = decltype(z);
                     return binary<T, T, T>([](T a, T b) { return mul_high(a, b); });
                   });
}

void mad(Lower& l) {
  const bool uses = l.s.op[0] == "madc", sets = l.take("cc");
  const bool lo = l.take("lo"), hi = l.take("hi"), wide = l.take("wide");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  if (!lo && !hi && !wide) l.fail("integer mad needs .lo, .hi or .wide");
  if (wide) {
    const Ty w = widened(l, t);
    l.operands({l.dest(l.arg(0), w), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), w)});
    l.inst.fn = t == Ty::U16   ? wide_mad<u16, u32>()
                : t == Ty::S16 ? wide_mad<s16, s32>()
                : t == Ty::U32 ? wide_mad<u32, u64>()
                               : wide_mad<s32, s64>();
    return;
  }
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), t)});
  if (uses || sets) {
    l.inst.imm = carry_slot(l);
    l.inst.n = (u8)((uses ? 1 : 0) | (sets ? 2 : 0));
    l.inst.fn = by_integer(l, t, [&](auto z) {
      using T = decltype(z);
      return hi ? mad_carry<T, true>() : mad_carry<T, false>();
    });
    return;
  }
  l.inst.fn = by_integer(l, t, [&](auto z) {
    using T = decltype(z);
    using U = Unsigned<T>;
    return hi ? ternary<T, T, T, T>([](T a, T b, T c) { return (T)((U)mul_high(a, b) + (U)c); })
              : ternary<T, T, T, T>([](T a, T b, T c) { return (T)((U)mul_low(a, b) + (U)c); });
  });
}

void mul24(Lower& l) {
  const bool hi = l.take("hi");
  if (!hi && !l.take("lo")) l.fail("mul24 needs .lo or .hi");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  const bool add = l.s.op[0] == "mad24";
  l.operands(
      {l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), add ? l.use(l.arg(3), t) : l.constant(0, 4)});
  l.inst.fn =
      t == Ty::S32
          ? (hi ? ternary<s32, s32, s32, s32>([](s32 a, s32 b, s32 c) {
              return (s32)((u32)(((s64)(a << 8 >> 8) * (b << 8 >> 8)) >> 16) + (u32)c);
            })
                : ternary<s32, s32, s32, s32>(
                      [](s32 a, s32 b, s32 c) { return (s32)((u32)((s64)(a << 8 >> 8) * (b << 8 >> 8)) + (u32)c); }))
          : (hi ? ternary<u32, u32, u32, u32>(
                      [](u32 a, u32 b, u32 c) { return (u32)(((u64)(a & 0xffffff) * (b & 0xffffff)) >> 16) + c; })
                : ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; }));
}

// Division by zero does not trap: all ones for the quotient, the dividend as remainder.
template <class T>
T divide(T a, T b) {
  if (b == 0) return (T) ~(T)0;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return (T)(0 - (Unsigned<T>)a);
  return (T)(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return (T)(a % b);
}

template <class F>
void simple(Lower& l, F f) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  three(l, t);
  l.inst.fn = by_integer(l, t, f);
}

void min_max(Lower& l) {
  const bool is_min = l.s.op[0] == "min";
  l.inst.cls = Class::Integer;
  const bool relu = l.take("relu");
  const Ty t = l.take_type();
  three(l, t);
  if (relu && t != Ty::S32) l.fail("integer .relu needs .s32");
  if (relu) {
    l.inst.fn = is_min ? binary<s32, s32, s32>([](s32 a, s32 b) { return std::max(0, std::min(a, b)); })
                       : binary<s32, s32, s32>([](s32 a, s32 b) { return std::max(0, std::max(a, b)); });
  } else if (t == Ty::U16x2) {
    l.inst.fn = is_min ? halves<u16, decltype([](u16 a, u16 b) { return std::min(a, b); })>()
                       : halves<u16, decltype([](u16 a, u16 b) { return std::max(a, b); })>();
  } else if (t == Ty::S16x2) {
    l.inst.fn = is_min ? halves<s16, decltype([](s16 a, s16 b) { return std::min(a, b); })>()
                       : halves<s16, decltype([](s16 a, s16 b) { return std::max(a, b); })>();
  } else {
    l.inst.fn = by_integer(l, t, [&](auto z) {
      using T = decltype(z);
      return is_min ? binary<T, T, T>([](T a, T b) { return b < a ? b : a; })
                    : binary<T, T, T>([](T a, T b) { return a < b ? b : a; });
    });
  }
}

void abs_neg(Lower& l) {
  const bool absolute = l.s.op[0] == "abs";
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  l.inst.fn = by_integer(l, t, [&](auto z) {
    using T = decltype(z);
    return absolute ? unary<T, T>([](T a) { return a < 0 ? T(0 - (Unsigned<T>)a) : a; })
                    : unary<T, T>([](T a) { return T(0 - (Unsigned<T>)a); });
  });
}

void sad(Lower& l) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), t)});
  l.inst.fn = by_integer(l, t, [](auto z) {
    using T = decltype(z);
    using U = Unsigned<T>;
    return ternary<T, T, T, T>([](T a, T b, T c) { return T((U)c + (a < b ? (U)b - (U)a : (U)a - (U)b)); });
  });
}

template <bool kSignedA, bool kSignedB>
u32 dot4(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 32; i += 8)
    c += (u32)((kSignedA ? (int)(s8)(a >> i) : (int)(u8)(a >> i)) * (kSignedB ? (int)(s8)(b >> i) : (int)(u8)(b >> i)));
  return c;
}

void dp4a(Lower& l) {
  const Ty ta = l.take_type(), tb = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::B32), l.use(l.arg(2), Ty::B32), l.use(l.arg(3), Ty::B32)});
  const bool a = ta == Ty::S32, b = tb == Ty::S32;
  l.inst.fn = a ? (b ? ternary<u32, u32, u32, u32>([](u32 x, u32 y, u32 z) { return dot4<true, true>(x, y, z); })
                     : ternary<u32, u32, u32, u32>([](u32 x, u32 y, u32 z) { return dot4<true, false>(x, y, z); }))
                : (b ? ternary<u32, u32, u32, u32>([](u32 x, u32 y, u32 z) { return dot4<false, true>(x, y, z); })
                     : ternary<u32, u32, u32, u32>([](u32 x, u32 y, u32 z) { return dot4<false, false>(x, y, z); }));
}

void quotient(Lower& l) {
  simple(l, [](auto z) {
    using T = decltype(z);
    return binary<T, T, T>([](T a, T b) { return divide(a, b); });
  });
}

bool is_float(const Lower& l) {
  for (const auto& m : l.s.op)
    if (m == "f32" || m == "f64" || m == "f16" || m == "f16x2" || m == "bf16" || m == "bf16x2") return true;
  return false;
}

}  // namespace

void add_float_arithmetic(Lower& l);  // ops_float.cpp

// Opcodes that floats share are told apart by their type.
template <void (*kInteger)(Lower&)>
static void shared_opcode(Lower& l) {
  if (is_float(l))
    add_float_arithmetic(l);
  else
    kInteger(l);
}

void add_integer_ops(Table& t) {
  t["add"] = t["sub"] = shared_opcode<add_sub>;
  t["mul"] = shared_opcode<mul>;
  t["mad"] = shared_opcode<mad>;
  t["min"] = t["max"] = shared_opcode<min_max>;
  t["abs"] = t["neg"] = shared_opcode<abs_neg>;
  t["div"] = shared_opcode<quotient>;
  t["rem"] = [](Lower& l) {
    simple(l, [](auto z) {
      using T = decltype(z);
      return binary<T, T, T>([](T a, T b) { return remainder(a, b); });
    });
  };
  t["addc"] = [](Lower& l) { carried(l, false, true); };
  t["subc"] = [](Lower& l) { carried(l, true, true); };
  t["madc"] = mad;
  t["mul24"] = t["mad24"] = mul24;
  t["sad"] = sad;
  t["dp4a"] = dp4a;
}
