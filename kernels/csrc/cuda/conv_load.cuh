// Operands of the convolution on their way from global into shared memory: one class for each Load of conv_plan.h.
//
// A "row" is tile.row_bytes of channels of one pixel or one filter; a piece is 16 bytes of it. Rows of the input are
// pixels, rows of the filters output channels; what lies outside of either becomes zero.
#pragma once

#include "conv_plan.h"
#include "elements.cuh"
#include "ptx.cuh"

namespace resnet_fast::cuda {

// What a block of threads works on: output pixels first .. first + rows - 1, output channels from `channel` on, the
// parts begin .. end - 1 of the sum.
struct ConvBlock {
  int64_t first;
  int rows, channel, begin, end;
};

template <typename T, int kIndex>
struct ConvTraits {
  static constexpr ConvTile kTile = kConvTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kPitch = kTile.pitch();
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kRow = kTile.row_bytes / static_cast<int>(sizeof(T));  // elements
  static constexpr int kPieces = kTile.row_bytes / 16;
  static constexpr int kFilterPieces = kTile.taps * kTile.n() * kPieces;
  static_assert(kThreads % kPieces == 0, "a thread keeps its piece of a row");
};

// The input pixels around a run of output pixels are one run, too: images lie one behind the other, and a tap is a
// fixed distance in it. So a block copies one contiguous range, and a tap is an offset. Where a tap leaves its image the
// range holds some other pixel; readers go to a row of zeros instead.
template <typename T, int kIndex>
class HaloLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kPieces;

 public:
  static constexpr int kSteps = 9 / kTile.taps;  // of one slice of channels
  // The next slice of channels arrives during these steps of the one before: its buffer is free from the first on, and
  // the copies must be `stages` - 1 steps old when they are used.
  static constexpr int kSlices = kSteps - kTile.stages + 2;

  __device__ HaloLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, uint32_t shared)
      : pieces_(a.channels / Traits::kPack), channels_(a.channels), piece_(threadIdx.x % Traits::kPieces) {
    const int64_t image = int64_t{a.height} * a.width, last = block.first + block.rows - 1;
    const int64_t low = max(block.first - a.width - 1, block.first / image * image);
    const int64_t high = min(last + a.width + 1, (last / image + 1) * image - 1);
    rows_ = static_cast<int>(high - low) + 1;
    offset_ = static_cast<int>(block.first - low);
    row_ = threadIdx.x / Traits::kPieces;
    // As many rows in each slice of a copy; the last may find none left.
    per_slice_ = (rows_ + kRowsAtOnce * kSlices - 1) / (kRowsAtOnce * kSlices) * kRowsAtOnce;
    buffer_bytes_ = static_cast<int>(input_rows(kTile, a)) * Traits::kPitch;
    input_ = shared + kZeroBytes;
    filters_ = input_ + buffer_bytes_ * static_cast<int>(input_buffers(kTile, a));
    x_ = x + (low + row_) * a.channels;
    const int filter = threadIdx.x / Traits::kPieces;
    filter_ = block.channel + filter;
    out_channels_ = a.out_channels;
    weight_ = weight + int64_t{filter_} * 9 * a.channels;
    next_part_ = block.begin;
  }

  // Slice `slice` of the copy of channels `part`, or all of it.
  __device__ void input(int part, int slice) { copy_rows(part, slice * per_slice_, (slice + 1) * per_slice_); }
  __device__ void input(int part) { copy_rows(part, 0, rows_); }

  // The filters of the next step, into the slot `stage`.
  __device__ void filters(int stage) {
    const int c = next_part_ * Traits::kPieces + piece_;
    const T* from = weight_ + next_tap_ * channels_ + c * Traits::kPack;
    const uint32_t to = filters_ + stage * kTile.filter_bytes() + row_ * Traits::kPitch + piece_ * 16;
#pragma unroll
    for (int i = 0; i * Traits::kThreads < Traits::kFilterPieces; ++i) {
      // Row r of the step is filter r % n under tap r / n.
      constexpr bool kEven = kTile.n() % kRowsAtOnce == 0;
      const int r = i * kRowsAtOnce, tap = (kEven ? r : row_ + r) / kTile.n();
      const int filter = r - tap * kTile.n();
      if (Traits::kFilterPieces % Traits::kThreads != 0 && row_ + r >= kTile.taps * kTile.n()) break;
      const bool there = filter_ + filter < out_channels_ && c < pieces_;
      ptx::copy_async(to + r * Traits::kPitch, from + (int64_t{filter} * 9 + tap) * channels_, there ? 16 : 0);
    }
    next_tap_ += kTile.taps;
    if (next_tap_ == 9) next_tap_ = 0, ++next_part_;
  }

  // Shared address of the first output pixel's row, as its own centre.
  __device__ uint32_t centre(int part) const { return input_ + (part & 1) * buffer_bytes_ + offset_ * Traits::kPitch; }
  __device__ uint32_t stage(int stage) const { return filters_ + stage * kTile.filter_bytes(); }

 private:
  __device__ void copy_rows(int part, int from, int to) {
    const int c = part * Traits::kPieces + piece_;
    const uint32_t bytes = c < pieces_ ? 16 : 0;
    const uint32_t at = input_ + (part & 1) * buffer_bytes_ + row_ * Traits::kPitch + piece_ * 16;
    const int end = min(to, rows_) - row_;
    for (int row = from; row < end; row += kRowsAtOnce)
      ptx::copy_async(at + row * Traits::kPitch, x_ + int64_t{row} * channels_ + c * Traits::kPack, bytes);
  }

  int pieces_, channels_, piece_, rows_, offset_, row_, per_slice_, buffer_bytes_, filter_, out_channels_;
  uint32_t input_, filters_;
  const T *x_, *weight_;
  int next_part_, next_tap_ = 0;
};

