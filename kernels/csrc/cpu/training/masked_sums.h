// The gradient behind a ReLU, and the sums that batch norm's backward wants of it.
#pragma once

#include <vector>

#include "cpu/training/training.h"

namespace resnet_fast {

inline void check_sum_inputs(const char* op, const Tensor& like, const OptionalTensor& positive,
                             const std::vector<Tensor>& ys, const std::vector<Tensor>& means) {
  const auto check = [&](const char* name, const Tensor& t) {
    check_image(op, name, t);
    check_same_shape(op, name, t, "the gradient", like);
    check_same_dtype(op, name, t, "the gradient", like);
  };
  if (positive) check("positive", *positive);
  RESNET_FAST_CHECK(ys.size() == means.size() && ys.size() <= 2, op, ": ", ys.size(), " ys and ", means.size(),
                    " means, want as many of both and at most two");
  for (const Tensor& y : ys) check("ys", y);
}

// grad -> where positive > 0; sums of it, and of it times (y - mean) for each y.
template <typename S, typename T>
class MaskedSums {
 public:
  MaskedSums(const char* op, const OptionalTensor& positive, const OptionalTensor& scale_shift,
             const std::vector<Tensor>& ys, const std::vector<Tensor>& means, int64_t channels)
      : channels_(channels) {
    const T* affine = check_rows<T>(op, "scale_shift", scale_shift, 2, channels);
    call_.scale = affine, call_.shift = affine ? affine + channels : nullptr;
    if (positive) positive_ = static_cast<const S*>(positive->data_ptr());
    for (size_t i = 0; i < ys.size(); ++i) {
      const T* mean = check_rows<T>(op, "means", means[i], 2, channels);
      (i == 0 ? call_.mean : call_.second_mean) = mean;
      (i == 0 ? y_ : second_) = static_cast<const S*>(ys[i].data_ptr());
    }
    call_.channels = static_cast<int>(channels);
  }

  // Pixels [begin, end) of all images; adds to sums[3][channels]. Where `to` is null the gradient is not wanted.
  void run(const S* from, S* to, int64_t begin, int64_t end, double* sums) const {
    const size_t room = sizeof(S) == sizeof(T) ? 0 : static_cast<size_t>(kSumElements + 16 * channels_);
    std::vector<T> wide(to ? room : static_cast<size_t>(kSumElements + 16 * channels_));
    std::vector<T> wide_positive(room), wide_y(room), wide_second(room);
    std::vector<T> part(static_cast<size_t>(3 * channels_));
    MaskedSumsCall<T> call = call_;
    call.sums = part.data();
    in_pieces(begin, end, channels_, [&](int64_t pixel, int64_t count) {
      const int64_t at = pixel * channels_, n = count * channels_;
      const auto read = [&](const S* source, std::vector<T>& buffer) -> const T* {
        return source ? as_arithmetic(source + at, n, buffer.data()) : nullptr;
      };
      call.grad = read(from, wide);
      call.positive = read(positive_, wide_positive);
      call.y = read(y_, wide_y);
      call.second = read(second_, wide_second);
      call.out = to ? target(to + at, wide.data()) : wide.data();
      call.pixels = count;
      kernels_in_use<T>().masked_sums(call);
      if (to) store_as(call.out, n, to + at);
      for (size_t i = 0; i < part.size(); ++i) sums[i] += static_cast<double>(part[i]);
    });
  }

 private:
  int64_t channels_;
  const S *positive_ = nullptr, *y_ = nullptr, *second_ = nullptr;
  MaskedSumsCall<T> call_{};
};

template <typename T>
void add_parts(const std::vector<std::vector<double>>& parts, T* to) {
  for (size_t i = 0; i < parts[0].size(); ++i) {
    double sum = 0;
    for (const auto& part : parts) sum += part[i];
    to[i] = static_cast<T>(sum);
  }
}

}  // namespace resnet_fast
