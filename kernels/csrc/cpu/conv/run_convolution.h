// Runs a part of a convolution by the algorithm that its filter is packed for: the calls of the kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "cpu/conv/convolution.h"

namespace resnet_fast {

template <typename T>
void run_direct(const Convolution<T>& conv, const Part& part) {
  const Layer& l = conv.layer;
  const FilterLayout<T>& layout = conv.layout;
  const ActivationView<T>&x = conv.input, &y = conv.output, &residual = conv.residual;
  const Kernels<T>& kernels = kernels_in_use<T>();
  ConvCall<T> call{};
  call.filter = conv.packed + layout.panels_begin();
  call.bias = conv.packed + layout.bias_begin();
  call.panel_begin = static_cast<int>(part.panel_begin);
  call.panel_end = static_cast<int>(part.panel_end);
  call.out_vectors = static_cast<int>(layout.padded_out() / layout.lanes);
  call.panel_stride = layout.panel_stride();
  call.relu = l.relu != 0;

  int64_t run_offset[kMaxRuns];
  const bool whole_rows = layout.block() == layout.channels && x.pixel == layout.channels;
  call.runs = static_cast<int>(whole_rows ? l.kernel_h : layout.taps());
  call.channels = static_cast<int>(whole_rows ? l.kernel_w * layout.channels : layout.channels);
  call.block = static_cast<int>(whole_rows ? call.channels : layout.block());
  const int64_t columns = whole_rows ? 1 : l.kernel_w;
  for (int i = 0; i < call.runs; ++i) run_offset[i] = (i / columns) * x.row + (i % columns) * x.pixel;
  call.run_offset = run_offset;

  call.input = x.origin - l.pad_h * x.row - l.pad_w * x.pixel;
  call.output = y.origin;
  call.residual = residual.origin;
  int64_t input_offset[kMaxPixels], residual_offset[kMaxPixels], output_offset[kMaxPixels];
  call.input_offset = input_offset;
  call.residual_offset = residual_offset;
  call.output_offset = output_offset;

  const int64_t total = part.end - part.begin;
  const int64_t step = round_up(ceil_div(total, ceil_div(total, kMaxPixels)), kernels.tile_pixels);
  for (int64_t begin = part.begin; begin < part.end; begin += step) {
    call.pixels = static_cast<int>(std::min(step, part.end - begin));
    int64_t w = begin % conv.width, h = begin / conv.width % conv.height, n = begin / conv.width / conv.height;
    for (int p = 0; p < call.pixels; ++p) {
      input_offset[p] = n * x.image + h * l.stride_h * x.row + w * l.stride_w * x.pixel;
      output_offset[p] = n * y.image + h * y.row + w * y.pixel;
      if (residual.origin) residual_offset[p] = n * residual.image + h * residual.row + w * residual.pixel;
      if (++w == conv.width) {
        w = 0;
        if (++h == conv.height) h = 0, ++n;
      }
    }
    kernels.conv(call);
  }
}

// How a Winograd call is blocked: tiles at a time, and panels whose GEMM results are stored until they are transformed
// back.
struct Blocking {
  int64_t tiles, panel_group;
};

// Transformed input that stays in L2, or nearly so, for all panels, one by one.
constexpr int64_t kTransformedBytes = 512 * 1024;
// With fewer tiles than this in L2, filters would be read too often: then all panels at each point, from L3.
constexpr int64_t kMinTiles = 16;
constexpr int64_t kMaxTiles = 32;
// A compact filter is transformed again for every block of tiles, which costs more than reading tiles from L3.
constexpr int64_t kMaxCompactTiles = 64;

template <typename T>
Blocking winograd_blocking(const FilterLayout<T>& layout, int64_t tiles, int64_t panels) {
  const int64_t fit = kTransformedBytes / (kTilePoints * layout.channels * static_cast<int64_t>(sizeof(T)));
  // A compact filter is transformed panel by panel.
  const bool compact = layout.algorithm == Algorithm::kCompactWinograd;
  const bool by_panel = compact || fit >= std::min(kMinTiles, tiles);
  const int64_t most = compact ? kMaxCompactTiles : by_panel ? std::min(fit, kMaxTiles) : kMaxTiles;
  return {std::min(tiles, most), by_panel ? 1 : panels};
}

// bfloat16: tiles whose transformed input and accumulators stay in L2, panel by panel.
constexpr int64_t kBf16MinTiles = 28, kBf16MaxTiles = 112;

inline Blocking winograd_blocking(const FilterLayout<BFloat16>& layout, int64_t tiles, int64_t) {
  const int64_t fit = kTransformedBytes / (2 * kBf16Points * layout.depth());
  return {std::min(tiles, std::clamp(fit, kBf16MinTiles, kBf16MaxTiles)), 1};
}

// Elements of scratch memory for any part of this convolution.
template <typename T>
int64_t winograd_scratch(const Convolution<T>& conv) {
  const FilterLayout<T>& layout = conv.layout;
  const Blocking most = winograd_blocking(layout, conv.units(), layout.panels());
  const int channels = static_cast<int>(layout.channels), tiles = static_cast<int>(most.tiles);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return Bf16WinogradScratch(channels, tiles).numel();
  } else {
    return WinogradScratch(channels, tiles, static_cast<int>(ceil_div(conv.width, kTileOut)),
                           static_cast<int>(most.panel_group), static_cast<int>(layout.panel),
                           layout.algorithm == Algorithm::kCompactWinograd)
        .numel();
  }
}

