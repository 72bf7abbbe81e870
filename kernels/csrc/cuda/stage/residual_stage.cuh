// A whole stage of residual blocks in one launch:
//
//   for each block: x = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))
//
// with 3x3 convolutions. The first block has stride 1, or stride 2 with a projection (1x1 and batch norm) as its
// shortcut. The first stage begins with the network's stem; the last ends with average pooling and the linear layer. A
// thread block carries its images through all of it. Activations stay in shared memory in the images' type; float32 is
// multiplied as TF32; accumulators are float32 in registers. Filters stream through two slots: one slice is in use
// while the next arrives. One barrier per slice orders everything: activations are stored from registers between
// barriers.
#pragma once

#include "cuda/stage/residual_stage_activations.cuh"
#include "cuda/stage/residual_stage_conv.cuh"
#include "cuda/stage/residual_stage_head.cuh"

namespace resnet_fast::cuda {
namespace stage {

extern __shared__ __align__(128) char shared[];

// Streams the filters of all layers through two slots, slice by slice.
template <class S>
class FilterStream {
 public:
  // Starts copying the first slice.
  __device__ FilterStream(const void* from, int slices) : from_(static_cast<const char*>(from)), slices_(slices) {
    if (S::kFirstBytes > 0) {
      copy<S::kFirstBytes>();
      from_ += S::kFirstBytes;
      ++slot_;
    } else {
      request();
    }
    ptx::cp_async_commit();
  }

  // Waits for the next slice, and for all warps: they are done with the slice before, and their stores are visible.
  __device__ const char* next() {
    static_assert(kStageSlots == 2, "one slice in use, one on its way");
    ptx::cp_async_wait<0>();
    __syncthreads();
    const char* slice = slot(slot_ ^ 1);
    if (requested_ < slices_) request();
    ptx::cp_async_commit();
    return slice;
  }

  // What follows the last slice; call it after all slices are requested.
  __device__ const char* end() const { return from_; }

 private:
  __device__ static char* slot(int i) { return shared + S::kSlotsOffset + (i & 1) * S::kSlotBytes; }

  template <int kBytes>
  __device__ void copy() {
    constexpr int kAtOnce = 16 * S::kThreads;
    const uint32_t to = ptx::smem_address(slot(slot_)) + 16 * threadIdx.x;
    const char* from = from_ + 16 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBytes; i += kAtOnce)
      if (i + kAtOnce <= kBytes || i + 16 * static_cast<int>(threadIdx.x) < kBytes) ptx::cp_async(to + i, from + i);
  }

  // Copies a slice and the bytes behind it, which are scale and shift or the beginning of the next slice.
  __device__ void request() {
    copy<S::kSlotBytes>();
    from_ += S::kSliceBytes + (S::ends_layer(requested_) ? S::kScaleShiftBytes : 0);
    ++requested_;
    ++slot_;
  }

  const char* from_;
  int slices_, requested_ = 0, slot_ = 0;
};

// One convolution of the stage's shape into acc. Returns its scale and shift.
template <class S, typename T>
__device__ const float* convolve(Acc<S>& acc, const char* activation, FilterStream<S>& filters,
                                 const WarpTile<S>& warp) {
  zero_acc<S>(acc);
  uint32_t lane_address = ptx::smem_address(activation) + lane_offset<S>(warp);
  const char* slice = nullptr;
#pragma unroll 1
  for (int step = 0; step < S::kSteps; ++step) {
    slice = filters.next();
    mma_slice<S, T, 1>(acc, lane_address, slice, warp);
    lane_address += S::kPairBytes;
  }
  return reinterpret_cast<const float*>(slice + S::kSliceBytes);
}

// The strided block's projection into x and first convolution into middle, which holds the input of both.
template <class S, typename T>
__device__ void enter_strided(char* x, char* middle, FilterStream<S>& filters, const WarpTile<S>& warp) {
  Acc<S> acc;
  const uint32_t lane_address = ptx::smem_address(middle) + strided_lane_offset<S>(warp);
  zero_acc<S>(acc);
  const char* slice = filters.next();
#pragma unroll
  for (int step = 0; step < S::kInSteps; ++step)
    mma_projection<S, T>(acc, lane_address + step * S::kInPairBytes, slice, step, warp);
  finalize<S, T, false, false>(acc, x, reinterpret_cast<const float*>(slice + S::kProjectionBytes), warp);

  zero_acc<S>(acc);
#pragma unroll 1
  for (int step = 0; step < S::kInSteps; ++step) {
    slice = filters.next();
    mma_slice<S, T, 2>(acc, lane_address + step * S::kInPairBytes, slice, warp);
  }
  __syncthreads();  // no warp still reads the input
  finalize<S, T, false, true>(acc, middle, reinterpret_cast<const float*>(slice + S::kSliceBytes), warp);
}

// The stem, from the image in middle into x.
template <class S, typename T>
__device__ void enter_stem(char* x, const char* middle, FilterStream<S>& filters, const WarpTile<S>& warp) {
  Acc<S> acc;
  zero_acc<S>(acc);
  const char* slice = filters.next();
  mma_stem<S, T>(acc, middle, slice, warp);
  finalize<S, T, false, true>(acc, x, reinterpret_cast<const float*>(slice + S::kStemBytes), warp);
  __syncthreads();  // no warp still reads the image
}

}  // namespace stage

