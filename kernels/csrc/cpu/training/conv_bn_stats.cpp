// conv_moments: a convolution whose input is normalised as it is read, and the mean and variance of what it gives.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/conv/convolution.h"
#include "cpu/thread_team.h"
#include "cpu/training/bf16_training.h"
#include "cpu/training/filters.h"
#include "cpu/training/training.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_moments";

template <typename S, typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Activation<T>& act, const Tensor& weight,
                                   const OptionalTensor& bias, Layer layer, Algorithm algorithm, bool with_moments) {
  const Image whole(x);
  const bool by_rows = goes_by_rows(layer, whole.channels, sizeof(T));
  const Image in = by_rows ? rows_of(whole) : whole;
  const Image out(in.images, layer.out_channels, output_size(in.height, layer.pad_h, layer.kernel_h, layer.stride_h),
                  output_size(in.width, layer.pad_w, layer.kernel_w, layer.stride_w));
  const FilterLayout<T> layout{layer.out_channels, in.channels, layer.kernel_h, layer.kernel_w, algorithm};
  std::vector<T> wide_bias(static_cast<size_t>(bias ? out.channels : 0));
  if (bias) {
    visit(bias->scalar_type(), [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(bias->data_ptr());
      for (size_t k = 0; k < wide_bias.size(); ++k) {
        wide_bias[k] = static_cast<T>(widen(from[static_cast<int64_t>(k) * bias->stride(0)]));
      }
    });
  }
  const Tensor packed = pack_training_filter<T>(view_filter(weight), layout, bias ? wide_bias.data() : nullptr);

  Tensor y = empty_image(by_rows ? Image(whole.images, out.channels, whole.height, whole.width) : out, x);
  Tensor statistics = empty_rows(2, with_moments ? out.channels : 0, x);
  const bool in_place = sizeof(S) == sizeof(T) && out.channels % layout.lanes == 0;
  const int64_t pad_h = layer.pad_h, pad_w = layer.pad_w;
  const auto reach = [&](int64_t size, int64_t result, int64_t pad, int64_t kernel, int64_t stride) {
    const int64_t last = layout.winograd() ? round_up(result, kTileOut) + 2 : (result - 1) * stride + kernel;
    return std::max<int64_t>(last - pad - size, 0);
  };
  const MapShape in_shape{in.channels,
                          in.height,
                          in.width,
                          in.channels,
                          {pad_h, reach(in.height, out.height, pad_h, layer.kernel_h, layer.stride_h), pad_w,
                           reach(in.width, out.width, pad_w, layer.kernel_w, layer.stride_w)}};
  const MapShape out_shape{out.channels, out.height, out.width, round_up(out.channels, layout.lanes), {}};
  const int64_t map_numel = round_up(in_shape.image(), 64), out_numel = in_place ? 0 : round_up(out_shape.image(), 64);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = (map_numel + out_numel) * static_cast<int64_t>(sizeof(T));
  const ImageSplit split(in.images, bytes, units_of(layout, out.height, out.width), threads, true);

  S* result = static_cast<S*>(y.data_ptr());
  const auto convolution = [&](int64_t first, int64_t images, T* maps) {
    const Map<T> to =
        in_place ? Map<T>{reinterpret_cast<T*>(result) + first * out.image(), out.image(), out.row(), out.channels}
                 : out_shape.map(maps + map_numel * split.chunk + 64);
    return Convolution<T>{
        layer,    layout, static_cast<const T*>(packed.data_ptr()), images, out.height, out.width, in_shape.map(maps),
        Map<T>{}, to};
  };
  const int64_t work_numel =
      layout.winograd() ? round_up(winograd_scratch(convolution(0, split.chunk, nullptr)), 64) : 0;
  const int64_t slot_numel = round_up((map_numel + out_numel) * split.chunk + 128, 64);
  Tensor scratch = empty_rows(1, slot_numel * split.slots(threads) + threads * work_numel, x);
  T* const slots = static_cast<T*>(scratch.data_ptr());

  std::vector<Moments> sums(static_cast<size_t>(threads), Moments(with_moments ? out.channels : 0));
  Team::run(in.images > 0 ? threads : 1, [&](int64_t rank, Team& team) {
    const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team};
    T* const maps = slots + (split.apart ? rank : 0) * slot_numel;
    T* const work = slots + slot_numel * split.slots(threads) + rank * work_numel;
    std::vector<T> mean(static_cast<size_t>(out.channels)), squares(mean.size());
    std::vector<T> buffer(static_cast<size_t>(sizeof(S) == sizeof(T) ? 0 : kSumElements + 16 * out.channels));
    for (int64_t n = crew.rank; n < split.chunk; n += crew.size) in_shape.clear_halo(maps + n * in_shape.image(), 1);
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      crew.share(images * in.height, [&](int64_t begin, int64_t end) {
        fill_activation<S, T>(static_cast<const S*>(x.data_ptr()), in, act, first, in_shape.map(maps), begin, end);
      });
      crew.wait();
      Convolution<T> conv = convolution(first, images, maps);
      conv.far_output = in_place;
      ask_for(conv.ahead, static_cast<const S*>(x.data_ptr()), in, first + images, images, split.end(rank, team.size()),
              crew);
      run_part(conv, part_of(conv, crew.rank, crew.size), work);
      crew.wait();
      crew.share(images * out.height, [&](int64_t begin, int64_t end) {
        if (!in_place) copy_out(conv.output, out_shape, y, first, begin, end);
        if (!with_moments) return;
        const S* pixels = result + first * out.image();
        in_pieces(begin * out.width, end * out.width, out.channels, [&](int64_t pixel, int64_t count) {
          const T* dense = as_arithmetic(pixels + pixel * out.channels, count * out.channels, buffer.data());
          kernels_in_use<T>().moments(dense, count, static_cast<int>(out.channels), mean.data(), squares.data());
          sums[static_cast<size_t>(rank)].add(static_cast<double>(count), mean.data(), squares.data());
        });
      });
    });
  });

  if (with_moments) {
    Moments total(out.channels);
    for (const Moments& part : sums) total.add(part.count, part.mean.data(), part.squares.data());
    T* const to = static_cast<T*>(statistics.data_ptr());
    for (int64_t k = 0; k < out.channels; ++k) {
      to[k] = static_cast<T>(total.mean[static_cast<size_t>(k)]);
      to[out.channels + k] = static_cast<T>(total.squares[static_cast<size_t>(k)] / total.count);
    }
  }
  return {y, statistics};
}

