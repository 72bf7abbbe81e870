// y = flatten(avg_pool2d(x, window, stride), 1), x in channels_last. y is the matrix that a linear layer reads, the
// output pixels of a channel contiguous, as torch flattens. Pooling in channels_last and flattening afterwards would
// copy.
//
// A block computes a chunk of the channels of one image. Adjacent threads read adjacent 16-byte packs of a pixel. Where
// the output has few pixels, several threads split a window. Partial sums in float32 meet in shared memory and are
// added in a fixed order.
#pragma once

#include "cuda/elements.cuh"

namespace resnet_fast::cuda {

constexpr int kAvgThreads = 256, kAvgPacks = 8;  // threads of a block, and those that read one pixel

// Windows have no padding and lie inside the image.
struct AvgPoolArgs {
  int32_t channels, height, width, kernel_h, kernel_w, stride_h, stride_w, out_height, out_width, chunks;
};

// Channels of a chunk.
constexpr int avg_channels(int element_size) { return kAvgPacks * 16 / element_size; }

// x: [images, height, width, channels], aligned to 16 bytes; y: [images, channels, out_height, out_width]. One block
// per chunk of an image.
template <typename T>
__global__ void __launch_bounds__(kAvgThreads)
    avg_pool_flatten_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ AvgPoolArgs a) {
  constexpr int kPack = Pack<T>::kSize, kChannels = avg_channels(sizeof(T)), kSlots = kAvgThreads / kAvgPacks;
  constexpr int kPitch = kChannels + 4;  // rows begin in different banks
  __shared__ __align__(16) float partial[kSlots * kPitch];

  const int64_t image = blockIdx.x / a.chunks;
  const int first = blockIdx.x % a.chunks * kChannels, channels = min(kChannels, a.channels - first);
  const int at = threadIdx.x % kAvgPacks * kPack, slot = threadIdx.x / kAvgPacks;
  const int pixels = a.out_height * a.out_width, window = a.kernel_h * a.kernel_w;
  const int splits = min(window, max(1, kSlots / pixels)), pixels_at_once = kSlots / splits;
  x += image * a.height * a.width * a.channels + first + at;
  y += (image * a.channels + first) * pixels;

  for (int begin = 0; begin < pixels; begin += pixels_at_once) {
    const int count = min(pixels_at_once, pixels - begin), pixel = begin + slot % count, split = slot / count;
    if (split < splits && at < channels) {
      const int top = pixel / a.out_width * a.stride_h, left = pixel % a.out_width * a.stride_w;
      float acc[kPack] = {};
      for (int k = split; k < window; k += splits) {
        const int64_t input_pixel = int64_t{top + k / a.kernel_w} * a.width + left + k % a.kernel_w;
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + input_pixel * a.channels);
#pragma unroll
        for (int i = 0; i < kPack; ++i) acc[i] += widen(v.value[i]);
      }
#pragma unroll
      for (int i = 0; i < kPack; i += 4)
        *reinterpret_cast<float4*>(partial + slot * kPitch + at + i) = {acc[i], acc[i + 1], acc[i + 2], acc[i + 3]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels * count; i += kAvgThreads) {
      const int channel = i / count, local = i % count;
      float acc = 0;
      for (int p = 0; p < splits; ++p) acc += partial[(p * count + local) * kPitch + channel];
      narrow(acc / window, y[channel * pixels + begin + local]);
    }
    __syncthreads();
  }
}

}  // namespace resnet_fast::cuda
