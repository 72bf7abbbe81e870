// y = [relu](conv2d(x, weight, stride, padding=1) * scale + shift [+ residual]), 3x3, NHWC, 16 bits, for sm_90a.
//
// Output channels are the rows of the products, positions of a tile (conv_halo_plan.h) their columns. The input of a
// tile lies in shared memory as planes of 8 channels, 16 bytes a position: 8 positions in a run are what wgmma takes
// for 8 columns, wherever they begin, so that all nine taps read the same planes at nine addresses. Filters come tap by
// tap.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/hopper/conv_halo_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma.cuh"

namespace resnet_fast::cuda {

template <int kIndex>
struct HaloBlock {
  static constexpr HaloTile kTile = kHaloTiles[kIndex];
  int channel;  // first output channel
  int first;  // first line of the batch's lines
  int last;  // the line behind the block's, or behind its images
  int begin, end;  // its chunks of channels

  __device__ explicit HaloBlock(const HaloArgs& a) {
    channel = static_cast<int>(blockIdx.x) % a.columns * kTile.rows();
    const int tile = static_cast<int>(blockIdx.x) / a.columns, group = tile / a.tiles;
    first = group * a.images * (a.out_height + 1) + tile % a.tiles * a.lines;
    last = min(first + a.lines, (group + 1) * a.images * (a.out_height + 1) - 1);
    begin = a.chunks * static_cast<int>(blockIdx.y) / a.splits;
    end = a.chunks * (static_cast<int>(blockIdx.y) + 1) / a.splits;
  }
};

// An image of the batch, and a row and column of its output.
struct Place {
  int image, row, column;
};

// What lies at a position, image -1 for zeros. `line`: the line of position 0.
__device__ inline Place place_at(const HaloArgs& a, int line, int position) {
  const int down = static_cast<int>(__umulhi(static_cast<uint32_t>(position), a.pitch_inverse));
  const int column = position - down * a.pitch, at = line + down;
  if (at < 0 || column >= a.out_width) return {-1, 0, 0};
  const int image = static_cast<int>(__umulhi(static_cast<uint32_t>(at), a.height_inverse));
  const int row = at - image * (a.out_height + 1);
  return {row < a.out_height && image < a.batch ? image : -1, row, column};
}

// The copies of a block, 16 bytes at a time. Neighbouring threads copy neighbouring channels.
template <typename T, int kIndex, int kChunk, int kStride>
struct HaloLoad {
  static constexpr HaloTile kTile = kHaloTiles[kIndex];
  static constexpr int kPieces = kChunk / 8, kAtOnce = kTile.threads() / kPieces, kRows = kTile.rows() / kAtOnce;
  const T *x, *next;  // next: this thread's first piece of the next step's filters
  const HaloArgs& a;
  const HaloBlock<kIndex>& block;
  uint32_t input, filters;
  int piece, place;
  int tap = 0, rows;  // rows: filters of the block that there are
  int64_t apart;  // elements from one filter of this thread to the next

  __device__ HaloLoad(const T* x_, const T* weight_, const HaloArgs& args, const HaloBlock<kIndex>& b, uint32_t shared)
      : x(x_), a(args), block(b), input(shared), filters(shared + input_bytes(kTile, args)) {
    piece = threadIdx.x % kPieces, place = threadIdx.x / kPieces;
    rows = a.out_channels - block.channel;
    const int64_t filter = int64_t{9} * a.channels;
    next = weight_ + (block.channel + place) * filter + block.begin * kChunk + piece * 8;
    apart = kAtOnce * filter;
  }

  __device__ uint32_t input_of(int chunk) const {
    return input + ((chunk - block.begin) & 1) * kPieces * plane_bytes(kTile.columns, a.pitch, kStride);
  }
  __device__ uint32_t stage(int n) const { return filters + n * filter_bytes(kTile, kChunk); }

  // Offset of the pixel at a position of the input, -1 for zeros.
  __device__ int pixel_at(int position) const {
    int row_of = 0, column_of = 0;  // in a pair of rows and columns
    if constexpr (kStride == 2) {
      constexpr int kRuns = 4;
      const int run = run_positions(kTile.columns, a.pitch);
#pragma unroll
      for (int i = 1; i < kRuns; ++i)
        if (position >= run) position -= run, row_of = i / 2, column_of = i % 2;
    }
    if (position == 0) return -1;
    const Place p = place_at(a, block.first - 1, position - 1);
    const int row = p.row * kStride + row_of, column = p.column * kStride + column_of;
    if (p.image < 0 || (kStride == 2 && (row >= a.height || column >= a.width))) return -1;
    return (p.image * a.height + row) * a.width + column;
  }

