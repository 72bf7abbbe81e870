// The GEMMs of Winograd: at each point, transformed tiles by the transformed filter.
#pragma once

#include "cpu/kernels/winograd_filter.h"
#include "cpu/kernels/winograd_transform.h"

namespace resnet_fast {
namespace {

// P tiles x V vectors of the GEMM at one point; `accumulate` adds to the result of earlier channels. Short sums err
// less than one long sum, and Winograd's output transform amplifies the error: each B channels of a panel have
// accumulators of their own. With S = 1 the total stays in registers. Where registers are too few to hide the latency
// of the FMAs, S = 2 panels are accumulated side by side, all of their channels, and the total is in memory.
template <typename T, int P, int V, int S, int B>
struct GemmMicrokernel {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename MakeIndices<P>::type Rows;
  typedef typename MakeIndices<V>::type Vectors;
  typedef RegisterTile<T, P, V> Acc;
  static constexpr int width = V * Simd<T>::lanes;

  template <int... I>
  static RESNET_FAST_INLINE void step(Acc& acc, const T* input, const T* filter, Indices<I...>) {
    constexpr int64_t rows[P] = {I * kInputPanel...};
    acc.multiply_add(input, rows, filter, Rows(), Vectors());
  }

  static void run(const T* input, int64_t panel, const T* filter, int channels, bool accumulate, T* acc) {
    Acc total;
    if (S == 1) {
      total.zero(All());
      if (accumulate) total.add(acc, width, All());
    }
    for (; channels > 0; channels -= S * kInputPanel) {
      const int count = channels < kInputPanel ? channels : kInputPanel;
      if (S == 2) {
        Acc one, other;
        one.zero(All());
        other.zero(All());
        const int both = channels < 2 * kInputPanel ? channels - count : kInputPanel;
        for (int c = 0; c < both; ++c) {
          step(one, input + c, filter + c * width, Rows());
          step(other, input + panel + c, filter + (kInputPanel + c) * width, Rows());
        }
        for (int c = both; c < count; ++c) step(one, input + c, filter + c * width, Rows());
        one.add(other, All());
        if (accumulate) one.add(acc, width, All());
        one.store_packed(acc, All());
        accumulate = true;
      } else {
        for (int c = 0; c < count;) {
          Acc one;
          one.zero(All());
          for (const int end = c + B < count ? c + B : count; c < end; ++c) {
            step(one, input + c, filter + c * width, Rows());
          }
          total.add(one, All());
        }
      }
      input += S * panel;
      filter += S * kInputPanel * width;
    }
    if (S == 1) total.store_packed(acc, All());
  }
};

template <typename T>
using Microkernel = void (*)(const T*, int64_t, const T*, int, bool, T*);

template <typename T, int V, int S, int B, int... P>
inline Microkernel<T> select_microkernel(int rows, Indices<P...>) {
  static constexpr Microkernel<T> tiles[] = {GemmMicrokernel<T, P + 1, V, S, B>::run...};
  return tiles[rows - 1];
}

// All tiles of a list, and channels [begin, end) of the transformed input; a panel starts at `begin`.
template <typename T, int P, int V, int S, int B>
void gemm(const T* input, const WinogradScratch& sizes, int tiles, int begin, int end, const T* filter, T* acc) {
  // Equal parts: a short remainder could not hide the latency of its FMAs.
  const int parts = (tiles + P - 1) / P;
  input += begin / kInputPanel * sizes.input_panel;
  for (int part = 0; part < parts; ++part) {
    const int first = tiles * part / parts, last = tiles * (part + 1) / parts;
    select_microkernel<T, V, S, B>(last - first, typename MakeIndices<P>::type())(
        input + first * kInputPanel, sizes.input_panel, filter, end - begin, begin > 0,
        acc + static_cast<int64_t>(first) * V * Simd<T>::lanes);
  }
}

// The GEMMs of one vector of output channels, out of panels of V, at the six points of row I, for a few tiles: G at
// most points, G3 and G4 at those that smaller tiles may skip. The filter is transformed in registers, once for all
// tiles, and never stored.
template <typename T, int V, int I, int G, int G3, int G4>
struct RowGemmMicrokernel {
  typedef typename Simd<T>::Vec Vec;
  static constexpr int width = V * Simd<T>::lanes;
  Vec acc[kTileIn * G];

