// Training in bfloat16: maps in bfloat16 with statistics in float32, convolutions by products of bfloat16.
#pragma once

#include <vector>

#include "cpu/conv/bf16_convolution.h"
#include "cpu/thread_team.h"
#include "cpu/training/filters.h"
#include "cpu/training/training.h"

namespace resnet_fast {

// Output channels [k0, k0 + width) of channels [0, layout.channels) as [channel][tap][output channel] in float32.
template <typename S>
void gather_filter(const FilterView& v, const FilterLayout<BFloat16>& layout, int64_t real_channels, int64_t k0,
                   int64_t width, float* to) {
  const S* const from = static_cast<const S*>(v.data) + v.origin + k0 * v.k_step;
  const int64_t taps = layout.taps(), real = std::min(width, layout.out_channels - k0);
  if (real < width || real_channels < layout.depth()) std::fill_n(to, taps * layout.depth() * width, 0.0f);
  copy_filter(from, v, layout.kernel_h, layout.kernel_w, 0, real_channels, real, to, taps * width, width);
}

// As pack_training_filter, from weights as they are: batch norm comes later in training.
inline Tensor pack_bf16_training_filter(const FilterView& v, const FilterLayout<BFloat16>& layout,
                                        int64_t real_channels, const float* bias) {
  Tensor packed = empty_tensor({layout.numel()}, ScalarType::BFloat16);
  BFloat16* const data = static_cast<BFloat16*>(packed.data_ptr());
  BFloat16* const panels = data + layout.panels_begin();
  std::fill(data, panels, BFloat16{});
  if (bias) std::memcpy(data + layout.bias_begin(), bias, static_cast<size_t>(layout.out_channels) * sizeof(float));
  visit(v.type, [&](auto tag) {
    using S = decltype(tag);
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(static_cast<size_t>(layout.taps() * layout.depth() * layout.panel));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k0 = i * layout.panel, width = std::min(layout.panel, layout.padded_out() - k0);
        BFloat16* to = panels + i * layout.panel_stride();
        gather_filter<S>(v, layout, real_channels, k0, width, wide.data());
        if (layout.winograd()) {
          kernels_in_use<BFloat16>().pack_winograd(wide.data(), static_cast<int>(layout.channels),
                                                   static_cast<int>(width / layout.lanes), to);
          continue;
        }
        for (int64_t first = 0; first < layout.channels; first += layout.block()) {
          const int64_t last = std::min(first + layout.block(), layout.channels);
          for (int64_t tap = 0; tap < layout.taps(); ++tap) {
            for (int64_t c = first; c < last; c += 2) {
              const float* const a = wide.data() + (c * layout.taps() + tap) * width;
              const float* const b = a + layout.taps() * width;
              for (int64_t k = 0; k < width; ++k, to += 2) {
                to[0] = narrow_to<BFloat16>(a[k]), to[1] = narrow_to<BFloat16>(b[k]);
              }
            }
          }
        }
      }
    });
  });
  return packed;
}

// Zeros that a convolution of stride `stride` reads beyond a map of `size`.
inline int64_t bf16_beyond(int64_t size, int64_t result, int64_t pad, int64_t kernel, int64_t stride, bool winograd) {
  const int64_t last = winograd ? round_up(result, kBf16TileOut) + 2 : (result - 1) * stride + kernel;
  return std::max<int64_t>(last - pad - size, 0);
}

// A row of pixels in float32 into a map whose pixels may hold a channel of zeros more.
inline void put_bf16_row(const float* from, int64_t pixels, int64_t channels, BFloat16* to, int64_t pixel) {
  if (pixel == channels) {
    kernels_in_use<BFloat16>().narrow(from, pixels * channels, to);
    return;
  }
  for (int64_t w = 0; w < pixels; ++w, from += channels, to += pixel) {
    for (int64_t c = 0; c < channels; ++c) to[c] = narrow_to<BFloat16>(from[c]);
    std::fill(to + channels, to + pixel, BFloat16{});
  }
}

