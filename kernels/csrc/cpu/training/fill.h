// Fills padded activations for convolutions in training: a convolution's input with batch norm and ReLU applied, and
// the gradient of its output behind batch norm's backward. bfloat16 computes both in float32 and rounds once.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv/padded_layout.h"
#include "cpu/nhwc.h"

namespace resnet_fast {

// A lazy activation: [relu](scale * y + shift) of a convolution's output y; y itself where scale is null.
template <typename T>
struct ScaleShiftRelu {
  const T *scale = nullptr, *shift = nullptr;
  bool relu = false;

  // scale_shift: [scale; shift], or null.
  ScaleShiftRelu(const T* scale_shift, int64_t channels, bool relu)
      : scale(scale_shift), shift(scale_shift ? scale_shift + channels : nullptr), relu(relu) {}
  bool identity() const { return !scale && !relu; }

  // A row of pixels; `out` may be `row`.
  void apply(const T* row, int64_t pixels, int64_t channels, T* out) const {
    kernels_in_use<T>().normalize(
        {row, scale, shift, nullptr, nullptr, nullptr, relu, out, pixels, static_cast<int>(channels)});
  }
};

// Rows [begin, end) of images x height, from image `first` of x on.
template <typename S, typename T>
void fill_activation(const S* x, const NhwcShape& shape, const ScaleShiftRelu<T>& act, int64_t first,
                     const ActivationView<T>& to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* out = to.at(i / shape.height, i % shape.height, 0);
    const T* in = as_compute(x + first * shape.image() + i * shape.row(), shape.row(), out);
    if (!act.identity()) {
      act.apply(in, shape.width, shape.channels, out);
    } else if (in != out) {
      std::copy_n(in, shape.row(), out);
    }
  }
}

// The gradient of a convolution's output: a * grad + b * (y - mean) + constant, or grad where coefficients is null.
template <typename S, typename T>
void fill_gradient(const S* grad, const S* y, const T* coefficients, const NhwcShape& shape, int64_t first,
                   const ActivationView<T>& to, int64_t begin, int64_t end) {
  std::vector<T> buffer(sizeof(S) == sizeof(T) ? 0 : static_cast<size_t>(shape.row()));
  for (int64_t i = begin; i < end; ++i) {
    T* out = to.at(i / shape.height, i % shape.height, 0);
    const int64_t at = first * shape.image() + i * shape.row();
    const T* in = as_compute(grad + at, shape.row(), out);
    if (coefficients) {
      kernels_in_use<T>().input_gradient({in, as_compute(y + at, shape.row(), buffer.data()), coefficients, out,
                                          shape.width, static_cast<int>(shape.channels)});
    } else if (in != out) {
      std::copy_n(in, shape.row(), out);
    }
  }
}

// Row `i` of images x height in float32.
inline void widen_activation(const BFloat16* x, const NhwcShape& shape, const ScaleShiftRelu<float>& act, int64_t i,
                             float* row) {
  kernels_in_use<BFloat16>().widen(x + i * shape.row(), shape.row(), row);
  if (!act.identity()) act.apply(row, shape.width, shape.channels, row);
}

// The same of the gradient. `row_y`: a buffer for a row.
inline void widen_gradient(const BFloat16* grad, const BFloat16* y, const float* coefficients, const NhwcShape& shape,
                           int64_t i, float* row, float* row_y) {
  kernels_in_use<BFloat16>().widen(grad + i * shape.row(), shape.row(), row);
  if (!coefficients) return;
  kernels_in_use<BFloat16>().widen(y + i * shape.row(), shape.row(), row_y);
  kernels_in_use<float>().input_gradient(
      {row, row_y, coefficients, row, shape.width, static_cast<int>(shape.channels)});
}

// Rounds a row of pixels into an activation whose pixels may hold one more channel, of zeros.
inline void store_bf16_row(const float* from, int64_t pixels, int64_t channels, BFloat16* to, int64_t pixel) {
  if (pixel == channels) {
    kernels_in_use<BFloat16>().narrow(from, pixels * channels, to);
    return;
  }
  for (int64_t w = 0; w < pixels; ++w, from += channels, to += pixel) {
    for (int64_t c = 0; c < channels; ++c) to[c] = narrow_to<BFloat16>(from[c]);
    std::fill(to + channels, to + pixel, BFloat16{});
  }
}

inline void fill_activation(const BFloat16* x, const NhwcShape& shape, const ScaleShiftRelu<float>& act, int64_t first,
                            const ActivationView<BFloat16>& to, int64_t begin, int64_t end) {
  std::vector<float> row(static_cast<size_t>(shape.row()));
  const int64_t at = first * shape.height;
  for (int64_t i = begin; i < end; ++i) {
    BFloat16* const out = to.at(i / shape.height, i % shape.height, 0);
    if (act.identity() && to.pixel == shape.channels) {
      std::copy_n(x + (at + i) * shape.row(), shape.row(), out);
      continue;
    }
    widen_activation(x, shape, act, at + i, row.data());
    store_bf16_row(row.data(), shape.width, shape.channels, out, to.pixel);
  }
}

// Rows [begin, end) of pairs of images x height, from pair `first` on, into an activation of images, one of pairs, or
// both. A last image without a partner is paired with zeros. widen(i, row): row `i` of images x height in float32.
template <typename Widen>
void fill_pairs(const NhwcShape& shape, int64_t first, const ActivationView<BFloat16>& images,
                const ActivationView<Bf16Pair>& pairs, int64_t begin, int64_t end, const Widen& widen) {
  std::vector<float> row(static_cast<size_t>(shape.row())), other(row.size());
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / shape.height, h = i % shape.height, n = 2 * (first + pair);
    const bool two = n + 1 < shape.images;
    widen(n * shape.height + h, row.data());
    if (two) {
      widen((n + 1) * shape.height + h, other.data());
    } else {
      std::fill(other.begin(), other.end(), 0.0f);
    }
    if (images.origin) {
      store_bf16_row(row.data(), shape.width, shape.channels, images.at(2 * pair, h, 0), images.pixel);
      if (two) {
        store_bf16_row(other.data(), shape.width, shape.channels, images.at(2 * pair + 1, h, 0), images.pixel);
      }
    }
    if (pairs.origin) kernels_in_use<Bf16Pair>().pair(row.data(), other.data(), shape.row(), pairs.at(pair, h, 0));
  }
}

}  // namespace resnet_fast
