// Logic, shifts, bit fields, byte permutes.
#include <algorithm>

#include "lower.h"

namespace {

template <class T>
Handler logic(char op) {
  switch (op) {
    case 'a': return binary<T, T, T>([](T a, T b) { return T(a & b); });
    case 'o': return binary<T, T, T>([](T a, T b) { return T(a | b); });
    default: return binary<T, T, T>([](T a, T b) { return T(a ^ b); });
  }
}

void and_or_xor(Lower& l) {
  const char op = l.s.op[0][0];
  const Ty t = l.take_type();
  if (t == Ty::Pred) {
    l.inst.cls = Class::Predicate;
    bool na, nb;
    const Ref a = l.pred_use(l.arg(1), &na), b = l.pred_use(l.arg(2), &nb);
    l.operands({l.pred_dest(l.arg(0)), a, b});
    l.inst.n = (u8)op;
    l.inst.imm = (na ? 1 : 0) | (nb ? 2 : 0);
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      const u32 a = w.pred(I.r[1]) ^ (I.imm & 1 ? kFullMask : 0), b = w.pred(I.r[2]) ^ (I.imm & 2 ? kFullMask : 0);
      const u32 v = I.n == 'a' ? a & b : I.n == 'o' ? a | b : a ^ b;
      u32& d = *w.at<u32>(I.r[0]);
      d = (d & ~m) | (v & m);
    };
    return;
  }
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t)});
  l.inst.fn = by_bits(l, t, [&](auto z) { return logic<decltype(z)>(op); });
}

void not_cnot(Lower& l) {
  const bool logical = l.s.op[0] == "cnot";
  const Ty t = l.take_type();
  if (t == Ty::Pred) {
    l.inst.cls = Class::Predicate;
    bool n;
    const Ref a = l.pred_use(l.arg(1), &n);
    l.operands({l.pred_dest(l.arg(0)), a});
    l.inst.imm = n;
    l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
      u32& d = *w.at<u32>(I.r[0]);
      d = (d & ~m) | ((I.imm ? w.pred(I.r[1]) : ~w.pred(I.r[1])) & m);
    };
    return;
  }
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t)});
  l.inst.fn = by_bits(l, t, [&](auto z) {
    using T = decltype(z);
    return logical ? unary<T, T>([](T a) { return T(a == 0); }) : unary<T, T>([](T a) { return T(~a); });
  });
}

void lop3(Lower& l) {
  if (l.take_type() != Ty::B32) l.fail("lop3 needs .b32");
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::B32), l.use(l.arg(2), Ty::B32), l.use(l.arg(3), Ty::B32)});
  l.inst.imm = l.immediate(l.arg(4));
  l.inst.fn = [](Warp& w, const Inst& I, u32 m) {
    u32* d = w.at<u32>(I.r[0]);
    const u32 *a = w.at<u32>(I.r[1]), *b = w.at<u32>(I.r[2]), *c = w.at<u32>(I.r[3]);
    u32 on[8];
    for (int k = 0; k < 8; ++k) on[k] = I.imm >> k & 1 ? kFullMask : 0;
    for_lanes(m, [&](int i) {
      const u32 x = a[i], y = b[i], z = c[i];
      d[i] = (~x & ~y & ~z & on[0]) | (~x & ~y & z & on[1]) | (~x & y & ~z & on[2]) | (~x & y & z & on[3]) |
             (x & ~y & ~z & on[4]) | (x & ~y & z & on[5]) | (x & y & ~z & on[6]) | (x & y & z & on[7]);
    });
  };
}

// Shift amounts are clamped to the register width, unlike C's.
void shift(Lower& l) {
  const bool left = l.s.op[0] == "shl";
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), Ty::U32)});
  if (left) {
    l.inst.fn = by_bits(l, t, [](auto z) {
      using T = decltype(z);
      return binary<T, T, u32>([](T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(a << n); });
    });
  } else if (t == Ty::S16 || t == Ty::S32 || t == Ty::S64) {
    l.inst.fn = by_integer(l, t, [](auto z) {
      using T = decltype(z);
      return binary<T, T, u32>([](T a, u32 n) { return T(a >> (n >= sizeof(T) * 8 ? sizeof(T) * 8 - 1 : n)); });
    });
  } else {
    l.inst.fn = by_bits(l, t, [](auto z) {
      using T = decltype(z);
      return binary<T, T, u32>([](T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(a >> n); });
    });
  }
}

