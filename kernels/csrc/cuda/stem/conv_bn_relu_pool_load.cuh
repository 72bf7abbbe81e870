// Loads the stem's operands from global into shared memory.
//
// A row of the patch is an input row in channels_last order: element 3 x + c is channel c of column x. A filter row
// then covers 3 * kFilter contiguous elements, and the im2col matrix is never materialised: its rows overlap in the
// patch as they do in the image.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stem/conv_bn_relu_pool_plan.h"

namespace resnet_fast::cuda::stem {

// A block's share of an image: pooled rows from `row` on, pooled pixels from `pixel` on; its input patch begins at
// element `element` of input row `top`.
struct Patch {
  int image, row, pixel, top, element;
};

template <typename T>
__device__ Patch patch_of(const StemArgs& a, int patch_index, bool overlap, int workers) {
  constexpr int kGroup = kStemChannels * Pack<T>::kSize;
  Patch p;
  const int across = patch_index % a.across;
  p.image = patch_index / a.across / a.strips;
  p.row = patch_index / a.across % a.strips * workers * a.rows;
  p.pixel = static_cast<int>(stem_first_pixel(overlap, a.tiles, across));
  p.top = 2 * (2 * p.row - (overlap ? 1 : 0)) - a.pad_h;
  p.element = static_cast<int>(floor_to(kStemChannels * (4 * p.pixel - a.pad_w) - 1 + stem_shift(a), kGroup));
  return p;
}

// Element by element: any strides.
template <typename T>
__device__ void load_elements(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  const int row_elements = a.packs * kStemChannels * Pack<T>::kSize;
  T zero;
  narrow(0.f, zero);
#pragma unroll 2
  for (int i = threadIdx.x; i < a.patch_rows * row_elements; i += kStemThreads) {
    const int row = i / row_elements, at = i % row_elements, y = p.top + row, e = p.element + at - stem_shift(a);
    const bool valid = y >= 0 && y < a.height && e >= 0 && e < kStemChannels * a.width;
    const int x = e / kStemChannels, c = e % kStemChannels;
    reinterpret_cast<T*>(patch + row * a.pitch)[at] =
        valid ? image[y * a.row_stride + x * a.column_stride + c * a.channel_stride] : zero;
  }
}

// i / a.packs, for i * a.packs below 2^31.
__device__ inline int patch_row(const StemArgs& a, int i) {
  return static_cast<int>(__umulhi(2 * static_cast<uint32_t>(i), static_cast<uint32_t>(a.packs_inverse)));
}

// channels_last: packs of pixels are copied as they are.
template <typename T>
__device__ void load_pixels(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  constexpr int kPack = Pack<T>::kSize;
  const int row_packs = a.packs * kStemChannels;
  const uint32_t to = ptx::smem_address(patch);
#pragma unroll 2
  for (int i = threadIdx.x; i < a.patch_rows * row_packs; i += kStemThreads) {
    const int row = patch_row(a, i / kStemChannels), at = i - row * row_packs, y = p.top + row,
              e = p.element + at * kPack;
    const bool valid = y >= 0 && y < a.height && e >= 0 && e < kStemChannels * a.width;
    ptx::cp_async(to + row * a.pitch + at * 16, image + (valid ? y * a.row_stride + e : 0), valid ? 16 : 0);
  }
}

// NCHW: one pack of each of the three planes becomes three packs of pixels.
template <typename T>
__device__ void load_planes(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  constexpr int kPack = Pack<T>::kSize, kBatch = 2;  // loads in flight
  const int count = a.patch_rows * a.packs, first = p.element / kStemChannels;
  for (int i = threadIdx.x; i < count; i += kBatch * kStemThreads) {
    uint4 planes[kBatch][kStemChannels];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int item = i + b * kStemThreads, row = patch_row(a, item), y = p.top + row,
                x = first + (item - row * a.packs) * kPack;
      const bool valid = item < count && y >= 0 && y < a.height && x >= 0 && x < a.width;
      const T* from = image + (valid ? y * a.row_stride + x : 0);
#pragma unroll
      for (int c = 0; c < kStemChannels; ++c) planes[b][c] = ptx::load_predicated(valid, from + c * a.channel_stride);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int item = i + b * kStemThreads;
      if (item >= count) break;
      Pack<T> pixels[kStemChannels];
#pragma unroll
      for (int e = 0; e < kStemChannels * kPack; ++e) {
        const Pack<T>& plane = reinterpret_cast<const Pack<T>&>(planes[b][e % kStemChannels]);
        pixels[e / kPack].value[e % kPack] = plane.value[e / kStemChannels];
      }
      const int row = patch_row(a, item);
      auto* to = reinterpret_cast<Pack<T>*>(patch + row * a.pitch) + (item - row * a.packs) * kStemChannels;
#pragma unroll
      for (int c = 0; c < kStemChannels; ++c) to[c] = pixels[c];
    }
  }
}

// Loads the patch, zeros outside the image. Complete after cp_async_wait and a barrier.
template <typename T>
__device__ void load_patch(char* patch, const T* x, const StemArgs& a, const Patch& p) {
  const T* image = x + p.image * a.image_stride;
  if (a.load == kStemPixels)
    load_pixels(patch, image, a, p);
  else if (a.load == kStemPlanes)
    load_planes(patch, image, a, p);
  else
    load_elements(patch, image, a, p);
}

// Loads filters for tensor cores as they are. Complete after cp_async_wait and a barrier.
template <typename T, int kFilter>
__device__ void load_filters(char* to, const T* weight, const StemArgs& a, int first) {
  constexpr int kPack = Pack<T>::kSize, kElements = kFilter * kFilter * kStemChannels;
  static_assert(16 * kElements % kPack == 0, "16 filters are whole packs");
  const int count = min(a.out_channels - first, kStemFilters) * kElements;
  const uint32_t to_address = ptx::smem_address(to);
#pragma unroll
  for (int i = threadIdx.x * kPack; i < kStemFilters * kElements; i += kStemThreads * kPack)
    ptx::cp_async(to_address + i * static_cast<int>(sizeof(T)), weight + (i < count ? first * kElements + i : 0),
                  i < count ? 16 : 0);
}

// Loads filters for SIMT, transposed to [element][filter].
template <int kFilter>
__device__ void load_filters(float* to, const float* weight, const StemArgs& a, int first) {
  constexpr int kElements = kFilter * kFilter * kStemChannels;
#pragma unroll 8
  for (int i = threadIdx.x; i < kStemFilters * kElements; i += kStemThreads) {
    const int filter = i / kElements, at = i % kElements;
    to[at * kStemSimtPitch + filter] = first + filter < a.out_channels ? weight[(first + filter) * kElements + at] : 0;
  }
}

}  // namespace resnet_fast::cuda::stem