  static constexpr int tiles(int point) { return point == 3 ? G3 : point == 4 ? G4 : G; }

  template <int... P>
  RESNET_FAST_INLINE void zero(Indices<P...>) {
    ((acc[P] = Vec{}), ...);
  }

  template <int P, int... S>
  RESNET_FAST_INLINE void point(const T* input, Vec u, Indices<S...>) {
    ((acc[P * G + S] += splat(input[S * kInputPanel], typename MakeIndices<Simd<T>::lanes>::type()) * u), ...);
  }

  template <int P>
  RESNET_FAST_INLINE void point(const T* input, Vec u) {
    point<P>(input, u, typename MakeIndices<tiles(P)>::type());
  }

  // transform_filter, each point used as soon as it is computed, with factors loaded where they are used: the
  // accumulators leave few registers for anything else.
  RESNET_FAST_INLINE void multiply_add(const T* const (&input)[kTileIn], int c, const Vec (&g)[3], const T* factors) {
    typedef typename MakeIndices<Simd<T>::lanes>::type Lanes;
    point<0>(input[0] + c, g[0]);
    point<5>(input[5] + c, g[2]);
    const Vec odd_a = g[1] * splat(factors[0], Lanes());
    const Vec even_a = g[0] * splat(factors[1], Lanes()) + g[2] * splat(factors[2], Lanes());
    point<1>(input[1] + c, even_a + odd_a);
    point<2>(input[2] + c, even_a - odd_a);
    const Vec odd_b = g[1] * splat(factors[3], Lanes());
    const Vec even_b = g[0] * splat(factors[4], Lanes()) + g[2] * splat(factors[5], Lanes());
    point<3>(input[3] + c, even_b + odd_b);
    point<4>(input[4] + c, even_b - odd_b);
  }

  template <int P, int... S>
  RESNET_FAST_INLINE void store_point(T* to, bool accumulate, Indices<S...>) {
    if (accumulate) ((acc[P * G + S] += Simd<T>::load(to + S * Simd<T>::lanes)), ...);
    (Simd<T>::store(to + S * Simd<T>::lanes, acc[P * G + S]), ...);
  }

  template <int... P>
  RESNET_FAST_INLINE void store(T* to, int64_t point, bool accumulate, Indices<P...>) {
    (store_point<P>(to + P * point, accumulate, typename MakeIndices<tiles(P)>::type()), ...);
  }

