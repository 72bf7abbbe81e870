// Activations as the kernels read them: channels last, in the type of the kernels, with a halo of zeros; and the copies
// between them and tensors of any layout and type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/round.h"

namespace resnet_fast {

inline int64_t output_size(int64_t size, int64_t pad, int64_t kernel, int64_t stride) {
  return (size + 2 * pad - kernel) / stride + 1;
}

// Zeros that a convolution of `output` pixels along one side reads beyond an input of `size`. winograd_tile: outputs of
// a tile of Winograd, whose last tiles are computed whole, or 0.
inline int64_t far_halo(int64_t size, int64_t output, int64_t pad, int64_t kernel, int64_t stride,
                        int64_t winograd_tile) {
  const int64_t last = winograd_tile > 0 ? round_up(output, winograd_tile) + 2 : (output - 1) * stride + kernel;
  return std::max<int64_t>(last - pad - size, 0);
}

// Channel 0 of pixel (h, w) of image n is at origin[n * image + h * row + w * pixel]; channels are dense.
template <typename T>
struct ActivationView {
  T* origin = nullptr;
  int64_t image = 0, row = 0, pixel = 0;

  T* at(int64_t n, int64_t h, int64_t w) const { return origin + n * image + h * row + w * pixel; }
};

// Zeros around an activation: the padding, and what the last Winograd tiles read beyond it.
struct Halo {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  bool operator==(const Halo&) const = default;
  bool empty() const { return top == 0 && bottom == 0 && left == 0 && right == 0; }
  void cover(const Halo& o) {
    top = std::max(top, o.top), bottom = std::max(bottom, o.bottom);
    left = std::max(left, o.left), right = std::max(right, o.right);
  }
};

// The layout of an activation in scratch memory. `pixel`, the stride of pixels, may exceed the channels, to whole
// vectors.
struct PaddedLayout {
  int64_t channels, height, width, pixel;
  Halo halo;

  bool operator==(const PaddedLayout&) const = default;
  int64_t row() const { return (halo.left + width + halo.right) * pixel; }
  int64_t image() const { return (halo.top + height + halo.bottom) * row(); }

  template <typename T>
  ActivationView<T> view(T* data) const {
    return {data + halo.top * row() + halo.left * pixel, image(), row(), pixel};
  }

  template <typename T>
  void clear_halo(T* data, int64_t images) const {
    for (int64_t n = 0; n < images; ++n, data += image()) {
      std::fill_n(data, halo.top * row(), T{});
      std::fill_n(data + (halo.top + height) * row(), halo.bottom * row(), T{});
      for (int64_t h = halo.top; h < halo.top + height; ++h) {
        std::fill_n(data + h * row(), halo.left * pixel, T{});
        std::fill_n(data + h * row() + (halo.left + width) * pixel, halo.right * pixel, T{});
      }
    }
  }
};

// Rows [row_begin, row_end) of images x height, from a tensor [N, C, H, W] of any strides.
template <typename T>
void copy_in(const torch::stable::Tensor& from, int64_t first_image, const ActivationView<T>& to,
             const PaddedLayout& shape, int64_t row_begin, int64_t row_end) {
  const int64_t sn = from.stride(0), sc = from.stride(1), sh = from.stride(2), sw = from.stride(3);
  dispatch_dtype(from.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const S* data = static_cast<const S*>(from.data_ptr());
    for (int64_t i = row_begin; i < row_end; ++i) {
      const int64_t n = i / shape.height, h = i % shape.height;
      const S* row = data + (first_image + n) * sn + h * sh;
      if (sc == 1 && sw == shape.channels && to.pixel == shape.channels) {
        T* out = to.at(n, h, 0);
        for (int64_t j = 0; j < shape.width * shape.channels; ++j) out[j] = convert<T>(row[j]);
        continue;
      }
      if (sc == 1) {
        for (int64_t w = 0; w < shape.width; ++w) {
          T* pixel = to.at(n, h, w);
          for (int64_t c = 0; c < shape.channels; ++c) pixel[c] = convert<T>(row[w * sw + c]);
        }
      } else {
        for (int64_t c = 0; c < shape.channels; ++c) {
          T* pixel = to.at(n, h, 0) + c;
          for (int64_t w = 0; w < shape.width; ++w) pixel[w * to.pixel] = convert<T>(row[c * sc + w * sw]);
        }
      }
      for (int64_t w = 0; w < shape.width; ++w) {
        std::fill_n(to.at(n, h, w) + shape.channels, to.pixel - shape.channels, T{});
      }
    }
  });
}

// Rows [row_begin, row_end) of images x height, to a channels_last tensor.
template <typename T>
void copy_out(const ActivationView<T>& from, const PaddedLayout& shape, const torch::stable::Tensor& to,
              int64_t first_image, int64_t row_begin, int64_t row_end) {
  dispatch_dtype(to.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    S* out = static_cast<S*>(to.data_ptr()) + (first_image * shape.height + row_begin) * shape.width * shape.channels;
    for (int64_t i = row_begin; i < row_end; ++i) {
      for (int64_t w = 0; w < shape.width; ++w, out += shape.channels) {
        const T* pixel = from.at(i / shape.height, i % shape.height, w);
        for (int64_t c = 0; c < shape.channels; ++c) out[c] = convert<S>(pixel[c]);
      }
    }
  });
}

}  // namespace resnet_fast
