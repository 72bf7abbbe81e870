// Max pooling of the last activation of a chain, which itself never leaves the scratch memory.
#pragma once

#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/conv/chain_layout.h"

namespace resnet_fast {

inline Value pooled_shape(const char* op, const Value& v, const Pool& p) {
  const auto fits = [](int64_t v) { return v > 0 && v <= kMaxSize; };
  RESNET_FAST_CHECK(fits(p.kernel_h) && fits(p.kernel_w) && fits(p.stride_h) && fits(p.stride_w), op,
                    ": pool has a window of ", p.kernel_h, " x ", p.kernel_w, " and stride ", p.stride_h, " x ",
                    p.stride_w, ", want at least 1 and at most ", kMaxSize);
  RESNET_FAST_CHECK(p.pad_h >= 0 && p.pad_w >= 0 && p.pad_h <= p.kernel_h / 2 && p.pad_w <= p.kernel_w / 2, op,
                    ": pool has padding ", p.pad_h, " x ", p.pad_w, ", want at most half of its window, ", p.kernel_h,
                    " x ", p.kernel_w);
  RESNET_FAST_CHECK(v.height + 2 * p.pad_h >= p.kernel_h && v.width + 2 * p.pad_w >= p.kernel_w, op,
                    ": pool's window, ", p.kernel_h, " x ", p.kernel_w, ", exceeds the map, ", v.height, " x ",
                    v.width);
  return {v.channels,
          output_size(v.height, p.pad_h, p.kernel_h, p.stride_h),
          output_size(v.width, p.pad_w, p.kernel_w, p.stride_w),
          {}};
}

// Rows [row_begin, row_end) of images x height of `to`, a channels_last tensor of the size of `out`.
template <typename T>
void pool_output(const ActivationView<T>& from, const PaddedLayout& shape, const Pool& p, const Value& out,
                 const Tensor& to, int64_t first_image, int64_t row_begin, int64_t row_end) {
  // bfloat16 is widened, a window of rows at a time.
  constexpr bool widened = std::is_same_v<T, BFloat16>;
  typedef std::conditional_t<widened, float, T> Wide;
  const int64_t row = shape.width * from.pixel;
  std::vector<Wide> pixel(static_cast<size_t>(out.channels));
  std::vector<Wide> rows(widened ? static_cast<size_t>(p.kernel_h * row + kBf16Lanes) : 0);
  dispatch_dtype(to.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    S* data = static_cast<S*>(to.data_ptr()) + (first_image * out.height + row_begin) * out.width * out.channels;
    for (int64_t i = row_begin; i < row_end; ++i) {
      const int64_t n = i / out.height, h = i % out.height * p.stride_h - p.pad_h;
      const int64_t top = std::max<int64_t>(h, 0), bottom = std::min(h + p.kernel_h, shape.height);
      PoolCall<Wide> call{};
      call.rows = static_cast<int>(bottom - top), call.channels = static_cast<int>(out.channels);
      call.pixel = from.pixel;
      const Wide* first;
      if constexpr (widened) {
        for (int64_t r = top; r < bottom; ++r) {
          kernels_in_use<BFloat16>().widen(from.at(n, r, 0), row, rows.data() + (r - top) * row);
        }
        first = rows.data(), call.row = row;
      } else {
        first = from.at(n, top, 0), call.row = from.row;
      }
      for (int64_t w = -p.pad_w; w < out.width * p.stride_w - p.pad_w; w += p.stride_w, data += out.channels) {
        const int64_t left = std::max<int64_t>(w, 0), right = std::min(w + p.kernel_w, shape.width);
        call.input = first + left * from.pixel, call.columns = static_cast<int>(right - left), call.out = pixel.data();
        if constexpr (std::is_same_v<S, Wide>) call.out = data;
        kernels_in_use<Wide>().max_pool(call);
        if constexpr (!std::is_same_v<S, Wide>) {
          for (int64_t c = 0; c < out.channels; ++c) data[c] = narrow_to<S>(pixel[static_cast<size_t>(c)]);
        }
      }
    }
  });
}

}  // namespace resnet_fast
