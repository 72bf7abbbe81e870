// conv_backward with products in bfloat16. The weight gradient reads activations of pairs of images: each instruction
// accumulates the products of two pixels (or tiles) in float32.
#include <torch/csrc/stable/ops.h>

#include "cpu/thread_team.h"
#include "cpu/training/conv_backward.h"
#include "cpu/training/data_gradient.h"
#include "cpu/training/fill.h"
#include "cpu/training/image_split.h"
#include "cpu/training/weight_gradient.h"

namespace resnet_fast {
namespace {

NhwcShape pairs_of(const NhwcShape& s) { return NhwcShape(ceil_div(s.images, 2), s.channels, s.height, s.width); }

bool by_winograd(const BackwardArguments& a) { return a.algorithm == Algorithm::kBf16Winograd; }

// Whether each thread may have accumulators of its own. Asked before anything is packed.
bool accumulates_per_thread(const BackwardArguments& a) {
  const int64_t numel =
      WeightGradient<Bf16Pair>(a.layer, NhwcShape(a.x), NhwcShape(a.grad), by_winograd(a), true).acc_numel(1);
  return numel * static_cast<int64_t>(sizeof(float)) <= kThreadAccBytes;
}

// Both gradients, or one of them, in one pass over the images.
class Pass {
 public:
  Pass(const BackwardArguments& a, bool need_x, bool need_weight)
      : a_(a), need_weight_(need_weight), in_(a.x), out_(a.grad), threads_(torch::stable::get_num_threads()) {
    const Layer& l = a.layer;
    if (goes_by_rows(l, in_.channels, sizeof(BFloat16))) in_ = rows_of(in_), out_ = rows_of(out_);
    scale_shift_ = check_rows<float>(a.op, "scale_shift", a.scale_shift, 2, in_.channels);
    coefficients_ = check_rows<float>(a.op, "coefficients", a.coefficients, 4, out_.channels);
    if (need_x) {
      data_.emplace(a, in_, out_, threads_);
      image_layout_ = {out_.channels, out_.height, out_.width, round_up(out_.channels, 2), data_->halo()};
    }
    const int64_t tile = by_winograd(a) ? kBf16TileOut : 0;
    const int64_t below = tile > 0 ? round_up(out_.height, tile) - out_.height : 0;
    const int64_t beside = tile > 0 ? round_up(out_.width, tile) - out_.width : 0;
    d_layout_ = {out_.channels, out_.height, out_.width, out_.channels, {0, below, 0, beside}};
    x_layout_ = {in_.channels,
                 in_.height,
                 in_.width,
                 in_.channels,
                 {l.pad_h, far_halo(in_.height, out_.height, l.pad_h, l.kernel_h, l.stride_h, tile), l.pad_w,
                  far_halo(in_.width, out_.width, l.pad_w, l.kernel_w, l.stride_w, tile)}};
    tiles_ = tile > 0 ? ceil_div(out_.height, tile) * ceil_div(out_.width, tile) : kMinThreadTiles;
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    const int64_t images_numel = data_ ? round_up(image_layout_.image(), 64) : 0;
    const int64_t d_numel = need_weight_ ? round_up(d_layout_.image(), 64) : 0;
    const int64_t x_numel = need_weight_ ? round_up(x_layout_.image(), 64) : 0;
    const int64_t pairs = ceil_div(in_.images, 2), pair_numel = std::max(images_numel, d_numel + x_numel);
    ImageSplit split(pairs, pair_numel * static_cast<int64_t>(sizeof(Bf16Pair)),
                     std::min(data_ ? data_->units() : tiles_, tiles_), threads_,
                     !need_weight_ || accumulates_per_thread(a_));
    const WeightGradient<Bf16Pair> weight(a_.layer, pairs_of(in_), pairs_of(out_), by_winograd(a_), split.per_thread);
    if (need_weight_ && weight.whole()) split.chunk = std::max<int64_t>(pairs, 1);
    const int64_t acc_numel = need_weight_ ? round_up(weight.acc_numel(threads_), 64) : 0;
    const int64_t tiles_numel = need_weight_ ? round_up(weight.work_numel(split.per_thread ? 1 : threads_), 64) : 0;
    const int64_t work_numel = data_ ? data_->work_numel(2 * split.chunk) : 0;

    // A slot, in pairs: d of a chunk as images, then d and x as pairs, then transformed tiles. The work memory of each
    // thread follows the slots.
    const int64_t d_begin = round_up(images_numel * split.chunk + 64, 64);
    const int64_t x_begin = d_begin + d_numel * split.chunk + 64;
    const int64_t tiles_begin = round_up(x_begin + x_numel * split.chunk + 64, 64);
    const int64_t slot_numel = tiles_begin + tiles_numel, slots = split.slots(threads_);
    Tensor scratch = empty_tensor({2 * slots * slot_numel + threads_ * work_numel}, ScalarType::BFloat16);
    Tensor accumulators = empty_tensor({slots * acc_numel}, ScalarType::Float);
    Bf16Pair* const memory = static_cast<Bf16Pair*>(scratch.data_ptr());
    float* const total = static_cast<float*>(accumulators.data_ptr());
    Tensor dw = empty_tensor_like(a_.weight);

    ThreadTeam::run(in_.images > 0 ? threads_ : 1, [&](int64_t rank, ThreadTeam& team) {
      const ThreadGroup group = split.group(rank, team), all{rank, team.size(), team};
      Bf16Pair* const slot = memory + split.slot(rank) * slot_numel;
      float* const acc = total + split.slot(rank) * acc_numel;
      BFloat16* const image_memory = &slot->first;
      BFloat16* const work = &memory[slots * slot_numel].first + rank * work_numel;
      group.share(acc_numel, [&](int64_t begin, int64_t end) { std::fill(acc + begin, acc + end, 0.0f); });
      group.share(split.chunk, [&](int64_t begin, int64_t end) {
        if (data_) image_layout_.clear_halo(image_memory + 2 * begin * image_layout_.image(), 2 * (end - begin));
        if (!need_weight_) return;
        d_layout_.clear_halo(slot + d_begin + begin * d_layout_.image(), end - begin);
        x_layout_.clear_halo(slot + x_begin + begin * x_layout_.image(), end - begin);
      });
      const ActivationView<BFloat16> d_images = data_ ? image_layout_.view(image_memory) : ActivationView<BFloat16>{};
      const ActivationView<Bf16Pair> d = need_weight_ ? d_layout_.view(slot + d_begin) : ActivationView<Bf16Pair>{};
      const ActivationView<Bf16Pair> x = x_layout_.view(slot + x_begin);
      split.for_chunks(rank, team.size(), [&](int64_t first, int64_t count) {
        const int64_t image = 2 * first, images = std::min(2 * count, in_.images - image);
        fill(first, count, d_images, d, x, group);
        if (data_) data_->fill_unreached(image, images, nullptr, group);
        group.wait();
        if (data_) data_->run(image, images, d_images, nullptr, work, {}, group);
        if (need_weight_) weight.add(d, x, count, acc, slot + tiles_begin, group);
        group.wait();
        if (data_) data_->finish(image, images, nullptr, rank, group);
      });
      if (!need_weight_) return;
      team.wait();
      weight.finish(total, acc_numel, acc_numel, split.per_thread, memory + tiles_begin, dw, all);
    });
    if (data_) {
      auto [dx, sums] = data_->results();
      return {dx, dw, sums};
    }
    return {empty_nhwc(NhwcShape(0, a_.x.size(1), a_.x.size(2), a_.x.size(3)), a_.x), dw,
            empty_rows(0, in_.channels, a_.x)};
  }