void funnel(Lower& l) {
  const bool left = l.take("l");
  if (!left && !l.take("r")) l.fail("shf needs .l or .r");
  const bool clamp = l.take("clamp");
  if (!clamp && !l.take("wrap")) l.fail("shf needs .wrap or .clamp");
  if (l.take_type() != Ty::B32) l.fail("shf needs .b32");
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::B32), l.use(l.arg(2), Ty::B32), l.use(l.arg(3), Ty::U32)});
  const auto f = [](auto left_, auto clamp_) {
    return ternary<u32, u32, u32, u32>([](u32 lo, u32 hi, u32 n) {
      n = decltype(clamp_)::value ? std::min(n, 32u) : n & 31;
      const u64 both = (u64)hi << 32 | lo;
      return (u32)(decltype(left_)::value ? both << n >> 32 : both >> n);
    });
  };
  using Yes = std::true_type;
  using No = std::false_type;
  l.inst.fn = left ? (clamp ? f(Yes{}, Yes{}) : f(Yes{}, No{})) : (clamp ? f(No{}, Yes{}) : f(No{}, No{}));
}

void count_bits(Lower& l) {
  const std::string op = l.s.op[0];
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), op == "brev" ? t : Ty::U32), l.use(l.arg(1), t)});
  const bool wide = ptx::bytes_of(t) == 8;
  if (op == "popc") {
    l.inst.fn = wide ? unary<u32, u64>([](u64 a) { return (u32)__builtin_popcountll(a); })
                     : unary<u32, u32>([](u32 a) { return (u32)__builtin_popcount(a); });
  } else if (op == "clz") {
    l.inst.fn = wide ? unary<u32, u64>([](u64 a) { return a ? (u32)__builtin_clzll(a) : 64u; })
                     : unary<u32, u32>([](u32 a) { return a ? (u32)__builtin_clz(a) : 32u; });
  } else if (wide) {
    l.inst.fn = unary<u64, u64>([](u64 a) {
      u64 r = 0;
      for (int i = 0; i < 64; ++i) r |= (a >> i & 1) << (63 - i);
      return r;
    });
  } else {
    l.inst.fn = unary<u32, u32>([](u32 a) {
      u32 r = 0;
      for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
      return r;
    });
  }
}

template <class T>
u32 highest(T a, bool as_shift) {
  using U = std::make_unsigned_t<T>;
  U v = (U)a;
  if (std::is_signed_v<T> && a < 0) v = ~v;
  if (!v) return kNone;
  const u32 at = sizeof(T) == 8 ? 63 - (u32)__builtin_clzll(v) : 31 - (u32)__builtin_clz((u32)v);
  return as_shift ? (u32)sizeof(T) * 8 - 1 - at : at;
}

void bfind(Lower& l) {
  const bool amount = l.take("shiftamt");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::U32), l.use(l.arg(1), t)});
  l.inst.fn = by_integer(l, t, [&](auto z) {
    using T = decltype(z);
    return amount ? unary<u32, T>([](T a) { return highest<T>(a, true); })
                  : unary<u32, T>([](T a) { return highest<T>(a, false); });
  });
}

template <class T>
T extract(T a, u32 pos, u32 len) {
  using U = std::make_unsigned_t<T>;
  constexpr u32 kBits = sizeof(T) * 8;
  pos &= 255, len &= 255;
  if (len == 0) return 0;
  if constexpr (std::is_signed_v<T>) {
    const u32 sign_at = std::min(pos + len - 1, kBits - 1);
    const bool sign = (U)a >> sign_at & 1;
    U v = pos < kBits ? (U)a >> pos : 0;
    const u32 have = pos < kBits ? std::min(len, kBits - pos) : 0;
    const U keep = have >= kBits ? ~(U)0 : ((U)1 << have) - 1;
    return (T)((v & keep) | (sign ? ~keep : 0));
  } else {
    const U v = pos < kBits ? (U)a >> pos : 0;
    return len >= kBits ? v : v & (((U)1 << len) - 1);
  }
}

void bfe(Lower& l) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), Ty::U32), l.use(l.arg(3), Ty::U32)});
  l.inst.fn = by_integer(l, t, [](auto z) {
    using T = decltype(z);
    return ternary<T, T, u32, u32>([](T a, u32 p, u32 n) { return extract<T>(a, p, n); });
  });
}

template <class T>
Handler insert() {
  return [](Warp& w, const Inst& I, u32 m) {
    T* d = w.at<T>(I.r[0]);
    const T *a = w.at<T>(I.r[1]), *b = w.at<T>(I.r[2]);
    const u32 *c = w.at<u32>(I.r[3]), *e = w.at<u32>(I.r[4]);
    for_lanes(m, [&](int i) {
      const u32 pos = c[i] & 255, len = e[i] & 255;
      constexpr u32 kBits = sizeof(T) * 8;
      const T ones = len >= kBits ? ~(T)0 : ((T)1 << len) - 1;
      const T keep = pos >= kBits ? 0 : ones << pos;
      d[i] = (b[i] & ~keep) | (pos >= kBits ? 0 : (a[i] << pos) & keep);
    });
  };
}

