// The weight gradient by Winograd, one source for every instruction set.
//
// Direct: outer_product.h. Winograd, the transpose of F(4x4, 3x3) in g:  dW = G^T [ sum over tiles of (A dy A^T)
// . (B^T d B) ] G.
#pragma once

#include "cpu/kernels/outer_product.h"
#include "cpu/kernels/winograd.h"

namespace resnet_fast {
namespace {

template <typename T>
void winograd_input(const WinogradCall<T>& call, int64_t panel, int64_t point, T* strip, T* out) {
  transform_inputs(call, gemm_panel<T>(Simd<T>::lanes), panel, point, strip, out);
}

// A d: the transpose of transform_output.
template <typename T>
RESNET_FAST_INLINE void transform_gradient(const typename Simd<T>::Vec (&d)[kTileOut],
                                           typename Simd<T>::Vec (&m)[kTileIn]) {
  typedef typename Simd<T>::Vec Vec;
  constexpr T a = T(kPointA), b = T(kPointB), aa = T(kSquareA), bb = T(kSquareB);
  constexpr T aaa = T(kSquareA * kPointA), bbb = T(kSquareB * kPointB);
  const Vec even_a = d[0] + aa * d[2], odd_a = a * d[1] + aaa * d[3];
  const Vec even_b = d[0] + bb * d[2], odd_b = b * d[1] + bbb * d[3];
  m[0] = d[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = d[3];
}

// Tiles [tile_begin, tile_end) of call.input, 4 x 4 pixels each, to out[point][panel][tile][channel of the panel].
// The input is padded with zeros to the end of the last tiles.
template <typename T>
void winograd_gradient(const WinogradCall<T>& call, int64_t panel, int64_t point, T* out) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int width = gemm_panel<T>(Simd<T>::lanes);
  const Tiling tiling(call.height, call.width, false);
  for (int tile = call.tile_begin; tile < call.tile_end; ++tile) {
    const TilePlace place(tile, tiling);
    const T* from = call.input + place.image * call.input_image + kTileOut * place.row * call.input_row +
                    kTileOut * place.column * call.input_pixel;
    for (int c = 0; c < call.channels; c += Simd<T>::lanes) {
      Vec half[kTileOut][kTileIn];
      for (int i = 0; i < kTileOut; ++i) {
        const T* line = from + i * call.input_row + c;
        const Vec d[kTileOut] = {Simd<T>::load(line), Simd<T>::load(line + call.input_pixel),
                                 Simd<T>::load(line + 2 * call.input_pixel),
                                 Simd<T>::load(line + 3 * call.input_pixel)};
        transform_gradient<T>(d, half[i]);
      }
      T* to = out + c / width * panel + (tile - call.tile_begin) * width + c % width;
      // Prefetch where the next vector goes: 36 streams of stores would miss the cache at each line.
      const int n = c + Simd<T>::lanes;
      const T* next = n < call.channels ? out + n / width * panel + (tile - call.tile_begin) * width + n % width
                                        : out + (tile + 1 - call.tile_begin) * width;
      for (int j = 0; j < kTileIn; ++j) {
        const Vec d[kTileOut] = {half[0][j], half[1][j], half[2][j], half[3][j]};
        Vec m[kTileIn];
        transform_gradient<T>(d, m);
        for (int i = 0; i < kTileIn; ++i) {
          Simd<T>::store(to + (kTileIn * i + j) * point, m[i]);
          __builtin_prefetch(next + (kTileIn * i + j) * point, 1);
        }
      }
    }
  }
}

// G^T u: the transpose of transform_filter.
template <typename T>
RESNET_FAST_INLINE void transform_filter_gradient(const typename Simd<T>::Vec (&u)[kTileIn],
                                                  typename Simd<T>::Vec (&g)[3]) {
  typedef typename Simd<T>::Vec Vec;
  const Vec sum_a = (u[1] + u[2]) * T(1 / kDistanceA), difference_a = (u[1] - u[2]) * T(1 / kDistanceA);
  const Vec sum_b = (u[3] + u[4]) * T(1 / kDistanceB), difference_b = (u[3] - u[4]) * T(1 / kDistanceB);
  g[0] = u[0] + sum_a + sum_b;
  g[1] = T(kPointA) * difference_a + T(kPointB) * difference_b;
  g[2] = u[5] + T(kSquareA) * sum_a + T(kSquareB) * sum_b;
}

// sums[point][channel] of one output channel -> out[tap][channel].
template <typename T>
void winograd_filter_gradient(const T* sums, int64_t point, int columns, T* out) {
  typedef typename Simd<T>::Vec Vec;
  for (int c = 0; c < columns; c += Simd<T>::lanes) {
    Vec half[3][kTileIn];
    for (int j = 0; j < kTileIn; ++j) {
      Vec u[kTileIn], g[3];
      for (int i = 0; i < kTileIn; ++i) u[i] = Simd<T>::load(sums + (kTileIn * i + j) * point + c);
      transform_filter_gradient<T>(u, g);
      half[0][j] = g[0], half[1][j] = g[1], half[2][j] = g[2];
    }
    for (int r = 0; r < 3; ++r) {
      Vec g[3];
      transform_filter_gradient<T>(half[r], g);
      for (int s = 0; s < 3; ++s) Simd<T>::store(out + (3 * r + s) * columns + c, g[s]);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
