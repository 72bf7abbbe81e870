// The input and output transforms of Winograd's F(4x4, 3x3), at the points of kernels.h.
//
// Smaller tiles, of 3 or 2 outputs, leave out points. They share the transformed filter, so the input transform absorbs
// the ratio of the products of distances (see conv/filters.cpp).
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// B^T d in place, for a tile of M outputs; d[p] for the points that it has. Rows of B^T are the coefficients of the
// product of (x - q) over all other points q, the last those of the product over all. Of the points 0, +-a, +-b; A * B
// is 1.
template <typename T, int M>
RESNET_FAST_INLINE void transform_input(typename Simd<T>::Vec (&d)[kTileIn]) {
  typedef typename Simd<T>::Vec Vec;
  constexpr T a = T(kPointA), b = T(kPointB), aa = T(kSquareA), bb = T(kSquareB);
  if constexpr (M == 4) {
    constexpr T sum = T(kSquareA + kSquareB);  // rounded once
    const Vec even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1];
    const Vec even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
    d[0] = d[0] + d[4] - sum * d[2];
    d[5] = d[1] + d[5] - sum * d[3];
    d[1] = even_a + a * odd_a;
    d[2] = even_a - a * odd_a;
    d[3] = even_b + b * odd_b;
    d[4] = even_b - b * odd_b;
  } else if constexpr (M == 3) {
    const Vec d0 = d[0] - a * d[1] - bb * d[2] + b * d[3];
    const Vec even = d[3] - b * d[2], odd = d[2] - b * d[1];
    d[5] = d[4] - b * d[3] - aa * (d[2] - b * d[1]);
    d[3] = T(2 * kPointB) * (d[3] - aa * d[1]);
    d[1] = T(kPointA + kPointB) * (even + a * odd);
    d[2] = T(kPointB - kPointA) * (even - a * odd);
    d[0] = d0;
  } else {
    d[0] = d[0] - bb * d[2];
    d[5] = d[3] - aa * d[1];
    const Vec even = T(kSquareA - kSquareB) * d[2], odd = T(kPointA * (kSquareA - kSquareB)) * d[1];
    d[1] = even + odd;
    d[2] = even - odd;
  }
}

// A^T m: row i holds the i-th powers of the points.
template <typename T, int M>
RESNET_FAST_INLINE void transform_output(const typename Simd<T>::Vec (&m)[kTileIn],
                                         typename Simd<T>::Vec (&y)[kTileOut]) {
  typedef typename Simd<T>::Vec Vec;
  constexpr T a = T(kPointA), b = T(kPointB), aa = T(kSquareA), bb = T(kSquareB);
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  if constexpr (M == 4) {
    constexpr T aaa = T(kSquareA * kPointA), bbb = T(kSquareB * kPointB);
    const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * difference_a + b * difference_b;
    y[2] = aa * sum_a + bb * sum_b;
    y[3] = m[5] + aaa * difference_a + bbb * difference_b;
  } else if constexpr (M == 3) {
    y[0] = m[0] + sum_a + m[3];
    y[1] = a * difference_a + b * m[3];
    y[2] = m[5] + aa * sum_a + bb * m[3];
  } else {
    y[0] = m[0] + sum_a;
    y[1] = m[5] + a * difference_a;
  }
}

// Whether a tile of M outputs has this point.
template <int M>
constexpr bool has_point(int point) {
  return M == 4 || (M == 3 ? point != 4 : point != 3 && point != 4);
}

// A compile-time number of outputs; with_outputs calls body(Outputs<M>()) for a run-time one.
template <int M>
struct Outputs {
  static constexpr int value = M;
};
template <typename Body>
RESNET_FAST_INLINE void with_outputs(int outputs, const Body& body) {
  if (outputs == kTileOut) {
    body(Outputs<4>());
  } else if (outputs == 3) {
    body(Outputs<3>());
  } else {
    body(Outputs<2>());
  }
}

// The image, and the row and column of tiles, of tile `index`.
struct TilePlace {
  int image, row, column;

  TilePlace(int index, const Tiling& tiling)
      : image(index / (tiling.rows.tiles * tiling.columns.tiles)),
        row(index / tiling.columns.tiles % tiling.rows.tiles), column(index % tiling.columns.tiles) {}
};

// Rows of a strip of tiles, M outputs high: to strip[point][column][V vectors].
template <typename T, int V, int M>
void transform_rows(const T* input, int64_t row, int64_t pixel, int columns, T* strip) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int lanes = Simd<T>::lanes;
  const int64_t plane = static_cast<int64_t>(columns) * V * lanes;
  for (int x = 0; x < columns; ++x) {
    for (int v = 0; v < V; ++v) {
      const T* from = input + x * pixel + v * lanes;
      Vec d[kTileIn] = {Simd<T>::load(from), Simd<T>::load(from + row), Simd<T>::load(from + 2 * row),
                        Simd<T>::load(from + 3 * row)};
      if constexpr (M > 2) d[4] = Simd<T>::load(from + 4 * row);
      if constexpr (M > 3) d[5] = Simd<T>::load(from + 5 * row);
      transform_input<T, M>(d);
      T* to = strip + (x * V + v) * lanes;
      Simd<T>::store(to, d[0]);
      Simd<T>::store(to + plane, d[1]);
      Simd<T>::store(to + 2 * plane, d[2]);
      if constexpr (has_point<M>(3)) Simd<T>::store(to + 3 * plane, d[3]);
      if constexpr (has_point<M>(4)) Simd<T>::store(to + 4 * plane, d[4]);
      Simd<T>::store(to + 5 * plane, d[5]);
    }
  }
}

