// The filter transform at run time, in the type of the kernels: a whole panel (training), or a row of points (compact).
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// Factors of the filter transform at point A and at point B: odd, even, even.
template <typename T>
constexpr T kFactors[] = {T(kPointA / kDistanceA), T(1 / kDistanceA), T(kSquareA / kDistanceA),
                          T(kPointB / kDistanceB), T(1 / kDistanceB), T(kSquareB / kDistanceB)};

// G g: the powers of the points over the products of their distances, as in conv/filters.cpp, where it is done in
// float64.
template <typename T>
RESNET_FAST_INLINE void transform_filter(const typename Simd<T>::Vec (&g)[3], typename Simd<T>::Vec (&u)[kTileIn]) {
  typedef typename Simd<T>::Vec Vec;
  const Vec odd_a = g[1] * kFactors<T>[0], even_a = g[0] * kFactors<T>[1] + g[2] * kFactors<T>[2];
  const Vec odd_b = g[1] * kFactors<T>[3], even_b = g[0] * kFactors<T>[4] + g[2] * kFactors<T>[5];
  u[0] = g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

// [channel][tap][width] -> [point][channel][width], V vectors wide, `point` elements from one point to the next.
template <typename T, int V>
void expand_filter(const T* compact, int channels, int64_t point, T* out) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int lanes = Simd<T>::lanes;
  for (int c = 0; c < channels; ++c) {
    for (int v = 0; v < V; ++v) {
      const T* from = compact + (static_cast<int64_t>(c) * 9 * V + v) * lanes;
      T* to = out + (static_cast<int64_t>(c) * V + v) * lanes;
      Vec half[3][kTileIn];
      for (int s = 0; s < 3; ++s) {
        const Vec g[3] = {Simd<T>::load(from + s * V * lanes), Simd<T>::load(from + (3 + s) * V * lanes),
                          Simd<T>::load(from + (6 + s) * V * lanes)};
        transform_filter<T>(g, half[s]);
      }
      for (int i = 0; i < kTileIn; ++i) {
        const Vec g[3] = {half[0][i], half[1][i], half[2][i]};
        Vec u[kTileIn];
        transform_filter<T>(g, u);
        T* row = to + kTileIn * i * point;
        Simd<T>::store(row, u[0]);
        Simd<T>::store(row + point, u[1]);
        Simd<T>::store(row + 2 * point, u[2]);
        Simd<T>::store(row + 3 * point, u[3]);
        Simd<T>::store(row + 4 * point, u[4]);
        Simd<T>::store(row + 5 * point, u[5]);
      }
    }
  }
}

// Row I of G g for one column of the filter, `down` from one of its taps to the next.
template <typename T, int I>
RESNET_FAST_INLINE typename Simd<T>::Vec transform_filter_row(const T* g, int64_t down, const T* factors) {
  typedef typename MakeIndices<Simd<T>::lanes>::type Lanes;
  if (I == 0) return Simd<T>::load(g);
  if (I == 5) return Simd<T>::load(g + 2 * down);
  if (I > 2) factors += 3;
  const typename Simd<T>::Vec odd = Simd<T>::load(g + down) * splat(factors[0], Lanes());
  const typename Simd<T>::Vec even =
      Simd<T>::load(g) * splat(factors[1], Lanes()) + Simd<T>::load(g + 2 * down) * splat(factors[2], Lanes());
  return I % 2 == 1 ? even + odd : even - odd;
}

// Row I of the points of a filter: V vectors out of panels of `width`, [channel][tap][width] -> [point][channel][V
// vectors]. Prefetches two taps of each channel of `next_filter`, which is read next: filters come from memory, in an
// order that no hardware prefetcher follows.
template <typename T, int V, int I>
void expand_row(const T* filter, const T* next_filter, int64_t width, int channels, int64_t point, T* out) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int lanes = Simd<T>::lanes, line = 64 / sizeof(T);
  for (int c = 0; c < channels; ++c, filter += 9 * width, next_filter += 9 * width) {
    __builtin_prefetch(next_filter, 0, 2);
    __builtin_prefetch(next_filter + line, 0, 2);
    for (int v = 0; v < V; ++v, out += lanes) {
      const T* from = filter + v * lanes;
      const Vec g[3] = {transform_filter_row<T, I>(from, 3 * width, kFactors<T>),
                        transform_filter_row<T, I>(from + width, 3 * width, kFactors<T>),
                        transform_filter_row<T, I>(from + 2 * width, 3 * width, kFactors<T>)};
      Vec u[kTileIn];
      transform_filter<T>(g, u);
      Simd<T>::store(out, u[0]);
      Simd<T>::store(out + point, u[1]);
      Simd<T>::store(out + 2 * point, u[2]);
      Simd<T>::store(out + 3 * point, u[3]);
      Simd<T>::store(out + 4 * point, u[4]);
      Simd<T>::store(out + 5 * point, u[5]);
    }
  }
}

template <typename T>
using ExpandRow = void (*)(const T*, const T*, int64_t, int, int64_t, T*);

template <typename T, int V, int... I>
inline ExpandRow<T> select_expand_row(int row, Indices<I...>) {
  static constexpr ExpandRow<T> rows[] = {expand_row<T, V, I>...};
  return rows[row];
}

}  // namespace
}  // namespace resnet_fast
