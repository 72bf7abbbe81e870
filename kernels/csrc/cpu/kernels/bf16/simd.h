// Vectors of 16 float32 and of 16 pairs of bfloat16; the register tile that all bfloat16 kernels share.
//
// A file that includes this has selected its instruction set, and defines RESNET_FAST_AVX512_BF16 if that multiplies
// bfloat16 (GCC 12 does not define its own macro after a pragma). Else the same code widens each factor to float32:
// correct everywhere, slower than the float32 kernels.
#pragma once

#include "cpu/kernels/bf16/kernels.h"
#include "cpu/kernels/simd.h"

#ifdef RESNET_FAST_AVX512_BF16
#include <immintrin.h>
#endif

namespace resnet_fast {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsInMemory __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Pairs __attribute__((vector_size(64)));
typedef int32_t PairsInMemory __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t HalvesInMemory __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t PairInMemory __attribute__((aligned(2), may_alias));

RESNET_FAST_INLINE Floats load_floats(const float* p) { return *reinterpret_cast<const FloatsInMemory*>(p); }
RESNET_FAST_INLINE void store_floats(float* p, Floats v) { *reinterpret_cast<FloatsInMemory*>(p) = v; }
RESNET_FAST_INLINE Pairs load_pairs(const BFloat16* p) { return *reinterpret_cast<const PairsInMemory*>(p); }

// Channels 2 i, and 2 i + 1, of the pairs i.
RESNET_FAST_INLINE Floats even(Pairs v) { return reinterpret_cast<Floats>(v << 16); }
RESNET_FAST_INLINE Floats odd(Pairs v) { return reinterpret_cast<Floats>(v & static_cast<int32_t>(0xFFFF0000)); }

RESNET_FAST_INLINE Floats load_widened(const BFloat16* p) {
  const Halves halves = *reinterpret_cast<const HalvesInMemory*>(p);
#ifdef RESNET_FAST_AVX512_BF16
  const Pairs wide = reinterpret_cast<Pairs>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(halves)));
#else
  const Pairs wide = __builtin_convertvector(halves, Pairs);
#endif
  return reinterpret_cast<Floats>(wide << 16);
}

// Rounded to nearest even; NaN stays NaN. (The instruction takes float32 below 2^-126 for zero.)
RESNET_FAST_INLINE void store_rounded(BFloat16* p, Floats v) {
#ifdef RESNET_FAST_AVX512_BF16
  *reinterpret_cast<HalvesInMemory*>(p) = reinterpret_cast<Halves>(_mm512_cvtneps_pbh(v));
#else
  const Pairs bits = reinterpret_cast<Pairs>(v);
  const Pairs rounded = bits + 0x7FFF + ((bits >> 16) & 1), quiet = bits | 0x400000;
  *reinterpret_cast<HalvesInMemory*>(p) = __builtin_convertvector((v != v ? quiet : rounded) >> 16, Halves);
#endif
}

RESNET_FAST_INLINE void store_rounded(BFloat16* p, Floats first, Floats second) {
#ifdef RESNET_FAST_AVX512_BF16
  *reinterpret_cast<PairsInMemory*>(p) = reinterpret_cast<Pairs>(_mm512_cvtne2ps_pbh(second, first));
#else
  store_rounded(p, first), store_rounded(p + kBf16Lanes, second);
#endif
}

// The two rounded and interleaved.
RESNET_FAST_INLINE Pairs paired(Floats first, Floats second) {
#ifdef RESNET_FAST_AVX512_BF16
  typedef int16_t Words __attribute__((vector_size(64)));
  constexpr Words order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Pairs>(_mm512_maskz_permutexvar_epi16(
      0xFFFFFFFF, reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first))));
#else
  BFloat16 halves[2 * kBf16Lanes];
  store_rounded(halves, first), store_rounded(halves + kBf16Lanes, second);
  const Pairs low = reinterpret_cast<Pairs>(load_widened(halves)),
              high = reinterpret_cast<Pairs>(load_widened(halves + kBf16Lanes));
  return high | ((low >> 16) & 0xFFFF);
