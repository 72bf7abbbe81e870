// conv_moments in bfloat16: its input is normalised in float32 and rounded, mean and variance are those of the rounded
// result, as PyTorch has it under autocast.
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/training/bf16_training.h"

namespace resnet_fast {

std::tuple<Tensor, Tensor> bf16_conv_moments(const Bf16Forward& f) {
  const Layer& l = f.layer;
  const Image in(f.x);
  const Image out(in.images, l.out_channels, output_size(in.height, l.pad_h, l.kernel_h, l.stride_h),
                  output_size(in.width, l.pad_w, l.kernel_w, l.stride_w));
  const FilterLayout<BFloat16> layout = bf16_layout(l.out_channels, in.channels, l.kernel_h, l.kernel_w, f.algorithm);
  std::vector<float> bias(static_cast<size_t>(f.bias ? out.channels : 0));
  if (f.bias) {
    visit(f.bias->scalar_type(), [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(f.bias->data_ptr());
      for (int64_t k = 0; k < out.channels; ++k) {
        bias[static_cast<size_t>(k)] = static_cast<float>(widen(from[k * f.bias->stride(0)]));
      }
    });
  }
  const Tensor packed =
      pack_bf16_training_filter(view_filter(f.weight), layout, in.channels, f.bias ? bias.data() : nullptr);

  Tensor y = empty_image(out, f.x);
  Tensor statistics = empty_rows(2, f.moments ? out.channels : 0, f.x);
  const bool in_place = out.channels % layout.lanes == 0;
  const bool winograd = layout.winograd();
  const MapShape in_shape{in.channels,
                          in.height,
                          in.width,
                          layout.channels,
                          {l.pad_h, bf16_beyond(in.height, out.height, l.pad_h, l.kernel_h, l.stride_h, winograd),
                           l.pad_w, bf16_beyond(in.width, out.width, l.pad_w, l.kernel_w, l.stride_w, winograd)}};
  const MapShape out_shape{out.channels, out.height, out.width, layout.padded_out(), {}};
  const int64_t map_numel = round_up(in_shape.image(), 64), out_numel = in_place ? 0 : round_up(out_shape.image(), 64);
  const int64_t threads = torch::stable::get_num_threads();
  const ImageSplit split(in.images, 2 * (map_numel + out_numel), units_of(layout, out.height, out.width), threads,
                         true);

  BFloat16* const result = static_cast<BFloat16*>(y.data_ptr());
  const auto convolution = [&](int64_t first, int64_t images, BFloat16* maps) {
    const Map<BFloat16> to = in_place
                                 ? Map<BFloat16>{result + first * out.image(), out.image(), out.row(), out.channels}
                                 : out_shape.map(maps + map_numel * split.chunk + 64);
    return Convolution<BFloat16>{l,
                                 layout,
                                 static_cast<const BFloat16*>(packed.data_ptr()),
                                 images,
                                 out.height,
                                 out.width,
                                 in_shape.map(maps),
                                 Map<BFloat16>{},
                                 to};
  };
  const int64_t work_numel = winograd ? round_up(winograd_scratch(convolution(0, split.chunk, nullptr)), 64) : 0;
  const int64_t slot_numel = round_up((map_numel + out_numel) * split.chunk + 128, 64);
  Tensor scratch = empty_tensor({slot_numel * split.slots(threads) + threads * work_numel}, ScalarType::BFloat16);
  BFloat16* const slots = static_cast<BFloat16*>(scratch.data_ptr());

  std::vector<Moments> sums(static_cast<size_t>(threads), Moments(f.moments ? out.channels : 0));
  Team::run(in.images > 0 ? threads : 1, [&](int64_t rank, Team& team) {
    const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team};
    BFloat16* const maps = slots + (split.apart ? rank : 0) * slot_numel;
    BFloat16* const work = slots + slot_numel * split.slots(threads) + rank * work_numel;
    std::vector<float> mean(static_cast<size_t>(out.channels)), squares(mean.size());
    std::vector<float> buffer(static_cast<size_t>(kSumElements + 16 * out.channels));
    for (int64_t n = crew.rank; n < split.chunk; n += crew.size) in_shape.clear_halo(maps + n * in_shape.image(), 1);
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      crew.share(images * in.height, [&](int64_t begin, int64_t end) {
        fill_bf16_activation(static_cast<const BFloat16*>(f.x.data_ptr()), in, f.act, first, in_shape.map(maps), begin,
                             end);
      });
      crew.wait();
      const Convolution<BFloat16> conv = convolution(first, images, maps);
      run_part(conv, part_of(conv, crew.rank, crew.size), work);
      crew.wait();
      crew.share(images * out.height, [&](int64_t begin, int64_t end) {
        if (!in_place) copy_out(conv.output, out_shape, y, first, begin, end);
        if (!f.moments) return;
        const BFloat16* pixels = result + first * out.image();
        in_pieces(begin * out.width, end * out.width, out.channels, [&](int64_t pixel, int64_t count) {
          const float* dense = as_arithmetic(pixels + pixel * out.channels, count * out.channels, buffer.data());
          kernels_in_use<float>().moments(dense, count, static_cast<int>(out.channels), mean.data(), squares.data());
          sums[static_cast<size_t>(rank)].add(static_cast<double>(count), mean.data(), squares.data());
        });
      });
    });
  });

  if (f.moments) {
    Moments total(out.channels);
    for (const Moments& part : sums) total.add(part.count, part.mean.data(), part.squares.data());
    float* const to = static_cast<float*>(statistics.data_ptr());
    for (int64_t k = 0; k < out.channels; ++k) {
      to[k] = static_cast<float>(total.mean[static_cast<size_t>(k)]);
      to[out.channels + k] = static_cast<float>(total.squares[static_cast<size_t>(k)] / total.count);
    }
  }
  return {y, statistics};
}

}  // namespace resnet_fast
