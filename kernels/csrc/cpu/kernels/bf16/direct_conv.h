// Direct convolution in bfloat16: kernels/direct_conv.h by pairs of channels, with a single rounding at the end.
#pragma once

#include "cpu/kernels/bf16/simd.h"

namespace resnet_fast {
namespace {

typedef ConvCall<BFloat16> Bf16ConvCall;

// One tile, one block of channels. `partial` holds the accumulators of the blocks before.
template <int P, int V>
void run_bf16_tile(const Bf16ConvCall& call, const BFloat16* filter, const float* bias, int first_pixel,
                   int64_t out_channel, int block_begin, int block_length, bool first_block, bool last_block,
                   float* partial) {
  typedef typename MakeIndices<P * V>::type All;
  PairRegisterTile<P, V> tile;
  tile.zero(All());
  int64_t offset[P];
  for (int p = 0; p < P; ++p) offset[p] = call.input_offset[first_pixel + p];
  for (int run = 0; run < call.runs; ++run) {
    const BFloat16* x = call.input + call.run_offset[run] + block_begin;
    for (const BFloat16* end = x + block_length; x != end; x += 2) {
      tile.multiply_add(x, offset, filter, typename MakeIndices<P>::type(), typename MakeIndices<V>::type());
      filter += 2 * tile.width;
    }
  }
  if (!first_block) tile.add(partial, tile.width, All());
  if (!last_block) {
    tile.store_packed(partial, All());
    return;
  }
  tile.add(bias, 0, All());
  if (call.residual) tile.add_at(call.residual + out_channel, call.residual_offset + first_pixel, All());
  if (call.relu) tile.relu(All());
  tile.store_at(call.output + out_channel, call.output_offset + first_pixel, All());
}

using RunBf16Tile = void (*)(const Bf16ConvCall&, const BFloat16*, const float*, int, int64_t, int, int, bool, bool,
                             float*);

template <int V, int... P>
inline RunBf16Tile select_bf16_tile(int pixels, Indices<P...>) {
  static constexpr RunBf16Tile tiles[] = {run_bf16_tile<P + 1, V>...};
  return tiles[pixels - 1];
}

template <int P, int V>
void conv_bf16_panel(const Bf16ConvCall& call, const BFloat16* filter, const float* bias, int64_t out_channel) {
  constexpr int width = V * kBf16Lanes;
  alignas(64) float partial[kMaxPixels * width];
  for (int begin = 0; begin < call.channels; begin += call.block) {
    const int length = begin + call.block < call.channels ? call.block : call.channels - begin;
    const bool first = begin == 0, last = begin + length == call.channels;
    for (int pixel = 0; pixel < call.pixels; pixel += P) {
      const int count = call.pixels - pixel < P ? call.pixels - pixel : P;
      select_bf16_tile<V>(count, typename MakeIndices<P>::type())(call, filter, bias, pixel, out_channel, begin, length,
                                                                  first, last, partial + pixel * width);
    }
    filter += static_cast<int64_t>(call.runs) * length * width;
  }
}

// P: pixels of a tile where the panel is full (two vectors), PH: where it is half full.
template <int P, int PH>
void conv_bf16(const Bf16ConvCall& call) {
  const float* const biases = reinterpret_cast<const float*>(call.bias);
  for (int k = call.panel_begin; k < call.panel_end; ++k) {
    const BFloat16* filter = call.filter + k * call.panel_stride;
    const int64_t out_channel = static_cast<int64_t>(k) * 2 * kBf16Lanes;
    if (2 * k + 1 < call.out_vectors) {
      conv_bf16_panel<P, 2>(call, filter, biases + out_channel, out_channel);
    } else {
      conv_bf16_panel<PH, 1>(call, filter, biases + out_channel, out_channel);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
