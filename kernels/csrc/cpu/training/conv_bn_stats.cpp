// The operator conv_moments: a convolution whose input is normalised as it is read, and the mean and variance of its
// output. In bfloat16 these are those of the rounded output, as PyTorch has them under autocast.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/conv/run_convolution.h"
#include "cpu/thread_team.h"
#include "cpu/training/fill.h"
#include "cpu/training/image_split.h"
#include "cpu/training/pack_filter.h"
#include "cpu/training/reductions.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_moments";

struct Arguments {
  const Tensor& x;
  const OptionalTensor& scale_shift;
  bool relu;
  const Tensor& weight;
  const OptionalTensor& bias;
  Layer layer;
  Algorithm algorithm;
  bool with_stats;
};

template <typename A>
std::vector<A> read_bias(const OptionalTensor& bias, int64_t channels) {
  std::vector<A> values(static_cast<size_t>(bias ? channels : 0));
  if (!bias) return values;
  dispatch_dtype(bias->scalar_type(), [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(bias->data_ptr());
    for (size_t k = 0; k < values.size(); ++k) {
      values[k] = static_cast<A>(widen(from[static_cast<int64_t>(k) * bias->stride(0)]));
    }
  });
  return values;
}

// S: elements of x and the output, T: those of the convolution.
template <typename S, typename T>
std::tuple<Tensor, Tensor> forward(const Arguments& a) {
  typedef typename AccumulatorOf<T>::type Acc;
  const Layer& l = a.layer;
  const NhwcShape whole(a.x);
  const bool by_rows = !std::is_same_v<T, BFloat16> && goes_by_rows(l, whole.channels, sizeof(T));
  const NhwcShape in = by_rows ? rows_of(whole) : whole;
  const NhwcShape out(in.images, l.out_channels, output_size(in.height, l.pad_h, l.kernel_h, l.stride_h),
                      output_size(in.width, l.pad_w, l.kernel_w, l.stride_w));
  const ScaleShiftRelu<Acc> act(check_rows<Acc>(kOp, "scale_shift", a.scale_shift, 2, in.channels), in.channels,
                                a.relu);
  const FilterLayout<T> layout = filter_layout<T>(out.channels, in.channels, l.kernel_h, l.kernel_w, a.algorithm);
  const std::vector<Acc> bias = read_bias<Acc>(a.bias, out.channels);
  const Tensor packed =
      pack_training_filter(view_filter(a.weight), layout, in.channels, a.bias ? bias.data() : nullptr);

  Tensor y = empty_nhwc(by_rows ? NhwcShape(whole.images, out.channels, whole.height, whole.width) : out, a.x);
  Tensor stats = empty_rows(2, a.with_stats ? out.channels : 0, a.x);
  // Whole vectors are stored: channels that do not fill them go through an activation of their own, and so does
  // bfloat16 that is computed in float32.
  const bool in_place = sizeof(S) == sizeof(T) && out.channels % layout.lanes == 0;
  const int64_t tile = layout.winograd() ? kWinogradTile<T> : 0;
  const PaddedLayout in_layout{in.channels,
                               in.height,
                               in.width,
                               layout.channels,
                               {l.pad_h, far_halo(in.height, out.height, l.pad_h, l.kernel_h, l.stride_h, tile),
                                l.pad_w, far_halo(in.width, out.width, l.pad_w, l.kernel_w, l.stride_w, tile)}};
  const PaddedLayout out_layout{out.channels, out.height, out.width, layout.padded_out(), {}};
  const int64_t in_numel = round_up(in_layout.image(), 64), out_numel = in_place ? 0 : round_up(out_layout.image(), 64);
  const int64_t threads = torch::stable::get_num_threads();
  const ImageSplit split(in.images, (in_numel + out_numel) * static_cast<int64_t>(sizeof(T)),
                         units_of(layout, out.height, out.width), threads, true);

  const S* const x = static_cast<const S*>(a.x.data_ptr());
  S* const result = static_cast<S*>(y.data_ptr());
  // slot: the padded input of a chunk of images, then its output where that is not stored in place.
  const auto convolution = [&](int64_t first, int64_t images, T* slot) {
    const ActivationView<T> to = in_place ? ActivationView<T>{reinterpret_cast<T*>(result) + first * out.image(),
                                                              out.image(), out.row(), out.channels}
                                          : out_layout.view(slot + in_numel * split.chunk + 64);
    return Convolution<T>{l,
                          layout,
                          static_cast<const T*>(packed.data_ptr()),
                          images,
                          out.height,
                          out.width,
                          in_layout.view(slot),
                          ActivationView<T>{},
                          to};
  };
  const int64_t work_numel =
      layout.winograd() ? round_up(winograd_scratch(convolution(0, split.chunk, nullptr)), 64) : 0;
  const int64_t slot_numel = round_up((in_numel + out_numel) * split.chunk + 128, 64), slots = split.slots(threads);
  Tensor scratch = empty_tensor({slot_numel * slots + threads * work_numel}, kScalarType<T>);
  T* const memory = static_cast<T*>(scratch.data_ptr());

  std::vector<ChannelStats> partial(static_cast<size_t>(threads), ChannelStats(a.with_stats ? out.channels : 0));
  ThreadTeam::run(in.images > 0 ? threads : 1, [&](int64_t rank, ThreadTeam& team) {
    const ThreadGroup group = split.group(rank, team);
    T* const slot = memory + split.slot(rank) * slot_numel;
    T* const work = memory + slot_numel * slots + rank * work_numel;
    std::vector<Acc> mean(static_cast<size_t>(out.channels)), squares(mean.size());
    std::vector<Acc> buffer(static_cast<size_t>(sizeof(S) == sizeof(Acc) ? 0 : block_numel(out.channels)));
    for (int64_t n = group.rank; n < split.chunk; n += group.size) {
      in_layout.clear_halo(slot + n * in_layout.image(), 1);
    }
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      group.share(images * in.height, [&](int64_t begin, int64_t end) {
        fill_activation(x, in, act, first, in_layout.view(slot), begin, end);
      });
      group.wait();
      Convolution<T> conv = convolution(first, images, slot);
      conv.output_uncached = in_place;
      append_prefetch(conv.prefetch, x, in, first + images, images, split.end(rank, team.size()), group);
      run_part(conv, part_of(conv, group.rank, group.size), work);
      group.wait();
      group.share(images * out.height, [&](int64_t begin, int64_t end) {
        if (!in_place) copy_out(conv.output, out_layout, y, first, begin, end);
        if (!a.with_stats) return;
        const S* pixels = result + first * out.image();
        for_pixel_blocks(begin * out.width, end * out.width, out.channels, [&](int64_t pixel, int64_t count) {
          const Acc* dense = as_compute(pixels + pixel * out.channels, count * out.channels, buffer.data());
          kernels_in_use<Acc>().channel_stats(dense, count, static_cast<int>(out.channels), mean.data(),
                                              squares.data());
          partial[static_cast<size_t>(rank)].add(static_cast<double>(count), mean.data(), squares.data());
        });
      });
    });
  });

  if (a.with_stats) {
    ChannelStats total(out.channels);
    for (const ChannelStats& part : partial) total.add(part.count, part.mean.data(), part.squares.data());
    Acc* const to = static_cast<Acc*>(stats.data_ptr());
    for (int64_t k = 0; k < out.channels; ++k) {
      to[k] = static_cast<Acc>(total.mean[static_cast<size_t>(k)]);
      to[out.channels + k] = static_cast<Acc>(total.squares[static_cast<size_t>(k)] / total.count);
    }
  }
  return {y, stats};
}

