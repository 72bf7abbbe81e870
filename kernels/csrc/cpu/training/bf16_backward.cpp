// conv_backward by products of bfloat16. The gradient of a filter is summed from maps of pairs of images, so that every
// product of pairs adds up two pixels (or tiles), in float32.
#include <torch/csrc/stable/ops.h>

#include "cpu/conv/chain_layout.h"
#include "cpu/training/bf16_data_gradient.h"
#include "cpu/training/weight_gradient.h"

namespace resnet_fast {
namespace {

constexpr const char* kOp = "conv_backward";

Image pairs_of(const Image& i) { return Image(ceil_div(i.images, 2), i.channels, i.height, i.width); }

bool by_winograd(const Bf16Backward& b) { return b.algorithm == Algorithm::kBf16Winograd; }

// May a member of the team sum a filter's gradient of its own? Asked before anything is packed.
bool sums_apart(const Bf16Backward& b) {
  const int64_t numel =
      WeightGradient<Bf16Pair>(b.layer, Image(b.x), Image(b.grad), by_winograd(b), true).sums_numel(1);
  return numel * static_cast<int64_t>(sizeof(float)) <= kMemberSumBytes;
}

// Both gradients, or one of them, in a pass over the images.
class Pass {
 public:
  Pass(const Bf16Backward& b, bool need_x, bool need_weight)
      : b_(b), need_weight_(need_weight), in_(b.x), out_(b.grad), threads_(torch::stable::get_num_threads()) {
    const Layer& l = b.layer;
    if (goes_by_rows(l, in_.channels, sizeof(BFloat16))) in_ = rows_of(in_), out_ = rows_of(out_);
    affine_ = check_rows<float>(kOp, "scale_shift", b.scale_shift, 2, in_.channels);
    coefficients_ = check_rows<float>(kOp, "coefficients", b.coefficients, 4, out_.channels);
    if (need_x) data_.emplace(kOp, b, in_, out_, threads_);
    const bool winograd = by_winograd(b);
    const int64_t below = winograd ? round_up(out_.height, kBf16TileOut) - out_.height : 0;
    const int64_t beside = winograd ? round_up(out_.width, kBf16TileOut) - out_.width : 0;
    d_shape_ = {out_.channels, out_.height, out_.width, out_.channels, {0, below, 0, beside}};
    x_shape_ = {in_.channels,
                in_.height,
                in_.width,
                in_.channels,
                {l.pad_h, bf16_beyond(in_.height, out_.height, l.pad_h, l.kernel_h, l.stride_h, winograd), l.pad_w,
                 bf16_beyond(in_.width, out_.width, l.pad_w, l.kernel_w, l.stride_w, winograd)}};
    tiles_ = winograd ? ceil_div(out_.height, kBf16TileOut) * ceil_div(out_.width, kBf16TileOut) : kMinMemberTiles;
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    const int64_t single = data_ ? round_up(data_->shape().image(), 64) : 0;
    const int64_t d_numel = need_weight_ ? round_up(d_shape_.image(), 64) : 0;
    const int64_t x_numel = need_weight_ ? round_up(x_shape_.image(), 64) : 0;
    const int64_t pairs = ceil_div(in_.images, 2), pair_numel = std::max(single, d_numel + x_numel);
    ImageSplit split(pairs, pair_numel * static_cast<int64_t>(sizeof(Bf16Pair)),
                     std::min(data_ ? data_->units() : tiles_, tiles_), threads_, !need_weight_ || sums_apart(b_));
    const WeightGradient<Bf16Pair> weight(b_.layer, pairs_of(in_), pairs_of(out_), by_winograd(b_), split.apart);
    if (need_weight_ && weight.whole()) split.chunk = std::max<int64_t>(pairs, 1);
    const int64_t sums_numel = need_weight_ ? round_up(weight.sums_numel(threads_), 64) : 0;
    const int64_t tiles_numel = need_weight_ ? round_up(weight.work_numel(split.apart ? 1 : threads_), 64) : 0;
    const int64_t own_numel = data_ ? data_->work_numel(2 * split.chunk) : 0;

    // A slot holds the maps of a chunk, then transformed tiles; behind the slots is what each thread needs.
    const int64_t d_begin = round_up(single * split.chunk + 64, 64), x_begin = d_begin + d_numel * split.chunk + 64;
    const int64_t tiles_begin = round_up(x_begin + x_numel * split.chunk + 64, 64);
    const int64_t slot_numel = tiles_begin + tiles_numel, slots = split.slots(threads_);
    Tensor scratch = empty_tensor({2 * slots * slot_numel + threads_ * own_numel}, ScalarType::BFloat16);
    Tensor summed = empty_tensor({slots * sums_numel}, ScalarType::Float);
    Bf16Pair* const maps = static_cast<Bf16Pair*>(scratch.data_ptr());
    float* const total = static_cast<float*>(summed.data_ptr());
    Tensor dw = empty_tensor_like(b_.weight);
    int64_t stride[4];
    for (int64_t i = 0; i < 4; ++i) stride[i] = dw.stride(i);

    Team::run(in_.images > 0 ? threads_ : 1, [&](int64_t rank, Team& team) {
      const Crew crew = split.apart ? Crew{0, 1, team} : Crew{rank, team.size(), team}, all{rank, team.size(), team};
      Bf16Pair* const slot = maps + (split.apart ? rank : 0) * slot_numel;
      float* const sums = total + (split.apart ? rank : 0) * sums_numel;
      BFloat16* const images = &slot->first;
      BFloat16* const own = &maps[slots * slot_numel].first + rank * own_numel;
      crew.share(sums_numel, [&](int64_t begin, int64_t end) { std::fill(sums + begin, sums + end, 0.0f); });
      crew.share(split.chunk, [&](int64_t begin, int64_t end) {
        if (data_) data_->shape().clear_halo(images + 2 * begin * data_->shape().image(), 2 * (end - begin));
        if (!need_weight_) return;
        d_shape_.clear_halo(slot + d_begin + begin * d_shape_.image(), end - begin);
        x_shape_.clear_halo(slot + x_begin + begin * x_shape_.image(), end - begin);
      });
      const Map<BFloat16> single_map = data_ ? data_->shape().map(images) : Map<BFloat16>{};
      const Map<Bf16Pair> d = need_weight_ ? d_shape_.map(slot + d_begin) : Map<Bf16Pair>{};
      const Map<Bf16Pair> x = x_shape_.map(slot + x_begin);
      split.for_chunks(rank, team.size(), [&](int64_t first, int64_t count) {
        const int64_t image = 2 * first, images_now = std::min(2 * count, in_.images - image);
        fill(first, count, single_map, d, x, crew);
        crew.wait();
        if (data_) data_->run(image, images_now, single_map, own, crew);
        if (need_weight_) weight.add(d, x, count, sums, slot + tiles_begin, crew);
        crew.wait();
        if (data_) data_->finish(image, images_now, rank, crew);
      });
      if (!need_weight_) return;
      team.wait();
      if (split.apart) {
        weight.collect(total, sums_numel, sums_numel, all);
        team.wait();
      }
      visit(b_.weight.scalar_type(), [&](auto tag) {
        using W = decltype(tag);
        weight.store(total, maps + tiles_begin, static_cast<W*>(dw.data_ptr()), stride, all);
      });
    });
    const Image none(0, b_.x.size(1), b_.x.size(2), b_.x.size(3));
    Tensor dx = empty_image(none, b_.x), of_dx = empty_rows(0, in_.channels, b_.x);
    if (data_) std::tie(dx, of_dx) = data_->results();
    return {dx, dw, of_dx};
  }

