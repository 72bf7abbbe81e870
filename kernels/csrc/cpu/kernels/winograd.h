// Winograd convolution F(4x4, 3x3), one source for every instruction set.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A,  Lavin and Gray 2015, section 4.1
//
// The filters arrive transformed (conv/filters.cpp), or as they are. A call transforms the input of its tiles,
// multiplies point by point (36 small matrix products, tiles x channels by channels x panel) and transforms back, group
// of panels by group of panels, adding bias and residual on the way out.
#pragma once

#include "cpu/kernels/winograd_gemm.h"

namespace resnet_fast {
namespace {

// Where there are fewer channels, eager's own sums are so short that sums of a whole panel would err twice as much.
constexpr int kFewChannels = 64, kShortSum = 8;

template <typename T, int P, int V, int S>
void multiply_whole(const T* input, const WinogradScratch& sizes, int tiles, int channels, const T* filter,
                    T* product) {
  if constexpr (S == 1) {
    if (channels < kFewChannels) {
      return multiply<T, P, V, S, kShortSum>(input, sizes, tiles, 0, channels, filter, product);
    }
  }
  multiply<T, P, V, S, kInputPanel>(input, sizes, tiles, 0, channels, filter, product);
}

// W tiles and two vectors make a register tile of products, or WH tiles and one; S: see Product.
template <typename T, int W, int WH, int S>
void winograd(const WinogradCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes, panel = 2 * lanes;
  // Vectors of a compact filter at once: two where registers are few, so that each input that is read serves twice.
  constexpr int at_once = S == 1 ? 1 : 2;
  const Tiling tiling(call.height, call.width, call.mixed);
  const int tiles = call.tile_end - call.tile_begin;
  const WinogradScratch sizes(call.channels, tiles, tiling.columns.tiles, call.panel_group, panel, call.compact);
  T* input = call.scratch;
  T* products = input + sizes.input;
  T* strip = products + sizes.products;
  T* expanded = strip + sizes.strip;
  const auto vectors_of = [&](int k) { return 2 * k + 1 < call.out_vectors ? 2 : 1; };
  const TileCounts counts = transform_inputs(call, kInputPanel, sizes.input_panel, sizes.input_point, strip, input);
  for (int first = call.panel_begin; first < call.panel_end; first += call.panel_group) {
    const int group = call.panel_end - first < call.panel_group ? call.panel_end - first : call.panel_group;
    const T* const filters = call.filter + first * call.panel_stride;
    if (call.compact && vectors_of(first) == 2) {
      multiply_compact<T, at_once == 2 ? W : WH, at_once, 2, S>(call, sizes, tiling, counts, first, input, filters,
                                                                expanded, products);
    } else if (call.compact) {
      multiply_compact<T, WH, 1, 1, S>(call, sizes, tiling, counts, first, input, filters, expanded, products);
    }
    for (int point = 0; point < kTilePoints && !call.compact; ++point) {
      prefetch(call, tiling, point, 2 * first, 2 * (first + group));
      const int count = counts.of[tiling.list(point)];
      for (int k = 0; k < group; ++k) {
        const int64_t width = vectors_of(first + k) * lanes;
        const T* filter = filters + k * call.panel_stride + point * call.channels * width;
        T* product = products + point * sizes.product_point + static_cast<int64_t>(k) * tiles * panel;
        const T* in = input + point * sizes.input_point;
        if (vectors_of(first + k) == 2) {
          multiply_whole<T, W, 2, S>(in, sizes, count, call.channels, filter, product);
        } else {
          multiply_whole<T, WH, 1, S>(in, sizes, count, call.channels, filter, product);
        }
      }
    }
    for (int k = 0; k < group; ++k) {
      // A tile's vectors follow each other, or a vector's tiles.
      const int vectors = vectors_of(first + k);
      const bool by_vector = call.compact && (at_once == 1 || in_registers(tiling, tiles));
      transform_outputs(call, tiling, products + static_cast<int64_t>(k) * tiles * panel, sizes.product_point,
                        by_vector ? lanes : vectors * lanes, by_vector ? tiles * lanes : lanes, vectors,
                        static_cast<int64_t>(first + k) * panel);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
