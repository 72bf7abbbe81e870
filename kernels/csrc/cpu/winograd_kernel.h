// Winograd convolution F(4x4, 3x3), one source for every instruction set.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A,  Lavin and Gray 2015, section 4.1
//
// at the points of kernels.h. The filters arrive transformed (filters.cpp). A call transforms the input of its tiles,
// multiplies point by point (36 small matrix products, tiles x channels by channels x panel) and transforms back, group
// of panels by group of panels, adding bias and residual on the way out.
#pragma once

#include "simd.h"

namespace resnet_fast {
namespace {

// B^T d in place; rows of B^T are the coefficients of x (x^2 - a^2) (x^2 - b^2) / (x - point), the last of the whole.
template <typename T>
RESNET_FAST_INLINE void transform_input(typename Simd<T>::Vec (&d)[kTileIn]) {
  typedef typename Simd<T>::Vec Vec;
  constexpr T a = T(kPointA), b = T(kPointB), aa = T(kSquareA), bb = T(kSquareB), sum = T(kSquareA + kSquareB);
  const Vec even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1];
  const Vec even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
  d[0] = d[0] + d[4] - sum * d[2];
  d[5] = d[1] + d[5] - sum * d[3];
  d[1] = even_a + a * odd_a;
  d[2] = even_a - a * odd_a;
  d[3] = even_b + b * odd_b;
  d[4] = even_b - b * odd_b;
}

// A^T m: row i holds the i-th powers of the points.
template <typename T>
RESNET_FAST_INLINE void transform_output(const typename Simd<T>::Vec (&m)[kTileIn],
                                         typename Simd<T>::Vec (&y)[kTileOut]) {
  typedef typename Simd<T>::Vec Vec;
  constexpr T a = T(kPointA), b = T(kPointB), aa = T(kSquareA), bb = T(kSquareB);
  constexpr T aaa = T(kSquareA * kPointA), bbb = T(kSquareB * kPointB);
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = a * difference_a + b * difference_b;
  y[2] = aa * sum_a + bb * sum_b;
  y[3] = m[5] + aaa * difference_a + bbb * difference_b;
}

// G g: the powers of the points over the products of their distances, as in filters.cpp, where it is done in float64.
template <typename T>
RESNET_FAST_INLINE void transform_filter(const typename Simd<T>::Vec (&g)[3], typename Simd<T>::Vec (&u)[kTileIn]) {
  typedef typename Simd<T>::Vec Vec;
  const Vec even_a = (g[0] + T(kSquareA) * g[2]) * T(1 / kDistanceA), odd_a = g[1] * T(kPointA / kDistanceA);
  const Vec even_b = (g[0] + T(kSquareB) * g[2]) * T(1 / kDistanceB), odd_b = g[1] * T(kPointB / kDistanceB);
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

// Where tile `index` lies: image and first output pixel.
struct TilePlace {
  int image, row, column;

  TilePlace(int index, int tiles_h, int tiles_w)
      : image(index / (tiles_h * tiles_w)), row(index / tiles_w % tiles_h * kTileOut),
        column(index % tiles_w * kTileOut) {}
};

// Tiles beside each other share columns: rows are transformed once for a whole strip of `tiles` tiles, then columns
// tile by tile. V vectors of channels at a time, a cache line where there are as many.
template <typename T, int V>
void transform_strip(const T* input, int64_t row, int64_t pixel, int tiles, T* strip, T* out, int64_t out_tile,
                     int64_t out_point) {
  typedef typename Simd<T>::Vec Vec;
  constexpr int lanes = Simd<T>::lanes;
  const int columns = kTileOut * tiles + kTileIn - kTileOut;
  for (int x = 0; x < columns; ++x) {
    for (int v = 0; v < V; ++v) {
      const T* from = input + x * pixel + v * lanes;
      Vec d[kTileIn] = {Simd<T>::load(from),           Simd<T>::load(from + row),     Simd<T>::load(from + 2 * row),
                        Simd<T>::load(from + 3 * row), Simd<T>::load(from + 4 * row), Simd<T>::load(from + 5 * row)};
      transform_input<T>(d);
      T* to = strip + (x * V + v) * lanes;
      const int64_t plane = static_cast<int64_t>(columns) * V * lanes;
      Simd<T>::store(to, d[0]);
      Simd<T>::store(to + plane, d[1]);
      Simd<T>::store(to + 2 * plane, d[2]);
      Simd<T>::store(to + 3 * plane, d[3]);
      Simd<T>::store(to + 4 * plane, d[4]);
      Simd<T>::store(to + 5 * plane, d[5]);
    }
  }
  for (int t = 0; t < tiles; ++t) {
    for (int i = 0; i < kTileIn; ++i) {
      for (int v = 0; v < V; ++v) {
        const T* from = strip + ((static_cast<int64_t>(i) * columns + kTileOut * t) * V + v) * lanes;
        constexpr int next = V * lanes;
        Vec d[kTileIn] = {Simd<T>::load(from),
                          Simd<T>::load(from + next),
                          Simd<T>::load(from + 2 * next),
                          Simd<T>::load(from + 3 * next),
                          Simd<T>::load(from + 4 * next),
                          Simd<T>::load(from + 5 * next)};
        transform_input<T>(d);
        T* to = out + t * out_tile + kTileIn * i * out_point + v * lanes;
        Simd<T>::store(to, d[0]);
        Simd<T>::store(to + out_point, d[1]);
        Simd<T>::store(to + 2 * out_point, d[2]);
        Simd<T>::store(to + 3 * out_point, d[3]);
        Simd<T>::store(to + 4 * out_point, d[4]);
        Simd<T>::store(to + 5 * out_point, d[5]);
      }
    }
  }
}

// To out[point][tile][channel], `row` from tile to tile, or with panels of channels apart, `panel` from one to the
// next.
template <typename T>
void transform_inputs(const WinogradCall<T>& call, int64_t row, int64_t panel, int64_t point, T* strip, T* out) {
  constexpr int lanes = Simd<T>::lanes, width = product_panel<T>(lanes);
  constexpr int line = 64 / sizeof(T) > lanes ? 64 / sizeof(T) / lanes : 1;  // vectors of a cache line
  const int tiles_h = (call.height + kTileOut - 1) / kTileOut, tiles_w = (call.width + kTileOut - 1) / kTileOut;
  const int channels = (call.channels + lanes - 1) / lanes * lanes;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const TilePlace place(tile, tiles_h, tiles_w);
    const int in_row = tiles_w - place.column / kTileOut;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row;
    const T* input =
        call.input + place.image * call.input_image + place.row * call.input_row + place.column * call.input_pixel;
    T* to = out + (tile - call.tile_begin) * row;
    int c = 0;
    for (; c + line * lanes <= channels; c += line * lanes) {
      transform_strip<T, line>(input + c, call.input_row, call.input_pixel, tiles, strip,
                               to + c / width * panel + c % width, row, point);
    }
    for (; c < channels; c += lanes) {
      transform_strip<T, 1>(input + c, call.input_row, call.input_pixel, tiles, strip,
                            to + c / width * panel + c % width, row, point);
    }
    tile += tiles;
  }
}

// Channels that are summed in one go, in two sums of every other one: short sums err less than a single long one, and
// Winograd's last transform multiplies what they err.
constexpr int kSumChannels = 32;

// P tiles x V vectors of the product at one point, alone or on top of what other channels gave.
template <typename T, int P, int V>
void multiply_tile(const T* input, int64_t row, const T* filter, int channels, bool accumulate, T* product) {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename MakeIndices<P>::type Rows;
  typedef typename MakeIndices<V>::type Vectors;
  constexpr int width = V * Simd<T>::lanes;
  Tile<T, P, V> even, odd;
  even.start(All());
  odd.start(All());
  int64_t offset[P];
  for (int p = 0; p < P; ++p) offset[p] = p * row;
  for (const T* end = input + channels / 2 * 2; input != end; input += 2, filter += 2 * width) {
    even.step(input, offset, filter, Rows(), Vectors());
    odd.step(input + 1, offset, filter + width, Rows(), Vectors());
  }
  if (channels % 2 != 0) even.step(input, offset, filter, Rows(), Vectors());
  even.add(odd, All());
  if (accumulate) even.add(product, width, All());
  even.spill(product, All());
}

template <typename T>
using MultiplyTile = void (*)(const T*, int64_t, const T*, int, bool, T*);

template <typename T, int V, int... P>
inline MultiplyTile<T> select_multiply(int rows, Indices<P...>) {
  static constexpr MultiplyTile<T> tiles[] = {multiply_tile<T, P + 1, V>...};
  return tiles[rows - 1];
}

template <typename T, int P, int V>
void multiply_panel(const T* input, int64_t row, int tiles, const T* filter, int channels, bool accumulate,
                    T* product) {
  // Parts of equal size rather than full ones and a short rest, which could not hide the latency of its FMAs.
  const int parts = (tiles + P - 1) / P;
  for (int part = 0; part < parts; ++part) {
    const int begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    select_multiply<T, V>(end - begin, typename MakeIndices<P>::type())(
        input + begin * row, row, filter, channels, accumulate,
        product + static_cast<int64_t>(begin) * V * Simd<T>::lanes);
  }
}

template <typename T>
void transform_output_tile(const WinogradCall<T>& call, const TilePlace& place, const T* product, int64_t point,
                           int64_t channel) {
  typedef typename Simd<T>::Vec Vec;
  Vec half[kTileOut][kTileIn];
  for (int j = 0; j < kTileIn; ++j) {
    const T* from = product + j * point;
    const int64_t down = kTileIn * point;
    const Vec m[kTileIn] = {Simd<T>::load(from),
                            Simd<T>::load(from + down),
                            Simd<T>::load(from + 2 * down),
                            Simd<T>::load(from + 3 * down),
                            Simd<T>::load(from + 4 * down),
                            Simd<T>::load(from + 5 * down)};
    Vec y[kTileOut];
    transform_output<T>(m, y);
    half[0][j] = y[0], half[1][j] = y[1], half[2][j] = y[2], half[3][j] = y[3];
  }
  const Vec bias = Simd<T>::load(call.bias + channel);
  const int rows = call.height - place.row < kTileOut ? call.height - place.row : kTileOut;
  const int columns = call.width - place.column < kTileOut ? call.width - place.column : kTileOut;
  for (int i = 0; i < rows; ++i) {
    Vec y[kTileOut];
    transform_output<T>(half[i], y);
    T* to = call.output + place.image * call.output_image + (place.row + i) * call.output_row +
            place.column * call.output_pixel + channel;
    const T* residual = call.residual + place.image * call.residual_image + (place.row + i) * call.residual_row +
                        place.column * call.residual_pixel + channel;
    const auto finish = [&](int j) __attribute__((always_inline)) {
      Vec sum = y[j] + bias;
      if (call.residual) sum += Simd<T>::load(residual + j * call.residual_pixel);
      if (call.relu) sum = relu<T>(sum);
      Simd<T>::store(to + j * call.output_pixel, sum);
    };
    finish(0);
    if (columns > 1) finish(1);
    if (columns > 2) finish(2);
    if (columns > 3) finish(3);
  }
}

// The products of one panel whose filter is transformed on the way, block of channels by block of channels.
template <typename T, int P, int V>
void multiply_compact(const WinogradCall<T>& call, const WinogradScratch& sizes, const T* input, const T* filter,
                      T* expanded, T* products) {
  constexpr int64_t width = V * Simd<T>::lanes;
  for (int c = 0; c < call.channels; c += sizes.filter_block) {
    const int channels = call.channels - c < sizes.filter_block ? call.channels - c : sizes.filter_block;
    expand_filter<T, V>(filter + c * 9 * width, channels, sizes.filter_point, expanded);
    for (int point = 0; point < kTilePoints; ++point) {
      multiply_panel<T, P, V>(input + point * sizes.input_point + c, sizes.row, call.tile_end - call.tile_begin,
                              expanded + point * sizes.filter_point, channels, c > 0,
                              products + point * sizes.product_point);
    }
  }
}

template <typename T, int P, int PH>
void winograd(const WinogradCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes, panel = 2 * lanes;
  const int tiles_h = (call.height + kTileOut - 1) / kTileOut, tiles_w = (call.width + kTileOut - 1) / kTileOut;
  const int tiles = call.tile_end - call.tile_begin;
  const WinogradScratch sizes(call.channels, tiles, tiles_w, lanes, call.panel_group, panel, call.compact);
  T* input = call.scratch;
  T* products = input + sizes.input;
  T* strip = products + sizes.products;
  T* expanded = strip + sizes.strip;
  const auto full = [&](int k) { return 2 * k + 1 < call.out_vectors; };
  transform_inputs(call, sizes.row, product_panel<T>(lanes), sizes.input_point, strip, input);
  for (int first = call.panel_begin; first < call.panel_end; first += call.panel_group) {
    const int group = call.panel_end - first < call.panel_group ? call.panel_end - first : call.panel_group;
    if (call.compact) {
      const T* filter = call.filter + first * call.panel_stride;
      if (full(first)) {
        multiply_compact<T, P / 2, 2>(call, sizes, input, filter, expanded, products);
      } else {
        multiply_compact<T, PH / 2, 1>(call, sizes, input, filter, expanded, products);
      }
    }
    for (int point = 0; point < kTilePoints && !call.compact; ++point) {
      for (int k = 0; k < group; ++k) {
        const int64_t width = full(first + k) ? panel : lanes;
        const T* filter = call.filter + (first + k) * call.panel_stride + point * call.channels * width;
        T* product = products + point * sizes.product_point + static_cast<int64_t>(k) * tiles * panel;
        const T* in = input + point * sizes.input_point;
        for (int c = 0; c < call.channels; c += kSumChannels) {
          const int channels = call.channels - c < kSumChannels ? call.channels - c : kSumChannels;
          if (full(first + k)) {
            multiply_panel<T, P / 2, 2>(in + c, sizes.row, tiles, filter + c * width, channels, c > 0, product);
          } else {
            multiply_panel<T, PH / 2, 1>(in + c, sizes.row, tiles, filter + c * width, channels, c > 0, product);
          }
        }
      }
    }
    for (int k = 0; k < group; ++k) {
      const int vectors = full(first + k) ? 2 : 1;
      for (int t = 0; t < tiles; ++t) {
        const TilePlace place(call.tile_begin + t, tiles_h, tiles_w);
        for (int v = 0; v < vectors; ++v) {
          const T* product = products + (static_cast<int64_t>(k) * tiles * 2 + t * vectors + v) * lanes;
          transform_output_tile(call, place, product, sizes.product_point,
                                static_cast<int64_t>(first + k) * panel + v * lanes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnet_fast
