// The stem's operands on their way from global into shared memory.
//
// A row of the patch is a row of the input with its channels side by side, as channels_last has it: element 3 x + c is
// channel c of column x. So what a filter row takes for one pixel is 3 * kFilter elements in sequence, and the matrix
// of input pixels is never written down: pixels overlap in it as they do in the image.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stem/conv_bn_relu_pool_plan.h"

namespace resnet_fast::cuda::stem {

// What a block works on: pooled rows from `row` on and pooled pixels from `pixel` on, of one image; the input row and
// the element of it that its patch begins with.
struct Patch {
  int image, row, pixel, top, element;
};

template <typename T>
__device__ Patch patch_of(const StemArgs& a, int unit, bool overlap, int workers) {
  constexpr int kGroup = kStemChannels * Pack<T>::kSize;
  Patch p;
  const int across = unit % a.across;
  p.image = unit / a.across / a.strips;
  p.row = unit / a.across % a.strips * workers * a.rows;
  p.pixel = static_cast<int>(stem_first_pixel(overlap, a.tiles, across));
  p.top = 2 * (2 * p.row - (overlap ? 1 : 0)) - a.pad_h;
  p.element = static_cast<int>(floor_to(kStemChannels * (4 * p.pixel - a.pad_w) - 1 + stem_shift(a), kGroup));
  return p;
}

// One by one, from any strides.
template <typename T>
__device__ void load_elements(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  const int row_elements = a.packs * kStemChannels * Pack<T>::kSize;
  T zero;
  narrow(0.f, zero);
#pragma unroll 2
  for (int i = threadIdx.x; i < a.patch_rows * row_elements; i += kStemThreads) {
    const int row = i / row_elements, at = i % row_elements, y = p.top + row, e = p.element + at - stem_shift(a);
    const bool there = y >= 0 && y < a.height && e >= 0 && e < kStemChannels * a.width;
    const int x = e / kStemChannels, c = e % kStemChannels;
    reinterpret_cast<T*>(patch + row * a.pitch)[at] =
        there ? image[y * a.row_stride + x * a.column_stride + c * a.channel_stride] : zero;
  }
}

// i / a.packs, for i * a.packs below 2^31.
__device__ inline int patch_row(const StemArgs& a, int i) {
  return static_cast<int>(__umulhi(2 * static_cast<uint32_t>(i), static_cast<uint32_t>(a.packs_inverse)));
}

// Whole packs of pixels, as they are.
template <typename T>
__device__ void load_pixels(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  constexpr int kPack = Pack<T>::kSize;
  const int row_packs = a.packs * kStemChannels;
  const uint32_t to = ptx::shared_address(patch);
#pragma unroll 2
  for (int i = threadIdx.x; i < a.patch_rows * row_packs; i += kStemThreads) {
    const int row = patch_row(a, i / kStemChannels), at = i - row * row_packs, y = p.top + row,
              e = p.element + at * kPack;
    const bool there = y >= 0 && y < a.height && e >= 0 && e < kStemChannels * a.width;
    ptx::copy_async(to + row * a.pitch + at * 16, image + (there ? y * a.row_stride + e : 0), there ? 16 : 0);
  }
}

// A pack of each of the three planes at a time, which become three packs of pixels.
template <typename T>
__device__ void load_planes(char* patch, const T* image, const StemArgs& a, const Patch& p) {
  constexpr int kPack = Pack<T>::kSize, kBatch = 2;  // under way at a time
  const int count = a.patch_rows * a.packs, first = p.element / kStemChannels;
  for (int i = threadIdx.x; i < count; i += kBatch * kStemThreads) {
    uint4 planes[kBatch][kStemChannels];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int item = i + b * kStemThreads, row = patch_row(a, item), y = p.top + row,
                x = first + (item - row * a.packs) * kPack;
      const bool there = item < count && y >= 0 && y < a.height && x >= 0 && x < a.width;
      const T* from = image + (there ? y * a.row_stride + x : 0);
#pragma unroll
      for (int c = 0; c < kStemChannels; ++c) planes[b][c] = ptx::load_if(there, from + c * a.channel_stride);
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

// The patch, zeros where it leaves the image; on its way until copy_async_wait and a barrier.
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

// Filters for tensor cores, as they are; on their way until copy_async_wait and a barrier.
template <typename T, int kFilter>
__device__ void load_filters(char* to, const T* weight, const StemArgs& a, int first) {
  constexpr int kPack = Pack<T>::kSize, kElements = kFilter * kFilter * kStemChannels;
  static_assert(16 * kElements % kPack == 0, "filters come in sixteens, and they in packs");
  const int count = min(a.out_channels - first, kStemFilters) * kElements;
  const uint32_t to_address = ptx::shared_address(to);
#pragma unroll
  for (int i = threadIdx.x * kPack; i < kStemFilters * kElements; i += kStemThreads * kPack)
    ptx::copy_async(to_address + i * static_cast<int>(sizeof(T)), weight + (i < count ? first * kElements + i : 0),
                    i < count ? 16 : 0);
}

// Filters for plain products: [element][filter].
template <int kFilter>
__device__ void load_filters(float* to, const float* weight, const StemArgs& a, int first) {
  constexpr int kElements = kFilter * kFilter * kStemChannels;
#pragma unroll 8
  for (int i = threadIdx.x; i < kStemFilters * kElements; i += kStemThreads) {
    const int filter = i / kElements, at = i % kElements;
    to[at * kStemPlainPitch + filter] = first + filter < a.out_channels ? weight[(first + filter) * kElements + at] : 0;
  }
}

}  // namespace resnet_fast::cuda::stem