  __device__ void load_input(int chunk) const {
    const uint32_t to = input_of(chunk) + piece * plane_bytes(kTile.columns, a.pitch, kStride);
    const int channel = chunk * kChunk + piece * 8;
#pragma unroll 2
    for (int p = place; p < halo_positions(kTile.columns, a.pitch, kStride); p += kAtOnce) {
      const int pixel = pixel_at(p);
      ptx::copy_async(to + p * 16, x + (int64_t{max(pixel, 0)} * a.channels + channel), pixel < 0 ? 0 : 16);
    }
  }

  // Filters of the next step, to a stage; steps go through the taps, then through the slices of channels.
  __device__ void load_filters(int n) {
    const uint32_t to = stage(n) + piece * filter_plane_bytes(kTile) + place * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      ptx::copy_async(to + i * kAtOnce * 16, next + i * apart, place + i * kAtOnce < rows ? 16 : 0);
    next += a.channels;
    if (++tap == 9) tap = 0, next += kChunk - 9 * a.channels;
  }
};

// Output tiles, 16 bytes at a time: calls f with the address in shared memory and the place in the tensor, -1 where
// there is none.
template <int kIndex, typename F>
__device__ void for_outputs(const HaloArgs& a, const HaloBlock<kIndex>& block, uint32_t tile, F f) {
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  constexpr int kPieces = kTile.rows() / 8, kAtOnce = kTile.threads() / kPieces;
  const int piece = threadIdx.x % kPieces, channel = block.channel + piece * 8;
  const int positions = channel < a.out_channels ? (block.last - block.first) * a.pitch : 0;
#pragma unroll 2
  for (int p = threadIdx.x / kPieces; p < kTile.columns; p += kAtOnce) {
    const Place at = p < positions ? place_at(a, block.first, p) : Place{-1, 0, 0};
    const int pixel = (at.image * a.out_height + at.row) * a.out_width + at.column;
    f(tile + p * output_pitch(kTile) + piece * 16, at.image < 0 ? -1 : int64_t{pixel} * a.out_channels + channel);
  }
}

// Sums of a block's part of the channels come together: each leaves its own in `partial`, and the last to arrive adds
// all in the order of the parts, so that it does not matter who was last, and leaves the counter at zero. Returns
// whether this block has the whole sum.
template <int kIndex>
__device__ bool join_halo(float (&sums)[kHaloTiles[kIndex].columns / 2], float* partial, int* counters,
                          const HaloArgs& a) {
  constexpr int kCount = kHaloTiles[kIndex].columns / 8, kThreads = kHaloTiles[kIndex].threads();
  float4* all = reinterpret_cast<float4*>(partial) + int64_t{blockIdx.x} * a.splits * kCount * kThreads + threadIdx.x;
  const int split = blockIdx.y;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    all[(split * kCount + i) * kThreads] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
  __threadfence();
  __syncthreads();
  if (__syncthreads_or(threadIdx.x == 0 && atomicAdd(counters + blockIdx.x, 1) != a.splits - 1)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) sums[i] = 0;
#pragma unroll 1
  for (int s = 0; s < a.splits; ++s) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 v = all[(s * kCount + i) * kThreads];
      sums[4 * i] += v.x, sums[4 * i + 1] += v.y, sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
    }
  }
  if (threadIdx.x == 0) counters[blockIdx.x] = 0;
  return true;
}