std::tuple<Tensor, Tensor> conv_moments(const Tensor& x, const OptionalTensor& scale_shift, bool relu,
                                        const Tensor& weight, const OptionalTensor& bias,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        int64_t algorithm, bool moments) {
  check_image(kOp, "x", x);
  check_conv_bn(kOp, weight, bias, {});
  RESNET_FAST_CHECK(weight.is_cpu(), kOp, ": weight is not on the CPU, as x is");
  RESNET_FAST_CHECK(arithmetic_type(weight) == arithmetic_type(x), kOp, ": weight has dtype ",
                    dtype_name(weight.scalar_type()), ", x has ", dtype_name(x.scalar_type()));
  RESNET_FAST_CHECK(x.size(1) == weight.size(1), kOp, ": x has ", x.size(1), " channels, want ", weight.size(1),
                    ", the in_channels of weight ", shape(weight));
  check_strides(kOp, stride, padding);
  const Layer layer{0,         -1,        0,          weight.size(0), weight.size(2), weight.size(3),
                    stride[0], stride[1], padding[0], padding[1]};
  RESNET_FAST_CHECK(x.size(2) + 2 * layer.pad_h >= layer.kernel_h && x.size(3) + 2 * layer.pad_w >= layer.kernel_w &&
                        x.size(2) > 0 && x.size(3) > 0,
                    kOp, ": x is ", x.size(2), " x ", x.size(3), ", smaller than the filter");
  RESNET_FAST_CHECK(!moments || x.size(0) > 0, kOp, ": x has no images, want at least one for mean and variance");
  const bool winograd = layer.kernel_h == 3 && layer.kernel_w == 3 && stride[0] == 1 && stride[1] == 1;
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  RESNET_FAST_CHECK((algorithm >= 0 && algorithm <= (winograd ? 2 : 0)) || (bf16 && algorithm == 3) ||
                        (bf16 && winograd && algorithm == 4),
                    kOp, ": algorithm is ", algorithm,
                    ", want 0, or for a 3x3 filter with stride 1 up to 2, or 3 and 4 likewise if x is bfloat16");
  if (algorithm >= 3) {
    const float* affine = check_rows<float>(kOp, "scale_shift", scale_shift, 2, x.size(1));
    return bf16_conv_moments({x,
                              {affine, affine ? affine + x.size(1) : nullptr, relu},
                              weight,
                              bias,
                              layer,
                              static_cast<Algorithm>(algorithm),
                              moments});
  }
  std::tuple<Tensor, Tensor> result{x, x};
  const auto run = [&](auto storage, auto arithmetic) {
    using T = decltype(arithmetic);
    const T* affine = check_rows<T>(kOp, "scale_shift", scale_shift, 2, x.size(1));
    const Activation<T> act{affine, affine ? affine + x.size(1) : nullptr, relu};
    result = forward<decltype(storage), T>(x, act, weight, bias, layer, static_cast<Algorithm>(algorithm), moments);
  };
  if (x.scalar_type() == ScalarType::Double) {
    run(double{}, double{});
  } else if (x.scalar_type() == ScalarType::Float) {
    run(float{}, float{});
  } else {
    run(BFloat16{}, float{});
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("conv_moments", TORCH_BOX(&conv_moments)); }

}  // namespace resnet_fast
