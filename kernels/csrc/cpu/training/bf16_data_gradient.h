// The data gradient of a convolution in bfloat16: convolutions of the output's gradient by the filter turned around,
// with what is added to it and the sums that batch norm's backward wants on the way out.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/training/bf16_training.h"
#include "cpu/training/masked_sums.h"
#include "cpu/training/phases.h"

namespace resnet_fast {

class Bf16DataGradient {
 public:
  // in, out: images as they are cut, those of x and of the output's gradient.
  Bf16DataGradient(const char* op, const Bf16Backward& b, const Image& in, const Image& out, int64_t threads)
      : in_(in), layer_(b.layer), dx_(empty_image(Image(b.x), b.x)),
        sums_(empty_rows(b.finish ? 3 : 0, in.channels, b.x)), result_(static_cast<BFloat16*>(dx_.data_ptr())),
        residual_(b.residual ? static_cast<BFloat16*>(b.residual->data_ptr()) : nullptr),
        parts_(static_cast<size_t>(threads), std::vector<double>(static_cast<size_t>(b.finish ? 3 * in.channels : 1))) {
    RESNET_FAST_CHECK(in.channels % kBf16Lanes == 0, op, ": x has ", in.channels,
                      " channels, want a multiple of 16 for an algorithm in bfloat16");
    phases_ = phases_of<BFloat16>(layer_, in, out.channels, b.weight, b.algorithm, complete_);
    Halo halo;
    for (const Phase<BFloat16>& p : phases_) {
      const bool winograd = p.layout.winograd();
      const int64_t top = std::max<int64_t>(p.layer.pad_h, 0), left = std::max<int64_t>(p.layer.pad_w, 0);
      halo.cover({top, bf16_beyond(out.height, p.height, p.layer.pad_h, p.layer.kernel_h, 1, winograd), left,
                  bf16_beyond(out.width, p.width, p.layer.pad_w, p.layer.kernel_w, 1, winograd)});
      units_ = std::min(units_, units_of(p.layout, p.height, p.width));
    }
    shape_ = {out.channels, out.height, out.width, round_up(out.channels, 2), halo};
    if (b.finish) {
      masked_.emplace(op, b.relu || !b.scale_shift ? OptionalTensor(b.x) : std::nullopt, b.scale_shift, b.ys, b.means,
                      in.channels);
    }
  }

  // Of the output's gradient, one image.
  const MapShape& shape() const { return shape_; }
  // Tiles or pixels of the smallest convolution on an image, or as many as a member needs at least.
  int64_t units() const { return units_; }

  // Scratch of a member for so many images at once.
  int64_t work_numel(int64_t images) const {
    int64_t numel = 0;
    for (const Phase<BFloat16>& p : phases_) {
      if (p.layout.winograd()) {
        numel = std::max(numel, round_up(winograd_scratch(convolution(p, 0, images, Map<BFloat16>{})), 64));
      }
    }
    return numel;
  }

  // From maps with a halo. A barrier must come before, and before what follows.
  void run(int64_t first, int64_t images, const Map<BFloat16>& d, BFloat16* work, const Crew& crew) const {
    if (!complete_) {
      fill_unreached(first, images, crew);
      crew.wait();
    }
    for (const Phase<BFloat16>& p : phases_) {
      const Convolution<BFloat16> conv = convolution(p, first, images, d);
      run_part(conv, part_of(conv, crew.rank, crew.size), work);
    }
  }

  // The mask of the ReLU, and the sums of thread `rank`.
  void finish(int64_t first, int64_t images, int64_t rank, const Crew& crew) {
    if (!masked_) return;
    const int64_t pixels = in_.height * in_.width;
    crew.share(images * in_.height, [&](int64_t begin, int64_t end) {
      masked_->run(result_, result_, first * pixels + begin * in_.width, first * pixels + end * in_.width,
                   parts_[static_cast<size_t>(rank)].data());
    });
  }

  std::tuple<Tensor, Tensor> results() {
    if (masked_) add_parts(parts_, static_cast<float*>(sums_.data_ptr()));
    return {dx_, sums_};
  }

 private:
  Convolution<BFloat16> convolution(const Phase<BFloat16>& p, int64_t first, int64_t images,
                                    const Map<BFloat16>& d) const {
    const auto pixels = [&](BFloat16* data) {
      return data ? Map<BFloat16>{data + first * in_.image() + p.row * in_.row() + p.column * in_.channels, in_.image(),
                                  in_.row() * layer_.stride_h, in_.channels * layer_.stride_w}
                  : Map<BFloat16>{};
    };
    return {p.layer, p.layout,          static_cast<const BFloat16*>(p.packed.data_ptr()),
            images,  p.height,          p.width,
            d,       pixels(residual_), pixels(result_)};
  }

  // Pixels that no filter reaches are among these.
  void fill_unreached(int64_t first, int64_t images, const Crew& crew) const {
    crew.share(images * in_.image(), [&](int64_t begin, int64_t end) {
      const int64_t at = first * in_.image();
      if (residual_) {
        std::copy(residual_ + at + begin, residual_ + at + end, result_ + at + begin);
      } else {
        std::fill(result_ + at + begin, result_ + at + end, BFloat16{});
      }
    });
  }

  Image in_;
  Layer layer_;
  Tensor dx_, sums_;
  BFloat16* result_;
  BFloat16* residual_;
  std::vector<std::vector<double>> parts_;
  std::vector<Phase<BFloat16>> phases_;
  bool complete_ = true;
  MapShape shape_{};
  int64_t units_ = kMinMemberTiles;
  std::optional<MaskedSums<BFloat16, float>> masked_;
};

}  // namespace resnet_fast
