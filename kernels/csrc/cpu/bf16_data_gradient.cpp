// The data gradient of a convolution of stride 1 in bfloat16: a convolution of the output's gradient by the filter
// turned around, with what is added to it and the sums that batch norm's backward wants on the way out.
#include <torch/csrc/stable/ops.h>

#include "bf16_training.h"
#include "geometry.h"
#include "training_sums.h"

namespace resnet_fast {
namespace {
constexpr const char* kOp = "conv_backward";
}

std::tuple<Tensor, Tensor> bf16_data_gradient(const Bf16DataGradient& g) {
  const Layer& l = g.layer;
  const Image in(g.x), out(g.grad);
  const Layer turned{
      0, -1, 0, in.channels, l.kernel_h, l.kernel_w, 1, 1, l.kernel_h - 1 - l.pad_h, l.kernel_w - 1 - l.pad_w};
  const FilterLayout<BFloat16> layout = bf16_layout(in.channels, out.channels, l.kernel_h, l.kernel_w, g.algorithm);
  RESNET_FAST_CHECK(in.channels % layout.lanes == 0, kOp, ": x has ", in.channels,
                    " channels, want a multiple of 16 for an algorithm in bfloat16");
  RESNET_FAST_CHECK(turned.pad_h >= 0 && turned.pad_w >= 0, kOp,
                    ": padding is larger than the filter less one, want algorithm 0");
  const float* const coefficients = check_rows<float>(kOp, "coefficients", g.coefficients, 4, out.channels);
  const FilterView view = transposed(view_filter(g.weight), l.kernel_h - 1, l.kernel_w - 1, 1, 1);
  const Tensor packed = pack_bf16_training_filter(view, layout, out.channels, nullptr);

  Tensor dx = empty_image(in, g.x);
  Tensor sums = empty_rows(g.finish ? 3 : 0, in.channels, g.x);
  BFloat16* const result = static_cast<BFloat16*>(dx.data_ptr());
  BFloat16* const residual = g.residual ? static_cast<BFloat16*>(g.residual->data_ptr()) : nullptr;
  const bool winograd = layout.winograd();
  const MapShape shape{out.channels,
                       out.height,
                       out.width,
                       layout.channels,
                       {turned.pad_h, bf16_beyond(out.height, in.height, turned.pad_h, l.kernel_h, 1, winograd),
                        turned.pad_w, bf16_beyond(out.width, in.width, turned.pad_w, l.kernel_w, 1, winograd)}};
  const int64_t map_numel = round_up(shape.image(), 64), threads = torch::stable::get_num_threads();
  const ImageSplit split(in.images, 2 * map_numel, units_of(layout, in.height, in.width), threads, true);
  const auto convolution = [&](int64_t first, int64_t images, BFloat16* maps) {
    const auto image = [&](BFloat16* data) {
      return data ? Map<BFloat16>{data + first * in.image(), in.image(), in.row(), in.channels} : Map<BFloat16>{};
    };
    return Convolution<BFloat16>{turned,          layout,          static_cast<const BFloat16*>(packed.data_ptr()),
                                 images,          in.height,       in.width,
                                 shape.map(maps), image(residual), image(result)};
  };
  const int64_t work_numel = winograd ? round_up(winograd_scratch(convolution(0, split.chunk, nullptr)), 64) : 0;
  const int64_t slot_numel = map_numel * split.chunk + 64;
  Tensor scratch = empty_tensor({slot_numel * split.slots(threads) + threads * work_numel}, ScalarType::BFloat16);
  BFloat16* const slots = static_cast<BFloat16*>(scratch.data_ptr());
  std::optional<MaskedSums<BFloat16, float>> masked;
  if (g.finish) {
    masked.emplace(kOp, g.relu || !g.scale_shift ? OptionalTensor(g.x) : std::nullopt, g.scale_shift, g.ys, g.means,
                   in.channels);
  }
  std::vector<std::vector<double>> parts(static_cast<size_t>(threads),
                                         std::vector<double>(static_cast<size_t>(g.finish ? 3 * in.channels : 1)));
  Team::run(in.images > 0 ? threads : 1, [&](int64_t rank, Team& team) {
    const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team};
    BFloat16* const maps = slots + (split.apart ? rank : 0) * slot_numel;
    BFloat16* const work = slots + split.slots(threads) * slot_numel + rank * work_numel;
    for (int64_t n = crew.rank; n < split.chunk; n += crew.size) shape.clear_halo(maps + n * shape.image(), 1);
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t images) {
      crew.share(images * out.height, [&](int64_t begin, int64_t end) {
        fill_bf16_gradient(static_cast<const BFloat16*>(g.grad.data_ptr()),
                           g.y ? static_cast<const BFloat16*>(g.y->data_ptr()) : nullptr, coefficients, out, first,
                           shape.map(maps), begin, end);
      });
      crew.wait();
      const Convolution<BFloat16> conv = convolution(first, images, maps);
      run_part(conv, part_of(conv, crew.rank, crew.size), work);
      crew.wait();
      if (!masked) return;
      const int64_t pixels = in.height * in.width;
      crew.share(images * in.height, [&](int64_t begin, int64_t end) {
        masked->run(result, result, first * pixels + begin * in.width, first * pixels + end * in.width,
                    parts[static_cast<size_t>(rank)].data());
      });
    });
  });
  if (g.finish) add_parts(parts, static_cast<float*>(sums.data_ptr()));
  return {dx, sums};
}

}  // namespace resnet_fast
