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

// To out[point][panel][tile][channel of the panel]: panels of `width` channels, `panel` elements from one to the next.
template <typename T>
void transform_inputs(const WinogradCall<T>& call, int width, int64_t panel, int64_t point, T* strip, T* out) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int line = 64 / sizeof(T) > lanes ? 64 / sizeof(T) / lanes : 1;  // vectors of a cache line
  const int tiles_h = (call.height + kTileOut - 1) / kTileOut, tiles_w = (call.width + kTileOut - 1) / kTileOut;
  const int channels = (call.channels + lanes - 1) / lanes * lanes;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const TilePlace place(tile, tiles_h, tiles_w);
    const int in_row = tiles_w - place.column / kTileOut;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row;
    const T* input =
        call.input + place.image * call.input_image + place.row * call.input_row + place.column * call.input_pixel;
    T* to = out + (tile - call.tile_begin) * width;
    int c = 0;
    for (; c + line * lanes <= channels; c += line * lanes) {
      transform_strip<T, line>(input + c, call.input_row, call.input_pixel, tiles, strip,
                               to + c / width * panel + c % width, width, point);
    }
    for (; c < channels; c += lanes) {
      transform_strip<T, 1>(input + c, call.input_row, call.input_pixel, tiles, strip,
                            to + c / width * panel + c % width, width, point);
    }
    tile += tiles;
  }
}

// P tiles x V vectors of the product at one point, alone or on top of what other channels gave. Short sums err less
// than a single long one, and Winograd's last transform multiplies what they err: the channels of a panel are summed
// apart. With S = 1 the total stays in registers. Where these are too few for sums enough to hide the latency of the
// FMAs, S = 2 panels are summed side by side, and the total waits in memory.
template <typename T, int P, int V, int S>
struct Product {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename MakeIndices<P>::type Rows;
  typedef typename MakeIndices<V>::type Vectors;
  typedef Tile<T, P, V> Sums;
  static constexpr int width = V * Simd<T>::lanes;

  template <int... I>
  static RESNET_FAST_INLINE void step(Sums& sums, const T* input, const T* filter, Indices<I...>) {
    constexpr int64_t rows[P] = {I * kInputPanel...};
    sums.step(input, rows, filter, Rows(), Vectors());
  }

  static void run(const T* input, int64_t panel, const T* filter, int channels, bool accumulate, T* product) {
    Sums total;
    if (S == 1) {
      total.start(All());
      if (accumulate) total.add(product, width, All());
    }
    for (; channels > 0; channels -= S * kInputPanel) {
      const int count = channels < kInputPanel ? channels : kInputPanel;
      Sums one, other;
      one.start(All());
      if (S == 2) {
        other.start(All());
        const int both = channels < 2 * kInputPanel ? channels - count : kInputPanel;
        for (int c = 0; c < both; ++c) {
          step(one, input + c, filter + c * width, Rows());
          step(other, input + panel + c, filter + (kInputPanel + c) * width, Rows());
        }
        for (int c = both; c < count; ++c) step(one, input + c, filter + c * width, Rows());
        one.add(other, All());
        if (accumulate) one.add(product, width, All());
        one.spill(product, All());
        accumulate = true;
      } else {
        for (int c = 0; c < count; ++c) step(one, input + c, filter + c * width, Rows());
        total.add(one, All());
      }
      input += S * panel;
      filter += S * kInputPanel * width;
    }
    if (S == 1) total.spill(product, All());
  }
};

template <typename T>
using MultiplyTile = void (*)(const T*, int64_t, const T*, int, bool, T*);

template <typename T, int V, int S, int... P>
inline MultiplyTile<T> select_multiply(int rows, Indices<P...>) {
  static constexpr MultiplyTile<T> tiles[] = {Product<T, P + 1, V, S>::run...};
  return tiles[rows - 1];
}

