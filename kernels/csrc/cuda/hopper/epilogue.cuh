// Epilogue of the convolutions for Hopper. wgmma leaves 16 output channels of all pixels of a block to a warp. A thread
// has two of them, 8 apart, and two adjacent pixels of every 8: acc[4 * j + 2 * i] and the next are of channel i, group
// j.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"

namespace resnet_fast::cuda {

// Loads scale and shift of this thread's two channels of a block that begins at `first`; zeros beyond the last channel.
__device__ inline void load_scale_shift(float (&scale_shift)[4], const float* scale, const float* shift, int first,
                                        int out_channels) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    scale_shift[i] = channel < out_channels ? scale[channel] : 0;
    scale_shift[2 + i] = channel < out_channels ? shift[channel] : 0;
  }
}

// Reduces the accumulators of the split-K blocks of an output tile. Each stores its own in `partial`; the last to
// arrive adds all in the order of the splits, whichever block it is, and resets the counter. Returns whether this block
// holds the whole sum.
template <int kThreads, int kAcc>
__device__ bool reduce_split_k(float (&acc)[kAcc], float* partial, int* counters, int splits) {
  constexpr int kCount = kAcc / 4;
  float4* all = reinterpret_cast<float4*>(partial) + int64_t{blockIdx.x} * splits * kCount * kThreads + threadIdx.x;
  const int split = blockIdx.y;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    all[(split * kCount + i) * kThreads] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  __threadfence();
  __syncthreads();
  if (__syncthreads_or(threadIdx.x == 0 && atomicAdd(counters + blockIdx.x, 1) != splits - 1)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) acc[i] = 0;
#pragma unroll 1
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 v = all[(s * kCount + i) * kThreads];
      acc[4 * i] += v.x, acc[4 * i + 1] += v.y, acc[4 * i + 2] += v.z, acc[4 * i + 3] += v.w;
    }
  }
  if (threadIdx.x == 0) counters[blockIdx.x] = 0;
  return true;
}

// Applies scale, shift, residual and ReLU, rounds, and stores to the output tile in shared memory, which holds the
// residual.
template <typename T, int kPitch, int kAcc>
__device__ void finalize(float (&acc)[kAcc], const float (&scale_shift)[4], bool residual, bool relu_after,
                         uint32_t tile) {
  constexpr int kGroups = kAcc / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lane_address = tile + (lane % 8 + lane / 16 * 8) * kPitch + (warp * 16 + lane / 8 % 2 * 8) * 2;
  const auto two_groups = [&]<int kCount>(int j, uint32_t (&v)[4]) {
    const uint32_t at = lane_address + j * 8 * kPitch;
    if (residual) ptx::ldmatrix_transposed<kCount>(v, at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scale = scale_shift[i % 2], shift = scale_shift[2 + i % 2];
      const float2 r = residual ? widen2(reinterpret_cast<const vec2_of<T>&>(v[i])) : float2{};
      const int k = 4 * (j + i / 2) + 2 * (i % 2);
      float2 z = {fmaf(acc[k], scale, shift) + r.x, fmaf(acc[k + 1], scale, shift) + r.y};
      if (relu_after) z = relu2(z);
      v[i] = narrow2(z.x, z.y, T{});
    }
    __syncwarp();  // all lanes have read their residual
    ptx::stmatrix_transposed<kCount>(at, v);
  };
#pragma unroll
  for (int j = 0; j + 1 < kGroups; j += 2) {
    uint32_t v[4] = {};
    two_groups.template operator()<4>(j, v);
  }
  if constexpr (kGroups % 2 == 1) {
    uint32_t v[4] = {};
    two_groups.template operator()<2>(kGroups - 1, v);
  }
}

}  // namespace resnet_fast::cuda