// The columns of one tile, M outputs wide, at a row of points: point 3 goes to `third`, point 4 to `fourth`, with the
// same stride `point` as the others.
template <typename T, int V, int M>
RESNET_FAST_INLINE void transform_columns(const T* strip, T* to, T* third, T* fourth, int64_t point) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int lanes = Simd<T>::lanes, next = V * lanes;
  for (int v = 0; v < V; ++v) {
    const T* from = strip + v * lanes;
    Vec d[kTileIn] = {Simd<T>::load(from), Simd<T>::load(from + next), Simd<T>::load(from + 2 * next),
                      Simd<T>::load(from + 3 * next)};
    if constexpr (M > 2) d[4] = Simd<T>::load(from + 4 * next);
    if constexpr (M > 3) d[5] = Simd<T>::load(from + 5 * next);
    transform_input<T, M>(d);
    Simd<T>::store(to + v * lanes, d[0]);
    Simd<T>::store(to + point + v * lanes, d[1]);
    Simd<T>::store(to + 2 * point + v * lanes, d[2]);
    if constexpr (has_point<M>(3)) Simd<T>::store(third + 3 * point + v * lanes, d[3]);
    if constexpr (has_point<M>(4)) Simd<T>::store(fourth + 4 * point + v * lanes, d[4]);
    Simd<T>::store(to + 5 * point + v * lanes, d[5]);
  }
}

// Adjacent tiles share columns: rows are transformed once for a strip of `tiles` tiles, then columns tile by tile, V
// vectors of channels at a time (a cache line where there are as many). Tiles are `outputs` high, the last one `last`
// wide. out[list]: the first tile at the points of each list.
template <typename T, int V>
void transform_strip(const T* input, int64_t row, int64_t pixel, int tiles, int outputs, int last, const Tiling& tiling,
                     T* strip, T* const (&out)[4], int64_t out_tile, int64_t out_point) {
  const int columns = kTileOut * (tiles - 1) + last + kTileIn - kTileOut;
  const int64_t plane = static_cast<int64_t>(columns) * V * Simd<T>::lanes;
  with_outputs(outputs, [&](auto m) { transform_rows<T, V, decltype(m)::value>(input, row, pixel, columns, strip); });
  const int third = tiling.columns.skips(3), fourth = tiling.columns.skips(4);
  for (int t = 0; t < tiles; ++t) {
    const T* from = strip + static_cast<int64_t>(t) * kTileOut * V * Simd<T>::lanes;
    const bool full = t + 1 < tiles || last == kTileOut;
    for (int i = 0; i < kTileIn; ++i, from += plane) {
      const int list = 2 * tiling.rows.skips(i);
      if (list != 0 && outputs < kTileOut) continue;
      const int64_t at = t * out_tile + kTileIn * i * out_point;
      T *const to = out[list] + at, *const to_third = out[list + third] + at,
               *const to_fourth = out[list + fourth] + at;
      if (full) {
        transform_columns<T, V, 4>(from, to, to_third, to_fourth, out_point);
      } else if (last == 3) {
        transform_columns<T, V, 3>(from, to, to_third, to_fourth, out_point);
      } else {
        transform_columns<T, V, 2>(from, to, to_third, to_fourth, out_point);
      }
    }
  }
}

// Transforms the input to out[point][panel][index in the list][channel of the panel]: panels of `width` channels, with
// the stride `panel`. Returns the lengths of the lists.
template <typename T>
TileCounts transform_inputs(const WinogradCall<T>& call, int width, int64_t panel, int64_t point, T* strip, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int line = 64 / sizeof(T) > lanes ? 64 / sizeof(T) / lanes : 1;  // vectors of a cache line
  const Tiling tiling(call.height, call.width, call.edge_tiles);
  const int channels = (call.channels + lanes - 1) / lanes * lanes;
  TileCounts counts;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const TilePlace place(tile, tiling);
    const int in_row = tiling.columns.tiles - place.column;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row;
    const int outputs = tiling.rows.outputs(place.row), last = tiling.columns.outputs(place.column + tiles - 1);
    const T* input = call.input + place.image * call.input_image + kTileOut * place.row * call.input_row +
                     kTileOut * place.column * call.input_pixel;
    const auto strip_of = [&](int c, auto vectors) {
      T* const first = out + c / width * panel + c % width;
      T* const to[4] = {first + counts.of[0] * width, first + counts.of[1] * width, first + counts.of[2] * width,
                        first + counts.of[3] * width};
      transform_strip<T, decltype(vectors)::value>(input + c, call.input_row, call.input_pixel, tiles, outputs, last,
                                                   tiling, strip, to, width, point);
    };
    int c = 0;
    for (; c + line * lanes <= channels; c += line * lanes) strip_of(c, Outputs<line>());
    for (; c < channels; c += lanes) strip_of(c, Outputs<1>());
    counts.add(tiles - 1, outputs < kTileOut, false);
    counts.add(1, outputs < kTileOut, last < kTileOut);
    tile += tiles;
  }
  return counts;
}

