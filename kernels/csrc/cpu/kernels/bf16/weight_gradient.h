// The weight gradient in bfloat16, from pairs of images: each instruction accumulates the products of both in float32.
//
// Direct: kernels/outer_product.h. Winograd, the transpose of F(2x2, 3x3) in g:
//
//   dW = G^T [ sum over tiles of (A dy A^T) . (B^T d B) ] G
//
// Transforms only add and subtract, in float32; their results are rounded once.
#pragma once

#include "cpu/kernels/bf16/simd.h"
#include "cpu/kernels/outer_product.h"

namespace resnet_fast {
namespace {

template <>
struct OuterRegisterTile<Bf16Pair> {
  template <int P, int V>
  using Of = PairRegisterTile<P, V>;
};

inline void pair_bf16(const float* first, const float* second, int64_t n, Bf16Pair* to) {
  int64_t i = 0;
  for (; i + kBf16Lanes <= n; i += kBf16Lanes) {
    store_pairs(&to[i].first, paired(load_floats(first + i), load_floats(second + i)));
  }
  if (i == n) return;
  float rest[2][kBf16Lanes] = {};
  Bf16Pair pairs[kBf16Lanes];
  for (int64_t j = i; j < n; ++j) rest[0][j - i] = first[j], rest[1][j - i] = second[j];
  store_pairs(&pairs[0].first, paired(load_floats(rest[0]), load_floats(rest[1])));
  for (int64_t j = i; j < n; ++j) to[j] = pairs[j - i];
}

// 16 channels of both images.
struct ImagePair {
  Floats first, second;

