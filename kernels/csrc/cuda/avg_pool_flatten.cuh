// y = flatten(avg_pool2d(x, window, stride), 1): x in channels_last, y the matrix that a linear layer reads, with the
// cells of a channel side by side, as torch flattens. By itself, pooling would leave channels side by side, and
// flattening would copy.
//
// A block computes some channels of one image. Threads side by side read 16 bytes of a pixel each; where an image has
// few cells, several threads share a window. Sums are float32 and meet in shared memory, in a fixed order.
#pragma once

#include "cuda/elements.cuh"

namespace resnet_fast::cuda {

constexpr int kAvgThreads = 256, kAvgPacks = 8;  // threads of a block, and those side by side

// Windows have no padding and lie inside of the image.
struct AvgPoolArgs {
  int32_t channels, height, width, kernel_h, kernel_w, stride_h, stride_w, out_height, out_width, chunks;
};

// Channels of a block.
constexpr int avg_channels(int element_size) { return kAvgPacks * 16 / element_size; }

// x: [images, height, width, channels], packs of 16 bytes; y: [images, channels, out_height, out_width]. A block for
// each chunk of channels of each image.
template <typename T>
__global__ void __launch_bounds__(kAvgThreads)
    avg_pool_flatten_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ AvgPoolArgs a) {
  constexpr int kPack = Pack<T>::kSize, kChannels = avg_channels(sizeof(T)), kSums = kAvgThreads / kAvgPacks;
  constexpr int kPitch = kChannels + 4;  // cells lie in different banks
  __shared__ __align__(16) float sums[kSums * kPitch];

  const int64_t image = blockIdx.x / a.chunks;
  const int first = blockIdx.x % a.chunks * kChannels, channels = min(kChannels, a.channels - first);
  const int at = threadIdx.x % kAvgPacks * kPack, slot = threadIdx.x / kAvgPacks;
  const int cells = a.out_height * a.out_width, window = a.kernel_h * a.kernel_w;
  const int parts = min(window, max(1, kSums / cells)), most = kSums / parts;
  x += image * a.height * a.width * a.channels + first + at;
  y += (image * a.channels + first) * cells;

  for (int begin = 0; begin < cells; begin += most) {
    const int count = min(most, cells - begin), cell = begin + slot % count, part = slot / count;
    if (part < parts && at < channels) {
      const int top = cell / a.out_width * a.stride_h, left = cell % a.out_width * a.stride_w;
      float sum[kPack] = {};
      for (int k = part; k < window; k += parts) {
        const int64_t pixel = int64_t{top + k / a.kernel_w} * a.width + left + k % a.kernel_w;
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + pixel * a.channels);
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] += widen(v.value[i]);
      }
#pragma unroll
      for (int i = 0; i < kPack; i += 4)
        *reinterpret_cast<float4*>(sums + slot * kPitch + at + i) = {sum[i], sum[i + 1], sum[i + 2], sum[i + 3]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels * count; i += kAvgThreads) {
      const int channel = i / count, here = i % count;
      float sum = 0;
      for (int p = 0; p < parts; ++p) sum += sums[(p * count + here) * kPitch + channel];
      narrow(sum / window, y[channel * cells + begin + here]);
    }
    __syncthreads();
  }
}

}  // namespace resnet_fast::cuda
