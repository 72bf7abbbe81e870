// The gradient of a filter, summed by a team over chunks of images.
#pragma once

#include <vector>

#include "cpu/conv/convolution.h"
#include "cpu/thread_team.h"
#include "cpu/training/training.h"

namespace resnet_fast {

// What a filter's gradient is made of: the layer, its input and the gradient of its output as maps with halos.
template <typename T>
class WeightGradient {
 public:
  typedef typename SumOf<T>::type Sum;
  typedef GradientTile<T> Tile;

  // apart: a member sums images of its own.
  WeightGradient(const Layer& layer, const Image& in, const Image& out, bool winograd, bool apart)
      : layer_(layer), in_(in), out_(out), winograd_(winograd), columns_(round_up(in.channels, lanes_)) {
    if (winograd) {
      runs_ = Tile::points;
    } else if (layer.kernel_w * in.channels <= 64) {
      runs_ = layer.kernel_h;  // few channels: a row of the filter is one run of the input, which has no gaps
      run_ = layer.kernel_w * in.channels;
      columns_ = round_up(run_, lanes_);
    } else {
      runs_ = layer.kernel_h * layer.kernel_w;
    }
    // Tiles that are transformed before they are multiplied: as many as stay in cache, but enough that sums are rarely
    // stored. All of them, if they fit: then no sum is ever stored.
    const int64_t d_panels = ceil_div(out.channels, panel_), x_panels = ceil_div(in.channels, panel_);
    const int64_t tile_bytes = Tile::points * (d_panels + x_panels) * panel_ * static_cast<int64_t>(sizeof(T));
    const int64_t all = in.images * ceil_div(out.height, Tile::out) * ceil_div(out.width, Tile::out);
    whole_ = winograd && !apart && all * tile_bytes <= kWholeTileBytes;
    tiles_ =
        whole_ ? all : std::clamp<int64_t>((apart ? kMemberTileBytes : kTeamTileBytes) / tile_bytes, 64, kMaxPixels);
    d_point_ = d_panels * tiles_ * panel_ + 16, x_point_ = x_panels * tiles_ * panel_ + 16;
    strip_ = round_up(static_cast<int64_t>(Tile::in) * (Tile::out * ceil_div(out.width, Tile::out) + 2) * 16, 64);
  }

  // Are all images wanted at once?
  bool whole() const { return whole_; }

  // Elements: sums and transformed tiles of the team, and a strip for each of its members.
  int64_t sums_numel(int64_t threads) const { return whole_ ? threads * kBlockNumel : runs_ * sum_stride(); }
  int64_t work_numel(int64_t threads) const {
    return winograd_ ? Tile::points * (d_point_ + x_point_) + threads * strip_ + 64 : 0;
  }

  // Adds the images in the maps to `sums`, which starts as zeros. Every member of the crew calls this; a barrier must
  // come before and after.
  void add(const Map<T>& d, const Map<T>& x, int64_t images, Sum* sums, T* work, const Crew& crew) const {
    if (winograd_) {
      add_tiles(d, x, images, sums, work, crew);
    } else {
      add_pixels(d, x, images, sums, crew.rank, crew.size);
    }
  }

  // Sums that each member of a team has for itself, `stride` elements from one to the next, to those of the first.
  void collect(Sum* sums, int64_t numel, int64_t stride, const Crew& team) const {
    team.share(numel, [&](int64_t begin, int64_t end) {
      for (int64_t other = 1; other < team.size; ++other) {
        const Sum* const from = sums + other * stride;
        for (int64_t i = begin; i < end; ++i) sums[i] += from[i];
      }
    });
  }

  // This member's output channels to `to`, whose strides are those of the weight. A barrier must come before.
  template <typename S>
  void store(Sum* sums, const T* work, S* to, const int64_t (&stride)[4], const Crew& crew) const {
    crew.share(out_.channels, [&](int64_t begin, int64_t end) {
      if (whole_) {
        multiply_and_store(sums + crew.rank * kBlockNumel, work, to, stride, begin, end);
      } else {
        store_rows(sums + begin * columns_, columns_, sum_stride(), 0, columns_, to, stride, begin, end);
      }
    });
  }

