// A whole stage of residual blocks in one launch:
//
//   for each block: x = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))
//
// with convolutions of 3x3, the first of stride 1, or of stride 2 with a projection (1x1 and batch norm) as its
// shortcut; before it the network's stem where the stage is the first, behind it average pooling and the linear layer
// where it is the last. A block of threads carries its images through all of it: maps stay in shared memory in the
// type of the images, products of float32 are TF32's, sums in float32 in registers, filters stream through two slots,
// the next slice on its way while one is used. One barrier a slice orders all: maps are written between barriers, from
// registers.
#pragma once

#include "cuda/stage/residual_stage_conv.cuh"
#include "cuda/stage/residual_stage_head.cuh"
#include "cuda/stage/residual_stage_maps.cuh"

namespace resnet_fast::cuda {
namespace stage {

extern __shared__ __align__(128) char shared[];

// The filters of all layers, slice after slice, through two slots.
template <class S>
class Filters {
 public:
  // Starts the copy of the first slice.
  __device__ Filters(const void* from, int slices) : from_(static_cast<const char*>(from)), slices_(slices) {
    if (S::kFirstBytes > 0) {
      copy<S::kFirstBytes>();
      from_ += S::kFirstBytes;
      ++slot_;
    } else {
      request();
    }
    ptx::copy_async_commit();
  }

  // The next slice, once all warps are done with the one before and what they wrote to the maps is visible.
  __device__ const char* next() {
    static_assert(kStageSlots == 2, "one slice in use, one on its way");
    ptx::copy_async_wait<0>();
    __syncthreads();
    const char* slice = slot(slot_ ^ 1);
    if (requested_ < slices_) request();
    ptx::copy_async_commit();
    return slice;
  }

  // What lies behind the last slice, once all are requested.
  __device__ const char* end() const { return from_; }

 private:
  __device__ static char* slot(int i) { return shared + S::kSlots + (i & 1) * S::kSlotBytes; }

  template <int kBytes>
  __device__ void copy() {
    constexpr int kAtOnce = 16 * S::kThreads;
    const uint32_t to = ptx::shared_address(slot(slot_)) + 16 * threadIdx.x;
    const char* from = from_ + 16 * threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBytes; i += kAtOnce)
      if (i + kAtOnce <= kBytes || i + 16 * static_cast<int>(threadIdx.x) < kBytes) ptx::copy_async(to + i, from + i);
  }

  // Always with the bytes where scale and shift may lie: what is there else belongs to the next slice.
  __device__ void request() {
    copy<S::kSlotBytes>();
    from_ += S::kSliceBytes + (S::ends_layer(requested_) ? S::kVectorBytes : 0);
    ++requested_;
    ++slot_;
  }

  const char* from_;
  int slices_, requested_ = 0, slot_ = 0;
};

// A convolution of the stage's own shape. Returns its scale and shift.
template <class S, typename T>
__device__ const float* convolve(Sums<S>& sums, const char* map, Filters<S>& filters, const Part<S>& part) {
  clear<S>(sums);
  uint32_t mine = ptx::shared_address(map) + lane_offset<S>(part);
  const char* slice = nullptr;
#pragma unroll 1
  for (int step = 0; step < S::kSteps; ++step) {
    slice = filters.next();
    multiply_slice<S, T, 1>(sums, mine, slice, part);
    mine += S::kPairBytes;
  }
  return reinterpret_cast<const float*>(slice + S::kSliceBytes);
}

// The strided block's projection into x, and its first convolution into middle, where their input lies.
template <class S, typename T>
__device__ void enter_strided(char* x, char* middle, Filters<S>& filters, const Part<S>& part) {
  Sums<S> sums;
  const uint32_t mine = ptx::shared_address(middle) + strided_lane_offset<S>(part);
  clear<S>(sums);
  const char* slice = filters.next();
#pragma unroll
  for (int step = 0; step < S::kInSteps; ++step)
    multiply_projection<S, T>(sums, mine + step * S::kInPairBytes, slice, step, part);
  write_sums<S, T, false, false>(sums, x, reinterpret_cast<const float*>(slice + S::kProjectionBytes), part);

  clear<S>(sums);
#pragma unroll 1
  for (int step = 0; step < S::kInSteps; ++step) {
    slice = filters.next();
    multiply_slice<S, T, 2>(sums, mine + step * S::kInPairBytes, slice, part);
  }
  __syncthreads();  // nobody reads the input any more
  write_sums<S, T, false, true>(sums, middle, reinterpret_cast<const float*>(slice + S::kSliceBytes), part);
}

// The stem, from the image in middle into x.
template <class S, typename T>
__device__ void enter_stem(char* x, const char* middle, Filters<S>& filters, const Part<S>& part) {
  Sums<S> sums;
  clear<S>(sums);
  const char* slice = filters.next();
  multiply_stem<S, T>(sums, middle, slice, part);
  write_sums<S, T, false, true>(sums, x, reinterpret_cast<const float*>(slice + S::kStemBytes), part);
  __syncthreads();  // nobody reads the image any more
}

}  // namespace stage