// The input that output pixel m sees under the filter's first tap: where it begins, and its coordinates. Pixels past
// the end lie outside of every image.
struct RowInfo {
  int64_t offset;  // in elements
  int row, column;
};

__device__ inline RowInfo row_info(const ConvArgs& a, int64_t m, bool there) {
  const int column = static_cast<int>(m % a.out_width), row = static_cast<int>(m / a.out_width % a.out_height);
  const int64_t image = m / (int64_t{a.out_width} * a.out_height);
  const int top = row * a.stride_h - a.pad_h, left = column * a.stride_w - a.pad_w;
  return {((image * a.height + top) * a.width + left) * a.channels, there ? top : INT32_MIN / 2, left};
}

// Products in the order of the filter: taps outside, channels inside, `row` of them a step. A thread keeps its piece of
// all rows, and with it one walk over taps and channels.
template <typename T, int kIndex>
class GatherLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kPieces;
  static constexpr int kRows = kTile.m() / kRowsAtOnce;
  static_assert(kTile.m() % kRowsAtOnce == 0, "threads share the rows evenly");

 public:
  __device__ GatherLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, uint32_t shared)
      : x_(x), height_(a.height), width_(a.width), channels_(a.channels), kernel_w_(a.kernel_w) {
    row_ = threadIdx.x / Traits::kPieces;
    const int piece = threadIdx.x % Traits::kPieces;
    total_ = a.kernel_h * a.kernel_w * a.channels;
    at_ = block.begin * Traits::kRow + piece * Traits::kPack;
    const int tap = at_ / a.channels;
    c_ = at_ % a.channels, r_ = tap / a.kernel_w, s_ = tap % a.kernel_w;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_ + i * kRowsAtOnce;
      info_[i] = row_info(a, block.first + row, row < block.rows);
    }
    to_ = shared + kZeroBytes + row_ * Traits::kPitch + piece * 16;
    filter_ = block.channel + row_;
    out_channels_ = a.out_channels;
    weight_ = weight + int64_t{filter_} * total_;
  }

  // Both operands of the next step.
  __device__ void step(int stage) {
    const uint32_t to = to_ + stage * kStageBytes;
    const bool inside = at_ < total_;
    const int64_t tap = (int64_t{r_} * width_ + s_) * channels_ + c_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool there = inside && static_cast<unsigned>(info_[i].row + r_) < static_cast<unsigned>(height_) &&
                         static_cast<unsigned>(info_[i].column + s_) < static_cast<unsigned>(width_);
      ptx::copy_async(to + i * kRowsAtOnce * Traits::kPitch, x_ + (info_[i].offset + tap), there ? 16 : 0);
    }