  // Prefetches a vector of `next_filter` for each channel: filters come from memory, in an order that no hardware
  // prefetcher follows.
  static __attribute__((noinline)) void run(const T* input, int64_t input_point, const T* filter, const T* next_filter,
                                            int channels, bool accumulate, T* acc, int64_t acc_point) {
    RowGemmMicrokernel tile;
    tile.zero(typename MakeIndices<kTileIn * G>::type());
    const T* const rows[kTileIn] = {input,
                                    input + input_point,
                                    input + 2 * input_point,
                                    input + 3 * input_point,
                                    input + 4 * input_point,
                                    input + 5 * input_point};
    const T *factors = kFactors<T>, *row_factors = kFactors<T>;
    for (int c = 0; c < channels; ++c, filter += 9 * width, next_filter += 9 * width) {
      asm("" : "+r"(factors), "+r"(row_factors));  // keeps the compiler from holding the factors in registers
      for (int v = 0; v < width; v += Simd<T>::lanes) __builtin_prefetch(next_filter + v, 0, 2);
      const Vec half[3] = {transform_filter_row<T, I>(filter, 3 * width, row_factors),
                           transform_filter_row<T, I>(filter + width, 3 * width, row_factors),
                           transform_filter_row<T, I>(filter + 2 * width, 3 * width, row_factors)};
      tile.multiply_add(rows, c, half, factors);
    }
    tile.store(acc, acc_point, accumulate, typename MakeIndices<kTileIn>::type());
  }
};

constexpr bool kManyRegisters = RESNET_FAST_VECTOR_BYTES == 64;

// Whether RowGemmMicrokernel takes these tiles: up to four with the same points, or 2 x 2 of one image. With 32
// registers, transforming a filter for so few tiles in registers is cheaper than storing it.
inline bool in_registers(const Tiling& tiling, int tiles) {
  return kManyRegisters && tiles <= 4 &&
         (tiling.uniform() || (tiles == 4 && tiling.rows.tiles == 2 && tiling.columns.tiles == 2));
}

template <typename T, int V, int I>
void gemm_row(const WinogradScratch& sizes, const Tiling& tiling, const T* input, const T* filter, const T* next_filter,
              int channels, bool accumulate, T* acc) {
  const int all = tiling.rows.skips(I) ? sizes.tiles / 2 : sizes.tiles;
  const int third = tiling.columns.skips(3) ? all / 2 : all, fourth = tiling.columns.skips(4) ? all / 2 : all;
  const auto run = [&](auto row) {
    row.run(input + I * kTileIn * sizes.input_point, sizes.input_point, filter, next_filter + I * V * Simd<T>::lanes,
            channels, accumulate, acc + I * kTileIn * sizes.acc_point, sizes.acc_point);
  };
  switch (100 * all + 10 * third + fourth) {
    case 111: return run(RowGemmMicrokernel<T, V, I, 1, 1, 1>());
    case 211: return run(RowGemmMicrokernel<T, V, I, 2, 1, 1>());
    case 221: return run(RowGemmMicrokernel<T, V, I, 2, 2, 1>());
    case 222: return run(RowGemmMicrokernel<T, V, I, 2, 2, 2>());
    case 333: return run(RowGemmMicrokernel<T, V, I, 3, 3, 3>());
    case 422: return run(RowGemmMicrokernel<T, V, I, 4, 2, 2>());
    case 442: return run(RowGemmMicrokernel<T, V, I, 4, 4, 2>());
    default: return run(RowGemmMicrokernel<T, V, I, 4, 4, 4>());
  }
}

template <typename T, int V, int... I>
void gemm_rows(const WinogradScratch& sizes, const Tiling& tiling, const T* input, const T* filter,
               const T* next_filter, int channels, bool accumulate, T* acc, Indices<I...>) {
  (gemm_row<T, V, I>(sizes, tiling, input, filter, next_filter, channels, accumulate, acc), ...);
}

// The GEMMs of one panel, one panel of input channels after the other: the filter stays in L1 for all points and tiles.
// The accumulators are [point][vector][tile].
template <typename T, int V>
void gemm_filter_in_registers(const WinogradCall<T>& call, const WinogradScratch& sizes, const Tiling& tiling,
                              const T* input, const T* filter, T* accumulators) {
  constexpr int64_t width = V * Simd<T>::lanes;
  for (int c = 0; c < call.channels; c += kInputPanel, input += sizes.input_panel) {
    const int channels = call.channels - c < kInputPanel ? call.channels - c : kInputPanel;
    for (int v = 0; v < V; ++v) {
      const T* block = filter + c * 9 * width + v * Simd<T>::lanes;
      const T* next_filter = filter + (c + kInputPanel) * 9 * width + (v == 0 ? 0 : 3 * width);
      gemm_rows<T, V>(sizes, tiling, input, block, next_filter, channels, c > 0,
                      accumulators + v * sizes.tiles * Simd<T>::lanes, typename MakeIndices<kTileIn>::type());
    }
  }
}

// Prefetches part `part` of kTilePoints of vectors [begin, end) of the output channels, where the output is not in a
// cache, and of call.prefetch. Inlined: GCC drops calls of functions that only prefetch.
template <typename T>
RESNET_FAST_INLINE void prefetch(const WinogradCall<T>& call, const Tiling& tiling, int part, int begin, int end) {
  const int tiles = call.tile_end - call.tile_begin;
  constexpr int line = 64 / sizeof(T);
  const int channels = (end < call.out_vectors ? end : call.out_vectors) * Simd<T>::lanes;
  for (int t = tiles * part / kTilePoints; call.output_uncached && t < tiles * (part + 1) / kTilePoints; ++t) {
    const TilePlace place(call.tile_begin + t, tiling);
    const int row = kTileOut * place.row, column = kTileOut * place.column;
    const int rows = call.height - row < kTileOut ? call.height - row : kTileOut;
    const int columns = call.width - column < kTileOut ? call.width - column : kTileOut;
    for (int i = 0; i < rows; ++i) {
      const T* to =
          call.output + place.image * call.output_image + (row + i) * call.output_row + column * call.output_pixel;
      const T* residual = call.residual + place.image * call.residual_image + (row + i) * call.residual_row +
                          column * call.residual_pixel;
      for (int j = 0; j < columns; ++j) {
        for (int c = begin * Simd<T>::lanes; c < channels; c += line) {
          __builtin_prefetch(to + j * call.output_pixel + c, 1, 2);
          if (call.residual) __builtin_prefetch(residual + j * call.residual_pixel + c, 0, 2);
        }
      }
    }
  }
  for (int r = 0; begin == 2 * call.panel_begin && r < call.prefetch.count; ++r) {
    const char* at = call.prefetch.from[r] + call.prefetch.bytes[r] * part / kTilePoints;
    const char* last = call.prefetch.from[r] + call.prefetch.bytes[r] * (part + 1) / kTilePoints;
    for (; at < last; at += 64) __builtin_prefetch(at, 0, 2);
  }
}

// The GEMMs of one panel for more tiles, on lists of their own: the filter is transformed into L1, a row of points at a
// time, E of the panel's V vectors at once. The accumulators are [point][V / E][tile][E].
template <typename T, int P, int E, int V, int S>
void gemm_filter_in_l1(const WinogradCall<T>& call, const WinogradScratch& sizes, const Tiling& tiling,
                       const TileCounts& counts, int panel, const T* input, const T* filter, T* expanded,
                       T* accumulators) {
  constexpr int lanes = Simd<T>::lanes, width = V * lanes;
  for (int c = 0; c < call.channels; c += kExpandedChannels) {
    const int channels = call.channels - c < kExpandedChannels ? call.channels - c : kExpandedChannels;
    const T *block = filter + c * 9 * width, *next = block + kExpandedChannels * 9 * width;
    for (int v = 0; v < V; v += E) {
      for (int i = 0; i < kTileIn; ++i) {
        // Each row prefetches its part of the next block: a vector and a half for each of its own.
        select_expand_row<T, E>(i, typename MakeIndices<kTileIn>::type())(
            block + v * lanes, next + (v * kTileIn + i * E) * 3 / 2 * lanes, width, channels, sizes.filter_point,
            expanded);
        for (int j = 0; j < kTileIn; ++j) {
          const int point = kTileIn * i + j;
          if (c == 0 && v == 0) prefetch(call, tiling, point, 2 * panel, 2 * panel + V);
          gemm<T, P, E, S, kInputPanel>(
              input + point * sizes.input_point, sizes, counts.of[tiling.list(point)], c, c + channels,
              expanded + j * sizes.filter_point,
              accumulators + point * sizes.acc_point + static_cast<int64_t>(v) * sizes.tiles * lanes);
        }
      }
    }
  }
}

template <typename T, int P, int E, int V, int S>
void gemm_compact(const WinogradCall<T>& call, const WinogradScratch& sizes, const Tiling& tiling,
                  const TileCounts& counts, int panel, const T* input, const T* filter, T* expanded, T* accumulators) {
  if constexpr (kManyRegisters) {
    if (in_registers(tiling, sizes.tiles)) {
      return gemm_filter_in_registers<T, V>(call, sizes, tiling, input, filter, accumulators);
    }
  }
  gemm_filter_in_l1<T, P, E, V, S>(call, sizes, tiling, counts, panel, input, filter, expanded, accumulators);
}

}  // namespace
}  // namespace resnet_fast
