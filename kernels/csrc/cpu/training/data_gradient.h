// The gradient of a convolution's input: convolutions of the output's gradient by the transposed filter, then the
// residual's gradient added, and ReLU's mask and the reductions of batch norm's backward.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/conv/run_convolution.h"
#include "cpu/training/conv_backward.h"
#include "cpu/training/image_split.h"
#include "cpu/training/masked_sums.h"
#include "cpu/training/phases.h"

namespace resnet_fast {

// S: elements of the tensors, T: those of the convolutions.
template <typename S, typename T>
class DataGradient {
 public:
  typedef typename AccumulatorOf<T>::type Acc;

  // in, out: x and the output's gradient, split by images or by rows.
  DataGradient(const BackwardArguments& a, const NhwcShape& in, const NhwcShape& out, int64_t threads)
      : in_(in), layer_(a.layer), lanes_(kernels_in_use<T>().lanes),
        in_place_(sizeof(S) == sizeof(T) && in.channels % lanes_ == 0), dx_(empty_nhwc(NhwcShape(a.x), a.x)),
        sums_(empty_rows(a.finish ? 3 : 0, in.channels, a.x)), dx_data_(static_cast<S*>(dx_.data_ptr())),
        residual_(a.residual ? static_cast<S*>(a.residual->data_ptr()) : nullptr),
        result_layout_{in.channels, in.height, in.width, round_up(in.channels, lanes_), {}},
        partial_(static_cast<size_t>(threads),
                 std::vector<double>(static_cast<size_t>(a.finish ? 3 * in.channels : 1))) {
    RESNET_FAST_CHECK((!std::is_same_v<T, BFloat16>) || in_place_, a.op, ": x has ", in.channels,
                      " channels, want a multiple of 16 for an algorithm in bfloat16");
    phases_ = phases_of<T>(layer_, in, out.channels, a.weight, a.algorithm, complete_);
    for (const Phase<T>& p : phases_) {
      const Layer& l = p.layer;
      const int64_t tile = p.layout.winograd() ? kWinogradTile<T> : 0;
      halo_.cover({std::max<int64_t>(l.pad_h, 0), far_halo(out.height, p.height, l.pad_h, l.kernel_h, 1, tile),
                   std::max<int64_t>(l.pad_w, 0), far_halo(out.width, p.width, l.pad_w, l.kernel_w, 1, tile)});
      units_ = std::min(units_, units_of(p.layout, p.height, p.width));
    }
    if (a.finish) {
      masked_.emplace(a.op, a.relu || !a.scale_shift ? OptionalTensor(a.x) : std::nullopt, a.scale_shift, a.ys, a.stats,
                      in.channels);
    }
  }

  // Around the output's gradient.
  const Halo& halo() const { return halo_; }
  // Winograd tiles or pixels of an image in the smallest convolution, or kMinThreadTiles.
  int64_t units() const { return units_; }
  // Whether convolutions write to dx. Else whole vectors would not fit, or the types differ: they write to a result of
  // T.
  bool in_place() const { return in_place_; }
  // Elements of the result of an image.
  int64_t result_numel() const { return in_place_ ? 0 : round_up(result_layout_.image(), 64); }

  // Elements of scratch memory of a thread, for so many images at a time.
  int64_t work_numel(int64_t images) const {
    int64_t numel = 0;
    for (const Phase<T>& p : phases_) {
      if (p.layout.winograd()) {
        numel = std::max(numel, round_up(winograd_scratch(convolution(p, 0, images, {}, nullptr)), 64));
      }
    }
    return numel;
  }

  // Writes the pixels that no filter reaches. A barrier must come between this and run.
  void fill_unreached(int64_t first, int64_t images, T* result, const ThreadGroup& group) const {
    if (complete_) return;
    if (!in_place_) {
      group.share(images * result_layout_.image(),
                  [&](int64_t begin, int64_t end) { std::fill(result + begin, result + end, T{}); });
      return;
    }
    group.share(images * in_.image(), [&](int64_t begin, int64_t end) {
      const int64_t at = first * in_.image();
      if (residual_) {
        std::copy(residual_ + at + begin, residual_ + at + end, dx_data_ + at + begin);
      } else {
        std::fill(dx_data_ + at + begin, dx_data_ + at + end, S{});
      }
    });
  }

  // The convolutions of images [first, first + images) of the padded gradient d. A barrier must come before and after.
  void run(int64_t first, int64_t images, const ActivationView<T>& d, T* result, T* work, const PrefetchList& prefetch,
           const ThreadGroup& group) const {
    for (const Phase<T>& p : phases_) {
      Convolution<T> conv = convolution(p, first, images, d, result);
      conv.output_uncached = in_place_;
      conv.prefetch = prefetch;
      run_part(conv, part_of(conv, group.rank, group.size), work);
    }
  }

  // What follows the convolutions; the sums are those of thread `rank` of the team.
  void finish(int64_t first, int64_t images, T* result, int64_t rank, const ThreadGroup& group) {
    if (in_place_ && !masked_) return;
    group.share(images * in_.height, [&](int64_t begin, int64_t end) {
      if (!in_place_) store_result(first, result, begin, end);
      if (!masked_) return;
      const int64_t pixel = first * in_.height * in_.width;
      masked_->run(dx_data_, dx_data_, pixel + begin * in_.width, pixel + end * in_.width,
                   partial_[static_cast<size_t>(rank)].data());
    });
  }

  // dx, and the sums.
  std::tuple<Tensor, Tensor> results() {
    if (masked_) add_partial_sums(partial_, static_cast<Acc*>(sums_.data_ptr()));
    return {dx_, sums_};
  }

 private:
  Convolution<T> convolution(const Phase<T>& p, int64_t first, int64_t images, const ActivationView<T>& d,
                             T* result) const {
    // The pixels of this phase, of tensors like x. The residual is added by the convolution where it writes dx.
    const auto phase_of = [&](ActivationView<T> v) {
      return ActivationView<T>{v.at(0, p.row, p.column), v.image, v.row * layer_.stride_h, v.pixel * layer_.stride_w};
    };
    const auto pixels = [&](S* data) {
      return phase_of({reinterpret_cast<T*>(data) + first * in_.image(), in_.image(), in_.row(), in_.channels});
    };
    return {p.layer,
            p.layout,
            static_cast<const T*>(p.packed.data_ptr()),
            images,
            p.height,
            p.width,
            d,
            residual_ && in_place_ ? pixels(residual_) : ActivationView<T>{},
            in_place_ ? pixels(dx_data_) : phase_of(result_layout_.view(result))};
  }

  // Rows [begin, end) of images x height from the result to dx, plus the residual.
  void store_result(int64_t first, T* result, int64_t begin, int64_t end) const {
    copy_out(result_layout_.view(result), result_layout_, dx_, first, begin, end);
    if (!residual_) return;
    const int64_t at = first * in_.image();
    for (int64_t i = at + begin * in_.row(); i < at + end * in_.row(); ++i) {
      dx_data_[i] = narrow_to<S>(static_cast<Acc>(widen(dx_data_[i])) + static_cast<Acc>(widen(residual_[i])));
    }
  }

  NhwcShape in_;
  Layer layer_;
  int64_t lanes_;
  bool in_place_;
  Tensor dx_, sums_;
  S* dx_data_;
  S* residual_;
  PaddedLayout result_layout_;
  std::vector<std::vector<double>> partial_;  // of each thread
  std::vector<Phase<T>> phases_;
  bool complete_ = true;
  Halo halo_;
  int64_t units_ = kMinThreadTiles;
  std::optional<MaskedSums<S, Acc>> masked_;
};

}  // namespace resnet_fast
