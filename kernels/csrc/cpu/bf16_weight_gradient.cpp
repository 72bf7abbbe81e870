// The gradient of a filter in bfloat16: its input and the output's gradient as maps of pairs of images, so that every
// product of pairs adds up two pixels (or tiles), in float32.
#include <torch/csrc/stable/ops.h>

#include "bf16_training.h"
#include "geometry.h"
#include "weight_gradient.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_backward";

Image pairs_of(const Image& i) { return Image(ceil_div(i.images, 2), i.channels, i.height, i.width); }

}  // namespace

Tensor bf16_weight_gradient(const Bf16Backward& b) {
  const Layer& l = b.layer;
  const bool winograd = b.algorithm == Algorithm::kBf16Winograd;
  const Image whole(b.x);
  const bool by_rows = goes_by_rows(l, whole.channels, sizeof(Bf16Pair));
  const Image in = by_rows ? rows_of(whole) : whole, out = by_rows ? rows_of(Image(b.grad)) : Image(b.grad);
  const int64_t pairs = ceil_div(in.images, 2), threads = torch::stable::get_num_threads();
  const float* const affine = check_rows<float>(kOp, "scale_shift", b.scale_shift, 2, in.channels);
  const float* const coefficients = check_rows<float>(kOp, "coefficients", b.coefficients, 4, out.channels);
  const Activation<float> act{affine, affine ? affine + in.channels : nullptr, b.relu};
  const auto* const x = static_cast<const BFloat16*>(b.x.data_ptr());
  const auto* const grad = static_cast<const BFloat16*>(b.grad.data_ptr());
  const auto* const y = b.y ? static_cast<const BFloat16*>(b.y->data_ptr()) : nullptr;

  const int64_t below = winograd ? round_up(out.height, kBf16TileOut) - out.height : 0;
  const int64_t beside = winograd ? round_up(out.width, kBf16TileOut) - out.width : 0;
  const MapShape d_shape{out.channels, out.height, out.width, out.channels, {0, below, 0, beside}};
  const MapShape x_shape{in.channels,
                         in.height,
                         in.width,
                         in.channels,
                         {l.pad_h, bf16_beyond(in.height, out.height, l.pad_h, l.kernel_h, l.stride_h, winograd),
                          l.pad_w, bf16_beyond(in.width, out.width, l.pad_w, l.kernel_w, l.stride_w, winograd)}};
  const int64_t d_numel = round_up(d_shape.image(), 64), x_numel = round_up(x_shape.image(), 64);

  typedef WeightGradient<Bf16Pair> Gradient;
  const int64_t tiles = winograd ? ceil_div(out.height, kBf16TileOut) * ceil_div(out.width, kBf16TileOut) : 16;
  const int64_t own_sums = Gradient(l, pairs_of(in), pairs_of(out), winograd, true).sums_numel(1);
  ImageSplit split(pairs, (d_numel + x_numel) * static_cast<int64_t>(sizeof(Bf16Pair)), tiles, threads,
                   own_sums * static_cast<int64_t>(sizeof(float)) <= kMemberSumBytes);
  const Gradient gradient(l, pairs_of(in), pairs_of(out), winograd, split.apart);
  if (gradient.whole()) split.chunk = std::max<int64_t>(pairs, 1);
  const int64_t crew_size = split.apart ? 1 : threads;
  const int64_t sums_numel = round_up(gradient.sums_numel(threads), 64);
  const int64_t work_numel = round_up(gradient.work_numel(crew_size), 64);

  // A slot holds the maps of a chunk, then transformed tiles.
  const int64_t x_begin = d_numel * split.chunk + 64, work_begin = round_up(x_begin + x_numel * split.chunk + 64, 64);
  const int64_t slot_numel = work_begin + work_numel, slots = split.slots(threads);
  Tensor scratch = empty_tensor({2 * slots * slot_numel}, ScalarType::BFloat16);
  Tensor summed = empty_tensor({slots * sums_numel}, ScalarType::Float);
  Bf16Pair* const maps = static_cast<Bf16Pair*>(scratch.data_ptr());
  float* const total = static_cast<float*>(summed.data_ptr());
  Tensor dw = empty_tensor_like(b.weight);
  int64_t stride[4];
  for (int64_t i = 0; i < 4; ++i) stride[i] = dw.stride(i);

  Team::run(threads, [&](int64_t rank, Team& team) {
    const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team};
    const int64_t own = split.apart ? rank : 0;
    Bf16Pair *const d_map = maps + own * slot_numel, *const x_map = d_map + x_begin, *const work = d_map + work_begin;
    float* const sums = total + own * sums_numel;
    crew.share(sums_numel, [&](int64_t begin, int64_t end) { std::fill(sums + begin, sums + end, 0.0f); });
    for (int64_t n = crew.rank; n < split.chunk; n += crew.size) {
      d_shape.clear_halo(d_map + n * d_numel, 1);
      x_shape.clear_halo(x_map + n * x_numel, 1);
    }
    const Map<Bf16Pair> d{d_shape.map(d_map).origin, d_numel, d_shape.row(), d_shape.pixel};
    const Map<Bf16Pair> to{x_shape.map(x_map).origin, x_numel, x_shape.row(), x_shape.pixel};
    split.for_chunks(rank, team.size(), [&](int64_t first, int64_t count) {
      crew.share(count * out.height, [&](int64_t begin, int64_t end) {
        std::vector<float> row_y(static_cast<size_t>(out.row()));
        fill_pairs(out, first, d, begin, end,
                   [&](int64_t i, float* row) { widen_gradient(grad, y, coefficients, out, i, row, row_y.data()); });
      });
      crew.share(count * in.height, [&](int64_t begin, int64_t end) {
        fill_pairs(in, first, to, begin, end, [&](int64_t i, float* row) { widen_activation(x, in, act, i, row); });
      });
      crew.wait();
      gradient.add(d, to, count, sums, work, crew);
      crew.wait();
    });
    team.wait();
    const Crew all{rank, team.size(), team};
    if (split.apart) {
      all.share(sums_numel, [&](int64_t begin, int64_t end) {
        for (int64_t other = 1; other < team.size(); ++other) {
          const float* const from = total + other * sums_numel;
          for (int64_t i = begin; i < end; ++i) total[i] += from[i];
        }
      });
      team.wait();
    }
    visit(b.weight.scalar_type(), [&](auto tag) {
      using W = decltype(tag);
      gradient.store(total, maps + work_begin, static_cast<W*>(dw.data_ptr()), stride, all);
    });
  });
  return dw;
}

}  // namespace resnet_fast
