// Loads the operands of the convolution from global into shared memory: a class for each Load of conv_plan.h.
//
// A row is tile.row_bytes of channels of one pixel or one filter, a vector 16 bytes of it. Whatever lies outside the
// input or the filters becomes zero.
#pragma once

#include "cuda/conv/conv_plan.h"
#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"

namespace resnet_fast::cuda {

// Output tile of a thread block: pixels first .. first + rows - 1, channels from `channel` on, over the k blocks begin
// .. end - 1.
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
  static constexpr int kRowVectors = kTile.row_bytes / 16;
  static_assert(kThreads % kRowVectors == 0, "a thread keeps its vector of a row");
};

// The input under a run of output pixels is a run itself, since images follow each other in memory, and a tap is a
// fixed offset in it. So a block copies one contiguous range. Where a tap leaves its image, the range holds some other
// pixel: readers take a row of zeros instead.
//
// Loops over steps are unrolled, so that stages and taps are constants and addresses only ever increase.
template <typename T, int kIndex>
class HaloLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kRowVectors;

 public:
  static constexpr int kSteps = 9 / kTile.taps;  // of one channel slice
  static_assert(kSteps % kTile.stages == 0, "a step always finds its filters in the same stage");
  // The next channel slice is copied during these steps of the current one: its buffer is free from the first step on,
  // and copies must be `stages` - 1 steps old when used.
  static constexpr int kSlices = kSteps - kTile.stages + 2;
  // Rows that a thread copies per step, for images up to 48 pixels wide. The last step copies the rest of wider ones.
  static constexpr int kCopies = (kTile.m() + 2 * 48 + kRowsAtOnce * kSlices - 1) / (kRowsAtOnce * kSlices);

  __device__ HaloLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, uint32_t shared)
      : vectors_(a.channels / Traits::kPack), channels_(a.channels) {
    // Pixel numbers fit 32 bits, as in the output; offsets may not.
    const int image = a.height * a.width, last = block.first + block.rows - 1;
    const int before = min(a.width + 1, block.first % image), after = min(a.width + 1, image - 1 - last % image);
    const int low = block.first - before;
    const int row = threadIdx.x / Traits::kRowVectors, vector = threadIdx.x % Traits::kRowVectors;
    rows_ = before + block.rows + after - row;
    buffer_bytes_ = static_cast<int>(input_rows(kTile, a)) * Traits::kPitch;
    const uint32_t input = shared + kZeroRowBytes;
    const uint32_t filters = input + buffer_bytes_ * static_cast<int>(input_buffers(kTile, a));
    centre_ = input + before * Traits::kPitch;
    filters_ = filters;
    input_to_ = input + row * Traits::kPitch + vector * 16;
    filters_to_ = filters + row * Traits::kPitch + vector * 16;

    vector_ = block.begin * Traits::kRowVectors + vector;
    x_ = x + int64_t{low + row} * a.channels + vector_ * Traits::kPack;
    const int filter = block.channel + row % kTile.n();
    weight_ = weight + (int64_t{filter} * 9 + row / kTile.n()) * a.channels + vector_ * Traits::kPack;
    filters_left_ = a.out_channels - filter;
  }

  // Copies the first channel slice.
  __device__ void load_first_input() {
    const T* from = x_;
    uint32_t to = input_to_;
    for (int row = 0; row < rows_; row += kRowsAtOnce) {
      ptx::cp_async(to, from, vector_ < vectors_ ? 16 : 0);
      from += int64_t{kRowsAtOnce} * channels_, to += kRowsAtOnce * Traits::kPitch;
    }
  }

  // Copies part `step` of the next channel slice into the other buffer.
  __device__ void load_next_input(int step) {
    if (step == 0) {
      next_to_ = input_to_ + (odd_ ? 0 : buffer_bytes_);
      next_from_ = x_ + Traits::kRow;
      next_rows_ = rows_;
    }
    const uint32_t bytes = vector_ + Traits::kRowVectors < vectors_ ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * kRowsAtOnce < next_rows_) ptx::cp_async(next_to_ + i * kRowsAtOnce * Traits::kPitch, next_from_, bytes);
      next_from_ += int64_t{kRowsAtOnce} * channels_;
    }
    next_to_ += kCopies * kRowsAtOnce * Traits::kPitch;
    next_rows_ -= kCopies * kRowsAtOnce;
    if (step == kSlices - 1) {
#pragma unroll 1
      for (; next_rows_ > 0; next_rows_ -= kRowsAtOnce) {
        ptx::cp_async(next_to_, next_from_, bytes);
        next_from_ += int64_t{kRowsAtOnce} * channels_, next_to_ += kRowsAtOnce * Traits::kPitch;
      }
    }
  }

  // Copies the filters of `step` of this channel slice or, from kSteps on, of the next.
  __device__ void load_filters(int step) {
    const int k_block = step / kSteps, tap = step % kSteps * kTile.taps;
    const T* from = weight_ + (k_block * Traits::kRow + tap * channels_);
    const uint32_t to = filters_to_ + step % kTile.stages * kTile.filter_bytes();
    const bool vector_valid = vector_ + k_block * Traits::kRowVectors < vectors_;
#pragma unroll
    for (int r = 0; r < kTile.taps * kTile.n(); r += kRowsAtOnce) {
      // Row r of the step is filter r % n under tap r / n; weight_ includes this thread's row.
      constexpr bool kEven = kTile.n() % kRowsAtOnce == 0 || kRowsAtOnce % kTile.n() == 0;
      static_assert(kEven, "copies divide the rows of filters evenly");
      if (r + kRowsAtOnce > kTile.taps * kTile.n() &&
          r + static_cast<int>(threadIdx.x) / Traits::kRowVectors >= kTile.taps * kTile.n())
        break;
      const int filter = r % kTile.n();
      const bool valid = vector_valid && filter < filters_left_;
      ptx::cp_async(to + r * Traits::kPitch, from + (filter * 9 + r / kTile.n()) * channels_, valid ? 16 : 0);
    }
  }

  // Moves on to the next channel slice.
  __device__ void advance_k_block() {
    x_ += Traits::kRow, weight_ += Traits::kRow, vector_ += Traits::kRowVectors;
    odd_ = !odd_;
  }

  // Shared addresses: of the first output pixel under the middle tap, and of a step's filters.
  __device__ uint32_t centre() const { return centre_ + (odd_ ? buffer_bytes_ : 0); }
  __device__ uint32_t stage(int step) const { return filters_ + step % kTile.stages * kTile.filter_bytes(); }

 private:
  int vectors_, channels_, vector_, rows_, next_rows_, buffer_bytes_, filters_left_;
  uint32_t centre_, filters_, input_to_, filters_to_, next_to_;
  const T *x_, *weight_, *next_from_;
  bool odd_ = false;
};

