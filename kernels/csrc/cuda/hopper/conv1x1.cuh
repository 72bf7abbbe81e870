// y = [relu](conv2d(x, weight, stride) * scale + shift [+ residual]), 1x1, NHWC, 16 bits, for sm_90a.
//
// GEMM: M is output channels, N pixels, K input channels, both operands K-major. Residual and operands of all stages
// are under way before the first wgmma.
#pragma once

#include "cuda/hopper/conv1x1_plan.h"
#include "cuda/hopper/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma.cuh"

namespace resnet_fast::cuda {

template <int kIndex>
struct Conv1x1Block {
  static constexpr Conv1x1Tile kTile = kConv1x1Tiles[kIndex];
  int channel, pixel;  // its first output channel and pixel
  int begin, end;  // its chunks

  __device__ explicit Conv1x1Block(const Conv1x1Args& a) {
    channel = static_cast<int>(blockIdx.x) % a.channel_blocks * kTile.channels();
    pixel = static_cast<int>(blockIdx.x) / a.channel_blocks * kTile.pixels;
    begin = a.chunks * static_cast<int>(blockIdx.y) / a.splits;
    end = a.chunks * (static_cast<int>(blockIdx.y) + 1) / a.splits;
  }
};

// Waits for this thread's copies except the newest groups, at most kConv1x1Stages - 1: the instruction takes a
// constant.
template <int kPending = 0>
__device__ void wait_copies(int pending) {
  if constexpr (kPending + 1 < kConv1x1Stages) {
    if (pending != kPending) return wait_copies<kPending + 1>(pending);
  }
  ptx::cp_async_wait<kPending>();
}

// A block's copies of operands, in vectors of 16 bytes. Adjacent threads copy adjacent channels.
template <typename T, int kIndex>
struct Conv1x1Load {
  static constexpr Conv1x1Tile kTile = kConv1x1Tiles[kIndex];
  static constexpr int kVectors = kConv1x1Chunk / 8, kAtOnce = kTile.threads() / kVectors;
  const T *x, *weight;
  const Conv1x1Args& a;
  const Conv1x1Block<kIndex>& block;
  uint32_t memory;

  __device__ uint32_t stage(int n) const { return memory + n * stage_bytes(kTile); }

  // Number of the input pixel that an output pixel reads.
  __device__ int input_pixel(int pixel) const {
    if (a.stride == 1) return pixel;
    const auto divide = [](int n, uint32_t inverse) {
      return inverse == 0 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), inverse));
    };
    const int line = divide(pixel, a.width_inverse), image = divide(line, a.height_inverse);
    const int row = (line - image * a.out_height) * a.stride, column = (pixel - line * a.out_width) * a.stride;
    return (image * a.height + row) * a.width + column;
  }

  // Copies a chunk of both operands into stage n, with zeros beyond the last channels and pixels.
  __device__ void load(int chunk, int n) const {
    const int vector = threadIdx.x % kVectors, first_row = threadIdx.x / kVectors;
    const int channel = chunk * kConv1x1Chunk + vector * 8;
    const bool inside = channel < a.channels;
    const uint32_t filters = stage(n) + vector * filter_plane_bytes(kTile);
    const uint32_t pixels = stage(n) + filter_bytes(kTile) + vector * pixel_plane_bytes(kTile);
    const T* filter = weight + (int64_t{block.channel + first_row} * a.channels + channel);
#pragma unroll
    for (int i = 0; i < kTile.channels() / kAtOnce; ++i) {
      const int row = first_row + i * kAtOnce;
      ptx::cp_async(filters + row * 16, filter + int64_t{i * kAtOnce} * a.channels,
                    inside && block.channel + row < a.out_channels ? 16 : 0);
    }
#pragma unroll 4
    for (int i = 0; i < kTile.pixels / kAtOnce; ++i) {
      const int row = first_row + i * kAtOnce, pixel = block.pixel + row;
      ptx::cp_async(pixels + row * 16, x + (int64_t{input_pixel(pixel)} * a.channels + channel),
                    inside && pixel < a.pixels ? 16 : 0);
    }
  }
};

