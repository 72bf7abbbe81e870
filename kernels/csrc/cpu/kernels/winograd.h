// Winograd convolution F(4x4, 3x3), one source for every instruction set.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A,  Lavin and Gray 2015, section 4.1
//
// The filters are packed transformed (conv/filters.cpp), or compact. A call transforms the input of its tiles, runs one
// GEMM a point (36 of [tiles x channels] by [channels x panel]) and transforms back, group of panels by group of
// panels, adding bias and residual on the way out.
#pragma once

#include "cpu/kernels/winograd_gemm.h"

namespace resnet_fast {
namespace {

// With fewer channels than this, eager's sums are so short that accumulating a whole panel would err twice as much.
constexpr int kFewChannels = 64, kShortSum = 8;

template <typename T, int P, int V, int S>
void gemm_all_channels(const T* input, const WinogradScratch& sizes, int tiles, int channels, const T* filter, T* acc) {
  if constexpr (S == 1) {
    if (channels < kFewChannels) {
      return gemm<T, P, V, S, kShortSum>(input, sizes, tiles, 0, channels, filter, acc);
    }
  }
  gemm<T, P, V, S, kInputPanel>(input, sizes, tiles, 0, channels, filter, acc);
}

// A register tile is W tiles x two vectors, or WH tiles x one; S: see GemmMicrokernel.
template <typename T, int W, int WH, int S>
void winograd(const WinogradCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes, panel = 2 * lanes;
  // Vectors of a compact filter at once: two where registers are few, so that each input is loaded for both.
  constexpr int at_once = S == 1 ? 1 : 2;
  const Tiling tiling(call.height, call.width, call.edge_tiles);
  const int tiles = call.tile_end - call.tile_begin;
  const WinogradScratch sizes(call.channels, tiles, tiling.columns.tiles, call.panel_group, panel, call.compact);
  T* input = call.scratch;
  T* accumulators = input + sizes.input;
  T* strip = accumulators + sizes.accumulators;
  T* expanded = strip + sizes.strip;
  const auto vectors_of = [&](int k) { return 2 * k + 1 < call.out_vectors ? 2 : 1; };
  const TileCounts counts = transform_inputs(call, kInputPanel, sizes.input_panel, sizes.input_point, strip, input);
  for (int first = call.panel_begin; first < call.panel_end; first += call.panel_group) {
    const int group = call.panel_end - first < call.panel_group ? call.panel_end - first : call.panel_group;
    const T* const filters = call.filter + first * call.panel_stride;
    if (call.compact && vectors_of(first) == 2) {
      gemm_compact<T, at_once == 2 ? W : WH, at_once, 2, S>(call, sizes, tiling, counts, first, input, filters,
                                                            expanded, accumulators);
    } else if (call.compact) {
      gemm_compact<T, WH, 1, 1, S>(call, sizes, tiling, counts, first, input, filters, expanded, accumulators);
    }
    for (int point = 0; point < kTilePoints && !call.compact; ++point) {
      prefetch(call, tiling, point, 2 * first, 2 * (first + group));
      const int count = counts.of[tiling.list(point)];
      for (int k = 0; k < group; ++k) {
        const int64_t width = vectors_of(first + k) * lanes;
        const T* filter = filters + k * call.panel_stride + point * call.channels * width;
        T* acc = accumulators + point * sizes.acc_point + static_cast<int64_t>(k) * tiles * panel;
        const T* in = input + point * sizes.input_point;
        if (vectors_of(first + k) == 2) {
          gemm_all_channels<T, W, 2, S>(in, sizes, count, call.channels, filter, acc);
        } else {
          gemm_all_channels<T, WH, 1, S>(in, sizes, count, call.channels, filter, acc);
        }
      }
    }
    for (int k = 0; k < group; ++k) {
      // The accumulators are [tile][vector] or [vector][tile].
      const int vectors = vectors_of(first + k);
      const bool by_vector = call.compact && (at_once == 1 || in_registers(tiling, tiles));
      transform_outputs(call, tiling, accumulators + static_cast<int64_t>(k) * tiles * panel, sizes.acc_point,
                        by_vector ? lanes : vectors * lanes, by_vector ? tiles * lanes : lanes, vectors,
                        static_cast<int64_t>(first + k) * panel);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