 private:
  // The maps of a chunk of pairs.
  void fill(int64_t first, int64_t count, const Map<BFloat16>& single, const Map<Bf16Pair>& d, const Map<Bf16Pair>& x,
            const Crew& crew) const {
    const auto* const grad = static_cast<const BFloat16*>(b_.grad.data_ptr());
    const auto* const y = b_.y ? static_cast<const BFloat16*>(b_.y->data_ptr()) : nullptr;
    crew.share(count * out_.height, [&](int64_t begin, int64_t end) {
      std::vector<float> row_y(static_cast<size_t>(out_.row()));
      fill_pairs(out_, first, single, d, begin, end,
                 [&](int64_t i, float* row) { widen_gradient(grad, y, coefficients_, out_, i, row, row_y.data()); });
    });
    if (!need_weight_) return;
    const Activation<float> act{affine_, affine_ ? affine_ + in_.channels : nullptr, b_.relu};
    crew.share(count * in_.height, [&](int64_t begin, int64_t end) {
      fill_pairs(in_, first, {}, x, begin, end, [&](int64_t i, float* row) {
        widen_activation(static_cast<const BFloat16*>(b_.x.data_ptr()), in_, act, i, row);
      });
    });
  }

  const Bf16Backward& b_;
  bool need_weight_;
  Image in_, out_;
  int64_t threads_, tiles_;
  const float *affine_, *coefficients_;
  std::optional<Bf16DataGradient> data_;
  MapShape d_shape_, x_shape_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bf16_backward(const Bf16Backward& b, bool need_x, bool need_weight) {
  if (!need_x || !need_weight) return Pass(b, need_x, need_weight).run();
  // Sums that the members of a team share want all images at once, which is too many for the data gradient.
  if (sums_apart(b)) return Pass(b, true, true).run();
  auto gradients = Pass(b, true, false).run();
  std::get<1>(gradients) = std::get<1>(Pass(b, false, true).run());
  return gradients;
}

}  // namespace resnet_fast
