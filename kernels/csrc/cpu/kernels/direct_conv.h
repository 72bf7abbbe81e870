// Direct convolution, one source for every instruction set.
//
// A block of the filter panel stays in L1 for all pixels of the call; where the channels need several blocks, `partial`
// holds the accumulators of a panel between them.
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// One tile, one block of channels.
template <typename T, int P, int V>
void run_tile(const ConvCall<T>& call, const T* filter, const T* bias, int first_pixel, int64_t out_channel,
              int block_begin, int block_length, bool first_block, bool last_block, T* partial) {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename MakeIndices<P>::type Pixels;
  typedef typename MakeIndices<V>::type Vectors;
  RegisterTile<T, P, V> tile;
  tile.zero(All());
  int64_t offset[P];
  for (int p = 0; p < P; ++p) offset[p] = call.input_offset[first_pixel + p];
  // Prefetch the output tile: large outputs have left the cache by the time it is stored.
  constexpr int line = 64 / sizeof(T);
  for (int p = 0; last_block && p < P; ++p) {
    for (int i = 0; i < V * Simd<T>::lanes; i += line) {
      __builtin_prefetch(call.output + out_channel + call.output_offset[first_pixel + p] + i, 1, 2);
      if (call.residual)
        __builtin_prefetch(call.residual + out_channel + call.residual_offset[first_pixel + p] + i, 0, 2);
    }
  }
  for (int run = 0; run < call.runs; ++run) {
    const T* x = call.input + call.run_offset[run] + block_begin;
    for (const T* end = x + block_length; x != end; ++x) {
      tile.multiply_add(x, offset, filter, Pixels(), Vectors());
      filter += V * Simd<T>::lanes;
    }
  }
  // Each block has accumulators of its own, added to the partial sums, and the bias comes last: the error grows with
  // the length of a block, not with all channels, and small products are not lost beside a large bias.
  if (!first_block) tile.add(partial, V * Simd<T>::lanes, All());
  if (!last_block) {
    tile.store_packed(partial, All());
    return;
  }
  tile.add(bias, 0, All());
  if (call.residual) tile.add_at(call.residual + out_channel, call.residual_offset + first_pixel, All());
  if (call.relu) tile.relu(All());
  tile.store_at(call.output + out_channel, call.output_offset + first_pixel, All());
}

template <typename T>
using RunTile = void (*)(const ConvCall<T>&, const T*, const T*, int, int64_t, int, int, bool, bool, T*);

// run_tile<T, 1..P, V>: the last tile has fewer pixels.
template <typename T, int V, int... P>
inline RunTile<T> select_tile(int pixels, Indices<P...>) {
  static constexpr RunTile<T> tiles[] = {run_tile<T, P + 1, V>...};
  return tiles[pixels - 1];
}

template <typename T, int P, int V>
void conv_panel(const ConvCall<T>& call, const T* filter, const T* bias, int64_t out_channel) {
  alignas(64) T partial[kMaxPixels * V * Simd<T>::lanes];
  typedef typename MakeIndices<P>::type Pixels;
  for (int begin = 0; begin < call.channels; begin += call.block) {
    const int length = begin + call.block < call.channels ? call.block : call.channels - begin;
    const bool first = begin == 0, last = begin + length == call.channels;
    for (int pixel = 0; pixel < call.pixels; pixel += P) {
      const int count = call.pixels - pixel < P ? call.pixels - pixel : P;
      select_tile<T, V>(count, Pixels())(call, filter, bias, pixel, out_channel, begin, length, first, last,
                                         partial + pixel * V * Simd<T>::lanes);
    }
    filter += static_cast<int64_t>(call.runs) * length * V * Simd<T>::lanes;
  }
}

// P: pixels of a tile where the panel is full (two vectors), PH: where it is half full (one vector).
template <typename T, int P, int PH>
void conv(const ConvCall<T>& call) {
  constexpr int panel = 2 * Simd<T>::lanes;
  for (int k = call.panel_begin; k < call.panel_end; ++k) {
    const T* filter = call.filter + k * call.panel_stride;
    const T* bias = call.bias + static_cast<int64_t>(k) * panel;
    if (2 * k + 1 < call.out_vectors) {
      conv_panel<T, P, 2>(call, filter, bias, static_cast<int64_t>(k) * panel);
    } else {
      conv_panel<T, PH, 1>(call, filter, bias, static_cast<int64_t>(k) * panel);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
