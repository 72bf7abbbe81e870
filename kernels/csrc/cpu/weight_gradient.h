// The gradient of a filter, summed by a team over chunks of images.
#pragma once

#include <vector>

#include "layer.h"
#include "team.h"
#include "training.h"

namespace resnet_fast {

// What a filter's gradient is made of: the layer, its input and the gradient of its output as maps with halos.
template <typename T>
class WeightGradient {
 public:
  WeightGradient(const Layer& layer, const Image& in, const Image& out, bool winograd)
      : layer_(layer), in_(in), out_(out), winograd_(winograd), rows_(round_up(out.channels, lanes_)),
        columns_(round_up(in.channels, lanes_)) {
    if (winograd) {
      runs_ = kTilePoints;
    } else if (layer.kernel_w * in.channels <= 64) {
      runs_ = layer.kernel_h;  // few channels: a row of the filter is one run of the input, which has no gaps
      run_ = layer.kernel_w * in.channels;
      columns_ = round_up(run_, lanes_);
    } else {
      runs_ = layer.kernel_h * layer.kernel_w;
    }
    // Tiles that are transformed before they are multiplied: as many as stay in cache, but enough that sums are rarely
    // stored.
    const int64_t tile_bytes = kTilePoints * (rows_ + columns_) * static_cast<int64_t>(sizeof(T));
    tiles_ = std::clamp<int64_t>(kTransformedTileBytes / tile_bytes, 64, kMaxPixels);
    d_point_ = tiles_ * rows_ + 16, x_point_ = tiles_ * columns_ + 16;
    strip_ = round_up(static_cast<int64_t>(kTileIn) * (kTileOut * ceil_div(out.width, kTileOut) + 2) * 16, 64);
  }

  // Elements: sums and transformed tiles of the team, and a strip for each of its members.
  int64_t sums_numel() const { return runs_ * sum_stride(); }
  int64_t work_numel(int64_t threads) const {
    return winograd_ ? kTilePoints * (d_point_ + x_point_) + threads * strip_ + 64 : 0;
  }

  // Adds the images in the maps to `sums`, which starts as zeros. Every member of the team calls this; a barrier must
  // come before and after.
  void add(const Map<T>& d, const Map<T>& x, int64_t images, T* sums, T* work, int64_t rank, Team& team) const {
    if (winograd_) {
      add_tiles(d, x, images, sums, work, rank, team);
    } else {
      add_pixels(d, x, images, sums, rank, team.size());
    }
  }

  // Output channels [begin, end) to `to`, whose strides are those of the weight.
  template <typename S>
  void store(const T* sums, S* to, const int64_t (&stride)[4], int64_t begin, int64_t end) const {
    std::vector<T> taps(static_cast<size_t>(winograd_ ? 9 * columns_ : 0));
    for (int64_t k = begin; k < end; ++k) {
      const T* from = sums + k * columns_;
      int64_t tap_stride = sum_stride();
      if (winograd_) {
        kernels_in_use<T>().winograd_filter_gradient(from, sum_stride(), static_cast<int>(columns_), taps.data());
        from = taps.data(), tap_stride = columns_;
      }
      for (int64_t r = 0; r < layer_.kernel_h; ++r) {
        for (int64_t s = 0; s < layer_.kernel_w; ++s) {
          const T* tap =
              run_ > 0 ? from + r * tap_stride + s * in_.channels : from + (r * layer_.kernel_w + s) * tap_stride;
          S* out = to + k * stride[0] + r * stride[2] + s * stride[3];
          for (int64_t c = 0; c < in_.channels; ++c) out[c * stride[1]] = narrow_to<S>(tap[c]);
        }
      }
    }
  }

 private:
  static constexpr int64_t kTransformedTileBytes = 2 << 20;

  int64_t sum_stride() const { return out_.channels * columns_; }