// The input of an output pixel under the first tap: offset and coordinates. If not valid, it lies outside the image.
struct alignas(16) RowInfo {
  int64_t offset;  // in elements
  int row, column;
};

__device__ inline RowInfo row_info(const ConvArgs& a, int m, bool valid) {
  const int column = m % a.out_width, row = m / a.out_width % a.out_height, image = m / a.out_width / a.out_height;
  const int top = row * a.stride_h - a.pad_h, left = column * a.stride_w - a.pad_w;
  return {((int64_t{image} * a.height + top) * a.width + left) * a.channels, valid ? top : INT32_MIN / 2, left};
}

// K runs over taps, then channels, a row a step. A thread loads the same vector of all its rows, so it walks taps and
// channels once.
template <typename T, int kIndex>
class GatherLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kRowVectors;
  static constexpr int kRows = kTile.m() / kRowsAtOnce;
  static_assert(kTile.m() % kRowsAtOnce == 0, "threads share the rows evenly");

 public:
  __device__ GatherLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, uint32_t shared)
      : x_(x), height_(a.height), width_(a.width), channels_(a.channels), kernel_w_(a.kernel_w) {
    row_ = threadIdx.x / Traits::kRowVectors;
    const int vector = threadIdx.x % Traits::kRowVectors;
    total_ = a.kernel_h * a.kernel_w * a.channels;
    at_ = block.begin * Traits::kRow + vector * Traits::kPack;
    const int tap = at_ / a.channels;
    c_ = at_ % a.channels, r_ = tap / a.kernel_w, s_ = tap % a.kernel_w;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_ + i * kRowsAtOnce;
      info_[i] = row_info(a, block.first + row, row < block.rows);
    }
    to_ = shared + kZeroRowBytes + row_ * Traits::kPitch + vector * 16;
    filter_ = block.channel + row_;
    out_channels_ = a.out_channels;
    weight_ = weight + int64_t{filter_} * total_;
  }

  // Copies both operands of the next k step.
  __device__ void load_step(int stage) {
    const uint32_t to = to_ + stage * kStageBytes;
    const bool inside = at_ < total_;
    const int64_t tap = (int64_t{r_} * width_ + s_) * channels_ + c_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool valid = inside && static_cast<unsigned>(info_[i].row + r_) < static_cast<unsigned>(height_) &&
                         static_cast<unsigned>(info_[i].column + s_) < static_cast<unsigned>(width_);
      ptx::cp_async(to + i * kRowsAtOnce * Traits::kPitch, x_ + (info_[i].offset + tap), valid ? 16 : 0);
    }
