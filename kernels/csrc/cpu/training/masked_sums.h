// ReLU's backward, and the sums over pixels that batch norm's backward needs of its result.
#pragma once

#include <vector>

#include "cpu/conv/filters.h"
#include "cpu/nhwc.h"
#include "cpu/training/reductions.h"

namespace resnet_fast {

inline void check_sum_inputs(const char* op, const Tensor& like, const OptionalTensor& relu_source,
                             const std::vector<Tensor>& ys, const std::vector<Tensor>& stats) {
  const auto check = [&](const char* name, const Tensor& t) {
    check_nhwc(op, name, t);
    check_same_shape(op, name, t, "the gradient", like);
    check_same_dtype(op, name, t, "the gradient", like);
  };
  if (relu_source) check("positive", *relu_source);
  RESNET_FAST_CHECK(ys.size() == stats.size() && ys.size() <= 2, op, ": ", ys.size(), " ys and ", stats.size(),
                    " means, want as many of both and at most two");
  for (const Tensor& y : ys) check("ys", y);
}

// g = grad where relu_source > 0, else 0; sums of g, and of g * (y - mean) for each y.
template <typename S, typename T>
class MaskedSums {
 public:
  MaskedSums(const char* op, const OptionalTensor& relu_source, const OptionalTensor& scale_shift,
             const std::vector<Tensor>& ys, const std::vector<Tensor>& stats, int64_t channels)
      : channels_(channels) {
    const T* affine = check_rows<T>(op, "scale_shift", scale_shift, 2, channels);
    call_.scale = affine, call_.shift = affine ? affine + channels : nullptr;
    if (relu_source) relu_source_ = static_cast<const S*>(relu_source->data_ptr());
    for (size_t i = 0; i < ys.size(); ++i) {
      const T* mean = check_rows<T>(op, "means", stats[i], 2, channels);
      (i == 0 ? call_.mean : call_.second_mean) = mean;
      (i == 0 ? y_ : second_) = static_cast<const S*>(ys[i].data_ptr());
    }
    call_.channels = static_cast<int>(channels);
  }

  // Pixels [begin, end) of all images; adds to sums[3][channels]. Where `to` is null the gradient is not wanted.
  void run(const S* from, S* to, int64_t begin, int64_t end, double* sums) const {
    const size_t block = static_cast<size_t>(block_numel(channels_)), room = sizeof(S) == sizeof(T) ? 0 : block;
    std::vector<T> wide(to ? room : block);
    std::vector<T> wide_relu_source(room), wide_y(room), wide_second(room);
    std::vector<T> part(static_cast<size_t>(3 * channels_));
    MaskedSumsCall<T> call = call_;
    call.sums = part.data();
    for_pixel_blocks(begin, end, channels_, [&](int64_t pixel, int64_t count) {
      const int64_t at = pixel * channels_, n = count * channels_;
      const auto read = [&](const S* source, std::vector<T>& buffer) -> const T* {
        return source ? as_compute(source + at, n, buffer.data()) : nullptr;
      };
      call.grad = read(from, wide);
      call.relu_source = read(relu_source_, wide_relu_source);
      call.y = read(y_, wide_y);
      call.second = read(second_, wide_second);
      call.out = to ? compute_target(to + at, wide.data()) : wide.data();
      call.pixels = count;
      kernels_in_use<T>().masked_sums(call);
      if (to) store_as(call.out, n, to + at);
      for (size_t i = 0; i < part.size(); ++i) sums[i] += static_cast<double>(part[i]);
    });
  }

 private:
  int64_t channels_;
  const S *relu_source_ = nullptr, *y_ = nullptr, *second_ = nullptr;
  MaskedSumsCall<T> call_{};
};

}  // namespace resnet_fast
