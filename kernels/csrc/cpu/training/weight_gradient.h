// The gradient of a filter, accumulated by the threads of a team over chunks of images.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv/padded_layout.h"
#include "cpu/isa.h"
#include "cpu/thread_team.h"
#include "cpu/training/image_split.h"

namespace resnet_fast {

// Accumulators that a thread may have for itself, in bytes.
constexpr int64_t kThreadAccBytes = 1 << 20;

// From the input of a layer and the gradient of its output, as padded activations of T.
template <typename T>
class WeightGradient {
 public:
  typedef typename AccumulatorOf<T>::type Acc;
  typedef GradientTile<T> Tile;

  // per_thread: each thread has images and accumulators of its own.
  WeightGradient(const Layer& layer, const NhwcShape& in, const NhwcShape& out, bool winograd, bool per_thread)
      : layer_(layer), in_(in), out_(out), winograd_(winograd), columns_(round_up(in.channels, lanes_)) {
    if (winograd) {
      runs_ = Tile::points;
    } else if (layer.kernel_w * in.channels <= 64) {
      runs_ = layer.kernel_h;  // few channels: a row of the filter is one dense run of the input
      run_ = layer.kernel_w * in.channels;
      columns_ = round_up(run_, lanes_);
    } else {
      runs_ = layer.kernel_h * layer.kernel_w;
    }
    // Tiles transformed at a time: as many as stay in cache, but enough that accumulators are rarely stored. If all
    // tiles fit, accumulators are never stored.
    const int64_t d_panels = ceil_div(out.channels, panel_), x_panels = ceil_div(in.channels, panel_);
    const int64_t tile_bytes = Tile::points * (d_panels + x_panels) * panel_ * static_cast<int64_t>(sizeof(T));
    const int64_t all = in.images * ceil_div(out.height, Tile::out) * ceil_div(out.width, Tile::out);
    whole_ = winograd && !per_thread && all * tile_bytes <= kWholeTileBytes;
    tiles_ = whole_
                 ? all
                 : std::clamp<int64_t>((per_thread ? kThreadTileBytes : kTeamTileBytes) / tile_bytes, 64, kMaxPixels);
    d_point_ = d_panels * tiles_ * panel_ + 16, x_point_ = x_panels * tiles_ * panel_ + 16;
    strip_ = round_up(static_cast<int64_t>(Tile::in) * (Tile::out * ceil_div(out.width, Tile::out) + 2) * 16, 64);
  }

  // Whether `add` must get all images at once.
  bool whole() const { return whole_; }

  // Elements: accumulators, and transformed tiles of the team with a strip for each thread.
  int64_t acc_numel(int64_t threads) const { return whole_ ? threads * kBlockNumel : runs_ * acc_stride(); }
  int64_t work_numel(int64_t threads) const {
    return winograd_ ? Tile::points * (d_point_ + x_point_) + threads * strip_ + 64 : 0;
  }

  // Accumulates these images in `acc`, which starts as zeros. Every thread of the group calls this; a barrier must come
  // before and after.
  void add(const ActivationView<T>& d, const ActivationView<T>& x, int64_t images, Acc* acc, T* work,
           const ThreadGroup& group) const {
    if (winograd_) {
      add_tiles(d, x, images, acc, work, group);
    } else {
      add_pixels(d, x, images, acc, group.rank, group.size);
    }
  }

  // Reduces the accumulators of the threads, `stride` elements apart where each has its own, and stores dw. Every
  // thread of the team calls this; a barrier must come before.
  void finish(Acc* acc, int64_t numel, int64_t stride, bool per_thread, const T* tiles, const Tensor& dw,
              const ThreadGroup& team) const {
    if (per_thread) {
      reduce_threads(acc, numel, stride, team);
      team.wait();
    }
    const int64_t strides[4] = {dw.stride(0), dw.stride(1), dw.stride(2), dw.stride(3)};
    dispatch_dtype(dw.scalar_type(),
                   [&](auto tag) { store(acc, tiles, static_cast<decltype(tag)*>(dw.data_ptr()), strides, team); });
  }