// x: by entry, [images, kSize, kSize, kChannels], [images, 2 kSize, 2 kSize, kChannels / 2], or images of three
// channels, NCHW or channels_last. filters: the slices, then the linear layer's weight and bias. y: the stage's output
// or, if classes > 0, the logits, [images, classes]. All are dense and aligned to 16 bytes.
template <typename T, class S>
__device__ void residual_stage(const T* __restrict__ x, const void* __restrict__ filters, T* __restrict__ y,
                               int64_t images, int blocks, int classes, bool channels_last) {
  using namespace stage;
  constexpr int64_t kActivation = int64_t{S::kSize} * S::kSize * S::kChannels;
  constexpr int64_t kInput = S::kEntry == Entry::kStem      ? int64_t{3} * S::kSize * S::kSize
                             : S::kEntry == Entry::kStrided ? 2 * kActivation
                                                            : kActivation;
  const int64_t first = int64_t{blockIdx.x} * S::kImages;
  char* const activations = shared;
  char* const middles = shared + S::kMiddleOffset;

#pragma unroll 1
  for (int i = 0; i < S::kImages; ++i) {
    const bool present = first + i < images;
    const T* from = x + (present ? first + i : 0) * kInput;
    char *activation = activations + i * S::kActivationBytes, *middle = middles + i * S::kMiddleBytes;
    if constexpr (S::kEntry == Entry::kStem) {
      load_image<S>(middle, from, present);
      zero_image<S>(middle);
    }
    if constexpr (S::kEntry == Entry::kStrided) load_strided_activation<S>(middle, from, present);
    if constexpr (S::kEntry == Entry::kMap) load_activation<S>(activation, from, present);
    zero_border<S>(activation);
    if constexpr (S::kEntry == Entry::kMap) zero_border<S>(middle);
    if constexpr (S::kEntry == Entry::kStrided) zero_strided_border<S>(middle);
  }
  FilterStream<S> stream(filters, S::slices(blocks));

  const WarpTile<S> warp;
  char* const activation = activations + warp.image * S::kActivationBytes;
  char* const middle = middles + warp.image * S::kMiddleBytes;
  if constexpr (S::kEntry == Entry::kStem) {
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < S::kImages; ++i) unpack_image<S>(middles + i * S::kMiddleBytes, channels_last);
    enter_stem<S, T>(activation, middle, stream, warp);
  }
  if constexpr (S::kEntry == Entry::kStrided) enter_strided<S, T>(activation, middle, stream, warp);
  if constexpr (S::kEntry != Entry::kMap) {
    // The input overwrote the padding.
#pragma unroll 1
    for (int i = 0; i < S::kImages; ++i) zero_border<S>(middles + i * S::kMiddleBytes);
  }

  Acc<S> acc;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    if (S::kEntry != Entry::kStrided || block > 0) {
      const float* scale_shift = convolve<S, T>(acc, activation, stream, warp);
      finalize<S, T, false, true>(acc, middle, scale_shift, warp);
    }
    const float* scale_shift = convolve<S, T>(acc, middle, stream, warp);
    finalize<S, T, true, true>(acc, activation, scale_shift, warp);
  }
  __syncthreads();

#pragma unroll 1
  for (int i = 0; i < S::kImages; ++i) {
    if (first + i >= images) break;
    const char* result = activations + i * S::kActivationBytes;
    if (classes == 0) {
      store_activation<S>(y + (first + i) * kActivation, result);
    } else if constexpr (S::kSize == 8) {
      float* means = reinterpret_cast<float*>(middles);
      average<S, T>(means, means + S::kChannels, result);
      const T* weight = reinterpret_cast<const T*>(stream.end());
      const float* bias = reinterpret_cast<const float*>(weight + classes * S::kChannels);
      classify<S>(y + (first + i) * classes, means, weight, bias, classes);
      __syncthreads();
    }
  }
}

}  // namespace resnet_fast::cuda
