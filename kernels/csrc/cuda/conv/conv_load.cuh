// Operands of the convolution on their way from global into shared memory: one class for each Load of conv_plan.h.
//
// A "row" is tile.row_bytes of channels of one pixel or one filter; a piece is 16 bytes of it. Rows of the input are
// pixels, rows of the filters output channels; what lies outside of either becomes zero.
#pragma once

#include "cuda/conv/conv_plan.h"
#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"

namespace resnet_fast::cuda {

// What a block of threads works on: output pixels first .. first + rows - 1, output channels from `channel` on, the
// parts begin .. end - 1 of the sum.
struct ConvBlock {
  int first, rows, channel, begin, end;
};

template <typename T, int kIndex>
struct ConvTraits {
  static constexpr ConvTile kTile = kConvTiles[kIndex];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kPitch = kTile.pitch();
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kRow = kTile.row_bytes / static_cast<int>(sizeof(T));  // elements
  static constexpr int kPieces = kTile.row_bytes / 16;
  static_assert(kThreads % kPieces == 0, "a thread keeps its piece of a row");
};

// The input pixels around a run of output pixels are one run, too: images lie one behind the other, and a tap is a
// fixed distance in it. So a block copies one contiguous range, and a tap is an offset. Where a tap leaves its image
// the range holds some other pixel; readers go to a row of zeros instead.
//
// All loops over steps are unrolled, so that slots and taps are constants; addresses only ever move on.
template <typename T, int kIndex>
class HaloLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kPieces;

 public:
  static constexpr int kSteps = 9 / kTile.taps;  // of one slice of channels
  static_assert(kSteps % kTile.stages == 0, "a step always finds its filters in the same slot");
  // The next slice of channels arrives during these steps of the one before: its buffer is free from the first on, and
  // the copies must be `stages` - 1 steps old when they are used.
  static constexpr int kSlices = kSteps - kTile.stages + 2;
  // Rows a thread copies in each of them, for images up to 48 pixels wide; what is left in wider ones follows the last.
  static constexpr int kCopies = (kTile.m() + 2 * 48 + kRowsAtOnce * kSlices - 1) / (kRowsAtOnce * kSlices);