 private:
  static constexpr int64_t kTeamTileBytes = 2 << 20, kThreadTileBytes = 256 << 10, kWholeTileBytes = 16 << 20;
  static constexpr int64_t kGemmTiles = 512;
  // Accumulators of so many output and input channels at all points stay in L2.
  static constexpr int64_t kBlockRows = 64, kBlockColumns = 64, kBlockNumel = Tile::points * kBlockRows * kBlockColumns;

  int64_t acc_stride() const { return out_.channels * columns_; }

  // Adds the accumulators of all threads to those of the first.
  void reduce_threads(Acc* acc, int64_t numel, int64_t stride, const ThreadGroup& team) const {
    team.share(numel, [&](int64_t begin, int64_t end) {
      for (int64_t other = 1; other < team.size; ++other) {
        const Acc* const from = acc + other * stride;
        for (int64_t i = begin; i < end; ++i) acc[i] += from[i];
      }
    });
  }

  // Stores this thread's output channels.
  template <typename S>
  void store(Acc* acc, const T* work, S* to, const int64_t (&stride)[4], const ThreadGroup& group) const {
    group.share(out_.channels, [&](int64_t begin, int64_t end) {
      if (whole_) {
        gemm_and_store(acc + group.rank * kBlockNumel, work, to, stride, begin, end);
      } else {
        store_rows(acc + begin * columns_, columns_, acc_stride(), 0, columns_, to, stride, begin, end);
      }
    });
  }

  void add_tiles(const ActivationView<T>& d, const ActivationView<T>& x, int64_t images, Acc* acc, T* work,
                 const ThreadGroup& group) const {
    const Kernels<T>& kernels = kernels_in_use<T>();
    const int64_t rank = group.rank, size = group.size;
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
      group.wait();
      for_own_rows(rank, size, [&](int64_t point, int64_t row_begin, int64_t row_end) {
        gemm(work, point, count, row_begin, row_end, 0, columns_, true,
             acc + point * acc_stride() + row_begin * columns_, columns_);
      });
      group.wait();
    }
  }

  // acc[row - row_begin][column - column_begin] (+)= the GEMM of `count` transformed tiles at one point. column_begin
  // is a multiple of a panel.
  void gemm(const T* work, int64_t point, int64_t count, int64_t row_begin, int64_t row_end, int64_t column_begin,
            int64_t column_end, bool accumulate, Acc* acc, int64_t acc_row) const {
    const T *const d_tiles = work + point * d_point_, *const x_tiles =
                                                          work + Tile::points * d_point_ + point * x_point_;
    int64_t offset[kGemmTiles + kOuterPrefetch];
    for (int64_t t = 0; t < std::min(count, kGemmTiles) + kOuterPrefetch; ++t) offset[t] = t * panel_;
    for (int64_t first = 0; first < count; first += kGemmTiles) {
      const int tiles = static_cast<int>(std::min(kGemmTiles, count - first));
      for (int64_t column = column_begin; column < column_end; column += panel_) {
        const T* const x = x_tiles + (column / panel_ * tiles_ + first) * panel_;
        for (int64_t row = row_begin; row < row_end;) {
          const int64_t panel = row / panel_, next = std::min((panel + 1) * panel_, row_end);
          kernels_in_use<T>().outer_products(
              {d_tiles + (panel * tiles_ + first) * panel_ + row % panel_, x, offset, offset, tiles, 0,
               static_cast<int>(next - row), static_cast<int>(std::min(panel_, column_end - column)),
               accumulate || first > 0, acc + (row - row_begin) * acc_row + column - column_begin, acc_row});
          row = next;
        }
      }
    }
  }

