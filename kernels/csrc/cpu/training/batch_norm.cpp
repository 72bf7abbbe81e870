// The operators bn_apply, bn_backward_sums and channel_sums, each a single pass over memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/training/masked_sums.h"
#include "cpu/training/reductions.h"

namespace resnet_fast {
namespace {

Tensor bn_apply(const Tensor& y, const Tensor& scale_shift, const OptionalTensor& residual,
                const OptionalTensor& residual_scale_shift, bool relu) {
  constexpr const char* op = "bn_apply";
  check_nhwc(op, "y", y);
  const NhwcShape image(y);
  if (residual) {
    check_nhwc(op, "residual", *residual);
    check_same_shape(op, "residual", *residual, "y", y);
    check_same_dtype(op, "residual", *residual, "y", y);
  }
  Tensor out = empty_nhwc(image, y);
  dispatch_compute(y, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const int64_t channels = image.channels;
    const T* affine = check_rows<T>(op, "scale_shift", scale_shift, 2, channels);
    const T* other = check_rows<T>(op, "residual_scale_shift", residual_scale_shift, 2, channels);
    const S* from = static_cast<const S*>(y.data_ptr());
    const S* added = residual ? static_cast<const S*>(residual->data_ptr()) : nullptr;
    S* to = static_cast<S*>(out.data_ptr());
    const int64_t grain = std::max<int64_t>(32768 / std::max<int64_t>(channels, 1), 1);
    torch::stable::parallel_for(0, image.pixels(), grain, [&](int64_t first, int64_t last) {
      const size_t room = sizeof(S) == sizeof(T) ? 0 : static_cast<size_t>(block_numel(channels));
      std::vector<T> wide(room), wide_residual(room);
      for_pixel_blocks(first, last, channels, [&](int64_t pixel, int64_t count) {
        const int64_t at = pixel * channels, n = count * channels;
        T* const result = compute_target(to + at, wide.data());
        kernels_in_use<T>().normalize({as_compute(from + at, n, wide.data()), affine, affine + channels,
                                       added ? as_compute(added + at, n, wide_residual.data()) : nullptr, other,
                                       other ? other + channels : nullptr, relu, result, count,
                                       static_cast<int>(channels)});
        store_as(result, n, to + at);
      });
    });
  });
  return out;
}

// All pixels through `masked`, to `out` (or null) and sums[3][channels].
template <typename S, typename T>
void sum_pixels(const MaskedSums<S, T>& masked, const Tensor& grad, S* out, T* sums) {
  const NhwcShape image(grad);
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<std::vector<double>> partial(static_cast<size_t>(threads),
                                           std::vector<double>(static_cast<size_t>(3 * image.channels)));
  const S* from = static_cast<const S*>(grad.data_ptr());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      masked.run(from, out, image.pixels() * part / threads, image.pixels() * (part + 1) / threads,
                 partial[static_cast<size_t>(part)].data());
    }
  });
  add_partial_sums(partial, sums);
}

std::tuple<Tensor, Tensor> bn_backward_sums(const Tensor& grad, const OptionalTensor& relu_source,
                                            const OptionalTensor& scale_shift, const std::vector<Tensor>& ys,
                                            const std::vector<Tensor>& stats) {
  constexpr const char* op = "bn_backward_sums";
  check_nhwc(op, "grad", grad);
  const NhwcShape image(grad);
  check_sum_inputs(op, grad, relu_source, ys, stats);
  Tensor out = empty_nhwc(image, grad);
  Tensor sums = empty_rows(3, image.channels, grad);
  dispatch_compute(grad, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const MaskedSums<S, T> masked(op, relu_source, scale_shift, ys, stats, image.channels);
    sum_pixels(masked, grad, static_cast<S*>(out.data_ptr()), static_cast<T*>(sums.data_ptr()));
  });
  return {out, sums};
}

Tensor channel_sums(const Tensor& grad) {
  constexpr const char* op = "channel_sums";
  check_nhwc(op, "grad", grad);
  Tensor out = empty_tensor({grad.size(1)}, compute_type(grad));
  dispatch_compute(grad, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const MaskedSums<S, T> plain(op, std::nullopt, std::nullopt, {}, {}, grad.size(1));
    std::vector<T> sums(static_cast<size_t>(3 * grad.size(1)));
    sum_pixels(plain, grad, static_cast<S*>(nullptr), sums.data());
    std::copy_n(sums.data(), grad.size(1), static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("bn_apply", TORCH_BOX(&bn_apply));
  m.impl("bn_backward_sums", TORCH_BOX(&bn_backward_sums));
  m.impl("channel_sums", TORCH_BOX(&channel_sums));
}

}  // namespace resnet_fast