void bfi(Lower& l) {
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), t), l.use(l.arg(3), Ty::U32),
              l.use(l.arg(4), Ty::U32)});
  l.inst.fn = ptx::bytes_of(t) == 8 ? insert<u64>() : insert<u32>();
}

u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> (4 * i);
    u8 byte = (u8)(both >> (8 * (s & 7)));
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= (u32)byte << (8 * i);
  }
  return r;
}

// The special modes are selectors of their own, chosen by the low two bits.
template <int kMode>
u32 permute_mode(u32 a, u32 b, u32 c) {
  static constexpr u16 kSelectors[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543},  // f4e
                                           {0x5670, 0x6701, 0x7012, 0x0123},  // b4e
                                           {0x0000, 0x1111, 0x2222, 0x3333},  // rc8
                                           {0x3210, 0x3211, 0x3222, 0x3333},  // ecl
                                           {0x0000, 0x1110, 0x2210, 0x3210},  // ecr
                                           {0x1010, 0x3232, 0x1010, 0x3232}};  // rc16
  return permute(a, b, kSelectors[kMode][c & 3]);
}

void prmt(Lower& l) {
  if (l.take_type() != Ty::B32) l.fail("prmt needs .b32");
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::B32), l.use(l.arg(2), Ty::B32), l.use(l.arg(3), Ty::B32)});
  if (l.take("f4e"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<0>(a, b, c); });
  else if (l.take("b4e"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<1>(a, b, c); });
  else if (l.take("rc8"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<2>(a, b, c); });
  else if (l.take("ecl"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<3>(a, b, c); });
  else if (l.take("ecr"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<4>(a, b, c); });
  else if (l.take("rc16"))
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute_mode<5>(a, b, c); });
  else
    l.inst.fn = ternary<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permute(a, b, c); });
}

void bmsk(Lower& l) {
  const bool clamp = l.take("clamp");
  if (!clamp && !l.take("wrap")) l.fail("bmsk needs .wrap or .clamp");
  l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), Ty::B32), l.use(l.arg(1), Ty::U32), l.use(l.arg(2), Ty::U32)});
  l.inst.fn = clamp ? binary<u32, u32, u32>([](u32 a, u32 b) {
    return a >= 32 ? 0 : (u32)((b >= 32 ? 0xffffffffull : (1ull << b) - 1) << a);
  })
                    : binary<u32, u32, u32>([](u32 a, u32 b) { return (u32)(((1ull << (b & 31)) - 1) << (a & 31)); });
}

void szext(Lower& l) {
  const bool clamp = l.take("clamp");
  if (!clamp && !l.take("wrap")) l.fail("szext needs .wrap or .clamp");
  const Ty t = l.take_type();
  l.inst.cls = Class::Integer;
  l.operands({l.dest(l.arg(0), t), l.use(l.arg(1), t), l.use(l.arg(2), Ty::U32)});
  if (t != Ty::U32 && t != Ty::S32) l.fail("szext needs .u32 or .s32");
  const bool sign = t == Ty::S32;
  l.inst.fn = sign ? (clamp ? binary<u32, u32, u32>([](u32 a, u32 n) {
    return n == 0 ? 0u : n >= 32 ? a : (u32)((s32)(a << (32 - n)) >> (32 - n));
  })
                            : binary<u32, u32, u32>([](u32 a, u32 n) {
                                n &= 31;
                                return n ? (u32)((s32)(a << (32 - n)) >> (32 - n)) : 0u;
                              }))
                   : (clamp ? binary<u32, u32, u32>([](u32 a, u32 n) { return n >= 32 ? a : a & ((1u << n) - 1); })
                            : binary<u32, u32, u32>([](u32 a, u32 n) { return a & ((1u << (n & 31)) - 1); }));
}

}  // namespace

void add_bit_ops(Table& t) {
  t["and"] = t["or"] = t["xor"] = and_or_xor;
  t["not"] = t["cnot"] = not_cnot;
  t["lop3"] = lop3;
  t["shl"] = t["shr"] = shift;
  t["shf"] = funnel;
  t["popc"] = t["clz"] = t["brev"] = count_bits;
  t["bfind"] = bfind;
  t["bfe"] = bfe;
  t["bfi"] = bfi;
  t["prmt"] = prmt;
  t["bmsk"] = bmsk;
  t["szext"] = szext;
}