 private:
  // The activations of a chunk of pairs.
  void fill(int64_t first, int64_t count, const ActivationView<BFloat16>& d_images, const ActivationView<Bf16Pair>& d,
            const ActivationView<Bf16Pair>& x, const ThreadGroup& group) const {
    const auto* const grad = static_cast<const BFloat16*>(a_.grad.data_ptr());
    const auto* const y = a_.y ? static_cast<const BFloat16*>(a_.y->data_ptr()) : nullptr;
    group.share(count * out_.height, [&](int64_t begin, int64_t end) {
      std::vector<float> row_y(static_cast<size_t>(out_.row()));
      fill_pairs(out_, first, d_images, d, begin, end,
                 [&](int64_t i, float* row) { widen_gradient(grad, y, coefficients_, out_, i, row, row_y.data()); });
    });
    if (!need_weight_) return;
    const ScaleShiftRelu<float> act(scale_shift_, in_.channels, a_.relu);
    group.share(count * in_.height, [&](int64_t begin, int64_t end) {
      fill_pairs(in_, first, {}, x, begin, end, [&](int64_t i, float* row) {
        widen_activation(static_cast<const BFloat16*>(a_.x.data_ptr()), in_, act, i, row);
      });
    });
  }

  const BackwardArguments& a_;
  bool need_weight_;
  NhwcShape in_, out_;
  int64_t threads_, tiles_;
  const float *scale_shift_, *coefficients_;
  std::optional<DataGradient<BFloat16, BFloat16>> data_;
  // The gradient of the output as images and as pairs, and x as pairs.
  PaddedLayout image_layout_{}, d_layout_, x_layout_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bf16_conv_backward(const BackwardArguments& a) {
  // Accumulators that the threads share need all images at once: too many for the data gradient.
  if (!a.need_x || !a.need_weight || accumulates_per_thread(a)) return Pass(a, a.need_x, a.need_weight).run();
  auto gradients = Pass(a, true, false).run();
  std::get<1>(gradients) = std::get<1>(Pass(a, false, true).run());
  return gradients;
}

}  // namespace resnet_fast
