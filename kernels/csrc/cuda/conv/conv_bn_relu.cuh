// y = [relu](conv2d(x, weight) * scale + shift [+ residual]) as an implicit GEMM, NHWC.
//
// M: output pixels; N: output channels; K: taps x input channels. A block computes `tile_pixels` consecutive pixels x
// n() channels: conv_load.cuh loads the operands, conv_mma.cuh multiplies, conv_epilogue.cuh finalizes.
//
// Source: implicit GEMM as in Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
#pragma once

#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/conv/conv_mma.cuh"

namespace resnet_fast::cuda {

// Accumulates kSlices slices of k under one tap: `tap`, a constant, plus `extra`. centre: shared address that this lane
// reads for its first pixel under the middle tap. taps: which taps of its pixels lie in the image, nine bits a pixel,
// three pixels a register, shifted by `extra`. filters: shared address of the step's first tap.
template <typename T, int kIndex, int kSlices, typename Acc, int kMasks>
__device__ inline void mma_tap(Acc& acc, uint32_t centre, int width, int tap, int extra, const uint32_t (&taps)[kMasks],
                               uint32_t filters, uint32_t zeros, int active) {
  using Traits = ConvTraits<T, kIndex>;
  using Mma = TensorMma<T, kIndex>;
  constexpr ConvTile kTile = Traits::kTile;
  const uint32_t address = centre + ((tap / 3 - 1) * width + (tap % 3 - 1) + extra) * Traits::kPitch;
  // Zeros of the same banks: no conflict with a neighbour's row.
  const uint32_t zero_row = zeros | (address & 0x70);
  const auto pixels = [&](int i) {
    const bool inside = taps[i / 3] & 1u << (9 * (i % 3) + tap);
    return inside ? address + i * 16 * Traits::kPitch : zero_row;
  };
  const uint32_t at = filters + (tap % kTile.taps + extra) * kTile.n() * Traits::kPitch;
  Mma::template accumulate<kSlices, Mma::kSliceBytes>(acc, pixels, at, active);
}

// Mainloop of kHalo: all nine taps read one range of pixels in shared memory.
template <typename T, int kIndex, typename Acc>
__device__ void halo_mainloop(Acc& acc, const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block,
                              unsigned char* memory, const ConvWarp& warp) {
  using Traits = ConvTraits<T, kIndex>;
  using Loader = HaloLoad<T, kIndex>;
  using Mma = TensorMma<T, kIndex>;
  constexpr ConvTile kTile = Traits::kTile;
  const uint32_t zeros = ptx::smem_address(memory);
  Loader load(x, weight, a, block, zeros);
  if (threadIdx.x < kZeroRowBytes / 16) reinterpret_cast<uint4*>(memory)[threadIdx.x] = uint4{};

  load.load_first_input();
#pragma unroll
  for (int step = 0; step < kTile.stages - 1; ++step) {
    load.load_filters(step);
    ptx::cp_async_commit();
  }

  // Which taps of this lane's pixels lie in the image: nine bits a pixel, three pixels a register.
  constexpr int kMasks = (kTile.mt + 2) / 3;
  uint32_t taps[kMasks] = {};
#pragma unroll
  for (int i = 0; i < kTile.mt; ++i) {
    const int row = 16 * i + Mma::pixel();
    if (row >= warp.rows) continue;
    const int m = block.first + warp.first + row, column = m % a.width, line = m / a.width % a.height;
    const uint32_t across = (column > 0 ? 1 : 0) | 2 | (column + 1 < a.width ? 4 : 0);
    const uint32_t mask = (line > 0 ? across : 0) | across << 3 | (line + 1 < a.height ? across << 6 : 0);
    taps[i / 3] |= mask << (9 * (i % 3));
  }

  const uint32_t pixel = warp.first * Traits::kPitch + Mma::pixel_offset();
  const uint32_t filter = warp.n * kTile.nt * 8 * Traits::kPitch + Mma::filter_offset();
  // Two warps that share a warp tile take an outer tap of a filter row each and half of k under the middle tap: three
  // slices each.
  constexpr bool kShared = kTile.warps_k == 2;
  static_assert(!kShared || (kTile.taps == 3 && kTile.row_bytes == 2 * Mma::kSliceBytes),
                "warps divide the taps evenly");
  const int outer = kShared ? 2 * warp.k : 0, half = kShared ? warp.k * Mma::kSliceBytes : 0;
  uint32_t outer_taps[kMasks];
#pragma unroll
  for (int i = 0; i < kMasks; ++i) outer_taps[i] = taps[i] >> outer;

#pragma unroll 1
  for (int k_block = block.begin; k_block < block.end; ++k_block) {
    const bool more = k_block + 1 < block.end;
    const uint32_t centre = load.centre() + pixel;
#pragma unroll
    for (int step = 0; step < Loader::kSteps; ++step) {
      ptx::cp_async_wait<kTile.stages - 2>();
      // All threads see the copies that arrived, and none still reads what the next copies overwrite.
      __syncthreads();
      const int next = step + kTile.stages - 1;
      if (step < Loader::kSlices && more) load.load_next_input(step);
      if (next < Loader::kSteps || more) load.load_filters(next);
      ptx::cp_async_commit();
      const uint32_t filters = load.stage(step) + filter;
      if constexpr (kShared) {
        mma_tap<T, kIndex, 2>(acc, centre, a.width, step * 3, outer, outer_taps, filters, zeros, warp.active);
        mma_tap<T, kIndex, 1>(acc, centre + half, a.width, step * 3 + 1, 0, taps, filters + half, zeros, warp.active);
      } else {
#pragma unroll
        for (int t = 0; t < kTile.taps; ++t)
          mma_tap<T, kIndex, kTile.row_bytes / Mma::kSliceBytes>(acc, centre, a.width, step * kTile.taps + t, 0, taps,
                                                                 filters, zeros, warp.active);
      }
    }
    load.advance_k_block();
  }
}

// Mainloop of kGather and kScalar: each stage holds both operands of a k step.
template <typename Loader, typename Mma, typename Acc>
__device__ void implicit_gemm_mainloop(Acc& acc, Loader& load, const ConvBlock& block, uint32_t shared,
                                       const ConvWarp& warp) {
  using Traits = typename Mma::Traits;
  constexpr ConvTile kTile = Traits::kTile;
#pragma unroll
  for (int stage = 0; stage < kTile.stages - 1; ++stage) {
    if (block.begin + stage < block.end) load.load_step(stage);
    ptx::cp_async_commit();
  }
  constexpr int kSliceStride = Mma::kSliceBytes * kTile.warps_k, kSlices = kTile.row_bytes / kSliceStride;
  const uint32_t slice = shared + kZeroRowBytes + warp.k * Mma::kSliceBytes;
  const uint32_t pixel = slice + warp.first * Traits::kPitch + Mma::pixel_offset();
  const uint32_t filter = slice + (kTile.m() + warp.n * kTile.nt * 8) * Traits::kPitch + Mma::filter_offset();
  int stage = 0;
#pragma unroll 1
  for (int step = block.begin; step < block.end; ++step) {
    ptx::cp_async_wait<kTile.stages - 2>();
    __syncthreads();
    if (step + kTile.stages - 1 < block.end) load.load_step(stage == 0 ? kTile.stages - 1 : stage - 1);
    ptx::cp_async_commit();
    const uint32_t at = pixel + stage * Loader::kStageBytes;
    const auto pixels = [&](int i) { return at + i * 16 * Traits::kPitch; };
    Mma::template accumulate<kSlices, kSliceStride>(acc, pixels, filter + stage * Loader::kStageBytes, warp.active);
    stage = stage + 1 == kTile.stages ? 0 : stage + 1;
  }
}

template <typename T, int kIndex>
struct MmaOf {
  using type = TensorMma<T, kIndex>;
};
template <int kIndex>
  requires(kConvTiles[kIndex].math == Math::kSimt)
struct MmaOf<float, kIndex> {
  using type = SimtMma<kIndex>;
};

// x: [batch, height, width, channels]; weight: [out_channels, kernel_h, kernel_w, channels]; scale, shift:
// [out_channels]; residual, y: [batch, out_height, out_width, out_channels], residual may be null. partial, counters:
// the split-K workspace of the plan; counters are zero before and after.
template <typename T, int kIndex>
__global__ void __launch_bounds__(kConvTiles[kIndex].threads(), kConvTiles[kIndex].blocks_per_sm)
    conv_bn_relu_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                            const float* __restrict__ shift, const T* __restrict__ residual, T* __restrict__ y,
                            float* partial, int* counters, const __grid_constant__ ConvArgs a) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  using Mma = typename MmaOf<T, kIndex>::type;
  extern __shared__ __align__(128) unsigned char shared[];

  const int tile = blockIdx.x / a.channel_blocks, split = blockIdx.y;
  ConvBlock block;
  block.first = tile * a.tile_pixels;
  block.rows = min(a.tile_pixels, a.pixels - block.first);
  block.channel = blockIdx.x % a.channel_blocks * kTile.n();
  block.begin = static_cast<int>(int64_t{a.k_blocks} * split / a.splits);
  block.end = static_cast<int>(int64_t{a.k_blocks} * (split + 1) / a.splits);

  const ConvWarp warp = conv_warp<kIndex>(block);

  // The barriers of the mainloop make it visible to all threads.
  float* scale_shift = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < kTile.n(); i += kTile.threads()) {
    const int channel = block.channel + i;
    scale_shift[i] = channel < a.out_channels ? scale[channel] : 0;
    scale_shift[kTile.n() + i] = channel < a.out_channels ? shift[channel] : 0;
  }
  unsigned char* memory = shared + kTile.scale_shift_bytes();

  float acc[kTile.mt][kTile.nt][4] = {};
  if constexpr (kTile.load == Load::kHalo) {
    halo_mainloop<T, kIndex>(acc, x, weight, a, block, memory, warp);
  } else if constexpr (kTile.load == Load::kGather) {
    GatherLoad<T, kIndex> load(x, weight, a, block, ptx::smem_address(memory));
    implicit_gemm_mainloop<GatherLoad<T, kIndex>, Mma>(acc, load, block, ptx::smem_address(memory), warp);
  } else {
    ScalarLoad<T, kIndex> load(x, weight, a, block, memory);
    implicit_gemm_mainloop<ScalarLoad<T, kIndex>, Mma>(acc, load, block, ptx::smem_address(memory), warp);
  }

  ConvOutput output = reduce_warps<kIndex>(acc, memory, block, warp);
  // A block that is done continues with no rows instead of returning: lanes exchange data in finalize, and behind a
  // branch the compiler could not tell that they are converged.
  if (a.splits > 1 && !reduce_split_k<kIndex>(acc, partial, counters, a, output, split)) output.rows = 0;
  finalize<T, kIndex>(acc, scale_shift + output.channel - block.channel, residual, y, a, output);
}

}  // namespace resnet_fast::cuda
