// mma.sync: f16, bf16 and tf32 operands, f32 and f16 accumulators. A 16-bit operand register is an
// 8x8 row-major matrix across the warp (lane l: row l / 4, columns 2 (l % 4) and + 1), a tf32 one is
// 8x4; an accumulator register pair interleaves columns.
#include <algorithm>

#include "floats.h"
#include "lower.h"
#include "tile.h"

namespace {

enum class In : u8 { F16, BF16, TF32 };

typedef u32 Bits4 __attribute__((vector_size(16)));
constexpr u32 kTf32 = 0xffffe000u;  // the bits of a float that a tf32 operand keeps

template <In kIn>
void widen_8x8(const void* reg, float (&out)[8][8]) {
  const u16* h = (const u16*)reg;
#ifdef __F16C__
  if constexpr (kIn == In::F16) {
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out[i], _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + 8 * i))));
    return;
  }
#endif
#pragma GCC ivdep
  for (int i = 0; i < 64; ++i) out[i / 8][i % 8] = kIn == In::BF16 ? from_bfloat(h[i]) : from_half(h[i]);
}

template <int K, In kIn>
void load_a(const Warp& w, const Inst& I, float (&a)[16][K]) {
  const Ref* r = I.r + 4;
  if constexpr (kIn == In::TF32) {
    for (int j = 0; j < K / 2; ++j) {  // register j: rows 8 (j % 2), columns 4 (j / 2)
      const Bits4* v = w.at<Bits4>(r[j]);
      for (int i = 0; i < 8; ++i) {
        const Bits4 row = v[i] & kTf32;
        std::memcpy(&a[i + 8 * (j % 2)][4 * (j / 2)], &row, 16);
      }
    }
  } else {
    for (int j = 0; j < K / 4; ++j) {
      float m[8][8];
      widen_8x8<kIn>(w.at<u16>(r[j]), m);
      for (int i = 0; i < 8; ++i) std::memcpy(&a[i + 8 * (j % 2)][8 * (j / 2)], m[i], 32);
    }
  }
}

template <int K, In kIn>
void load_b(const Warp& w, const Inst& I, float (&b)[K][8]) {
  const Ref* r = I.r + 8;
  if constexpr (kIn == In::TF32) {
    for (int j = 0; j < K / 4; ++j) {
      const Bits4* v = w.at<Bits4>(r[j]);
      for (int half = 0; half < 2; ++half) {  // 4 x 4 by two rounds of interleaving
        const Bits4 r0 = v[4 * half], r1 = v[4 * half + 1], r2 = v[4 * half + 2], r3 = v[4 * half + 3];
        const Bits4 p = __builtin_shuffle(r0, r2, Bits4{0, 4, 1, 5}), q = __builtin_shuffle(r1, r3, Bits4{0, 4, 1, 5});
        const Bits4 s = __builtin_shuffle(r0, r2, Bits4{2, 6, 3, 7}), t = __builtin_shuffle(r1, r3, Bits4{2, 6, 3, 7});
        const Bits4 columns[4] = {
            __builtin_shuffle(p, q, Bits4{0, 4, 1, 5}) & kTf32, __builtin_shuffle(p, q, Bits4{2, 6, 3, 7}) & kTf32,
            __builtin_shuffle(s, t, Bits4{0, 4, 1, 5}) & kTf32, __builtin_shuffle(s, t, Bits4{2, 6, 3, 7}) & kTf32};
        for (int k = 0; k < 4; ++k) std::memcpy(&b[4 * j + k][4 * half], &columns[k], 16);
      }
    }
  } else {
    for (int j = 0; j < K / 8; ++j) {
      float m[8][8];
      widen_8x8<kIn>(w.at<u16>(r[j]), m);  // row n, column k
      for (int n = 0; n < 8; ++n)
        for (int k = 0; k < 8; ++k) b[8 * j + k][n] = m[n][k];
    }
  }
}