template <typename T>
void run_winograd(const Convolution<T>& conv, const Part& part, T* scratch) {
  const FilterLayout<T>& layout = conv.layout;
  const ActivationView<T>&x = conv.input, &y = conv.output, &residual = conv.residual;
  const int64_t tiles = part.end - part.begin;
  const Blocking blocking = winograd_blocking(layout, tiles, part.panel_end - part.panel_begin);
  WinogradCall<T> call{};
  call.input = x.origin - conv.layer.pad_h * x.row - conv.layer.pad_w * x.pixel;
  call.input_image = x.image, call.input_row = x.row, call.input_pixel = x.pixel;
  call.residual = residual.origin;
  call.residual_image = residual.image, call.residual_row = residual.row, call.residual_pixel = residual.pixel;
  call.output = y.origin;
  call.output_image = y.image, call.output_row = y.row, call.output_pixel = y.pixel;
  call.height = static_cast<int>(conv.height), call.width = static_cast<int>(conv.width);
  call.edge_tiles = true;
  call.filter = conv.packed + layout.panels_begin();
  call.bias = conv.packed + layout.bias_begin();
  call.compact = layout.algorithm == Algorithm::kCompactWinograd;
  call.channels = static_cast<int>(layout.channels);
  call.panel_begin = static_cast<int>(part.panel_begin), call.panel_end = static_cast<int>(part.panel_end);
  call.panel_group = static_cast<int>(blocking.panel_group);
  call.out_vectors = static_cast<int>(layout.padded_out() / layout.lanes);
  call.panel_stride = layout.panel_stride();
  call.relu = conv.layer.relu != 0;
  call.scratch = scratch;
  call.output_uncached = conv.output_uncached;
  call.prefetch.count = conv.prefetch.count;
  constexpr int most_lanes = 64 / sizeof(T);
  T spread[most_lanes] = {};
  if (conv.spread && part.panel_begin == 0) call.spread = spread;
  const int64_t calls = ceil_div(tiles, blocking.tiles);
  for (int64_t i = 0; i < calls; ++i) {
    call.tile_begin = static_cast<int>(part.begin + tiles * i / calls);
    call.tile_end = static_cast<int>(part.begin + tiles * (i + 1) / calls);
    for (int r = 0; r < conv.prefetch.count; ++r) {
      const int64_t begin = conv.prefetch.bytes[r] * i / calls;
      call.prefetch.from[r] = conv.prefetch.from[r] + begin;
      call.prefetch.bytes[r] = conv.prefetch.bytes[r] * (i + 1) / calls - begin;
    }
    kernels_in_use<T>().winograd(call);
  }
  if constexpr (!std::is_same_v<T, BFloat16>) {  // F(2x2) spreads nothing beyond its windows
    if (!std::all_of(spread, spread + most_lanes, [](T sum) { return std::isfinite(sum); })) {
      conv.spread->store(true, std::memory_order_relaxed);
    }
  }
}

// scratch: winograd_scratch elements, of this thread alone.
template <typename T>
void run_part(const Convolution<T>& conv, const Part& part, T* scratch) {
  if (part.begin >= part.end || part.panel_begin >= part.panel_end) return;
  if (conv.layout.winograd()) {
    run_winograd(conv, part, scratch);
  } else {
    run_direct(conv, part);
  }
}

}  // namespace resnet_fast