std::tuple<Tensor, Tensor> conv_bn_stats(const Tensor& x, const OptionalTensor& scale_shift, bool relu,
                                         const Tensor& weight, const OptionalTensor& bias,
                                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                         int64_t algorithm, bool with_stats) {
  check_nhwc(kOp, "x", x);
  check_conv_bn(kOp, weight, bias, {});
  RESNET_FAST_CHECK(weight.is_cpu(), kOp, ": weight is not on the CPU, as x is");
  RESNET_FAST_CHECK(compute_type(weight) == compute_type(x), kOp, ": weight has dtype ",
                    dtype_name(weight.scalar_type()), ", x has ", dtype_name(x.scalar_type()));
  RESNET_FAST_CHECK(x.size(1) == weight.size(1), kOp, ": x has ", x.size(1), " channels, want ", weight.size(1),
                    ", the in_channels of weight ", shape(weight));
  check_strides(kOp, stride, padding);
  const Layer layer{0,         -1,        0,          weight.size(0), weight.size(2), weight.size(3),
                    stride[0], stride[1], padding[0], padding[1]};
  RESNET_FAST_CHECK(x.size(2) + 2 * layer.pad_h >= layer.kernel_h && x.size(3) + 2 * layer.pad_w >= layer.kernel_w &&
                        x.size(2) > 0 && x.size(3) > 0,
                    kOp, ": x is ", x.size(2), " x ", x.size(3), ", smaller than the filter");
  RESNET_FAST_CHECK(!with_stats || x.size(0) > 0, kOp, ": x has no images, want at least one for mean and variance");
  const bool winograd = layer.kernel_h == 3 && layer.kernel_w == 3 && stride[0] == 1 && stride[1] == 1;
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  RESNET_FAST_CHECK((algorithm >= 0 && algorithm <= (winograd ? 2 : 0)) || (bf16 && algorithm == 3) ||
                        (bf16 && winograd && algorithm == 4),
                    kOp, ": algorithm is ", algorithm,
                    ", want 0, or for a 3x3 filter with stride 1 up to 2, or 3 and 4 likewise if x is bfloat16");
  const Arguments a{x, scale_shift, relu, weight, bias, layer, static_cast<Algorithm>(algorithm), with_stats};
  if (in_bf16(a.algorithm)) return forward<BFloat16, BFloat16>(a);
  std::tuple<Tensor, Tensor> result{x, x};
  dispatch_compute(x, [&](auto storage, auto compute) { result = forward<decltype(storage), decltype(compute)>(a); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("conv_moments", TORCH_BOX(&conv_bn_stats)); }

}  // namespace resnet_fast
