// One convolution of a chain: which part of it a thread takes, and the calls of the kernels that make it up.
#pragma once

#include <atomic>
#include <cmath>

#include "cpu/conv/bf16_filters.h"
#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"
#include "cpu/conv/padded_layout.h"

namespace resnet_fast {

// What an image is counted in: output tiles of Winograd, pixels otherwise.
template <typename T>
int64_t units_of(const FilterLayout<T>& layout, int64_t height, int64_t width) {
  constexpr int64_t tile = std::is_same_v<T, BFloat16> ? kBf16TileOut : kTileOut;
  return layout.winograd() ? ceil_div(height, tile) * ceil_div(width, tile) : height * width;
}

// A convolution on some images, ready to run in parts.
template <typename T>
struct Convolution {
  Layer layer;
  FilterLayout<T> layout;
  const T* packed;
  int64_t images, height, width;  // of the output
  Map<T> input, residual, output;  // residual.origin is null where there is none
  bool far_output = false;  // the output, and the residual, are not in a cache
  Ahead ahead{};  // this member's share
  std::atomic<bool>* spread = nullptr;  // set where Winograd tiles meet what is not finite

  // What a part is counted in.
  int64_t units() const { return images * units_of(layout, height, width); }
};

// Part of the output: units and panels of output channels.
struct Part {
  int64_t begin, end, panel_begin, panel_end;
};

template <typename T>
void direct(const Convolution<T>& conv, const Part& part) {
  const Layer& l = conv.layer;
  const FilterLayout<T>& layout = conv.layout;
  const Map<T>&x = conv.input, &y = conv.output, &residual = conv.residual;
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

// How a Winograd call is cut: tiles at a time, and panels whose products are kept until they are transformed back.
struct Blocking {
  int64_t tiles, panel_group;
};

// Transformed input that stays in L2, or nearly so, while the panels pass by, one by one.
constexpr int64_t kTransformedBytes = 512 * 1024;
// Where fewer tiles than this fit, filters would have to pass by too often: all panels at each point, then, from L3.
constexpr int64_t kMinTiles = 16;
constexpr int64_t kMaxTiles = 32;
// Compact filters are transformed again for every block of tiles, which costs more than reading tiles from L3.
constexpr int64_t kMaxCompactTiles = 64;

template <typename T>
Blocking winograd_blocking(const FilterLayout<T>& layout, int64_t tiles, int64_t panels) {
  const int64_t fit = kTransformedBytes / (kTilePoints * layout.channels * static_cast<int64_t>(sizeof(T)));
  // Filters that are transformed on the way are at hand panel by panel only.
  const bool compact = layout.algorithm == Algorithm::kCompactWinograd;
  const bool by_panel = compact || fit >= std::min(kMinTiles, tiles);
  const int64_t most = compact ? kMaxCompactTiles : by_panel ? std::min(fit, kMaxTiles) : kMaxTiles;
  return {std::min(tiles, most), by_panel ? 1 : panels};
}

// Elements that any part of this convolution needs.
template <typename T>
int64_t winograd_scratch(const Convolution<T>& conv) {
  const FilterLayout<T>& layout = conv.layout;
  const Blocking most = winograd_blocking(layout, conv.units(), layout.panels());
  return WinogradScratch(static_cast<int>(layout.channels), static_cast<int>(most.tiles),
                         static_cast<int>(ceil_div(conv.width, kTileOut)), static_cast<int>(most.panel_group),
                         static_cast<int>(layout.panel), layout.algorithm == Algorithm::kCompactWinograd)
      .numel();
}

template <typename T>
void winograd(const Convolution<T>& conv, const Part& part, T* scratch) {
  const FilterLayout<T>& layout = conv.layout;
  const Map<T>&x = conv.input, &y = conv.output, &residual = conv.residual;
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
  call.mixed = true;
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
  call.far_output = conv.far_output;
  call.ahead.count = conv.ahead.count;
  constexpr int most_lanes = 64 / sizeof(T);
  T spread[most_lanes] = {};
  if (conv.spread && part.panel_begin == 0) call.spread = spread;
  const int64_t calls = ceil_div(tiles, blocking.tiles);
  for (int64_t i = 0; i < calls; ++i) {
    call.tile_begin = static_cast<int>(part.begin + tiles * i / calls);
    call.tile_end = static_cast<int>(part.begin + tiles * (i + 1) / calls);
    for (int r = 0; r < conv.ahead.count; ++r) {
      const int64_t begin = conv.ahead.bytes[r] * i / calls;
      call.ahead.from[r] = conv.ahead.from[r] + begin;
      call.ahead.bytes[r] = conv.ahead.bytes[r] * (i + 1) / calls - begin;
    }
    kernels_in_use<T>().winograd(call);
  }
  if (!std::all_of(spread, spread + most_lanes, [](T sum) { return std::isfinite(sum); })) {
    conv.spread->store(true, std::memory_order_relaxed);
  }
}

// Filters larger than this are split over the members of a team; smaller ones are read by every member, unless it would
// have too few tiles to keep its FMA units busy. Members that split Winograd filters each transform the whole input.
constexpr int64_t kSplitFilterBytes = 1 << 20;
constexpr int64_t kSplitWinogradBytes = 4 << 20;
constexpr int64_t kMinTilesOfMember = 12;

// The part of member `rank` of `size`.
template <typename T>
Part part_of(const Convolution<T>& conv, int64_t rank, int64_t size) {
  const int64_t panels = conv.layout.panels(), units = conv.units();
  const bool even = panels % size == 0 || panels >= 4 * size;
  const bool large = conv.layout.numel() * static_cast<int64_t>(sizeof(T)) >=
                     (conv.layout.winograd() ? kSplitWinogradBytes : kSplitFilterBytes);
  const bool few = conv.layout.winograd() && units < size * kMinTilesOfMember;
  if (size > 1 && even && (large || few)) return {0, units, panels * rank / size, panels * (rank + 1) / size};
  const int64_t step = conv.layout.winograd() ? 1 : kernels_in_use<T>().tile_pixels, steps = ceil_div(units, step);
  return {steps * rank / size * step, std::min(steps * (rank + 1) / size * step, units), 0, panels};
}

template <typename T>
void run_part(const Convolution<T>& conv, const Part& part, T* scratch) {
  if (part.begin >= part.end || part.panel_begin >= part.panel_end) return;
  if (conv.layout.winograd()) {
    winograd(conv, part, scratch);
  } else {
    direct(conv, part);
  }
}

}  // namespace resnet_fast
