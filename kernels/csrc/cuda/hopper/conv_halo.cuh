// y = [relu](conv2d(x, weight, stride, padding=1) * scale + shift [+ residual]), 3x3, NHWC, 16 bits, for sm_90a.
//
// GEMM: M is output channels, N the positions of a tile (conv_halo_plan.h), K taps x input channels. The input of a
// tile lies in shared memory as planes of 8 channels, 16 bytes per position. wgmma takes any 8 consecutive positions as
// 8 columns, so all nine taps read the same planes at nine addresses. Filters arrive tap by tap.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/hopper/conv_halo_plan.h"
#include "cuda/hopper/epilogue.cuh"
#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma.cuh"

namespace resnet_fast::cuda {

template <int kIndex>
struct HaloBlock {
  static constexpr HaloTile kTile = kHaloTiles[kIndex];
  int channel;  // first output channel
  int first;  // first line, counted over the batch
  int last;  // end of its lines
  int begin, end;  // its channel chunks

  __device__ explicit HaloBlock(const HaloArgs& a) {
    channel = static_cast<int>(blockIdx.x) % a.channel_blocks * kTile.channels();
    const int tile = static_cast<int>(blockIdx.x) / a.channel_blocks, group = tile / a.tiles;
    first = group * a.images * (a.out_height + 1) + tile % a.tiles * a.lines;
    last = min(first + a.lines, (group + 1) * a.images * (a.out_height + 1) - 1);
    begin = a.chunks * static_cast<int>(blockIdx.y) / a.splits;
    end = a.chunks * (static_cast<int>(blockIdx.y) + 1) / a.splits;
  }
};

// An output pixel.
struct Coord {
  int image, row, column;
};

// The output pixel at a position, image -1 for zeros. line: that of position 0.
__device__ inline Coord coord_at(const HaloArgs& a, int line, int position) {
  const int down = static_cast<int>(__umulhi(static_cast<uint32_t>(position), a.pitch_inverse));
  const int column = position - down * a.pitch, at = line + down;
  if (at < 0 || column >= a.out_width) return {-1, 0, 0};
  const int image = static_cast<int>(__umulhi(static_cast<uint32_t>(at), a.height_inverse));
  const int row = at - image * (a.out_height + 1);
  return {row < a.out_height && image < a.batch ? image : -1, row, column};
}

// A block's copies, in vectors of 16 bytes. Adjacent threads copy adjacent channels.
template <typename T, int kIndex, int kChunk, int kStride>
struct HaloLoad {
  static constexpr HaloTile kTile = kHaloTiles[kIndex];
  static constexpr int kVectors = kChunk / 8, kAtOnce = kTile.threads() / kVectors, kRows = kTile.channels() / kAtOnce;
  const T *x, *next;  // next: this thread's first vector of the next step's filters
  const HaloArgs& a;
  const HaloBlock<kIndex>& block;
  uint32_t input, filters;
  int vector, first_row;
  int tap = 0, rows;  // rows: filters that the block has
  int64_t filter_stride;  // elements between two filters of this thread

  __device__ HaloLoad(const T* x_, const T* weight_, const HaloArgs& args, const HaloBlock<kIndex>& b, uint32_t shared)
      : x(x_), a(args), block(b), input(shared), filters(shared + input_bytes(kTile, args)) {
    vector = threadIdx.x % kVectors, first_row = threadIdx.x / kVectors;
    rows = a.out_channels - block.channel;
    const int64_t filter = int64_t{9} * a.channels;
    next = weight_ + (block.channel + first_row) * filter + block.begin * kChunk + vector * 8;
    filter_stride = kAtOnce * filter;
  }

  __device__ uint32_t input_of(int chunk) const {
    return input + ((chunk - block.begin) & 1) * kVectors * plane_bytes(kTile.positions, a.pitch, kStride);
  }
  __device__ uint32_t stage(int n) const { return filters + n * filter_bytes(kTile, kChunk); }

  // Number of the input pixel at a position, -1 for zeros.
  __device__ int pixel_at(int position) const {
    int row_of = 0, column_of = 0;  // parity of row and column
    if constexpr (kStride == 2) {
      constexpr int kRuns = 4;
      const int run = run_positions(kTile.positions, a.pitch);
#pragma unroll
      for (int i = 1; i < kRuns; ++i)
        if (position >= run) position -= run, row_of = i / 2, column_of = i % 2;
    }
    if (position == 0) return -1;
    const Coord p = coord_at(a, block.first - 1, position - 1);
    const int row = p.row * kStride + row_of, column = p.column * kStride + column_of;
    if (p.image < 0 || (kStride == 2 && (row >= a.height || column >= a.width))) return -1;
    return (p.image * a.height + row) * a.width + column;
  }

