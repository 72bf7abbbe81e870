// y = [relu](conv2d(x, weight, stride, padding=1) * scale + shift [+ residual]), 3x3, NHWC, 16 bits, for sm_90a.
// How: halo_tile.cuh.
#pragma once

#include "cuda/hopper/halo_tile.cuh"

namespace resnet_fast::cuda {

// Reduces the accumulators of the split-K blocks of an output tile. Each stores its own in `partial`; the last to
// arrive adds all in the order of the splits, whichever block it is, and resets the counter. Returns whether this block
// holds the whole sum.
template <int kIndex>
__device__ bool halo_reduce_split_k(float (&acc)[kHaloTiles[kIndex].positions / 2], float* partial, int* counters,
                                    const HaloArgs& a) {
  constexpr int kCount = kHaloTiles[kIndex].positions / 8, kThreads = kHaloTiles[kIndex].threads();
  float4* all = reinterpret_cast<float4*>(partial) + int64_t{blockIdx.x} * a.splits * kCount * kThreads + threadIdx.x;
  const int split = blockIdx.y;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    all[(split * kCount + i) * kThreads] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
  __threadfence();
  __syncthreads();
  if (__syncthreads_or(threadIdx.x == 0 && atomicAdd(counters + blockIdx.x, 1) != a.splits - 1)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) acc[i] = 0;
#pragma unroll 1
  for (int s = 0; s < a.splits; ++s) {
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
template <typename T, int kIndex>
__device__ void halo_finalize(float (&acc)[kHaloTiles[kIndex].positions / 2], const float (&scale_shift)[4],
                              bool residual, bool relu_after, uint32_t tile) {
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  constexpr int kGroups = kTile.positions / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lane_address =
      tile + (lane % 8 + lane / 16 * 8) * output_pitch(kTile) + (warp * 16 + lane / 8 % 2 * 8) * 2;
  const auto two_groups = [&]<int kCount>(int j, uint32_t (&v)[4]) {
    const uint32_t at = lane_address + j * 8 * output_pitch(kTile);
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

// x: [batch, height, width, channels]; weight: [out_channels, 3, 3, channels]; scale, shift: [out_channels]; residual,
// y: [batch, out_height, out_width, out_channels], residual may be null. partial, counters: the split-K workspace
// of the plan; counters are zero before and after. kChunk, kStride: a.chunk, a.stride.
template <typename T, int kIndex, int kChunk, int kStride>
__global__ void __launch_bounds__(kHaloTiles[kIndex].threads(), 1)
    conv_halo_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                         const float* __restrict__ shift, const T* __restrict__ residual, T* __restrict__ y,
                         float* partial, int* counters, const __grid_constant__ HaloArgs a) {
#ifdef RESNET_FAST_WGMMA
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::smem_address(shared);
  const HaloBlock<kTile> block(a);
  HaloLoad<T, kTile, kChunk, kStride> load(x, weight, a, block, memory);
  const uint32_t tile = load.stage(kTile.stages);

  halo_start(load);
  if (residual != nullptr)
    for_each_output(a, block, tile, [&](uint32_t to, int64_t at) {
      ptx::cp_async(to, at < 0 ? residual : residual + at, at < 0 ? 0 : 16);
    });

  const int warp = threadIdx.x / 32, row = warp * 16 + threadIdx.x % 32 / 4;
  float scale_shift[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = block.channel + row + 8 * i;
    scale_shift[i] = channel < a.out_channels ? scale[channel] : 0;
    scale_shift[2 + i] = channel < a.out_channels ? shift[channel] : 0;
  }

  float acc[kTile.positions / 2];
  halo_mainloop(acc, load, [](int, int) {});
  if (a.splits > 1 && !halo_reduce_split_k<kIndex>(acc, partial, counters, a)) return;
  // The residual arrived with the first of at least nine steps: waits and barriers of later steps cover it.
  halo_finalize<T, kIndex>(acc, scale_shift, residual != nullptr, a.relu, tile);
  __syncthreads();
  for_each_output(a, block, tile, [&](uint32_t from, int64_t at) {
    if (at < 0) return;
    *reinterpret_cast<float4*>(y + at) = ptx::load_shared(from);
  });
#else
  __trap();  // not sm_90a: the launcher checks the architecture
#endif
}

}  // namespace resnet_fast::cuda