#pragma unroll
    for (int r = 0; r < kTile.n(); r += kRowsAtOnce) {
      if (kTile.n() % kRowsAtOnce != 0 && row_ + r >= kTile.n()) break;
      const bool valid = inside && filter_ + r < out_channels_;
      ptx::cp_async(to + (kTile.m() + r) * Traits::kPitch, weight_ + (int64_t{r} * total_ + at_), valid ? 16 : 0);
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

// The same element by element, through registers: any alignment.
template <typename T, int kIndex>
class ScalarLoad {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kRowsAtOnce = Traits::kThreads / Traits::kRow;
  static_assert(Traits::kThreads % Traits::kRow == 0 && kTile.m() % kRowsAtOnce == 0 && kTile.n() % kRowsAtOnce == 0,
                "threads share the rows evenly");

 public:
  __device__ ScalarLoad(const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block, unsigned char* shared)
      : x_(x), weight_(weight), height_(a.height), width_(a.width), channels_(a.channels), kernel_w_(a.kernel_w) {
    total_ = a.kernel_h * a.kernel_w * a.channels;
    at_ = block.begin * Traits::kRow + threadIdx.x % Traits::kRow;
    row_ = threadIdx.x / Traits::kRow;
    channel_ = block.channel, out_channels_ = a.out_channels;
    to_ = shared + kZeroRowBytes + row_ * Traits::kPitch + threadIdx.x % Traits::kRow * sizeof(T);
    info_ = reinterpret_cast<RowInfo*>(shared + kZeroRowBytes + kTile.stages * kStageBytes);
    for (int row = threadIdx.x; row < kTile.m(); row += Traits::kThreads)
      info_[row] = row_info(a, block.first + row, row < block.rows);
    __syncthreads();
  }

  __device__ void load_step(int stage) {
    unsigned char* to = to_ + stage * kStageBytes;
    const bool inside = at_ < total_;
    const int tap = at_ / channels_, r = tap / kernel_w_, s = tap % kernel_w_;
    const int64_t offset = (int64_t{r} * width_ + s) * channels_ + at_ % channels_;
    T zero;
    narrow(0.f, zero);
#pragma unroll 8
    for (int row = 0; row < kTile.m(); row += kRowsAtOnce) {
      const RowInfo info = info_[row_ + row];
      const bool valid = inside && static_cast<unsigned>(info.row + r) < static_cast<unsigned>(height_) &&
                         static_cast<unsigned>(info.column + s) < static_cast<unsigned>(width_);
      *reinterpret_cast<T*>(to + row * Traits::kPitch) = valid ? x_[info.offset + offset] : zero;
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
