// The data gradient of a convolution in bfloat16: convolutions of the output's gradient by the filter turned around,
// with what is added to it and the sums that batch norm's backward wants on the way out.
#include <torch/csrc/stable/ops.h>

#include "bf16_training.h"
#include "phases.h"
#include "training_sums.h"

namespace resnet_fast {
namespace {
constexpr const char* kOp = "conv_backward";
}

std::tuple<Tensor, Tensor> bf16_data_gradient(const Bf16Backward& g) {
  const Layer& l = g.layer;
  const Image in(g.x), out(g.grad);
  RESNET_FAST_CHECK(in.channels % kBf16Lanes == 0, kOp, ": x has ", in.channels,
                    " channels, want a multiple of 16 for an algorithm in bfloat16");
  const float* const coefficients = check_rows<float>(kOp, "coefficients", g.coefficients, 4, out.channels);
  bool complete = true;
  const std::vector<Phase<BFloat16>> phases = phases_of<BFloat16>(l, in, out.channels, g.weight, g.algorithm, complete);

  Tensor dx = empty_image(in, g.x);
  Tensor sums = empty_rows(g.finish ? 3 : 0, in.channels, g.x);
  BFloat16* const result = static_cast<BFloat16*>(dx.data_ptr());
  BFloat16* const residual = g.residual ? static_cast<BFloat16*>(g.residual->data_ptr()) : nullptr;
  Halo halo;
  int64_t units = kMinMemberTiles;
  for (const Phase<BFloat16>& p : phases) {
    const bool winograd = p.layout.winograd();
    const int64_t top = std::max<int64_t>(p.layer.pad_h, 0), left = std::max<int64_t>(p.layer.pad_w, 0);
    halo.cover({top, bf16_beyond(out.height, p.height, p.layer.pad_h, p.layer.kernel_h, 1, winograd), left,
                bf16_beyond(out.width, p.width, p.layer.pad_w, p.layer.kernel_w, 1, winograd)});
    units = std::min(units, units_of(p.layout, p.height, p.width));
  }
  const MapShape shape{out.channels, out.height, out.width, round_up(out.channels, 2), halo};
  const int64_t map_numel = round_up(shape.image(), 64), threads = torch::stable::get_num_threads();
  const ImageSplit split(in.images, 2 * map_numel, units, threads, true);
  const auto convolution = [&](const Phase<BFloat16>& p, int64_t first, int64_t images, BFloat16* maps) {
    const auto pixels = [&](BFloat16* data) {
      return data ? Map<BFloat16>{data + first * in.image() + p.row * in.row() + p.column * in.channels, in.image(),
                                  in.row() * l.stride_h, in.channels * l.stride_w}
                  : Map<BFloat16>{};
    };
    return Convolution<BFloat16>{p.layer,         p.layout,         static_cast<const BFloat16*>(p.packed.data_ptr()),
                                 images,          p.height,         p.width,
                                 shape.map(maps), pixels(residual), pixels(result)};
  };
  int64_t work_numel = 0;
  for (const Phase<BFloat16>& p : phases) {
    if (p.layout.winograd()) work_numel = round_up(winograd_scratch(convolution(p, 0, split.chunk, nullptr)), 64);
  }
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
      if (!complete) {  // pixels that no filter reaches
        crew.share(images * in.image(), [&](int64_t begin, int64_t end) {
          BFloat16* const to = result + first * in.image();
          if (residual) {
            std::copy(residual + first * in.image() + begin, residual + first * in.image() + end, to + begin);
          } else {
            std::fill(to + begin, to + end, BFloat16{});
          }
        });
      }
      crew.wait();
      for (const Phase<BFloat16>& p : phases) {
        const Convolution<BFloat16> conv = convolution(p, first, images, maps);
        run_part(conv, part_of(conv, crew.rank, crew.size), work);
      }
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