  __device__ HaloLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, uint32_t shared)
      : pieces_(a.channels / Traits::kPack), channels_(a.channels) {
    // All pixels of the batch fit 32 bits, as they do in the output; their offsets may not.
    const int image = a.height * a.width, last = block.first + block.rows - 1;
    const int before = min(a.width + 1, block.first % image), after = min(a.width + 1, image - 1 - last % image);
    const int low = block.first - before;
    const int row = threadIdx.x / Traits::kPieces, piece = threadIdx.x % Traits::kPieces;
    rows_ = before + block.rows + after - row;
    buffer_bytes_ = static_cast<int>(input_rows(kTile, a)) * Traits::kPitch;
    const uint32_t input = shared + kZeroBytes;
    const uint32_t filters = input + buffer_bytes_ * static_cast<int>(input_buffers(kTile, a));
    centre_ = input + before * Traits::kPitch;
    filters_ = filters;
    input_to_ = input + row * Traits::kPitch + piece * 16;
    filters_to_ = filters + row * Traits::kPitch + piece * 16;

    piece_ = block.begin * Traits::kPieces + piece;
    x_ = x + int64_t{low + row} * a.channels + piece_ * Traits::kPack;
    const int filter = block.channel + row % kTile.n();
    weight_ = weight + (int64_t{filter} * 9 + row / kTile.n()) * a.channels + piece_ * Traits::kPack;
    filters_left_ = a.out_channels - filter;
  }

  // All of the first slice of channels.
  __device__ void first_input() {
    const T* from = x_;
    uint32_t to = input_to_;
    for (int row = 0; row < rows_; row += kRowsAtOnce) {
      ptx::copy_async(to, from, piece_ < pieces_ ? 16 : 0);
      from += int64_t{kRowsAtOnce} * channels_, to += kRowsAtOnce * Traits::kPitch;
    }
  }

  // Part `slice` of the next slice of channels, into the other buffer.
  __device__ void next_input(int slice) {
    if (slice == 0) {
      next_to_ = input_to_ + (odd_ ? 0 : buffer_bytes_);
      next_from_ = x_ + Traits::kRow;
      next_rows_ = rows_;
    }
    const uint32_t bytes = piece_ + Traits::kPieces < pieces_ ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * kRowsAtOnce < next_rows_) ptx::copy_async(next_to_ + i * kRowsAtOnce * Traits::kPitch, next_from_, bytes);
      next_from_ += int64_t{kRowsAtOnce} * channels_;
    }
    next_to_ += kCopies * kRowsAtOnce * Traits::kPitch;
    next_rows_ -= kCopies * kRowsAtOnce;
    if (slice == kSlices - 1) {
#pragma unroll 1
      for (; next_rows_ > 0; next_rows_ -= kRowsAtOnce) {
        ptx::copy_async(next_to_, next_from_, bytes);
        next_from_ += int64_t{kRowsAtOnce} * channels_, next_to_ += kRowsAtOnce * Traits::kPitch;
      }
    }
  }

  // The filters of step `step` of this slice of channels or, from kSteps on, of the next.
  __device__ void filters(int step) {
    const int part = step / kSteps, tap = step % kSteps * kTile.taps;
    const T* from = weight_ + (part * Traits::kRow + tap * channels_);
    const uint32_t to = filters_to_ + step % kTile.stages * kTile.filter_bytes();
    const bool piece_there = piece_ + part * Traits::kPieces < pieces_;
#pragma unroll
    for (int r = 0; r < kTile.taps * kTile.n(); r += kRowsAtOnce) {
      // Row r of the step is filter r % n under tap r / n; this thread's own row is in weight_ already.
      constexpr bool kEven = kTile.n() % kRowsAtOnce == 0 || kRowsAtOnce % kTile.n() == 0;
      static_assert(kEven, "rows of filters follow each other in whole steps");
      if (r + kRowsAtOnce > kTile.taps * kTile.n() &&
          r + static_cast<int>(threadIdx.x) / Traits::kPieces >= kTile.taps * kTile.n())
        break;
      const int filter = r % kTile.n();
      const bool there = piece_there && filter < filters_left_;
      ptx::copy_async(to + r * Traits::kPitch, from + (filter * 9 + r / kTile.n()) * channels_, there ? 16 : 0);
    }
  }

  // On to the next slice of channels.
  __device__ void advance() {
    x_ += Traits::kRow, weight_ += Traits::kRow, piece_ += Traits::kPieces;
    odd_ = !odd_;
  }

  // Shared addresses: of the first output pixel's row, as its own centre, and of a step's filters.
  __device__ uint32_t centre() const { return centre_ + (odd_ ? buffer_bytes_ : 0); }
  __device__ uint32_t stage(int step) const { return filters_ + step % kTile.stages * kTile.filter_bytes(); }

 private:
  int pieces_, channels_, piece_, rows_, next_rows_, buffer_bytes_, filters_left_;
  uint32_t centre_, filters_, input_to_, filters_to_, next_to_;
  const T *x_, *weight_, *next_from_;
  bool odd_ = false;
};

// The input that output pixel m sees under the filter's first tap: where it begins, and its coordinates. Pixels past
// the end lie outside of every image.
struct alignas(16) RowInfo {
  int64_t offset;  // in elements
  int row, column;
};

__device__ inline RowInfo row_info(const ConvArgs& a, int m, bool there) {
  const int column = m % a.out_width, row = m / a.out_width % a.out_height, image = m / a.out_width / a.out_height;
  const int top = row * a.stride_h - a.pad_h, left = column * a.stride_w - a.pad_w;
  return {((int64_t{image} * a.height + top) * a.width + left) * a.channels, there ? top : INT32_MIN / 2, left};
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