  void add_tiles(const Map<T>& d, const Map<T>& x, int64_t images, T* sums, T* work, int64_t rank, Team& team) const {
    const Kernels<T>& kernels = kernels_in_use<T>();
    const int64_t size = team.size();
    T *const d_tiles = work, *const x_tiles = work + kTilePoints * d_point_;
    T* const strip = x_tiles + kTilePoints * x_point_ + rank * strip_;
    const int64_t total = images * ceil_div(out_.height, kTileOut) * ceil_div(out_.width, kTileOut);
    int64_t d_offset[kMaxPixels], x_offset[kMaxPixels];
    for (int64_t t = 0; t < tiles_; ++t) d_offset[t] = t * rows_, x_offset[t] = t * columns_;
    WinogradCall<T> call{};
    call.height = static_cast<int>(out_.height), call.width = static_cast<int>(out_.width);
    for (int64_t first = 0; first < total; first += tiles_) {
      const int64_t count = std::min(tiles_, total - first), begin = count * rank / size;
      call.tile_begin = static_cast<int>(first + begin);
      call.tile_end = static_cast<int>(first + count * (rank + 1) / size);
      call.input = x.origin - layer_.pad_h * x.row - layer_.pad_w * x.pixel;
      call.input_image = x.image, call.input_row = x.row, call.input_pixel = x.pixel;
      kernels.winograd_input(call, columns_, x_point_, strip, x_tiles + begin * columns_);
      call.input = d.origin;
      call.input_image = d.image, call.input_row = d.row, call.input_pixel = d.pixel;
      kernels.winograd_gradient(call, rows_, d_point_, d_tiles + begin * rows_);
      team.wait();
      for_own_parts(rank, size, [&](int64_t point, int64_t row_begin, int64_t row_end) {
        kernels.outer_products({d_tiles + point * d_point_, x_tiles + point * x_point_, d_offset, x_offset,
                                static_cast<int>(count), static_cast<int>(row_begin), static_cast<int>(row_end),
                                static_cast<int>(columns_), sums + point * sum_stride(), columns_});
      });
      team.wait();
    }
  }

  void add_pixels(const Map<T>& d, const Map<T>& x, int64_t images, T* sums, int64_t rank, int64_t size) const {
    const int64_t total = images * out_.height * out_.width;
    const T* const origin = x.origin - layer_.pad_h * x.row - layer_.pad_w * x.pixel;
    int64_t d_offset[kMaxPixels], x_offset[kMaxPixels];
    for (int64_t first = 0; first < total; first += kMaxPixels) {
      const int64_t count = std::min<int64_t>(kMaxPixels, total - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = first + i, w = p % out_.width, h = p / out_.width % out_.height;
        const int64_t n = p / out_.width / out_.height;
        d_offset[i] = n * d.image + h * d.row + w * d.pixel;
        x_offset[i] = n * x.image + h * layer_.stride_h * x.row + w * layer_.stride_w * x.pixel;
      }
      for_own_parts(rank, size, [&](int64_t run, int64_t row_begin, int64_t row_end) {
        const int64_t r = run_ > 0 ? run : run / layer_.kernel_w, s = run_ > 0 ? 0 : run % layer_.kernel_w;
        kernels_in_use<T>().outer_products({d.origin, origin + r * x.row + s * x.pixel, d_offset, x_offset,
                                            static_cast<int>(count), static_cast<int>(row_begin),
                                            static_cast<int>(row_end), static_cast<int>(columns_),
                                            sums + run * sum_stride(), columns_});
      });
    }
  }

  // The sums that a member owns: whole runs (or points), or parts of their rows where there are too few.
  template <typename Body>
  void for_own_parts(int64_t rank, int64_t size, const Body& body) const {
    const int64_t parts = std::min(ceil_div(4 * size, runs_), ceil_div(out_.channels, kernels_in_use<T>().tile_pixels));
    const int64_t units = runs_ * parts;
    for (int64_t unit = units * rank / size; unit < units * (rank + 1) / size; ++unit) {
      const int64_t run = unit / parts, part = unit % parts;
      body(run, out_.channels * part / parts, out_.channels * (part + 1) / parts);
    }
  }

  Layer layer_;
  Image in_, out_;
  bool winograd_;
  int64_t lanes_ = kernels_in_use<T>().lanes;
  int64_t rows_, columns_;  // of a tile's transformed gradient and input
  int64_t runs_, run_ = 0;
  int64_t tiles_, d_point_, x_point_, strip_;
};

}  // namespace resnet_fast