  // The GEMMs of all tiles, in blocks of accumulators that are transformed and stored as soon as they are complete.
  template <typename S>
  void gemm_and_store(Acc* block, const T* work, S* to, const int64_t (&stride)[4], int64_t begin, int64_t end) const {
    for (int64_t column = 0; column < columns_; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, columns_ - column);
      for (int64_t k = begin; k < end; k += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - k), point_acc = rows * width;
        for (int64_t point = 0; point < Tile::points; ++point) {
          gemm(work, point, tiles_, k, k + rows, column, column + width, false, block + point * point_acc, width);
        }
        store_rows(block, width, point_acc, column, width, to, stride, k, k + rows);
      }
    }
  }

  // Stores output channels [begin, end) and `width` input channels from `column` on, from accumulators of `row`
  // elements, whose runs (or points) are `run` elements apart.
  template <typename S>
  void store_rows(const Acc* acc, int64_t row, int64_t run, int64_t column, int64_t width, S* to,
                  const int64_t (&stride)[4], int64_t begin, int64_t end) const {
    std::vector<Acc> taps(static_cast<size_t>(winograd_ ? 9 * width : 0));
    const int64_t channels = std::min(width, in_.channels - column);
    for (int64_t k = begin; k < end; ++k, acc += row) {
      const Acc* from = acc;
      int64_t tap_stride = run;
      if (winograd_) {
        kernels_in_use<T>().winograd_filter_gradient(acc, run, static_cast<int>(width), taps.data());
        from = taps.data(), tap_stride = width;
      }
      for (int64_t r = 0; r < layer_.kernel_h; ++r) {
        for (int64_t s = 0; s < layer_.kernel_w; ++s) {
          const Acc* tap =
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

  void add_pixels(const ActivationView<T>& d, const ActivationView<T>& x, int64_t images, Acc* acc, int64_t rank,
                  int64_t size) const {
    const int64_t total = images * out_.height * out_.width;
    const T* const origin = x.origin - layer_.pad_h * x.row - layer_.pad_w * x.pixel;
    int64_t d_offset[kMaxPixels + kOuterPrefetch], x_offset[kMaxPixels + kOuterPrefetch];
    for (int64_t first = 0; first < total; first += kMaxPixels) {
      const int64_t count = std::min<int64_t>(kMaxPixels, total - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = first + i, w = p % out_.width, h = p / out_.width % out_.height;
        const int64_t n = p / out_.width / out_.height;
        d_offset[i] = n * d.image + h * d.row + w * d.pixel;
        x_offset[i] = n * x.image + h * layer_.stride_h * x.row + w * layer_.stride_w * x.pixel;
      }
      std::fill_n(d_offset + count, kOuterPrefetch, d_offset[count - 1]);
      std::fill_n(x_offset + count, kOuterPrefetch, x_offset[count - 1]);
      for_own_rows(rank, size, [&](int64_t run, int64_t row_begin, int64_t row_end) {
        const int64_t r = run_ > 0 ? run : run / layer_.kernel_w, s = run_ > 0 ? 0 : run % layer_.kernel_w;
        kernels_in_use<T>().outer_products({d.origin, origin + r * x.row + s * x.pixel, d_offset, x_offset,
                                            static_cast<int>(count), static_cast<int>(row_begin),
                                            static_cast<int>(row_end), static_cast<int>(columns_), true,
                                            acc + run * acc_stride(), columns_});
      });
    }
  }

  // The accumulators that a thread owns: whole runs (or points), or some of their rows where there are too few runs.
  template <typename Body>
  void for_own_rows(int64_t rank, int64_t size, const Body& body) const {
    const int64_t parts = std::min(ceil_div(4 * size, runs_), ceil_div(out_.channels, kernels_in_use<T>().tile_pixels));
    const int64_t units = runs_ * parts;
    for (int64_t unit = units * rank / size; unit < units * (rank + 1) / size; ++unit) {
      const int64_t run = unit / parts, part = unit % parts;
      body(run, out_.channels * part / parts, out_.channels * (part + 1) / parts);
    }
  }

  Layer layer_;
  NhwcShape in_, out_;
  bool winograd_, whole_ = false;
  int64_t lanes_ = kernels_in_use<T>().lanes, panel_ = gemm_panel<T>(static_cast<int>(lanes_));
  int64_t columns_;  // input channels of the accumulators, in whole vectors
  int64_t runs_, run_ = 0;
  int64_t tiles_, d_point_, x_point_, strip_;
};

}  // namespace resnet_fast