// x: [images, kSize, kSize, kChannels], or [images, 2 kSize, 2 kSize, kChannels / 2], or images of three channels,
// dense, by pixel or (channels_last) by channel. filters: the slices, then the linear layer's weight and bias. y: the
// stage's map, or where classes > 0 the logits, [images, classes]. All of them aligned to 16 bytes.
template <typename T, class S>
__device__ void residual_stage(const T* __restrict__ x, const void* __restrict__ filters, T* __restrict__ y,
                               int64_t images, int blocks, int classes, bool channels_last) {
  using namespace stage;
  constexpr int64_t kMap = int64_t{S::kSize} * S::kSize * S::kChannels;
  constexpr int64_t kInput = S::kEntry == Entry::kStem      ? int64_t{3} * S::kSize * S::kSize
                             : S::kEntry == Entry::kStrided ? 2 * kMap
                                                            : kMap;
  const int64_t first = int64_t{blockIdx.x} * S::kImages;
  char* const maps = shared;
  char* const middles = shared + S::kMiddle;

#pragma unroll 1
  for (int i = 0; i < S::kImages; ++i) {
    const bool present = first + i < images;
    const T* from = x + (present ? first + i : 0) * kInput;
    char *map = maps + i * S::kMapBytes, *middle = middles + i * S::kMiddleBytes;
    if constexpr (S::kEntry == Entry::kStem) {
      copy_image<S>(middle, from, present);
      zero_image<S>(middle);
    }
    if constexpr (S::kEntry == Entry::kStrided) copy_strided_map<S>(middle, from, present);
    if constexpr (S::kEntry == Entry::kMap) copy_map<S>(map, from, present);
    zero_border<S>(map);
    if constexpr (S::kEntry == Entry::kMap) zero_border<S>(middle);
    if constexpr (S::kEntry == Entry::kStrided) zero_strided_border<S>(middle);
  }
  Filters<S> stream(filters, S::slices(blocks));

  const Part<S> part;
  char* const map = maps + part.image * S::kMapBytes;
  char* const middle = middles + part.image * S::kMiddleBytes;
  if constexpr (S::kEntry == Entry::kStem) {
    ptx::copy_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < S::kImages; ++i) spread_image<S>(middles + i * S::kMiddleBytes, channels_last);
    enter_stem<S, T>(map, middle, stream, part);
  }
  if constexpr (S::kEntry == Entry::kStrided) enter_strided<S, T>(map, middle, stream, part);
  if constexpr (S::kEntry != Entry::kMap) {
    // The input lay where zeros belong.
#pragma unroll 1
    for (int i = 0; i < S::kImages; ++i) zero_border<S>(middles + i * S::kMiddleBytes);
  }

  Sums<S> sums;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    if (S::kEntry != Entry::kStrided || block > 0) {
      const float* vectors = convolve<S, T>(sums, map, stream, part);
      write_sums<S, T, false, true>(sums, middle, vectors, part);
    }
    const float* vectors = convolve<S, T>(sums, middle, stream, part);
    write_sums<S, T, true, true>(sums, map, vectors, part);
  }
  __syncthreads();

#pragma unroll 1
  for (int i = 0; i < S::kImages; ++i) {
    if (first + i >= images) break;
    const char* result = maps + i * S::kMapBytes;
    if (classes == 0) {
      store_map<S>(y + (first + i) * kMap, result);
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
