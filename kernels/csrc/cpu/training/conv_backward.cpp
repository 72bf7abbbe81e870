// The operator conv_backward: both gradients of a convolution between two batch norms, whose backwards are applied as
// its operands are read and its result is written.
#include "cpu/training/conv_backward.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/thread_team.h"
#include "cpu/training/data_gradient.h"
#include "cpu/training/fill.h"
#include "cpu/training/image_split.h"
#include "cpu/training/weight_gradient.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_backward";

// What the epilogue of these images and the next images read.
template <typename S>
PrefetchList prefetch_list(const BackwardArguments& a, const NhwcShape& in, const NhwcShape& out, int64_t first,
                           int64_t images, int64_t end, const ThreadGroup& group) {
  PrefetchList list{};
  const auto append = [&](const Tensor& t, const NhwcShape& shape, int64_t from) {
    append_prefetch(list, static_cast<const S*>(t.data_ptr()), shape, from, images, end, group);
  };
  for (const Tensor& y : a.ys) {
    if (y.data_ptr() != a.x.data_ptr()) append(y, in, first);
  }
  append(a.grad, out, first + images);
  if (a.y) append(*a.y, out, first + images);
  if (a.need_weight) append(a.x, in, first + images);
  return list;
}

// S: elements of the tensors, T: those of the arithmetic.
template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const BackwardArguments& a) {
  const Layer& l = a.layer;
  const NhwcShape whole(a.x);
  const bool by_rows = goes_by_rows(l, whole.channels, sizeof(T)), winograd = a.algorithm != Algorithm::kDirect;
  const NhwcShape in = by_rows ? rows_of(whole) : whole, out = by_rows ? rows_of(NhwcShape(a.grad)) : NhwcShape(a.grad);
  const int64_t threads = torch::stable::get_num_threads(), tile = winograd ? kTileOut : 0;
  const ScaleShiftRelu<T> act(check_rows<T>(kOp, "scale_shift", a.scale_shift, 2, in.channels), in.channels, a.relu);
  const T* coefficients = check_rows<T>(kOp, "coefficients", a.coefficients, 4, out.channels);

  std::optional<DataGradient<S, T>> data;
  if (a.need_x) data.emplace(a, in, out, threads);
  // Both gradients read the same padded d, the gradient of the output.
  Halo d_halo = data ? data->halo() : Halo{};
  if (winograd) d_halo.cover({0, round_up(out.height, tile) - out.height, 0, round_up(out.width, tile) - out.width});
  const PaddedLayout d_layout{out.channels, out.height, out.width, out.channels, d_halo};
  const PaddedLayout x_layout{in.channels,
                              in.height,
                              in.width,
                              in.channels,
                              {l.pad_h, far_halo(in.height, out.height, l.pad_h, l.kernel_h, l.stride_h, tile), l.pad_w,
                               far_halo(in.width, out.width, l.pad_w, l.kernel_w, l.stride_w, tile)}};
  Tensor dw = empty_tensor_like(a.weight);

  const int64_t d_numel = round_up(d_layout.image(), 64), x_numel = a.need_weight ? round_up(x_layout.image(), 64) : 0;
  const int64_t result_numel = data ? data->result_numel() : 0;
  const int64_t tiles = winograd ? ceil_div(out.height, kTileOut) * ceil_div(out.width, kTileOut) : kMinThreadTiles;
  const int64_t own_acc = WeightGradient<T>(l, in, out, winograd, true).acc_numel(1);
  ImageSplit split(in.images, (d_numel + x_numel + result_numel) * static_cast<int64_t>(sizeof(T)), tiles, threads,
                   !a.need_weight || own_acc * static_cast<int64_t>(sizeof(T)) <= kThreadAccBytes);
  const WeightGradient<T> weight(l, in, out, winograd, split.per_thread);
  if (a.need_weight && weight.whole()) split.chunk = std::max<int64_t>(in.images, 1);

  // A slot: d, x and the result of a chunk of images, then accumulators and transformed tiles of the weight's gradient.
  const int64_t acc_numel = a.need_weight ? round_up(weight.acc_numel(threads), 64) : 0;
  const int64_t tiles_numel = a.need_weight ? round_up(weight.work_numel(split.per_thread ? 1 : threads), 64) : 0;
  const int64_t x_begin = d_numel * split.chunk + 64, result_begin = x_begin + x_numel * split.chunk + 64;
  const int64_t acc_begin = round_up(result_begin + result_numel * split.chunk + 64, 64);
  const int64_t tiles_begin = acc_begin + acc_numel;
  const int64_t slot_numel = tiles_begin + tiles_numel, slots = split.slots(threads);
  const int64_t work_numel = data ? data->work_numel(split.chunk) : 0;
  Tensor scratch = empty_rows(1, slots * slot_numel + threads * work_numel, a.x);
  T* const memory = static_cast<T*>(scratch.data_ptr());

  ThreadTeam::run(threads, [&](int64_t rank, ThreadTeam& team) {
    const ThreadGroup group = split.group(rank, team), all{rank, team.size(), team};
    T* const slot = memory + split.slot(rank) * slot_numel;
    T *const x_memory = slot + x_begin, *const result = slot + result_begin;
    T *const acc = slot + acc_begin, *const weight_tiles = slot + tiles_begin;
    T* const work = memory + slots * slot_numel + rank * work_numel;
    group.share(acc_numel, [&](int64_t begin, int64_t end) { std::fill(acc + begin, acc + end, T(0)); });
    for (int64_t n = group.rank; n < split.chunk; n += group.size) {
      d_layout.clear_halo(slot + n * d_layout.image(), 1);
      if (a.need_weight) x_layout.clear_halo(x_memory + n * x_layout.image(), 1);
    }
    const ActivationView<T> d = d_layout.view(slot), x = x_layout.view(x_memory);
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      group.share(images * out.height, [&](int64_t begin, int64_t end) {
        fill_gradient(static_cast<const S*>(a.grad.data_ptr()), a.y ? static_cast<const S*>(a.y->data_ptr()) : nullptr,
                      coefficients, out, first, d, begin, end);
      });
      if (a.need_weight) {
        group.share(images * in.height, [&](int64_t begin, int64_t end) {
          fill_activation(static_cast<const S*>(a.x.data_ptr()), in, act, first, x, begin, end);
        });
      }
      if (data) data->fill_unreached(first, images, result, group);
      group.wait();
      if (data) {
        data->run(first, images, d, result, work,
                  prefetch_list<S>(a, in, out, first, images, split.end(rank, team.size()), group), group);
      }
      if (a.need_weight) weight.add(d, x, images, acc, weight_tiles, group);
      group.wait();
      if (data) data->finish(first, images, result, rank, group);
    });
    team.wait();
    if (a.need_weight) {
      weight.finish(memory + acc_begin, acc_numel, slot_numel, split.per_thread, memory + tiles_begin, dw, all);
    }
  });
  if (data) {
    auto [dx, sums] = data->results();
    return {dx, dw, sums};
  }
  return {empty_nhwc(NhwcShape(0, whole.channels, whole.height, whole.width), a.x), dw,
          empty_rows(0, in.channels, a.x)};
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad, const OptionalTensor& y,
                                                 const OptionalTensor& coefficients, const Tensor& x,
                                                 const OptionalTensor& scale_shift, bool relu, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding, int64_t algorithm, bool need_x,
                                                 bool need_weight, const OptionalTensor& residual, bool finish,
                                                 const std::vector<Tensor>& ys, const std::vector<Tensor>& stats) {
  check_nhwc(kOp, "grad", grad);
  check_nhwc(kOp, "x", x);
  check_conv_bn(kOp, weight, std::nullopt, {});
  RESNET_FAST_CHECK(weight.is_cpu(), kOp, ": weight is not on the CPU, as x is");
  check_same_dtype(kOp, "grad", grad, "x", x);
  RESNET_FAST_CHECK(compute_type(weight) == compute_type(x), kOp, ": weight has dtype ",
                    dtype_name(weight.scalar_type()), ", x has ", dtype_name(x.scalar_type()));
  check_strides(kOp, stride, padding);
  const Layer layer{0,         -1,        0,          weight.size(0), weight.size(2), weight.size(3),
                    stride[0], stride[1], padding[0], padding[1]};
  const bool fits = x.size(1) == weight.size(1) && grad.size(0) == x.size(0) && grad.size(1) == weight.size(0) &&
                    x.size(2) + 2 * padding[0] >= layer.kernel_h && x.size(3) + 2 * padding[1] >= layer.kernel_w &&
                    grad.size(2) == output_size(x.size(2), padding[0], layer.kernel_h, stride[0]) &&
                    grad.size(3) == output_size(x.size(3), padding[1], layer.kernel_w, stride[1]);
  RESNET_FAST_CHECK(fits, kOp, ": grad ", shape(grad), " is not what a convolution of x ", shape(x), " by weight ",
                    shape(weight), " gives");
  RESNET_FAST_CHECK(y.has_value() == coefficients.has_value(), kOp, ": y and coefficients come together");
  if (y) {
    check_nhwc(kOp, "y", *y);
    check_same_shape(kOp, "y", *y, "grad", grad);
    check_same_dtype(kOp, "y", *y, "grad", grad);
  }
  if (residual) {
    check_nhwc(kOp, "residual", *residual);
    check_same_shape(kOp, "residual", *residual, "x", x);
    check_same_dtype(kOp, "residual", *residual, "x", x);
  }
  check_sum_inputs(kOp, x, std::nullopt, ys, stats);
  RESNET_FAST_CHECK(!finish || need_x, kOp, ": finish without need_x");
  const bool winograd = layer.kernel_h == 3 && layer.kernel_w == 3 && stride[0] == 1 && stride[1] == 1;
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  RESNET_FAST_CHECK((algorithm >= 0 && algorithm <= (winograd ? 2 : 0)) || (bf16 && algorithm == 3) ||
                        (bf16 && winograd && algorithm == 4),
                    kOp, ": algorithm is ", algorithm,
                    ", want 0, or for a 3x3 filter with stride 1 up to 2; if x is bfloat16 also 3, and 4 likewise");
  const BackwardArguments a{kOp,
                            grad,
                            x,
                            weight,
                            y,
                            coefficients,
                            scale_shift,
                            residual,
                            relu,
                            layer,
                            static_cast<Algorithm>(algorithm),
                            need_x,
                            need_weight,
                            finish,
                            ys,
                            stats};
  if (in_bf16(a.algorithm)) return bf16_conv_backward(a);
  std::tuple<Tensor, Tensor, Tensor> result{x, x, x};
  dispatch_compute(x, [&](auto storage, auto compute) { result = backward<decltype(storage), decltype(compute)>(a); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("conv_backward", TORCH_BOX(&conv_backward)); }

}  // namespace resnet_fast
