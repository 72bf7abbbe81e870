// Packed filters in bfloat16, for Algorithm::kBf16Direct and kBf16Winograd.
//
//   [algorithm, a cache line] [bias in float32, padded to whole vectors] [panel 0] [panel 1] ...
//
//   panel of a direct convolution:  [block of channels][tap row][tap column][pair of channels][output channel][2]
//   panel of Winograd F(2x2):       [point of the transformed filter][pair of channels][output channel][2]
//
// A panel is 32 output channels, the last one possibly 16; missing channels are zero. The sizes and the contents are
// the same for every instruction set.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/conv/filters.h"
#include "cpu/kernels/bf16/kernels.h"

namespace resnet_fast {

template <>
struct FilterLayout<BFloat16> {
  int64_t out_channels;
  int64_t channels;  // even: an activation pads an odd number with a channel of zeros
  int64_t kernel_h, kernel_w;
  Algorithm algorithm = Algorithm::kBf16Direct;
  static constexpr int64_t lanes = kBf16Lanes, panel = 2 * kBf16Lanes;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t padded_out() const { return round_up(out_channels, lanes); }
  int64_t panels() const { return ceil_div(out_channels, panel); }
  bool winograd() const { return algorithm == Algorithm::kBf16Winograd; }
  int64_t points() const { return winograd() ? kBf16Points : taps(); }
  // Channels of the packed filter: those of Winograd fill whole vectors, as the transformed input does.
  int64_t depth() const { return winograd() ? round_up(channels, lanes) : channels; }
  int64_t panel_stride() const { return points() * depth() * panel; }
  static constexpr int64_t line = 32;
  int64_t bias_begin() const { return line; }
  int64_t panels_begin() const { return line + 2 * padded_out(); }
  int64_t numel() const { return panels_begin() + points() * depth() * padded_out(); }
  int64_t block() const {
    const int64_t fit = std::max<int64_t>(kFilterBlockBytes / (taps() * panel * 2), 2);
    const int64_t even = ceil_div(channels, ceil_div(channels, fit));
    return std::min(channels, round_up(even, 2));
  }
};

// The layout for activations of T, whose pixels have so many channels without padding.
template <typename T>
FilterLayout<T> filter_layout(int64_t out_channels, int64_t channels, int64_t kernel_h, int64_t kernel_w,
                              Algorithm algorithm) {
  return {out_channels, std::is_same_v<T, BFloat16> ? round_up(channels, 2) : channels, kernel_h, kernel_w, algorithm};
}

// The filter scale[k] * weight[k] with the bias shift, in the order in which the kernels read it.
torch::stable::Tensor pack_bf16_filters(const torch::stable::Tensor& weight, const std::vector<double>& scale,
                                        const std::vector<double>& shift, Algorithm algorithm);

}  // namespace resnet_fast