  RESNET_FAST_INLINE ImagePair operator+(const ImagePair& o) const { return {first + o.first, second + o.second}; }
  RESNET_FAST_INLINE ImagePair operator-(const ImagePair& o) const { return {first - o.first, second - o.second}; }
};

RESNET_FAST_INLINE ImagePair load_image_pair(const Bf16Pair* p) {
  const Pairs pairs = load_pairs(&p->first);
  return {even(pairs), odd(pairs)};
}
RESNET_FAST_INLINE void store_image_pair(Bf16Pair* p, const ImagePair& v) {
  store_pairs(&p->first, paired(v.first, v.second));
}

// Row I of B^T d for a column of the input. The last row has the opposite sign of the convolution's, and so has that of
// A below: the products are the same.
template <int I>
RESNET_FAST_INLINE ImagePair input_row(const Bf16Pair* from, int64_t row) {
  if (I == 0) return load_image_pair(from) - load_image_pair(from + 2 * row);
  if (I == 1) return load_image_pair(from + row) + load_image_pair(from + 2 * row);
  if (I == 2) return load_image_pair(from + 2 * row) - load_image_pair(from + row);
  return load_image_pair(from + 3 * row) - load_image_pair(from + row);
}

// Row I of A dy for a column of the gradient.
template <int I>
RESNET_FAST_INLINE ImagePair gradient_row(const Bf16Pair* from, int64_t row) {
  if (I == 0) return load_image_pair(from);
  if (I == 1) return load_image_pair(from) + load_image_pair(from + row);
  if (I == 2) return load_image_pair(from) - load_image_pair(from + row);
  return load_image_pair(from + row);
}

// Four points, in row I, of adjacent tiles. Their two shared columns stay in registers.
template <int I>
void transform_input_pairs(const Bf16Pair* input, int64_t row, int64_t pixel, int tiles, Bf16Pair* out, int width,
                           int64_t point) {
  out += I * kBf16TileIn * point;
  ImagePair a = input_row<I>(input, row), b = input_row<I>(input + pixel, row);
  for (int t = 0; t < tiles; ++t, input += kBf16TileOut * pixel, out += width) {
    const ImagePair c = input_row<I>(input + 2 * pixel, row), d = input_row<I>(input + 3 * pixel, row);
    store_image_pair(out, a - c), store_image_pair(out + point, b + c);
    store_image_pair(out + 2 * point, c - b), store_image_pair(out + 3 * point, d - b);
    a = c, b = d;
  }
}

template <int I>
void transform_gradient_pairs(const Bf16Pair* input, int64_t row, int64_t pixel, int tiles, Bf16Pair* out, int width,
                              int64_t point) {
  out += I * kBf16TileIn * point;
  for (int t = 0; t < tiles; ++t, input += kBf16TileOut * pixel, out += width) {
    const ImagePair a = gradient_row<I>(input, row), b = gradient_row<I>(input + pixel, row);
    store_image_pair(out, a), store_image_pair(out + point, a + b);
    store_image_pair(out + 2 * point, a - b), store_image_pair(out + 3 * point, b);
  }
}

// Transforms the tiles of a call to out[point][panel][tile][channel of the panel], one row of tiles at a time.
template <typename Transform>
void transform_pairs(const WinogradCall<Bf16Pair>& call, int64_t panel, int64_t point, Bf16Pair* out,
                     const Transform& transform) {
  constexpr int width = gemm_panel<Bf16Pair>(kBf16Lanes);
  const int tiles_h = (call.height + 1) / kBf16TileOut, tiles_w = (call.width + 1) / kBf16TileOut;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const int column = tile % tiles_w, row = tile / tiles_w % tiles_h, pair = tile / (tiles_w * tiles_h);
    const int tiles = call.tile_end - tile < tiles_w - column ? call.tile_end - tile : tiles_w - column;
    const Bf16Pair* from = call.input + pair * call.input_image + kBf16TileOut * row * call.input_row +
                           kBf16TileOut * column * call.input_pixel;
    Bf16Pair* const to = out + (tile - call.tile_begin) * width;
    for (int c = 0; c < call.channels; c += kBf16Lanes) {
      transform(from + c, tiles, to + c / width * panel + c % width, width, point);
    }
    tile += tiles;
  }
}

inline void winograd_input_pairs(const WinogradCall<Bf16Pair>& call, int64_t panel, int64_t point, Bf16Pair*,
                                 Bf16Pair* out) {
  const int64_t row = call.input_row, pixel = call.input_pixel;
  transform_pairs(call, panel, point, out, [=](const Bf16Pair* from, int tiles, Bf16Pair* to, int width, int64_t at) {
    transform_input_pairs<0>(from, row, pixel, tiles, to, width, at);
    transform_input_pairs<1>(from, row, pixel, tiles, to, width, at);
    transform_input_pairs<2>(from, row, pixel, tiles, to, width, at);
    transform_input_pairs<3>(from, row, pixel, tiles, to, width, at);
  });
}

// The input is padded with zeros to the end of the last tiles.
inline void winograd_gradient_pairs(const WinogradCall<Bf16Pair>& call, int64_t panel, int64_t point, Bf16Pair* out) {
  const int64_t row = call.input_row, pixel = call.input_pixel;
  transform_pairs(call, panel, point, out, [=](const Bf16Pair* from, int tiles, Bf16Pair* to, int width, int64_t at) {
    transform_gradient_pairs<0>(from, row, pixel, tiles, to, width, at);
    transform_gradient_pairs<1>(from, row, pixel, tiles, to, width, at);
    transform_gradient_pairs<2>(from, row, pixel, tiles, to, width, at);
    transform_gradient_pairs<3>(from, row, pixel, tiles, to, width, at);
  });
}

// G^T u: the transpose of transform_bf16_filter.
RESNET_FAST_INLINE void transform_bf16_filter_gradient(const Floats (&u)[kBf16TileIn], Floats (&g)[3]) {
  const Floats sum = 0.5f * (u[1] + u[2]);
  g[0] = u[0] + sum;
  g[1] = 0.5f * (u[1] - u[2]);
  g[2] = sum + u[3];
}

// sums[point][channel] of one output channel -> out[tap][channel].
inline void winograd_bf16_filter_gradient(const float* sums, int64_t point, int columns, float* out) {
  for (int c = 0; c < columns; c += kBf16Lanes) {
    Floats half[3][kBf16TileIn];
    for (int j = 0; j < kBf16TileIn; ++j) {
      Floats u[kBf16TileIn], g[3];
      for (int i = 0; i < kBf16TileIn; ++i) u[i] = load_floats(sums + (kBf16TileIn * i + j) * point + c);
      transform_bf16_filter_gradient(u, g);
      half[0][j] = g[0], half[1][j] = g[1], half[2][j] = g[2];
    }
    for (int r = 0; r < 3; ++r) {
      Floats g[3];
      transform_bf16_filter_gradient(half[r], g);
      for (int s = 0; s < 3; ++s) store_floats(out + (3 * r + s) * columns + c, g[s]);
    }
  }
}

template <int P, int PH>
constexpr Kernels<Bf16Pair> bf16_pair_kernels() {
  return {kBf16Lanes,
          P,
          pair_bf16,
          outer_products<Bf16Pair, P, PH>,
          winograd_input_pairs,
          winograd_gradient_pairs,
          winograd_bf16_filter_gradient};
}

}  // namespace
}  // namespace resnet_fast