template <int K, In kIn, bool kHalfOut>
void mma(Warp& w, const Inst& I, u32) {
  alignas(32) float a[16][K], b[K][8], c[16][8];
  load_a<K, kIn>(w, I, a);
  load_b<K, kIn>(w, I, b);
  const Ref* rc = I.r + 10;
  for (int h = 0; h < 2; ++h) {
    if constexpr (kHalfOut) {
      const u16* v = w.at<u16>(rc[h]);
      for (int i = 0; i < 64; ++i) c[8 * h + i / 8][i % 8] = from_half(v[i]);
    } else {
      const float *even = w.at<float>(rc[2 * h]), *odd = w.at<float>(rc[2 * h + 1]);
      float* rows = c[8 * h];
      for (int i = 0; i < kLanes; ++i) rows[2 * i] = even[i], rows[2 * i + 1] = odd[i];
    }
  }
  multiply_tile(a, b, c);
  for (int h = 0; h < 2; ++h) {
    if constexpr (kHalfOut) {
      u16* v = w.at<u16>(I.r[h]);
      for (int i = 0; i < 64; ++i) v[i] = float_to_half(c[8 * h + i / 8][i % 8]);
    } else {
      float *even = w.at<float>(I.r[2 * h]), *odd = w.at<float>(I.r[2 * h + 1]);
      const float* rows = c[8 * h];
      for (int i = 0; i < kLanes; ++i) even[i] = canonical(rows[2 * i]), odd[i] = canonical(rows[2 * i + 1]);
    }
  }
}

void lower_mma(Lower& l) {
  if (!l.take("sync") || !l.take("aligned")) l.fail("needs .sync.aligned");
  const std::string shape = l.take_any();
  const int k = shape == "m16n8k16" ? 16 : shape == "m16n8k8" ? 8 : shape == "m16n8k4" ? 4 : 0;
  if (!k) l.fail("unsupported shape");
  if (!l.take("row") || !l.take("col")) l.fail("needs .row.col");
  const Ty d = l.take_type(), a = l.take_type(), b = l.take_type(), c = l.take_type();
  if (a != b || d != c || (d != Ty::F32 && !(d == Ty::F16 && a == Ty::F16))) l.fail("unsupported types");
  // Twelve slots: d at 0, a at 4, b at 8, c at 10.
  std::vector<Ref> refs(14, kNone);
  const bool tf32 = a == Ty::TF32;
  const size_t want[4] = {d == Ty::F16 ? 2u : 4u, (size_t)(tf32 ? k / 2 : k / 4), (size_t)(tf32 ? k / 4 : k / 8),
                          c == Ty::F16 ? 2u : 4u};
  const size_t at[4] = {0, 4, 8, 10};
  for (int i = 0; i < 4; ++i) {
    const ptx::Arg& v = l.arg(i);
    std::vector<ptx::Arg> elems = v.kind == ptx::Arg::Vec ? v.elems : std::vector<ptx::Arg>{v};
    if (elems.size() != want[i]) l.fail("vector length does not match the shape");
    for (size_t j = 0; j < elems.size(); ++j)
      refs[at[i] + j] =
          i == 3 && elems[j].kind == ptx::Arg::Float ? l.use(elems[j], Ty::F32) : l.use(elems[j], Ty::B32);
  }
  l.operands(refs);
  l.inst.control = Control::Collective;
  l.inst.cls = Class::Mma;
  l.inst.imm = 2ull * 16 * 8 * (u64)k;
  if (tf32 && k == 8)
    l.inst.fn = mma<8, In::TF32, false>;
  else if (tf32 && k == 4)
    l.inst.fn = mma<4, In::TF32, false>;
  else if (a == Ty::BF16 && k == 16)
    l.inst.fn = mma<16, In::BF16, false>;
  else if (a == Ty::BF16 && k == 8)
    l.inst.fn = mma<8, In::BF16, false>;
  else if (a == Ty::F16 && k == 16)
    l.inst.fn = d == Ty::F16 ? mma<16, In::F16, true> : mma<16, In::F16, false>;
  else if (a == Ty::F16 && k == 8)
    l.inst.fn = d == Ty::F16 ? mma<8, In::F16, true> : mma<8, In::F16, false>;
  else
    l.fail("unsupported types for this shape");
}

}  // namespace

void add_mma_ops(Table& t) { t["mma"] = lower_mma; }
