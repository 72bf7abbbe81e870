// One convolution of a chain in bfloat16: convolution.h, where its tiles and its blocks are others.
#pragma once

#include "cpu/conv/convolution.h"

namespace resnet_fast {

// Tiles at a time: their transformed input and products stay in L2.
constexpr int64_t kBf16TransformedBytes = 512 * 1024;
constexpr int64_t kBf16MinTiles = 28, kBf16MaxTiles = 112;

inline int64_t bf16_tiles(const FilterLayout<BFloat16>& layout, int64_t tiles) {
  const int64_t fit = kBf16TransformedBytes / (2 * kBf16Points * layout.depth());
  return std::min(tiles, std::clamp(fit, kBf16MinTiles, kBf16MaxTiles));
}

inline int64_t winograd_scratch(const Convolution<BFloat16>& conv) {
  return Bf16Scratch(static_cast<int>(conv.layout.channels), static_cast<int>(bf16_tiles(conv.layout, conv.units())))
      .numel();
}

inline void winograd(const Convolution<BFloat16>& conv, const Part& part, BFloat16* scratch) {
  const FilterLayout<BFloat16>& layout = conv.layout;
  const Map<BFloat16>&x = conv.input, &y = conv.output, &residual = conv.residual;
  WinogradCall<BFloat16> call{};
  call.input = x.origin - conv.layer.pad_h * x.row - conv.layer.pad_w * x.pixel;
  call.input_image = x.image, call.input_row = x.row, call.input_pixel = x.pixel;
  call.residual = residual.origin;
  call.residual_image = residual.image, call.residual_row = residual.row, call.residual_pixel = residual.pixel;
  call.output = y.origin;
  call.output_image = y.image, call.output_row = y.row, call.output_pixel = y.pixel;
  call.height = static_cast<int>(conv.height), call.width = static_cast<int>(conv.width);
  call.filter = conv.packed + layout.panels_begin();
  call.bias = conv.packed + layout.bias_begin();
  call.channels = static_cast<int>(layout.channels);
  call.panel_begin = static_cast<int>(part.panel_begin), call.panel_end = static_cast<int>(part.panel_end);
  call.out_vectors = static_cast<int>(layout.padded_out() / layout.lanes);
  call.panel_stride = layout.panel_stride();
  call.relu = conv.layer.relu != 0;
  call.scratch = scratch;
  const int64_t tiles = part.end - part.begin, calls = ceil_div(tiles, bf16_tiles(layout, tiles));
  for (int64_t i = 0; i < calls; ++i) {
    call.tile_begin = static_cast<int>(part.begin + tiles * i / calls);
    call.tile_end = static_cast<int>(part.begin + tiles * (i + 1) / calls);
    kernels_in_use<BFloat16>().winograd(call);
  }
}

}  // namespace resnet_fast