#pragma unroll
    for (int r = 0; r < kTile.n(); r += kRowsAtOnce) {
      if (kTile.n() % kRowsAtOnce != 0 && row_ + r >= kTile.n()) break;
      const bool there = inside && filter_ + r < out_channels_;
      ptx::copy_async(to + (kTile.m() + r) * Traits::kPitch, weight_ + (int64_t{r} * total_ + at_), there ? 16 : 0);
    }
    at_ += Traits::kRow;
    c_ += Traits::kRow;
    while (c_ >= channels_) {
      c_ -= channels_;
      if (++s_ == kernel_w_) s_ = 0, ++r_;
    }
  }

  static constexpr int kStageBytes = (kTile.m() + kTile.n()) * Traits::kPitch;

 private:
  const T *x_, *weight_;
  RowInfo info_[kRows];
  int height_, width_, channels_, kernel_w_, out_channels_, total_, row_, at_, c_, r_, s_, filter_;
  uint32_t to_;
};

// The same element by element, through registers: no alignment is asked for.
template <typename T, int kIndex>
class MixedLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kRow;
  static_assert(Traits::kThreads % Traits::kRow == 0 && kTile.m() % kRowsAtOnce == 0 && kTile.n() % kRowsAtOnce == 0,
                "threads share the rows evenly");

 public:
  __device__ MixedLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, unsigned char* shared)
      : x_(x), weight_(weight), height_(a.height), width_(a.width), channels_(a.channels), kernel_w_(a.kernel_w) {
    total_ = a.kernel_h * a.kernel_w * a.channels;
    at_ = block.begin * Traits::kRow + threadIdx.x % Traits::kRow;
    row_ = threadIdx.x / Traits::kRow;
    channel_ = block.channel, out_channels_ = a.out_channels;
    to_ = shared + kZeroBytes + row_ * Traits::kPitch + threadIdx.x % Traits::kRow * sizeof(T);
    info_ = reinterpret_cast<RowInfo*>(shared + kZeroBytes + kTile.stages * kStageBytes);
    for (int row = threadIdx.x; row < kTile.m(); row += Traits::kThreads)
      info_[row] = row_info(a, block.first + row, row < block.rows);
    __syncthreads();
  }

  __device__ void step(int stage) {
    unsigned char* to = to_ + stage * kStageBytes;
    const bool inside = at_ < total_;
    const int tap = at_ / channels_, r = tap / kernel_w_, s = tap % kernel_w_;
    const int64_t offset = (int64_t{r} * width_ + s) * channels_ + at_ % channels_;
    T zero;
    narrow(0.f, zero);
#pragma unroll 8
    for (int row = 0; row < kTile.m(); row += kRowsAtOnce) {
      const RowInfo info = info_[row_ + row];
      const bool there = inside && static_cast<unsigned>(info.row + r) < static_cast<unsigned>(height_) &&
                         static_cast<unsigned>(info.column + s) < static_cast<unsigned>(width_);
      *reinterpret_cast<T*>(to + row * Traits::kPitch) = there ? x_[info.offset + offset] : zero;
    }
#pragma unroll 8
    for (int row = 0; row < kTile.n(); row += kRowsAtOnce) {
      const int filter = channel_ + row_ + row;
      *reinterpret_cast<T*>(to + (kTile.m() + row) * Traits::kPitch) =
          inside && filter < out_channels_ ? weight_[int64_t{filter} * total_ + at_] : zero;
    }
    at_ += Traits::kRow;
  }

  static constexpr int kStageBytes = (kTile.m() + kTile.n()) * Traits::kPitch;

 private:
  const T *x_, *weight_;
  int height_, width_, channels_, kernel_w_, out_channels_, total_, at_, row_, channel_;
  unsigned char* to_;
  RowInfo* info_;
};

}  // namespace resnet_fast::cuda
