// y = [relu](conv2d(x, weight, stride, padding=1) * scale + shift [+ residual]), 3x3, NHWC, 16 bits, for sm_90a.
// How: halo_tile.cuh.
#pragma once

#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/halo_tile.cuh"

namespace resnet_fast::cuda {

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

  float scale_shift[4];
  load_scale_shift(scale_shift, scale, shift, block.channel, a.out_channels);

  float acc[kTile.positions / 2];
  halo_mainloop(acc, load, [](int, int) {});
  if (a.splits > 1 && !reduce_split_k<kTile.threads()>(acc, partial, counters, a.splits)) return;
  // The residual arrived with the first of at least nine steps: waits and barriers of later steps cover it.
  finalize<T, output_pitch(kTile)>(acc, scale_shift, residual != nullptr, a.relu, tile);
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