// One tile of M x N outputs, one vector of channels: acc[list] is the tile at the points of each list, acc[0] at all
// points without Lists.
template <typename T, int M, int N, bool Lists>
__attribute__((noinline)) void transform_output_tile(const WinogradCall<T>& call, const Tiling& tiling,
                                                     const TilePlace& place, const T* const (&acc)[4], int64_t point,
                                                     int64_t channel) {
  typedef typename Simd<T>::Vec Vec;
  Vec half[kTileOut][kTileIn];
  const int64_t down = kTileIn * point;
  const int third = Lists ? 2 * tiling.rows.skips(3) : 0, fourth = Lists ? 2 * tiling.rows.skips(4) : 0;
  for (int j = 0; j < kTileIn; ++j) {
    if (!has_point<N>(j)) continue;
    const int list = Lists ? tiling.columns.skips(j) : 0;
    const T* from = acc[list] + j * point;
    Vec m[kTileIn] = {Simd<T>::load(from), Simd<T>::load(from + down), Simd<T>::load(from + 2 * down)};
    if constexpr (has_point<M>(3)) m[3] = Simd<T>::load(acc[list + third] + j * point + 3 * down);
    if constexpr (has_point<M>(4)) m[4] = Simd<T>::load(acc[list + fourth] + j * point + 4 * down);
    m[5] = Simd<T>::load(from + 5 * down);
    Vec y[kTileOut];
    transform_output<T, M>(m, y);
    for (int i = 0; i < M; ++i) half[i][j] = y[i];
  }
  if (call.spread != nullptr && channel == 0) {
    // Inf or NaN in an inner row of a tile's input reaches all rows of its output, more than the windows that contain
    // it; columns likewise. The first and the last row and column spread nothing. It reaches all channels: one
    // vector suffices.
    const Vec rows = half[1][0] + half[1][1] + half[1][5], columns = half[0][1] + half[M - 1][1];
    Simd<T>::store(call.spread, Simd<T>::load(call.spread) + (rows + columns));
  }
  const Vec bias = Simd<T>::load(call.bias + channel);
  const int row = kTileOut * place.row, column = kTileOut * place.column;
  const int rows = call.height - row < M ? call.height - row : M;
  const int columns = call.width - column < N ? call.width - column : N;
  for (int i = 0; i < rows; ++i) {
    Vec y[kTileOut];
    transform_output<T, N>(half[i], y);
    T* to = call.output + place.image * call.output_image + (row + i) * call.output_row + column * call.output_pixel +
            channel;
    const T* residual = call.residual + place.image * call.residual_image + (row + i) * call.residual_row +
                        column * call.residual_pixel + channel;
    const auto finish = [&](int j) __attribute__((always_inline)) {
      Vec sum = y[j] + bias;
      if (call.residual) sum += Simd<T>::load(residual + j * call.residual_pixel);
      if (call.relu) sum = relu<T>(sum);
      Simd<T>::store(to + j * call.output_pixel, sum);
    };
    finish(0);
    if (columns > 1) finish(1);
    if constexpr (N > 2) {
      if (columns > 2) finish(2);
    }
    if constexpr (N > 3) {
      if (columns > 3) finish(3);
    }
  }
}

// All tiles of a call, `vectors` of output channels from `channel` on, from accumulators[point][index in the list] with
// the strides tile_step and vector_step.
template <typename T>
void transform_outputs(const WinogradCall<T>& call, const Tiling& tiling, const T* accumulators, int64_t point,
                       int64_t tile_step, int64_t vector_step, int vectors, int64_t channel) {
  TileCounts counts;
  for (int tile = call.tile_begin; tile < call.tile_end; ++tile) {
    const TilePlace place(tile, tiling);
    const int high = tiling.rows.outputs(place.row), wide = tiling.columns.outputs(place.column);
    for (int v = 0; v < vectors; ++v) {
      const T* const first = accumulators + v * vector_step;
      const T* const at[4] = {first + counts.of[0] * tile_step, first + counts.of[1] * tile_step,
                              first + counts.of[2] * tile_step, first + counts.of[3] * tile_step};
      if (tiling.uniform()) {
        transform_output_tile<T, 4, 4, false>(call, tiling, place, at, point, channel + v * Simd<T>::lanes);
        continue;
      }
      with_outputs(high, [&](auto m) {
        with_outputs(wide, [&](auto n) {
          transform_output_tile<T, decltype(m)::value, decltype(n)::value, true>(call, tiling, place, at, point,
                                                                                 channel + v * Simd<T>::lanes);
        });
      });
    }
    counts.add(1, high < kTileOut, wide < kTileOut);
  }
}

}  // namespace
}  // namespace resnet_fast
