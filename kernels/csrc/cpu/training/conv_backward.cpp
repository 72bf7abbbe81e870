// conv_backward: both gradients of a convolution between two batch norms, whose backwards happen on the way in and out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/conv/convolution.h"
#include "cpu/thread_team.h"
#include "cpu/training/bf16_training.h"
#include "cpu/training/masked_sums.h"
#include "cpu/training/phases.h"
#include "cpu/training/training.h"
#include "cpu/training/weight_gradient.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_backward";

// Zeros that a convolution reads beyond a map of `size`.
int64_t beyond(int64_t size, int64_t result, int64_t pad, int64_t kernel, int64_t stride, bool winograd) {
  const int64_t last = winograd ? round_up(result, kTileOut) + 2 : (result - 1) * stride + kernel;
  return std::max<int64_t>(last - pad - size, 0);
}

struct Arguments {
  const Tensor &grad, &x, &weight;
  const OptionalTensor &y, &coefficients, &scale_shift, &residual;
  bool relu;
  Layer layer;
  Algorithm data_algorithm;
  bool winograd_weight, need_x, need_weight, finish;
  const std::vector<Tensor>&ys, &means;
};

template <typename S, typename T>
std::vector<Tensor> backward(const Arguments& a) {
  const Layer& l = a.layer;
  const Image whole(a.x);
  const bool by_rows = goes_by_rows(l, whole.channels, sizeof(T));
  const Image in = by_rows ? rows_of(whole) : whole, out = by_rows ? rows_of(Image(a.grad)) : Image(a.grad);
  const int64_t threads = torch::stable::get_num_threads(), lanes = kernels_in_use<T>().lanes;
  const T* affine = check_rows<T>(kOp, "scale_shift", a.scale_shift, 2, in.channels);
  const T* coefficients = check_rows<T>(kOp, "coefficients", a.coefficients, 4, out.channels);
  const Activation<T> act{affine, affine ? affine + in.channels : nullptr, a.relu};

  bool complete = true;
  std::vector<Phase<T>> phases;
  if (a.need_x) phases = phases_of<T>(l, in, out.channels, a.weight, a.data_algorithm, complete);
  Halo d_halo, x_halo{l.pad_h, beyond(in.height, out.height, l.pad_h, l.kernel_h, l.stride_h, a.winograd_weight),
                      l.pad_w, beyond(in.width, out.width, l.pad_w, l.kernel_w, l.stride_w, a.winograd_weight)};
  for (const Phase<T>& p : phases) {
    const bool winograd = p.layout.winograd();
    const int64_t top = std::max<int64_t>(p.layer.pad_h, 0), left = std::max<int64_t>(p.layer.pad_w, 0);
    d_halo.cover({top, beyond(out.height, p.height, p.layer.pad_h, p.layer.kernel_h, 1, winograd), left,
                  beyond(out.width, p.width, p.layer.pad_w, p.layer.kernel_w, 1, winograd)});
  }
  if (a.winograd_weight) {
    d_halo.cover({0, round_up(out.height, kTileOut) - out.height, 0, round_up(out.width, kTileOut) - out.width});
  }
  const MapShape d_shape{out.channels, out.height, out.width, out.channels, d_halo};
  const MapShape x_shape{in.channels, in.height, in.width, in.channels, x_halo};
  // Whole vectors are written: channels that do not fill them go through a map of their own, and so does bfloat16.
  const bool in_place = sizeof(S) == sizeof(T) && in.channels % lanes == 0;
  const MapShape result_shape{in.channels, in.height, in.width, round_up(in.channels, lanes), {}};

  Tensor dx = empty_image(Image(a.need_x ? whole.images : 0, whole.channels, whole.height, whole.width), a.x);
  Tensor dw = empty_tensor_like(a.weight);
  Tensor sums = empty_rows(a.finish ? 3 : 0, in.channels, a.x);
  const S* const residual = a.residual ? static_cast<const S*>(a.residual->data_ptr()) : nullptr;
  S* const result = static_cast<S*>(dx.data_ptr());

  const int64_t d_numel = round_up(d_shape.image(), 64), x_numel = a.need_weight ? round_up(x_shape.image(), 64) : 0;
  const int64_t result_numel = a.need_x && !in_place ? round_up(result_shape.image(), 64) : 0;
  const int64_t image_numel = d_numel + x_numel + result_numel;
  const int64_t tiles = a.winograd_weight ? ceil_div(out.height, kTileOut) * ceil_div(out.width, kTileOut) : 16;
  const int64_t own_sums = WeightGradient<T>(l, in, out, a.winograd_weight, true).sums_numel(1);
  ImageSplit split(in.images, image_numel * static_cast<int64_t>(sizeof(T)), tiles, threads,
                   !a.need_weight || own_sums * static_cast<int64_t>(sizeof(T)) <= kMemberSumBytes);
  const WeightGradient<T> weight_gradient(l, in, out, a.winograd_weight, split.apart);
  if (a.need_weight && weight_gradient.whole()) split.chunk = std::max<int64_t>(in.images, 1);
  const int64_t sums_numel = a.need_weight ? round_up(weight_gradient.sums_numel(threads), 64) : 0;
  const int64_t shared_numel = a.need_weight ? round_up(weight_gradient.work_numel(split.apart ? 1 : threads), 64) : 0;

  // A slot holds the maps of a chunk, then what the weight's gradient needs.
  const int64_t x_begin = d_numel * split.chunk + 64, result_begin = x_begin + x_numel * split.chunk + 64;
  const int64_t sums_begin = round_up(result_begin + result_numel * split.chunk + 64, 64);
  const int64_t slot_numel = sums_begin + sums_numel + shared_numel;
  const auto convolution = [&](const Phase<T>& p, int64_t first, int64_t images, T* slot) {
    Map<T> to = in_place ? Map<T>{reinterpret_cast<T*>(result) + first * in.image(), in.image(), in.row(), in.channels}
                         : result_shape.map(slot + result_begin);
    Map<T> added{};
    if (residual && in_place) {
      T* const from = const_cast<T*>(reinterpret_cast<const T*>(residual)) + first * in.image();
      added = {from + p.row * in.row() + p.column * in.channels, in.image(), in.row() * l.stride_h,
               in.channels * l.stride_w};
    }
    to.origin += p.row * to.row + p.column * to.pixel;
    to.row *= l.stride_h, to.pixel *= l.stride_w;
    return Convolution<T>{
        p.layer, p.layout, static_cast<const T*>(p.packed.data_ptr()), images, p.height, p.width, d_shape.map(slot),
        added,   to};
  };
  int64_t work_numel = 0;
  for (const Phase<T>& p : phases) {
    if (p.layout.winograd())
      work_numel = std::max(work_numel, round_up(winograd_scratch(convolution(p, 0, split.chunk, nullptr)), 64));
  }
  Tensor scratch = empty_rows(1, split.slots(threads) * slot_numel + threads * work_numel, a.x);
  T* const slots = static_cast<T*>(scratch.data_ptr());
  std::optional<MaskedSums<S, T>> masked;
  if (a.finish) {
    masked.emplace(kOp, a.relu || !a.scale_shift ? OptionalTensor(a.x) : std::nullopt, a.scale_shift, a.ys, a.means,
                   in.channels);
  }
  std::vector<std::vector<double>> parts(static_cast<size_t>(threads),
                                         std::vector<double>(static_cast<size_t>(a.finish ? 3 * in.channels : 1)));
  int64_t weight_stride[4];
  for (int64_t i = 0; i < 4; ++i) weight_stride[i] = dw.stride(i);

  // What the sums of these images and the next images are made of.
  const auto ask = [&](Ahead& ahead, int64_t first, int64_t images, int64_t last, const Crew& crew) {
    for (const Tensor& y : a.ys) {
      if (y.data_ptr() != a.x.data_ptr()) {
        ask_for(ahead, static_cast<const S*>(y.data_ptr()), in, first, images, last, crew);
      }
    }
    ask_for(ahead, static_cast<const S*>(a.grad.data_ptr()), out, first + images, images, last, crew);
    if (a.y) ask_for(ahead, static_cast<const S*>(a.y->data_ptr()), out, first + images, images, last, crew);
    if (a.need_weight) {
      ask_for(ahead, static_cast<const S*>(a.x.data_ptr()), in, first + images, images, last, crew);
    }
  };

  Team::run(threads, [&](int64_t rank, Team& team) {
    const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team};
    T* const slot = slots + (split.apart ? rank : 0) * slot_numel;
    T *const x_map = slot + x_begin, *const result_map = slot + result_begin;
    T *const weight_sums = slot + sums_begin, *const shared = weight_sums + sums_numel;
    T* const work = slots + split.slots(threads) * slot_numel + rank * work_numel;
    crew.share(sums_numel,
               [&](int64_t begin, int64_t end) { std::fill(weight_sums + begin, weight_sums + end, T(0)); });
    for (int64_t n = crew.rank; n < split.chunk; n += crew.size) {
      d_shape.clear_halo(slot + n * d_shape.image(), 1);
      if (a.need_weight) x_shape.clear_halo(x_map + n * x_shape.image(), 1);
    }
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      crew.share(images * out.height, [&](int64_t begin, int64_t end) {
        fill_gradient<S, T>(static_cast<const S*>(a.grad.data_ptr()),
                            a.y ? static_cast<const S*>(a.y->data_ptr()) : nullptr, coefficients, out, first,
                            d_shape.map(slot), begin, end);
      });
      if (a.need_weight) {
        crew.share(images * in.height, [&](int64_t begin, int64_t end) {
          fill_activation<S, T>(static_cast<const S*>(a.x.data_ptr()), in, act, first, x_shape.map(x_map), begin, end);
        });
      }
      if (!complete && in_place) {  // pixels that no filter reaches
        crew.share(images * in.image(), [&](int64_t begin, int64_t end) {
          S* const to = result + first * in.image();
          if (residual) {
            std::copy(residual + first * in.image() + begin, residual + first * in.image() + end, to + begin);
          } else {
            std::fill(to + begin, to + end, S{});
          }
        });
      } else if (!complete) {
        crew.share(images * result_shape.image(),
                   [&](int64_t begin, int64_t end) { std::fill(result_map + begin, result_map + end, T(0)); });
      }
      crew.wait();
      for (const Phase<T>& p : phases) {
        Convolution<T> conv = convolution(p, first, images, slot);
        conv.far_output = in_place;
        if (p.layout.winograd()) ask(conv.ahead, first, images, split.end(rank, team.size()), crew);
        run_part(conv, part_of(conv, crew.rank, crew.size), work);
      }
      if (a.need_weight) {
        weight_gradient.add(d_shape.map(slot), x_shape.map(x_map), images, weight_sums, shared, crew);
      }
      crew.wait();
      if (!a.need_x) return;
      crew.share(images * in.height, [&](int64_t begin, int64_t end) {
        if (!in_place) {
          copy_out(result_shape.map(result_map), result_shape, dx, first, begin, end);
          if (residual) {
            const int64_t at = first * in.image();
            for (int64_t i = at + begin * in.row(); i < at + end * in.row(); ++i) {
              result[i] = narrow_to<S>(static_cast<T>(widen(result[i])) + static_cast<T>(widen(residual[i])));
            }
          }
        }
        if (!masked) return;
        const int64_t pixel = first * in.height * in.width;
        masked->run(result, result, pixel + begin * in.width, pixel + end * in.width,
                    parts[static_cast<size_t>(rank)].data());
      });
    });
    team.wait();
    if (!a.need_weight) return;
    const Crew all{rank, team.size(), team};
    T* const total = slots + sums_begin;
    if (split.apart) {
      weight_gradient.collect(total, sums_numel, slot_numel, all);
      team.wait();
    }
    visit(a.weight.scalar_type(), [&](auto tag) {
      using W = decltype(tag);
      weight_gradient.store(total, total + sums_numel, static_cast<W*>(dw.data_ptr()), weight_stride, all);
    });
  });
  if (a.finish) add_parts(parts, static_cast<T*>(sums.data_ptr()));
  return {dx, dw, sums};
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad, const OptionalTensor& y,
                                                 const OptionalTensor& coefficients, const Tensor& x,
                                                 const OptionalTensor& scale_shift, bool relu, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding, int64_t algorithm, bool need_x,
                                                 bool need_weight, const OptionalTensor& residual, bool finish,
                                                 const std::vector<Tensor>& ys, const std::vector<Tensor>& means) {
  check_image(kOp, "grad", grad);
  check_image(kOp, "x", x);
  check_conv_bn(kOp, weight, std::nullopt, {});
  RESNET_FAST_CHECK(weight.is_cpu(), kOp, ": weight is not on the CPU, as x is");
  check_same_dtype(kOp, "grad", grad, "x", x);
  RESNET_FAST_CHECK(arithmetic_type(weight) == arithmetic_type(x), kOp, ": weight has dtype ",
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
    check_image(kOp, "y", *y);
    check_same_shape(kOp, "y", *y, "grad", grad);
    check_same_dtype(kOp, "y", *y, "grad", grad);
  }
  if (residual) {
    check_image(kOp, "residual", *residual);
    check_same_shape(kOp, "residual", *residual, "x", x);
    check_same_dtype(kOp, "residual", *residual, "x", x);
  }
  check_sum_inputs(kOp, x, std::nullopt, ys, means);
  RESNET_FAST_CHECK(!finish || need_x, kOp, ": finish without need_x");
  const bool winograd = layer.kernel_h == 3 && layer.kernel_w == 3 && stride[0] == 1 && stride[1] == 1;
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  RESNET_FAST_CHECK((algorithm >= 0 && algorithm <= (winograd ? 2 : 0)) || (bf16 && algorithm == 3) ||
                        (bf16 && winograd && algorithm == 4),
                    kOp, ": algorithm is ", algorithm,
                    ", want 0, or for a 3x3 filter with stride 1 up to 2; if x is bfloat16 also 3, and 4 likewise");
  if (algorithm >= 3) {
    return bf16_backward({grad, x, weight, y, coefficients, scale_shift, residual, relu, layer,
                          static_cast<Algorithm>(algorithm), finish, ys, means},
                         need_x, need_weight);
  }
  const Arguments a{grad,           x,        weight,      y,      coefficients,
                    scale_shift,    residual, relu,        layer,  static_cast<Algorithm>(algorithm),
                    algorithm != 0, need_x,   need_weight, finish, ys,
                    means};
  std::vector<Tensor> r = x.scalar_type() == ScalarType::Double  ? backward<double, double>(a)
                          : x.scalar_type() == ScalarType::Float ? backward<float, float>(a)
                                                                 : backward<BFloat16, float>(a);
  return {r[0], r[1], r[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("conv_backward", TORCH_BOX(&conv_backward)); }

}  // namespace resnet_fast