// The same for all tiles, and channels [begin, end) of the transformed input, begin being the first of a panel.
template <typename T, int P, int V, int S>
void multiply(const T* input, const WinogradScratch& sizes, int begin, int end, const T* filter, T* product) {
  // Parts of equal size rather than full ones and a short rest, which could not hide the latency of its FMAs.
  const int parts = (sizes.tiles + P - 1) / P;
  input += begin / kInputPanel * sizes.input_panel;
  for (int part = 0; part < parts; ++part) {
    const int first = sizes.tiles * part / parts, last = sizes.tiles * (part + 1) / parts;
    select_multiply<T, V, S>(last - first, typename MakeIndices<P>::type())(
        input + first * kInputPanel, sizes.input_panel, filter, end - begin, begin > 0,
        product + static_cast<int64_t>(first) * V * Simd<T>::lanes);
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

// What the filter's transform multiplies by, at point A and at point B: odd, even, even.
template <typename T>
constexpr T kFactors[] = {T(kPointA / kDistanceA), T(1 / kDistanceA), T(kSquareA / kDistanceA),
                          T(kPointB / kDistanceB), T(1 / kDistanceB), T(kSquareB / kDistanceB)};

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

// Row I of the transformed filter, [channel][tap][width] -> [point of the row][channel][width].
template <typename T, int V, int I>
void expand_filter_row(const T* compact, int channels, int64_t point, T* out) {
  typedef typename Simd<T>::Vec Vec;
  typedef typename MakeIndices<Simd<T>::lanes>::type Lanes;
  constexpr int lanes = Simd<T>::lanes, width = V * lanes;
  for (int c = 0; c < channels; ++c, compact += 9 * width, out += width) {
    for (int v = 0; v < width; v += lanes) {
      const Vec half[3] = {transform_filter_row<T, I>(compact + v, 3 * width, kFactors<T>),
                           transform_filter_row<T, I>(compact + v + width, 3 * width, kFactors<T>),
                           transform_filter_row<T, I>(compact + v + 2 * width, 3 * width, kFactors<T>)};
      Simd<T>::store(out + v, half[0]);
      Simd<T>::store(out + v + 5 * point, half[2]);
      for (int i = 0; i < 2; ++i) {  // rounded as in RowProduct: a result does not depend on the number of tiles
        const T* factors = kFactors<T> + 3 * i;
        const Vec odd = half[1] * splat(factors[0], Lanes());
        const Vec even = half[0] * splat(factors[1], Lanes()) + half[2] * splat(factors[2], Lanes());
        Simd<T>::store(out + v + (1 + 2 * i) * point, even + odd);
        Simd<T>::store(out + v + (2 + 2 * i) * point, even - odd);
      }
    }
  }
}

// The products of one panel whose filter is transformed on the way, into memory from where all tiles read it: a block
// of channels and a row of points at a time, which stay in L1.
template <typename T, int P, int V, int S, int... I>
void multiply_expanded(const WinogradCall<T>& call, const WinogradScratch& sizes, const T* input, const T* filter,
                       T* expanded, T* products, Indices<I...>) {
  constexpr int64_t width = V * Simd<T>::lanes;
  static constexpr void (*expand[])(const T*, int, int64_t, T*) = {expand_filter_row<T, V, I>...};
  for (int c = 0; c < call.channels; c += sizes.filter_block) {
    const int channels = call.channels - c < sizes.filter_block ? call.channels - c : sizes.filter_block;
    for (int row = 0; row < kTileIn; ++row) {
      expand[row](filter + c * 9 * width, channels, sizes.filter_point, expanded);
      for (int i = 0; i < kTileIn; ++i) {
        const int point = kTileIn * row + i;
        multiply<T, P, V, S>(input + point * sizes.input_point, sizes, c, c + channels,
                             expanded + i * sizes.filter_point, products + point * sizes.product_point);
      }
    }
  }
}

// The products of one vector of output channels, out of panels of V, at the six points of row I, for G tiles. The
// filter is transformed in registers, once for each group of tiles, and never written.
template <typename T, int V, int I, int G>
struct RowProduct {
  typedef typename Simd<T>::Vec Vec;
  typedef typename MakeIndices<kTileIn>::type Points;
  typedef typename MakeIndices<G>::type Tiles;
  static constexpr int width = V * Simd<T>::lanes;
  Vec sum[kTileIn * G];

  template <int... P>
  RESNET_FAST_INLINE void start(Indices<P...>) {
    ((sum[P] = Vec{}), ...);
  }

  template <int P, int... S>
  RESNET_FAST_INLINE void point(const T* input, Vec u, Indices<S...>) {
    ((sum[P * G + S] += splat(input[S * kInputPanel], typename MakeIndices<Simd<T>::lanes>::type()) * u), ...);
  }

  // transform_filter, each point multiplied as soon as it is there, by factors that are read where they are used: the
  // sums leave few registers for anything else.
  RESNET_FAST_INLINE void step(const T* const (&input)[kTileIn], int c, const Vec (&g)[3], const T* factors) {
    typedef typename MakeIndices<Simd<T>::lanes>::type Lanes;
    point<0>(input[0] + c, g[0], Tiles());
    point<5>(input[5] + c, g[2], Tiles());
    const Vec odd_a = g[1] * splat(factors[0], Lanes());
    const Vec even_a = g[0] * splat(factors[1], Lanes()) + g[2] * splat(factors[2], Lanes());
    point<1>(input[1] + c, even_a + odd_a, Tiles());
    point<2>(input[2] + c, even_a - odd_a, Tiles());
    const Vec odd_b = g[1] * splat(factors[3], Lanes());
    const Vec even_b = g[0] * splat(factors[4], Lanes()) + g[2] * splat(factors[5], Lanes());
    point<3>(input[3] + c, even_b + odd_b, Tiles());
    point<4>(input[4] + c, even_b - odd_b, Tiles());
  }

  template <int P, int... S>
  RESNET_FAST_INLINE void put_point(T* to, bool accumulate, Indices<S...>) {
    if (accumulate) ((sum[P * G + S] += Simd<T>::load(to + S * width)), ...);
    (Simd<T>::store(to + S * width, sum[P * G + S]), ...);
  }

  template <int... P>
  RESNET_FAST_INLINE void put(T* to, int64_t point, bool accumulate, Indices<P...>) {
    (put_point<P>(to + P * point, accumulate, Tiles()), ...);
  }

  // `ahead` is read next, a vector for each channel: filters come from memory, in an order that no CPU foresees.
  static __attribute__((noinline)) void run(const T* input, int64_t input_point, const T* filter, const T* ahead,
                                            int channels, bool accumulate, T* product, int64_t product_point) {
    RowProduct sums;
    sums.start(typename MakeIndices<kTileIn * G>::type());
    const T* const rows[kTileIn] = {input,
                                    input + input_point,
                                    input + 2 * input_point,
                                    input + 3 * input_point,
                                    input + 4 * input_point,
                                    input + 5 * input_point};
    const T *factors = kFactors<T>, *row_factors = kFactors<T>;
    for (int c = 0; c < channels; ++c, filter += 9 * width, ahead += 9 * width) {
      asm("" : "+r"(factors), "+r"(row_factors));  // what is not known to stay the same is not kept in registers
      for (int v = 0; v < width; v += Simd<T>::lanes) __builtin_prefetch(ahead + v);
      const Vec half[3] = {transform_filter_row<T, I>(filter, 3 * width, row_factors),
                           transform_filter_row<T, I>(filter + width, 3 * width, row_factors),
                           transform_filter_row<T, I>(filter + 2 * width, 3 * width, row_factors)};
      sums.step(rows, c, half, factors);
    }
    sums.put(product, product_point, accumulate, Points());
  }
};

// Tiles of a group: as many as leave registers for the points of a row.
constexpr int kTilesOfRow = 4;

template <typename T, int V, int G, int... I>
void multiply_rows(const WinogradScratch& sizes, const T* input, const T* filter, const T* ahead, int channels,
                   bool accumulate, T* product, Indices<I...>) {
  constexpr int width = V * Simd<T>::lanes;
  (RowProduct<T, V, I, G>::run(input + I * kTileIn * sizes.input_point, sizes.input_point, filter, ahead + I * width,
                               channels, accumulate, product + I * kTileIn * sizes.product_point, sizes.product_point),
   ...);
}

// The products of one panel, panel of input channels by panel: the filter stays in L1 for all points and tiles.
template <typename T, int V>
void multiply_in_registers(const WinogradCall<T>& call, const WinogradScratch& sizes, const T* input, const T* filter,
                           T* products) {
  typedef typename MakeIndices<kTileIn>::type Rows;
  constexpr int64_t width = V * Simd<T>::lanes;
  for (int c = 0; c < call.channels; c += kInputPanel, input += sizes.input_panel) {
    const int channels = call.channels - c < kInputPanel ? call.channels - c : kInputPanel;
    for (int v = 0; v < V; ++v) {
      const T* block = filter + c * 9 * width + v * Simd<T>::lanes;
      const T* ahead = filter + (c + kInputPanel) * 9 * width + (v == 0 ? 0 : 3 * width);
      for (int tile = 0; tile < sizes.tiles; tile += kTilesOfRow) {
        const T* in = input + tile * kInputPanel;
        T* out = products + tile * width + v * Simd<T>::lanes;
        switch (sizes.tiles - tile) {
          case 1: multiply_rows<T, V, 1>(sizes, in, block, ahead, channels, c > 0, out, Rows()); break;
          case 2: multiply_rows<T, V, 2>(sizes, in, block, ahead, channels, c > 0, out, Rows()); break;
          case 3: multiply_rows<T, V, 3>(sizes, in, block, ahead, channels, c > 0, out, Rows()); break;
          default: multiply_rows<T, V, 4>(sizes, in, block, ahead, channels, c > 0, out, Rows());
        }
      }
    }
  }
}

// With 32 registers, transforming a filter again for every four tiles is cheaper than writing it once, unless there are
// many.
constexpr int kTilesInRegisters = 2 * kTilesOfRow;

template <typename T, int P, int V, int S>
void multiply_compact(const WinogradCall<T>& call, const WinogradScratch& sizes, const T* input, const T* filter,
                      T* expanded, T* products) {
  if (RESNET_FAST_VECTOR_BYTES == 64 && sizes.tiles <= kTilesInRegisters) {
    multiply_in_registers<T, V>(call, sizes, input, filter, products);
  } else {
    multiply_expanded<T, P, V, S>(call, sizes, input, filter, expanded, products,
                                  typename MakeIndices<kTileIn>::type());
  }
}

// Asks for part `part` of kTilePoints of what is written, or read, soon: vectors [begin, end) of the channels of the
// call's output, where that comes from memory, and `call.ahead`. Inlined, for GCC drops calls of functions that do
// nothing but prefetch.
template <typename T>
RESNET_FAST_INLINE void prefetch(const WinogradCall<T>& call, int part, int tiles_h, int tiles_w, int begin, int end) {
  const int tiles = call.tile_end - call.tile_begin;
  constexpr int line = 64 / sizeof(T);
  const int channels = (end < call.out_vectors ? end : call.out_vectors) * Simd<T>::lanes;
  for (int t = tiles * part / kTilePoints; call.far_output && t < tiles * (part + 1) / kTilePoints; ++t) {
    const TilePlace place(call.tile_begin + t, tiles_h, tiles_w);
    const int rows = call.height - place.row < kTileOut ? call.height - place.row : kTileOut;
    const int columns = call.width - place.column < kTileOut ? call.width - place.column : kTileOut;
    for (int i = 0; i < rows; ++i) {
      const T* to = call.output + place.image * call.output_image + (place.row + i) * call.output_row +
                    place.column * call.output_pixel;
      const T* residual = call.residual + place.image * call.residual_image + (place.row + i) * call.residual_row +
                          place.column * call.residual_pixel;
      for (int j = 0; j < columns; ++j) {
        for (int c = begin * Simd<T>::lanes; c < channels; c += line) {
          __builtin_prefetch(to + j * call.output_pixel + c, 1, 2);
          if (call.residual) __builtin_prefetch(residual + j * call.residual_pixel + c, 0, 2);
        }
      }
    }
  }
  for (int r = 0; begin == 2 * call.panel_begin && r < call.ahead.count; ++r) {
    const char* at = call.ahead.from[r] + call.ahead.bytes[r] * part / kTilePoints;
    const char* last = call.ahead.from[r] + call.ahead.bytes[r] * (part + 1) / kTilePoints;
    for (; at < last; at += 64) __builtin_prefetch(at, 0, 2);
  }
}

// W tiles and two vectors make a register tile of products, or WH tiles and one; S: see Product.
template <typename T, int W, int WH, int S>
void winograd(const WinogradCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes, panel = 2 * lanes;
  const int tiles_h = (call.height + kTileOut - 1) / kTileOut, tiles_w = (call.width + kTileOut - 1) / kTileOut;
  const int tiles = call.tile_end - call.tile_begin;
  const WinogradScratch sizes(call.channels, tiles, tiles_w, call.panel_group, panel, call.compact);
  T* input = call.scratch;
  T* products = input + sizes.input;
  T* strip = products + sizes.products;
  T* expanded = strip + sizes.strip;
  const auto full = [&](int k) { return 2 * k + 1 < call.out_vectors; };
  transform_inputs(call, kInputPanel, sizes.input_panel, sizes.input_point, strip, input);
  for (int first = call.panel_begin; first < call.panel_end; first += call.panel_group) {
    const int group = call.panel_end - first < call.panel_group ? call.panel_end - first : call.panel_group;
    if (call.compact) {
      const T* filter = call.filter + first * call.panel_stride;
      if (full(first)) {
        multiply_compact<T, W, 2, S>(call, sizes, input, filter, expanded, products);
      } else {
        multiply_compact<T, WH, 1, S>(call, sizes, input, filter, expanded, products);
      }
    }
    for (int point = 0; point < kTilePoints && !call.compact; ++point) {
      prefetch(call, point, tiles_h, tiles_w, 2 * first, 2 * (first + group));
      for (int k = 0; k < group; ++k) {
        const int64_t width = full(first + k) ? panel : lanes;
        const T* filter = call.filter + (first + k) * call.panel_stride + point * call.channels * width;
        T* product = products + point * sizes.product_point + static_cast<int64_t>(k) * tiles * panel;
        const T* in = input + point * sizes.input_point;
        if (full(first + k)) {
          multiply<T, W, 2, S>(in, sizes, 0, call.channels, filter, product);
        } else {
          multiply<T, WH, 1, S>(in, sizes, 0, call.channels, filter, product);
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