  __device__ void load_input(int chunk) const {
    const uint32_t to = input_of(chunk) + vector * plane_bytes(kTile.positions, a.pitch, kStride);
    const int channel = chunk * kChunk + vector * 8;
#pragma unroll 2
    for (int p = first_row; p < halo_positions(kTile.positions, a.pitch, kStride); p += kAtOnce) {
      const int pixel = pixel_at(p);
      ptx::cp_async(to + p * 16, x + (int64_t{max(pixel, 0)} * a.channels + channel), pixel < 0 ? 0 : 16);
    }
  }

  // Copies the filters of the next step into stage n. Steps run over taps, then channel chunks.
  __device__ void load_filters(int n) {
    const uint32_t to = stage(n) + vector * filter_plane_bytes(kTile) + first_row * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      ptx::cp_async(to + i * kAtOnce * 16, next + i * filter_stride, first_row + i * kAtOnce < rows ? 16 : 0);
    next += a.channels;
    if (++tap == 9) tap = 0, next += kChunk - 9 * a.channels;
  }
};

// Calls f for every vector of the output tile, with its address in shared memory and its offset in the tensor, -1 if it
// has none.
template <int kIndex, typename F>
__device__ void for_each_output(const HaloArgs& a, const HaloBlock<kIndex>& block, uint32_t tile, F f) {
  constexpr HaloTile kTile = kHaloTiles[kIndex];
  constexpr int kVectors = kTile.channels() / 8, kAtOnce = kTile.threads() / kVectors;
  const int vector = threadIdx.x % kVectors, channel = block.channel + vector * 8;
  const int positions = channel < a.out_channels ? (block.last - block.first) * a.pitch : 0;
#pragma unroll 2
  for (int p = threadIdx.x / kVectors; p < kTile.positions; p += kAtOnce) {
    const Coord at = p < positions ? coord_at(a, block.first, p) : Coord{-1, 0, 0};
    const int pixel = (at.image * a.out_height + at.row) * a.out_width + at.column;
    f(tile + p * output_pitch(kTile) + vector * 16, at.image < 0 ? -1 : int64_t{pixel} * a.out_channels + channel);
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
  constexpr int kAhead = kTile.stages - 2;  // wgmma reads one stage and may still read the one before
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::smem_address(shared);
  const HaloBlock<kIndex> block(a);
  HaloLoad<T, kIndex, kChunk, kStride> load(x, weight, a, block, memory);
  const uint32_t tile = load.stage(kTile.stages);
  const int steps = 9 * (block.end - block.begin);

  load.load_input(block.begin);
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    load.load_filters(s);
    ptx::cp_async_commit();
  }
  if (residual != nullptr)
    for_each_output<kIndex>(a, block, tile, [&](uint32_t to, int64_t at) {
      ptx::cp_async(to, at < 0 ? residual : residual + at, at < 0 ? 0 : 16);
    });

  const int warp = threadIdx.x / 32;
  float scale_shift[4];
  load_scale_shift(scale_shift, scale, shift, block.channel, a.out_channels);

  float acc[kTile.positions / 2];
  const uint32_t plane = plane_bytes(kTile.positions, a.pitch, kStride);
  const uint64_t filters = ptx::matrix_descriptor(load.stage(0) + warp / 4 * 64 * 16, 128, filter_plane_bytes(kTile));
  const uint64_t input = ptx::matrix_descriptor(memory, 128, plane);
  // Step s: tap (ky, kx) of `chunk`, filters in `stage`; the filters of step s + kAhead go to `next_stage`.
  int chunk = block.begin, ky = 0, kx = 0, stage = 0, next_stage = kAhead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kAhead - 1>();
    ptx::fence_async_proxy();  // this thread's copies, for the wgmma of all
    // All warps see the copies that arrived, and all have finished the wgmmas before the last.
    __syncthreads();
    const int position = tap_position(kTile.positions, a.pitch, kStride, ky, kx);
    const uint64_t desc_a = ptx::advance_descriptor(filters, stage * filter_bytes(kTile, kChunk));
    const uint64_t desc_b = ptx::advance_descriptor(input, load.input_of(chunk) - memory + position * 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
      ptx::wgmma(acc, ptx::advance_descriptor(desc_a, 2 * k * filter_plane_bytes(kTile)),
                 ptx::advance_descriptor(desc_b, 2 * k * plane), step + k, T{});
    ptx::wgmma_commit();
    if (ky == 0 && kx == 1 && chunk + 1 < block.end) load.load_input(chunk + 1);
    if (step + kAhead < steps) load.load_filters(next_stage);
    ptx::cp_async_commit();
    ptx::wgmma_wait<1>();
    if (++kx == 3) kx = 0, ++ky;
    if (ky == 3) ky = 0, ++chunk;
    if (++stage == kTile.stages) stage = 0;
    if (++next_stage == kTile.stages) next_stage = 0;
  }
  ptx::wgmma_wait<0>();
  ptx::fence_accumulators(acc);
  if (a.splits > 1 && !reduce_split_k<kTile.threads()>(acc, partial, counters, a.splits)) return;
  // The residual arrived with the first of at least nine steps: waits and barriers of later steps cover it.
  finalize<T, output_pitch(kTile)>(acc, scale_shift, residual != nullptr, a.relu, tile);
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