#endif
}
RESNET_FAST_INLINE void store_pairs(BFloat16* to, Pairs v) { *reinterpret_cast<PairsInMemory*>(to) = v; }

// Keeps NaN and the sign of zero: the instruction returns its second operand for these.
RESNET_FAST_INLINE Floats relu(Floats v) {
#ifdef RESNET_FAST_AVX512_BF16
  return _mm512_maskz_max_ps(0xFFFF, Floats{}, v);
#else
  return v < 0 ? Floats{} : v;
#endif
}

// acc + both products of each pair.
RESNET_FAST_INLINE Floats dot_accumulate(Floats acc, Pairs a, Pairs b) {
#ifdef RESNET_FAST_AVX512_BF16
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  return acc + even(a) * even(b) + odd(a) * odd(b);
#endif
}

template <int... L>
RESNET_FAST_INLINE Pairs splat_pair(const BFloat16* p, Indices<L...>) {
  const int32_t pair = *reinterpret_cast<const PairInMemory*>(p);
  return Pairs{((void)L, pair)...};
}

// Accumulators of P rows (output pixels or tiles) x V vectors of output channels, as RegisterTile in kernels/simd.h, by
// pairs of channels.
template <int P, int V>
struct PairRegisterTile {
  static constexpr int lanes = kBf16Lanes, width = V * lanes;
  static constexpr int kPrefetchSteps = 16;  // deep filters come from beyond L2
  Floats acc[P * V];

  template <int... I>
  RESNET_FAST_INLINE void zero(Indices<I...>) {
    ((acc[I] = Floats{}), ...);
  }

  template <int... I, int... F>
  RESNET_FAST_INLINE void multiply_add(const BFloat16* x, const int64_t (&offset)[P], const BFloat16* filter,
                                       Indices<I...>, Indices<F...>) {
    for (int v = 0; v < V; ++v) __builtin_prefetch(filter + kPrefetchSteps * 2 * width + 2 * v * kBf16Lanes);
    const Pairs panel[V] = {load_pairs(filter + 2 * F * kBf16Lanes)...};
    ((multiply_add_row<I>(splat_pair(x + offset[I], typename MakeIndices<kBf16Lanes>::type()), panel, Indices<F...>())),
     ...);
  }

  // As RegisterTile::outer_product, over a pair of images.
  template <int... I, int... F>
  RESNET_FAST_INLINE void outer_product(const Bf16Pair* d, const Bf16Pair* columns, Indices<I...>, Indices<F...>) {
    const Pairs panel[V] = {load_pairs(&columns[F * lanes].first)...};
    ((multiply_add_row<I>(splat_pair(&d[I].first, typename MakeIndices<lanes>::type()), panel, Indices<F...>())), ...);
  }

  template <int I, int... F>
  RESNET_FAST_INLINE void multiply_add_row(Pairs x, const Pairs (&panel)[V], Indices<F...>) {
    ((acc[I * V + F] = dot_accumulate(acc[I * V + F], x, panel[F])), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void add(const float* from, int64_t row_stride, Indices<I...>) {
    ((acc[I] += load_floats(from + (I / V) * row_stride + (I % V) * kBf16Lanes)), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void add_at(const BFloat16* from, const int64_t* offset, Indices<I...>) {
    ((acc[I] += load_widened(from + offset[I / V] + (I % V) * kBf16Lanes)), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void relu(Indices<I...>) {
    ((acc[I] = resnet_fast::relu(acc[I])), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store_at(BFloat16* to, const int64_t* offset, Indices<I...>) const {
    (store_rounded(to + offset[I / V] + (I % V) * kBf16Lanes, acc[I]), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store(float* to, int64_t row, Indices<I...>) const {
    (store_floats(to + (I / V) * row + (I % V) * lanes, acc[I]), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store_packed(float* to, Indices<I...>) const {
    (store_floats(to + I * kBf16Lanes, acc[I]), ...);
  }
};

}  // namespace
}  // namespace resnet_fast