 private:
  static constexpr int64_t kTeamTileBytes = 2 << 20, kMemberTileBytes = 256 << 10, kWholeTileBytes = 16 << 20;
  static constexpr int64_t kProductTiles = 512;
  // Sums of so many output and input channels at all points stay in L2.
  static constexpr int64_t kBlockRows = 64, kBlockColumns = 64, kBlockNumel = Tile::points * kBlockRows * kBlockColumns;

  int64_t sum_stride() const { return out_.channels * columns_; }

  void add_tiles(const Map<T>& d, const Map<T>& x, int64_t images, Sum* sums, T* work, const Crew& crew) const {
    const Kernels<T>& kernels = kernels_in_use<T>();
    const int64_t rank = crew.rank, size = crew.size;
    T *const d_tiles = work, *const x_tiles = work + Tile::points * d_point_;
    T* const strip = x_tiles + Tile::points * x_point_ + rank * strip_;
    const int64_t total = images * ceil_div(out_.height, Tile::out) * ceil_div(out_.width, Tile::out);
    WinogradCall<T> call{};
    call.height = static_cast<int>(out_.height), call.width = static_cast<int>(out_.width);
    for (int64_t first = 0; first < total; first += tiles_) {
      const int64_t count = std::min(tiles_, total - first), begin = count * rank / size;
      call.tile_begin = static_cast<int>(first + begin);
      call.tile_end = static_cast<int>(first + count * (rank + 1) / size);
      call.channels = static_cast<int>(in_.channels);
      call.input = x.origin - layer_.pad_h * x.row - layer_.pad_w * x.pixel;
      call.input_image = x.image, call.input_row = x.row, call.input_pixel = x.pixel;
      kernels.winograd_input(call, tiles_ * panel_, x_point_, strip, x_tiles + begin * panel_);
      call.channels = static_cast<int>(out_.channels);
      call.input = d.origin;
      call.input_image = d.image, call.input_row = d.row, call.input_pixel = d.pixel;
      kernels.winograd_gradient(call, tiles_ * panel_, d_point_, d_tiles + begin * panel_);
      if (whole_) return;
      crew.wait();
      for_own_parts(rank, size, [&](int64_t point, int64_t row_begin, int64_t row_end) {
        multiply(work, point, count, row_begin, row_end, 0, columns_, true,
                 sums + point * sum_stride() + row_begin * columns_, columns_);
      });
      crew.wait();
    }
  }

  // sums[row - row_begin][column - column_begin] = products of `count` transformed tiles at one point, or += with
  // `accumulate`. column_begin is a multiple of a panel.
  void multiply(const T* work, int64_t point, int64_t count, int64_t row_begin, int64_t row_end, int64_t column_begin,
                int64_t column_end, bool accumulate, Sum* sums, int64_t sums_row) const {
    const T *const d_tiles = work + point * d_point_, *const x_tiles =
                                                          work + Tile::points * d_point_ + point * x_point_;
    int64_t offset[kProductTiles + kOuterAhead];
    for (int64_t t = 0; t < std::min(count, kProductTiles) + kOuterAhead; ++t) offset[t] = t * panel_;
    for (int64_t first = 0; first < count; first += kProductTiles) {
      const int tiles = static_cast<int>(std::min(kProductTiles, count - first));
      for (int64_t column = column_begin; column < column_end; column += panel_) {
        const T* const x = x_tiles + (column / panel_ * tiles_ + first) * panel_;
        for (int64_t row = row_begin; row < row_end;) {
          const int64_t panel = row / panel_, next = std::min((panel + 1) * panel_, row_end);
          kernels_in_use<T>().outer_products(
              {d_tiles + (panel * tiles_ + first) * panel_ + row % panel_, x, offset, offset, tiles, 0,
               static_cast<int>(next - row), static_cast<int>(std::min(panel_, column_end - column)),
               accumulate || first > 0, sums + (row - row_begin) * sums_row + column - column_begin, sums_row});
          row = next;
        }
      }
    }
  }

