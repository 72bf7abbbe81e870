// The operators max_pool and max_pool_backward: the maximum of each window and its offset in it, two offsets in a byte.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/nhwc.h"
#include "cpu/round.h"

namespace resnet_fast {
namespace {

constexpr int64_t kMaxTaps = 16;  // of a window: an offset takes four bits
// Elements a thread takes at least.
constexpr int64_t kGrain = 16384;

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

Window check_window(const char* op, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding) {
  check_pair(op, "kernel", kernel, 1, kMaxTaps);
  check_strides(op, stride, padding);
  const Window w{kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  RESNET_FAST_CHECK(w.kernel_h * w.kernel_w <= kMaxTaps, op, ": kernel is ", w.kernel_h, " x ", w.kernel_w,
                    ", want at most ", kMaxTaps, " places");
  RESNET_FAST_CHECK(2 * w.pad_h <= w.kernel_h && 2 * w.pad_w <= w.kernel_w, op, ": padding is ", w.pad_h, " x ",
                    w.pad_w, ", want at most half of the kernel");
  return w;
}

// Windows along a side. With ceil_mode the last one holds at least one pixel before the far padding.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad, bool ceil_mode) {
  const int64_t n = (size + 2 * pad - kernel + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (n - 1) * stride >= size + pad ? n - 1 : n;
}

// An offset as an integer of the size of T: comparisons of both fill vectors alike.
template <typename T>
using Offset = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// One window of one image: the first pixel with the maximum, or the last NaN, as in PyTorch.
template <typename S, typename T, typename P>
void window_max(const S* image, const NhwcShape& in, const Window& w, int64_t row, int64_t column, T* best, P* offset) {
  const int64_t channels = in.channels;
  std::fill_n(best, channels, -std::numeric_limits<T>::infinity());
  const int64_t top = std::max<int64_t>(-row, 0), left = std::max<int64_t>(-column, 0);
  std::fill_n(offset, channels, static_cast<P>(top * w.kernel_w + left));
  for (int64_t r = top; r < std::min(w.kernel_h, in.height - row); ++r) {
    for (int64_t s = left; s < std::min(w.kernel_w, in.width - column); ++s) {
      const S* x = image + (row + r) * in.row() + (column + s) * channels;
      const P here = static_cast<P>(r * w.kernel_w + s);
      for (int64_t c = 0; c < channels; ++c) {
        const T v = static_cast<T>(widen(x[c]));
        const bool take = v > best[c] || v != v;
        best[c] = take ? v : best[c];
        offset[c] = take ? here : offset[c];
      }
    }
  }
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& x, const std::vector<int64_t>& kernel,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    bool ceil_mode) {
  constexpr const char* op = "max_pool";
  check_nhwc(op, "x", x);
  const Window w = check_window(op, kernel, stride, padding);
  const NhwcShape in(x);
  RESNET_FAST_CHECK(
      in.height + 2 * w.pad_h >= w.kernel_h && in.width + 2 * w.pad_w >= w.kernel_w && in.height > 0 && in.width > 0,
      op, ": x is ", in.height, " x ", in.width, ", smaller than the window");
  const NhwcShape out(in.images, in.channels, windows(in.height, w.kernel_h, w.stride_h, w.pad_h, ceil_mode),
                      windows(in.width, w.kernel_w, w.stride_w, w.pad_w, ceil_mode));
  Tensor y = empty_nhwc(out, x);
  const int64_t bytes = (out.images * out.image() + 1) / 2;
  Tensor argmax = empty_tensor({bytes}, ScalarType::Byte);
  uint8_t* const packed = static_cast<uint8_t*>(argmax.data_ptr());
  const int64_t channels = in.channels, pairs = ceil_div(out.pixels(), 2);
  dispatch_compute(x, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    using P = Offset<T>;
    const S* from = static_cast<const S*>(x.data_ptr());
    S* to = static_cast<S*>(y.data_ptr());
    // Threads take pairs of pixels: no two write one byte.
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(channels, 1), 1);
    torch::stable::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      std::vector<T> best(static_cast<size_t>(channels));
      std::vector<P> offset(static_cast<size_t>(2 * channels));
      for (int64_t pair = begin; pair < end; ++pair) {
        std::fill(offset.begin() + channels, offset.end(), P(0));
        for (int64_t p = 2 * pair; p < std::min(2 * pair + 2, out.pixels()); ++p) {
          const int64_t column = p % out.width, row = p / out.width % out.height, n = p / out.width / out.height;
          window_max<S, T, P>(from + n * in.image(), in, w, row * w.stride_h - w.pad_h, column * w.stride_w - w.pad_w,
                              best.data(), offset.data() + (p - 2 * pair) * channels);
          store_as(best.data(), channels, to + p * channels);
        }
        uint8_t* const at = packed + pair * channels;
        const int64_t count = std::min(channels, bytes - pair * channels);
        for (int64_t i = 0; i < count; ++i) {
          at[i] =
              static_cast<uint8_t>(offset[static_cast<size_t>(2 * i)] | offset[static_cast<size_t>(2 * i + 1)] << 4);
        }
      }
    });
  });
  return {y, argmax};
}