// Row `i`, counted through the images, normalised in float32.
inline void widen_activation(const BFloat16* x, const Image& image, const Activation<float>& act, int64_t i,
                             float* row) {
  kernels_in_use<BFloat16>().widen(x + i * image.row(), image.row(), row);
  if (!act.scale && !act.relu) return;
  kernels_in_use<float>().normalize({row, act.scale, act.shift, nullptr, nullptr, nullptr, act.relu, row, image.width,
                                     static_cast<int>(image.channels)});
}

// The same for the gradient of a convolution's output: a * grad + b * (y - mean) + constant, or grad itself. `row_y`:
// room for a row.
inline void widen_gradient(const BFloat16* grad, const BFloat16* y, const float* coefficients, const Image& image,
                           int64_t i, float* row, float* row_y) {
  kernels_in_use<BFloat16>().widen(grad + i * image.row(), image.row(), row);
  if (!coefficients) return;
  kernels_in_use<BFloat16>().widen(y + i * image.row(), image.row(), row_y);
  kernels_in_use<float>().input_gradient(
      {row, row_y, coefficients, row, image.width, static_cast<int>(image.channels)});
}

// Rows [begin, end) of images x height, normalised and rounded, into a map.
inline void fill_bf16_activation(const BFloat16* x, const Image& image, const Activation<float>& act, int64_t first,
                                 const Map<BFloat16>& to, int64_t begin, int64_t end) {
  std::vector<float> row(static_cast<size_t>(image.row()));
  const int64_t at = first * image.height;
  for (int64_t i = begin; i < end; ++i) {
    BFloat16* const out = to.at(i / image.height, i % image.height, 0);
    if (!act.scale && !act.relu && to.pixel == image.channels) {
      std::copy_n(x + (at + i) * image.row(), image.row(), out);
      continue;
    }
    widen_activation(x, image, act, at + i, row.data());
    put_bf16_row(row.data(), image.width, image.channels, out, to.pixel);
  }
}

// Rows [begin, end) of pairs of images x height, from pair `first` on, into a map of images, a map of pairs, or both; a
// last image without another has zeros beside it. widen(i, row): row `i`, counted through the images, in float32.
template <typename Widen>
void fill_pairs(const Image& image, int64_t first, const Map<BFloat16>& single, const Map<Bf16Pair>& pairs,
                int64_t begin, int64_t end, const Widen& widen) {
  std::vector<float> row(static_cast<size_t>(image.row())), other(row.size());
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / image.height, h = i % image.height, n = 2 * (first + pair);
    const bool two = n + 1 < image.images;
    widen(n * image.height + h, row.data());
    if (two) {
      widen((n + 1) * image.height + h, other.data());
    } else {
      std::fill(other.begin(), other.end(), 0.0f);
    }
    if (single.origin) {
      put_bf16_row(row.data(), image.width, image.channels, single.at(2 * pair, h, 0), single.pixel);
      if (two) put_bf16_row(other.data(), image.width, image.channels, single.at(2 * pair + 1, h, 0), single.pixel);
    }
    if (pairs.origin) kernels_in_use<Bf16Pair>().pair(row.data(), other.data(), image.row(), pairs.at(pair, h, 0));
  }
}

struct Bf16Forward {
  const Tensor& x;
  Activation<float> act;
  const Tensor& weight;
  const OptionalTensor& bias;
  Layer layer;
  Algorithm algorithm;
  bool moments;
};

// conv_moments by products of bfloat16.
std::tuple<Tensor, Tensor> bf16_conv_moments(const Bf16Forward& f);

struct Bf16Backward {
  const Tensor &grad, &x, &weight;
  const OptionalTensor &y, &coefficients, &scale_shift, &residual;
  bool relu;
  Layer layer;
  Algorithm algorithm;
  bool finish;
  const std::vector<Tensor>&ys, &means;
};

// The results of conv_backward.
std::tuple<Tensor, Tensor, Tensor> bf16_backward(const Bf16Backward& b, bool need_x, bool need_weight);

}  // namespace resnet_fast
