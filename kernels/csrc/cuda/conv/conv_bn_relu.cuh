// y = [relu](conv2d(x, weight) * scale + shift [+ residual]) as one implicit matrix product, NHWC.
//
// The convolution is the product of a matrix of input pixels, never written down, with the filters: a row for each
// output pixel, a column for each output channel, a sum over taps and input channels. A block owns `tile_pixels` rows
// in a run and n() columns. Its operands come by conv_load.cuh, are multiplied by conv_math.cuh and finish in
// conv_epilogue.cuh.
//
// Source: implicit GEMM as in Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
#pragma once

#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/conv/conv_math.cuh"

namespace resnet_fast::cuda {

// kSlices slices of the row of products of one tap: `tap`, a constant, and `extra` taps on. `centre`: shared address of
// what this lane reads under the middle tap for its first pixel; `taps`: nine bits for each of its pixels, three pixels
// a register and shifted by `extra`, that tell which taps lie in the image; `filters`: those of the first tap of the
// step.
template <typename T, int kIndex, int kSlices, typename Sums, int kMasks>
__device__ inline void tap_products(Sums& sums, uint32_t centre, int width, int tap, int extra,
                                    const uint32_t (&taps)[kMasks], uint32_t filters, uint32_t zeros, int active) {
  using Traits = ConvTraits<T, kIndex>;
  using Multiply = TensorMath<T, kIndex>;
  constexpr ConvTile kTile = Traits::kTile;
  const uint32_t here = centre + ((tap / 3 - 1) * width + (tap % 3 - 1) + extra) * Traits::kPitch;
  // The zeros of the same bank, so that they collide with no neighbour's row.
  const uint32_t nothing = zeros | (here & 0x70);
  const auto pixels = [&](int i) {
    const bool inside = taps[i / 3] & 1u << (9 * (i % 3) + tap);
    return inside ? here + i * 16 * Traits::kPitch : nothing;
  };
  const uint32_t at = filters + (tap % kTile.taps + extra) * kTile.n() * Traits::kPitch;
  Multiply::template multiply<kSlices, Multiply::kSlice>(sums, pixels, at, active);
}

// All taps from one range of pixels in shared memory.
template <typename T, int kIndex, typename Sums>
__device__ void halo_products(Sums& sums, const T* x, const T* weight, const ConvArgs& a, const ConvBlock& block,
                              unsigned char* memory, const ConvWarp& warp) {
  using Traits = ConvTraits<T, kIndex>;
  using Loader = HaloLoad<T, kIndex>;
  using Multiply = TensorMath<T, kIndex>;
  constexpr ConvTile kTile = Traits::kTile;
  const uint32_t zeros = ptx::shared_address(memory);
  Loader load(x, weight, a, block, zeros);
  if (threadIdx.x < kZeroBytes / 16) reinterpret_cast<uint4*>(memory)[threadIdx.x] = uint4{};

  load.first_input();
#pragma unroll
  for (int step = 0; step < kTile.stages - 1; ++step) {
    load.filters(step);
    ptx::copy_async_commit();
  }

  // Which taps of this lane's pixels lie in their image: nine bits for each, three pixels a register.
  constexpr int kMasks = (kTile.mt + 2) / 3;
  uint32_t taps[kMasks] = {};
#pragma unroll
  for (int i = 0; i < kTile.mt; ++i) {
    const int row = 16 * i + Multiply::pixel();
    if (row >= warp.rows) continue;
    const int m = block.first + warp.first + row, column = m % a.width, line = m / a.width % a.height;
    const uint32_t across = (column > 0 ? 1 : 0) | 2 | (column + 1 < a.width ? 4 : 0);
    const uint32_t mask = (line > 0 ? across : 0) | across << 3 | (line + 1 < a.height ? across << 6 : 0);
    taps[i / 3] |= mask << (9 * (i % 3));
  }

  const uint32_t pixel = warp.first * Traits::kPitch + Multiply::pixel_offset();
  const uint32_t filter = warp.n * kTile.nt * 8 * Traits::kPitch + Multiply::filter_offset();
  // Two warps that share a part take one outer tap of a filter row each, and half of the row of products of the tap in
  // between: three slices each.
  constexpr bool kShared = kTile.warps_k == 2;
  static_assert(!kShared || (kTile.taps == 3 && kTile.row_bytes == 2 * Multiply::kSlice), "taps are shared out evenly");
  const int outer = kShared ? 2 * warp.k : 0, half = kShared ? warp.k * Multiply::kSlice : 0;
  uint32_t outer_taps[kMasks];
#pragma unroll
  for (int i = 0; i < kMasks; ++i) outer_taps[i] = taps[i] >> outer;

#pragma unroll 1
  for (int part = block.begin; part < block.end; ++part) {
    const bool more = part + 1 < block.end;
    const uint32_t centre = load.centre() + pixel;
#pragma unroll
    for (int step = 0; step < Loader::kSteps; ++step) {
      ptx::copy_async_wait<kTile.stages - 2>();
      // After it all see what has arrived, and none reads any more from what the next copies overwrite.
      __syncthreads();
      const int next = step + kTile.stages - 1;
      if (step < Loader::kSlices && more) load.next_input(step);
      if (next < Loader::kSteps || more) load.filters(next);
      ptx::copy_async_commit();
      const uint32_t filters = load.stage(step) + filter;
      if constexpr (kShared) {
        tap_products<T, kIndex, 2>(sums, centre, a.width, step * 3, outer, outer_taps, filters, zeros, warp.active);
        tap_products<T, kIndex, 1>(sums, centre + half, a.width, step * 3 + 1, 0, taps, filters + half, zeros,
                                   warp.active);
      } else {
#pragma unroll
        for (int t = 0; t < kTile.taps; ++t)
          tap_products<T, kIndex, kTile.row_bytes / Multiply::kSlice>(sums, centre, a.width, step * kTile.taps + t, 0,
                                                                      taps, filters, zeros, warp.active);
      }
    }
    load.advance();
  }
}

// Each step with both its operands.
template <typename Loader, typename Multiply, typename Sums>
__device__ void step_products(Sums& sums, Loader& load, const ConvBlock& block, uint32_t shared, const ConvWarp& warp) {
  using Traits = typename Multiply::Traits;
  constexpr ConvTile kTile = Traits::kTile;
#pragma unroll
  for (int stage = 0; stage < kTile.stages - 1; ++stage) {
    if (block.begin + stage < block.end) load.step(stage);
    ptx::copy_async_commit();
  }
  constexpr int kApart = Multiply::kSlice * kTile.warps_k, kSlices = kTile.row_bytes / kApart;
  const uint32_t slice = shared + kZeroBytes + warp.k * Multiply::kSlice;
  const uint32_t pixel = slice + warp.first * Traits::kPitch + Multiply::pixel_offset();
  const uint32_t filter = slice + (kTile.m() + warp.n * kTile.nt * 8) * Traits::kPitch + Multiply::filter_offset();
  int stage = 0;
#pragma unroll 1
  for (int step = block.begin; step < block.end; ++step) {
    ptx::copy_async_wait<kTile.stages - 2>();
    __syncthreads();
    if (step + kTile.stages - 1 < block.end) load.step(stage == 0 ? kTile.stages - 1 : stage - 1);
    ptx::copy_async_commit();
    const uint32_t at = pixel + stage * Loader::kStageBytes;
    const auto pixels = [&](int i) { return at + i * 16 * Traits::kPitch; };
    Multiply::template multiply<kSlices, kApart>(sums, pixels, filter + stage * Loader::kStageBytes, warp.active);
    stage = stage + 1 == kTile.stages ? 0 : stage + 1;
  }
}

template <typename T, int kIndex>
struct MathOf {
  using type = TensorMath<T, kIndex>;
};
template <int kIndex>
  requires(kConvTiles[kIndex].math == Math::kPlain)
struct MathOf<float, kIndex> {
  using type = PlainMath<kIndex>;
};

// x: [batch, height, width, channels]; weight: [out_channels, kernel_h, kernel_w, channels]; scale, shift:
// [out_channels]; residual, y: [batch, out_height, out_width, out_channels], residual may be null. partial and
// counters: the workspace of the plan; counters are zero before and after.
template <typename T, int kIndex>
__global__ void __launch_bounds__(kConvTiles[kIndex].threads(), kConvTiles[kIndex].blocks_per_sm)
    conv_bn_relu_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                            const float* __restrict__ shift, const T* __restrict__ residual, T* __restrict__ y,
                            float* partial, int* counters, const __grid_constant__ ConvArgs a) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  using Multiply = typename MathOf<T, kIndex>::type;
  extern __shared__ __align__(128) unsigned char shared[];

  const int tile = blockIdx.x / a.columns, split = blockIdx.y;
  ConvBlock block;
  block.first = tile * a.tile_pixels;
  block.rows = min(a.tile_pixels, a.pixels - block.first);
  block.channel = blockIdx.x % a.columns * kTile.n();
  block.begin = static_cast<int>(int64_t{a.parts} * split / a.splits);
  block.end = static_cast<int>(int64_t{a.parts} * (split + 1) / a.splits);

  const ConvWarp warp = conv_warp<kIndex>(block);

  // Once a block; any barrier before the end lets all threads see it.
  float* constants = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < kTile.n(); i += kTile.threads()) {
    const int channel = block.channel + i;
    constants[i] = channel < a.out_channels ? scale[channel] : 0;
    constants[kTile.n() + i] = channel < a.out_channels ? shift[channel] : 0;
  }
  unsigned char* memory = shared + kTile.constant_bytes();

  float sums[kTile.mt][kTile.nt][4] = {};
  if constexpr (kTile.load == Load::kHalo) {
    halo_products<T, kIndex>(sums, x, weight, a, block, memory, warp);
  } else if constexpr (kTile.load == Load::kGather) {
    GatherLoad<T, kIndex> load(x, weight, a, block, ptx::shared_address(memory));
    step_products<GatherLoad<T, kIndex>, Multiply>(sums, load, block, ptx::shared_address(memory), warp);
  } else {
    MixedLoad<T, kIndex> load(x, weight, a, block, memory);
    step_products<MixedLoad<T, kIndex>, Multiply>(sums, load, block, ptx::shared_address(memory), warp);
  }

  ConvOutput output = join_warps<kIndex>(sums, memory, block, warp);
  // Blocks that are done have no rows left, rather than return: lanes exchange what they write, and behind a branch the
  // compiler would not know that they are together.
  if (a.splits > 1 && !join_splits<kIndex>(sums, partial, counters, a, output, split)) output.rows = 0;
  finish<T, kIndex>(sums, constants + output.channel - block.channel, residual, y, a, output);
}

}  // namespace resnet_fast::cuda