  // The products of all tiles, block by block of sums, which are transformed as soon as they are complete.
  template <typename S>
  void multiply_and_store(Sum* block, const T* work, S* to, const int64_t (&stride)[4], int64_t begin,
                          int64_t end) const {
    for (int64_t column = 0; column < columns_; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, columns_ - column);
      for (int64_t k = begin; k < end; k += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - k), point_sums = rows * width;
        for (int64_t point = 0; point < Tile::points; ++point) {
          multiply(work, point, tiles_, k, k + rows, column, column + width, false, block + point * point_sums, width);
        }
        store_rows(block, width, point_sums, column, width, to, stride, k, k + rows);
      }
    }
  }

  // Sums of output channels [begin, end) and `width` input channels from `column` on, `row` elements each, runs or
  // points `run` elements apart.
  template <typename S>
  void store_rows(const Sum* sums, int64_t row, int64_t run, int64_t column, int64_t width, S* to,
                  const int64_t (&stride)[4], int64_t begin, int64_t end) const {
    std::vector<Sum> taps(static_cast<size_t>(winograd_ ? 9 * width : 0));
    const int64_t channels = std::min(width, in_.channels - column);
    for (int64_t k = begin; k < end; ++k, sums += row) {
      const Sum* from = sums;
      int64_t tap_stride = run;
      if (winograd_) {
        kernels_in_use<T>().winograd_filter_gradient(sums, run, static_cast<int>(width), taps.data());
        from = taps.data(), tap_stride = width;
      }
      for (int64_t r = 0; r < layer_.kernel_h; ++r) {
        for (int64_t s = 0; s < layer_.kernel_w; ++s) {
          const Sum* tap =
              run_ > 0 ? from + r * tap_stride + s * in_.channels : from + (r * layer_.kernel_w + s) * tap_stride;
          S* out = to + k * stride[0] + column * stride[1] + r * stride[2] + s * stride[3];
          const int64_t count = run_ > 0 ? in_.channels : channels;
          if (stride[1] == 1) {
            for (int64_t c = 0; c < count; ++c) out[c] = narrow_to<S>(tap[c]);
          } else {
            for (int64_t c = 0; c < count; ++c) out[c * stride[1]] = narrow_to<S>(tap[c]);
          }
        }
      }
    }
  }

  void add_pixels(const Map<T>& d, const Map<T>& x, int64_t images, Sum* sums, int64_t rank, int64_t size) const {
    const int64_t total = images * out_.height * out_.width;
    const T* const origin = x.origin - layer_.pad_h * x.row - layer_.pad_w * x.pixel;
    int64_t d_offset[kMaxPixels + kOuterAhead], x_offset[kMaxPixels + kOuterAhead];
    for (int64_t first = 0; first < total; first += kMaxPixels) {
      const int64_t count = std::min<int64_t>(kMaxPixels, total - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = first + i, w = p % out_.width, h = p / out_.width % out_.height;
        const int64_t n = p / out_.width / out_.height;
        d_offset[i] = n * d.image + h * d.row + w * d.pixel;
        x_offset[i] = n * x.image + h * layer_.stride_h * x.row + w * layer_.stride_w * x.pixel;
      }
      std::fill_n(d_offset + count, kOuterAhead, d_offset[count - 1]);
      std::fill_n(x_offset + count, kOuterAhead, x_offset[count - 1]);
      for_own_parts(rank, size, [&](int64_t run, int64_t row_begin, int64_t row_end) {
        const int64_t r = run_ > 0 ? run : run / layer_.kernel_w, s = run_ > 0 ? 0 : run % layer_.kernel_w;
        kernels_in_use<T>().outer_products({d.origin, origin + r * x.row + s * x.pixel, d_offset, x_offset,
                                            static_cast<int>(count), static_cast<int>(row_begin),
                                            static_cast<int>(row_end), static_cast<int>(columns_), true,
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
  bool winograd_, whole_ = false;
  int64_t lanes_ = kernels_in_use<T>().lanes, panel_ = product_panel<T>(static_cast<int>(lanes_));
  int64_t columns_;  // input channels of the sums, in whole vectors
  int64_t runs_, run_ = 0;
  int64_t tiles_, d_point_, x_point_, strip_;
};

}  // namespace resnet_fast
