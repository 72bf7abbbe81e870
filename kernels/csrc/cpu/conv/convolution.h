// A convolution on some images, and the part of it that a thread takes.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/conv/bf16_filters.h"
#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"
#include "cpu/conv/padded_layout.h"

namespace resnet_fast {

// Output pixels along a side of a Winograd tile.
template <typename T>
constexpr int64_t kWinogradTile = std::is_same_v<T, BFloat16> ? kBf16TileOut : kTileOut;

// Units of work of an image: output tiles of Winograd, or pixels.
template <typename T>
int64_t units_of(const FilterLayout<T>& layout, int64_t height, int64_t width) {
  constexpr int64_t tile = kWinogradTile<T>;
  return layout.winograd() ? ceil_div(height, tile) * ceil_div(width, tile) : height * width;
}

// A convolution on some images, ready to run in parts.
template <typename T>
struct Convolution {
  Layer layer;
  FilterLayout<T> layout;
  const T* packed;
  int64_t images, height, width;  // of the output
  ActivationView<T> input, residual, output;  // residual.origin is null where there is none
  bool output_uncached = false;  // the output, and the residual, are not in a cache
  PrefetchList prefetch{};  // this thread's share
  std::atomic<bool>* spread = nullptr;  // set where a Winograd tile reads Inf or NaN

  int64_t units() const { return images * units_of(layout, height, width); }
};

// Part of the output: units and panels of output channels.
struct Part {
  int64_t begin, end, panel_begin, panel_end;
};

// Filters larger than this are split over the threads of a team. Smaller ones are read by every thread, unless it would
// have too few tiles to keep its FMA units busy. Threads that split a Winograd filter each transform the whole input.
constexpr int64_t kSplitFilterBytes = 1 << 20;
constexpr int64_t kSplitWinogradBytes = 4 << 20;
constexpr int64_t kMinTilesPerThread = 12;

// The part of thread `rank` of `size`.
template <typename T>
Part part_of(const Convolution<T>& conv, int64_t rank, int64_t size) {
  const int64_t panels = conv.layout.panels(), units = conv.units();
  const bool even = panels % size == 0 || panels >= 4 * size;
  const bool large = conv.layout.numel() * static_cast<int64_t>(sizeof(T)) >=
                     (conv.layout.winograd() ? kSplitWinogradBytes : kSplitFilterBytes);
  const bool few = conv.layout.winograd() && units < size * kMinTilesPerThread;
  if (size > 1 && even && (large || few)) return {0, units, panels * rank / size, panels * (rank + 1) / size};
  const int64_t step = conv.layout.winograd() ? 1 : kernels_in_use<T>().tile_pixels, steps = ceil_div(units, step);
  return {steps * rank / size * step, std::min(steps * (rank + 1) / size * step, units), 0, panels};
}

}  // namespace resnet_fast