// Windows [first, last] of `count` that hold pixel `at`.
struct Reach {
  int64_t first, last;

  Reach(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t count)
      : first(at + pad < kernel ? 0 : (at + pad - kernel) / stride + 1),
        last(std::min((at + pad) / stride, count - 1)) {}
};

Tensor max_pool_backward(const Tensor& grad, const Tensor& argmax, const std::vector<int64_t>& size,
                         const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding) {
  constexpr const char* op = "max_pool_backward";
  check_nhwc(op, "grad", grad);
  const Window w = check_window(op, kernel, stride, padding);
  const NhwcShape out(grad);
  check_defined(op, "places", argmax);
  RESNET_FAST_CHECK(argmax.scalar_type() == ScalarType::Byte && argmax.dim() == 1 && argmax.stride(0) == 1 &&
                        argmax.size(0) == (out.images * out.image() + 1) / 2,
                    op, ": places has shape ", shape(argmax), ", want a byte for each two of grad ", shape(grad));
  check_pair(op, "size", size, 1, kMaxSize);
  const NhwcShape in(out.images, out.channels, size[0], size[1]);
  Tensor dx = empty_nhwc(in, grad);
  const uint8_t* const packed = static_cast<const uint8_t*>(argmax.data_ptr());
  const int64_t channels = in.channels;
  dispatch_compute(grad, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    using P = Offset<T>;
    const S* from = static_cast<const S*>(grad.data_ptr());
    S* to = static_cast<S*>(dx.data_ptr());
    const int64_t depth = ceil_div(w.kernel_h, w.stride_h);  // rows of windows that share a row of pixels
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(in.row(), 1), 1);
    torch::stable::parallel_for(0, in.images * in.height, grain, [&](int64_t begin, int64_t end) {
      std::vector<P> offset(static_cast<size_t>(depth * out.row()));
      std::vector<int64_t> held(static_cast<size_t>(depth), -1);
      std::vector<T> sum(static_cast<size_t>(channels));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / in.height, h = i % in.height;
        const Reach rows(h, w.kernel_h, w.stride_h, w.pad_h, out.height);
        for (int64_t row = rows.first; row <= rows.last; ++row) {
          const int64_t line = n * out.height + row;
          if (std::exchange(held[static_cast<size_t>(row % depth)], line) == line) continue;
          P* const unpacked = offset.data() + row % depth * out.row();
          for (int64_t j = 0, at = line * out.row(); j < out.row(); ++j, ++at) {
            unpacked[j] = static_cast<P>(packed[at / 2] >> at % 2 * 4 & 15);
          }
        }
        for (int64_t column = 0; column < in.width; ++column) {
          const Reach columns(column, w.kernel_w, w.stride_w, w.pad_w, out.width);
          std::fill(sum.begin(), sum.end(), T(0));
          for (int64_t row = rows.first; row <= rows.last; ++row) {
            for (int64_t s = columns.first; s <= columns.last; ++s) {
              const P here =
                  static_cast<P>((h + w.pad_h - row * w.stride_h) * w.kernel_w + column + w.pad_w - s * w.stride_w);
              const S* g = from + n * out.image() + row * out.row() + s * channels;
              const P* at = offset.data() + row % depth * out.row() + s * channels;
              T* const total = sum.data();
              for (int64_t c = 0; c < channels; ++c) {  // without a branch, which no CPU predicts
                const T value = static_cast<T>(widen(g[c]));
                total[c] += at[c] == here ? value : T(0);
              }
            }
          }
          store_as(sum.data(), channels, to + i * in.row() + column * channels);
        }
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace resnet_fast