// Calls f for every vector of the output tile, with its address in shared memory and its offset in the tensor, -1 if it
// has none.
template <int kIndex, typename F>
__device__ void for_each_output(const Conv1x1Args& a, const Conv1x1Block<kIndex>& block, uint32_t tile, F f) {
  constexpr Conv1x1Tile kTile = kConv1x1Tiles[kIndex];
  constexpr int kVectors = kTile.channels() / 8, kAtOnce = kTile.threads() / kVectors;
  const int vector = threadIdx.x % kVectors, first = threadIdx.x / kVectors, channel = block.channel + vector * 8;
  const int pixels = channel < a.out_channels ? a.pixels - block.pixel : 0;
#pragma unroll 4
  for (int p = first; p < kTile.pixels; p += kAtOnce)
    f(tile + p * output_pitch(kTile) + vector * 16,
      p < pixels ? int64_t{block.pixel + p} * a.out_channels + channel : -1);
}

// x: [batch, height, width, channels]; weight: [out_channels, channels]; scale, shift: [out_channels]; residual, y:
// [batch, out_height, out_width, out_channels], residual may be null. partial, counters: the split-K workspace of the
// plan; counters are zero before and after.
template <typename T, int kIndex>
__global__ void __launch_bounds__(kConv1x1Tiles[kIndex].threads(), kConv1x1Tiles[kIndex].blocks)
    conv1x1_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                       const float* __restrict__ shift, const T* __restrict__ residual, T* __restrict__ y,
                       float* partial, int* counters, const __grid_constant__ Conv1x1Args a) {
#ifdef RESNET_FAST_WGMMA
  constexpr Conv1x1Tile kTile = kConv1x1Tiles[kIndex];
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::smem_address(shared), tile = memory + a.output;
  const Conv1x1Block<kIndex> block(a);
  const Conv1x1Load<T, kIndex> load{x, weight, a, block, memory};
  // All steps are loaded ahead if they fit. Else a stage is free one step after its wgmma.
  const int steps = block.end - block.begin, ahead = steps <= a.stages ? steps : a.stages - 1;
  for (int s = 0; s < ahead; ++s) {
    load.load(block.begin + s, s);
    ptx::cp_async_commit();
  }
  // With the group of step 0, which the first `ahead` steps do not wait for.
  if (a.residual)
    for_each_output<kIndex>(a, block, tile, [&](uint32_t to, int64_t at) {
      ptx::cp_async(to, at < 0 ? residual : residual + at, at < 0 ? 0 : 16);
    });
  float scale_shift[4];
  load_scale_shift(scale_shift, scale, shift, block.channel, a.out_channels);

  float acc[kTile.pixels / 2];
  const uint64_t filters = ptx::matrix_descriptor(memory + threadIdx.x / 128 * 64 * 16, 128, filter_plane_bytes(kTile));
  const uint64_t pixels = ptx::matrix_descriptor(memory + filter_bytes(kTile), 128, pixel_plane_bytes(kTile));
  int stage = 0, next_stage = ahead;  // step s + ahead goes to next_stage
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies(ahead - 1);
    ptx::fence_async_proxy();  // this thread's copies, for the wgmma of all
    __syncthreads();  // all warps see the copies that arrived, and all have finished the wgmmas before
    const uint32_t offset = stage * stage_bytes(kTile);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kConv1x1Chunk / 16; ++k)
      ptx::wgmma(acc, ptx::advance_descriptor(filters, offset + 2 * k * filter_plane_bytes(kTile)),
                 ptx::advance_descriptor(pixels, offset + 2 * k * pixel_plane_bytes(kTile)), step + k, T{});
    ptx::wgmma_commit();
    if (step + ahead < steps) load.load(block.begin + step + ahead, next_stage);
    ptx::cp_async_commit();
    ptx::wgmma_wait<0>();
    if (++stage == a.stages) stage = 0;
    if (++next_stage == a.stages) next_stage = 0;
  }
  ptx::fence_accumulators(acc);
  ptx::cp_async_wait<0>();
  __syncthreads();  // the residual of all threads is there, or the stages below the output tile are read
  if (a.splits > 1 && !reduce_split_k<kTile.threads()>(acc, partial, counters, a.splits)) return;
  finalize<T, output_pitch(kTile)>(acc, scale_shift, a.residual, a.relu, tile);
  __syncthreads();
  for_each_output<kIndex>(a, block, tile, [&](uint32_t from, int64_t at) {
    if (at < 0) return;
    *reinterpret_cast<float4*>(y + at) = ptx::load_shared(from);
  });
#else
  __trap();  // not sm_90a: the launcher checks the architecture
#endif
}

}  // namespace resnet_fast::cuda