// Scale, shift, residual and ReLU, then rounding; a warp exchanges what its lanes hold for whole pieces of 16 bytes in
// the output tile, where the residual lies already.
template <typename T, int kIndex>
__device__ void finish_halo(float (&sums)[kHaloTiles[kIndex].columns / 2], const float (&constants)[4], bool residual,
                            bool relu_after, uint32_t tile) {
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  constexpr int kGroups = kTile.columns / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t here = tile + (lane % 8 + lane / 16 * 8) * output_pitch(kTile) + (warp * 16 + lane / 8 % 2 * 8) * 2;
  const auto two_groups = [&]<int kCount>(int j, uint32_t (&v)[4]) {
    const uint32_t at = here + j * 8 * output_pitch(kTile);
    if (residual) ptx::ldmatrix_transposed<kCount>(v, at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scale = constants[i % 2], shift = constants[2 + i % 2];
      const float2 r = residual ? widen2(reinterpret_cast<const pair_of<T>&>(v[i])) : float2{};
      const int k = 4 * (j + i / 2) + 2 * (i % 2);
      float2 z = {fmaf(sums[k], scale, shift) + r.x, fmaf(sums[k + 1], scale, shift) + r.y};
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
// y: [batch, out_height, out_width, out_channels], residual may be null. partial and counters: the workspace of the
// plan; counters are zero before and after. kChunk and kStride: a.chunk and a.stride.
template <typename T, int kIndex, int kChunk, int kStride>
__global__ void __launch_bounds__(kHaloTiles[kIndex].threads(), 1)
    conv_halo_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                         const float* __restrict__ shift, const T* __restrict__ residual, T* __restrict__ y,
                         float* partial, int* counters, const __grid_constant__ HaloArgs a) {
#ifdef RESNET_FAST_WGMMA
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  constexpr int kAhead = kTile.stages - 2;  // one stage is multiplied, the one before may still be
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::shared_address(shared);
  const HaloBlock<kIndex> block(a);
  HaloLoad<T, kIndex, kChunk, kStride> load(x, weight, a, block, memory);
  const uint32_t tile = load.stage(kTile.stages);
  const int steps = 9 * (block.end - block.begin);

  load.load_input(block.begin);
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    load.load_filters(s);
    ptx::copy_async_commit();
  }
  if (residual != nullptr)
    for_outputs<kIndex>(a, block, tile, [&](uint32_t to, int64_t at) {
      ptx::copy_async(to, at < 0 ? residual : residual + at, at < 0 ? 0 : 16);
    });

  const int warp = threadIdx.x / 32, row = warp * 16 + threadIdx.x % 32 / 4;
  float constants[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = block.channel + row + 8 * i;
    constants[i] = channel < a.out_channels ? scale[channel] : 0;
    constants[2 + i] = channel < a.out_channels ? shift[channel] : 0;
  }

  float sums[kTile.columns / 2];
  const uint32_t plane = plane_bytes(kTile.columns, a.pitch, kStride);
  const uint64_t filters = ptx::matrix_descriptor(load.stage(0) + warp / 4 * 64 * 16, 128, filter_plane_bytes(kTile));
  const uint64_t input = ptx::matrix_descriptor(memory, 128, plane);
  // Step s multiplies tap (ky, kx) of `chunk`; its filters lie in `stage`, those of step s + kAhead go to `next_stage`.
  int chunk = block.begin, ky = 0, kx = 0, stage = 0, next_stage = kAhead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<kAhead - 1>();
    ptx::fence_async_proxy();  // by those that have copied, for the products of all
    // After it all see what has arrived, and the products before the last ones are done in all warps.
    __syncthreads();
    const int position = tap_position(kTile.columns, a.pitch, kStride, ky, kx);
    const uint64_t at_a = ptx::further(filters, stage * filter_bytes(kTile, kChunk));
    const uint64_t at_b = ptx::further(input, load.input_of(chunk) - memory + position * 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
      ptx::wgmma(sums, ptx::further(at_a, 2 * k * filter_plane_bytes(kTile)), ptx::further(at_b, 2 * k * plane),
                 step + k, T{});
    ptx::wgmma_commit();
    if (ky == 0 && kx == 1 && chunk + 1 < block.end) load.load_input(chunk + 1);
    if (step + kAhead < steps) load.load_filters(next_stage);
    ptx::copy_async_commit();
    ptx::wgmma_wait<1>();
    if (++kx == 3) kx = 0, ++ky;
    if (ky == 3) ky = 0, ++chunk;
    if (++stage == kTile.stages) stage = 0;
    if (++next_stage == kTile.stages) next_stage = 0;
  }
  ptx::wgmma_wait<0>();
  ptx::hold(sums);
  if (a.splits > 1 && !join_halo<kIndex>(sums, partial, counters, a)) return;
  // The residual came with the first of the nine steps or more: waits and barriers of later ones cover it.
  finish_halo<T, kIndex>(sums, constants, residual != nullptr, a.relu, tile);
  __syncthreads();
  for_outputs<kIndex>(a, block, tile, [&](uint32_t from, int64_t at) {
    if (at < 0) return;
    *reinterpret_cast<float4*>(y + at) = ptx::load_shared(from);
  });
#else
  __trap();  // compiled for another architecture: the launcher asks for this one
#endif
}

}  // namespace resnet_fast::cuda
