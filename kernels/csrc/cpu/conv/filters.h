// Packed filters: batch norm folded in, in the order in which the kernels read them.
//
//   [algorithm] [bias, padded to whole vectors] [panel 0] [panel 1] ...
//
//   panel of a direct convolution:  [block of channels][tap row][tap column][channel of the block][output channel]
//   panel of Winograd:              [point of the transformed filter][channel][output channel]
//   panel of compact Winograd:      [channel][tap][output channel], transformed at run time
//
// A panel is two vectors of output channels, the last one possibly a single vector; missing channels are zero.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"
#include "cpu/round.h"

namespace resnet_fast {

// The last two compute in bfloat16: bf16_filters.h.
enum class Algorithm { kDirect, kWinograd, kCompactWinograd, kBf16Direct, kBf16Winograd };
inline bool in_bf16(Algorithm a) { return a == Algorithm::kBf16Direct || a == Algorithm::kBf16Winograd; }

template <typename T>
struct FilterLayout {
  int64_t out_channels, channels, kernel_h, kernel_w;
  Algorithm algorithm = Algorithm::kDirect;
  int64_t lanes = kernels_in_use<T>().lanes;
  int64_t panel = lanes * kernels_in_use<T>().panel_vectors;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t padded_out() const { return round_up(out_channels, lanes); }
  int64_t panels() const { return ceil_div(out_channels, panel); }
  // Filter elements for each input and output channel.
  int64_t points() const { return algorithm == Algorithm::kWinograd ? kTilePoints : taps(); }
  int64_t panel_stride() const { return points() * channels * panel; }
  bool winograd() const { return algorithm != Algorithm::kDirect; }
  // The algorithm and the bias take whole cache lines: panels start on one. The sizes (not the contents) are the same
  // for every instruction set: a traced or exported program has the right shapes everywhere.
  static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  int64_t bias_begin() const { return line; }
  int64_t panels_begin() const { return line + round_up(out_channels, line); }
  int64_t numel() const { return line + round_up(out_channels, line) * (1 + points() * channels); }
  // Channels of a block: equal blocks that fit kFilterBlockBytes.
  int64_t block() const {
    const int64_t fit = std::max<int64_t>(kFilterBlockBytes / (taps() * panel * static_cast<int64_t>(sizeof(T))), 1);
    const int64_t even = ceil_div(channels, ceil_div(channels, fit));
    return std::min(channels, fit >= 8 ? round_up(even, 8) : even);
  }
};

template <>
struct FilterLayout<BFloat16>;  // bf16_filters.h

using OptionalTensor = std::optional<torch::stable::Tensor>;

struct BatchNorm {
  OptionalTensor weight, bias, running_mean, running_var;
  double eps;
};

// Checks weight [K, C, kernel_h, kernel_w] and all that goes with it.
void check_conv_bn(const char* op, const torch::stable::Tensor& weight, const OptionalTensor& bias,
                   const BatchNorm& bn);

// Filters for inputs of type float (bfloat16 too) or double, as the type of the weight says.
torch::stable::Tensor pack_filters(const torch::stable::Tensor& weight, const OptionalTensor& bias, const BatchNorm& bn,
                                   Algorithm algorithm);

}  // namespace resnet_fast
