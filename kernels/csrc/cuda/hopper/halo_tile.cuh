// What the 3x3 convolutions for Hopper share: a block's tile, its copies, and the main loop.
//
// GEMM: M is output channels, N the positions of a tile (conv_halo_plan.h), K taps x input channels. The input of a
// tile lies in shared memory as planes of 8 channels, 16 bytes per position. wgmma takes any 8 consecutive positions as
// 8 columns, so all nine taps read the same planes at nine addresses. Filters arrive tap by tap.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/hopper/conv_halo_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma.cuh"

namespace resnet_fast::cuda {

// Steps that filters are copied ahead: wgmma reads one stage and may still read the one before.
constexpr int halo_ahead(HaloTile t) { return t.stages - 2; }

template <HaloTile kTile>
struct HaloBlock {
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
template <typename T, HaloTile kOwnTile, int kOwnChunk, int kOwnStride>
struct HaloLoad {
  using Element = T;
  static constexpr HaloTile kTile = kOwnTile;
  static constexpr int kChunk = kOwnChunk, kStride = kOwnStride;
  static constexpr int kVectors = kChunk / 8, kAtOnce = kTile.threads() / kVectors, kRows = kTile.channels() / kAtOnce;
  // Filters in shared memory: bytes of a stage, and from 16 of its input channels to the next; how wgmma reads them.
  static constexpr int kFilterBytes = filter_bytes(kTile, kChunk), kFilterStep = 2 * filter_plane_bytes(kTile);
  static constexpr int kTransposed = 0;
  const T *x, *next;  // next: this thread's first vector of the next step's filters
  const HaloArgs& a;
  const HaloBlock<kTile>& block;
  uint32_t input, filters;  // addresses in shared memory
  int vector, first_row;
  int tap = 0, rows;  // rows: filters that the block has
  int64_t filter_stride;  // elements between two filters of this thread

  __device__ HaloLoad(const T* x_, const T* weight_, const HaloArgs& args, const HaloBlock<kTile>& b, uint32_t shared)
      : x(x_), a(args), block(b), input(shared), filters(shared + input_bytes(kTile, args)) {
    vector = threadIdx.x % kVectors, first_row = threadIdx.x / kVectors;
    rows = a.out_channels - block.channel;
    const int64_t filter = int64_t{9} * a.channels;
    next = weight_ + (block.channel + first_row) * filter + block.begin * kChunk + vector * 8;
    filter_stride = kAtOnce * filter;
  }

  __device__ uint32_t input_of(int chunk) const {
    return input + ((chunk - block.begin) & 1) * kVectors * plane_bytes(kTile.positions, a.pitch, kStride, kChunk);
  }
  __device__ uint32_t stage(int n) const { return filters + n * kFilterBytes; }

  // wgmma's descriptor of this warpgroup's filters in stage 0.
  __device__ uint64_t filter_descriptor() const {
    return ptx::matrix_descriptor(stage(0) + threadIdx.x / 128 * 64 * 16, 128, filter_plane_bytes(kTile));
  }

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

  __device__ void load_input(int chunk) const { load_halo(x, input_of(chunk), chunk); }

  // Copies a chunk of the halo of an image to `memory`.
  __device__ void load_halo(const T* image, uint32_t memory, int chunk) const {
    const uint32_t to = memory + vector * plane_bytes(kTile.positions, a.pitch, kStride, kChunk);
    const int channel = chunk * kChunk + vector * 8;
#pragma unroll 2
    for (int p = first_row; p < halo_positions(kTile.positions, a.pitch, kStride); p += kAtOnce) {
      const int pixel = pixel_at(p);
      ptx::cp_async(to + p * 16, image + (int64_t{max(pixel, 0)} * a.channels + channel), pixel < 0 ? 0 : 16);
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
template <HaloTile kTile, typename F>
__device__ void for_each_output(const HaloArgs& a, const HaloBlock<kTile>& block, uint32_t tile, F f) {
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

// Starts the first copies of a block: its first chunk of input with the filters of step 0, then those of the next
// steps.
template <typename Load>
__device__ void halo_start(Load& load) {
  load.load_input(load.block.begin);
#pragma unroll
  for (int s = 0; s < halo_ahead(Load::kTile); ++s) {
    load.load_filters(s);
    ptx::cp_async_commit();
  }
}

// acc = the convolution of a block, behind halo_start. `multiplying(chunk, tap)` is called while wgmma works on that
// step; what it writes is seen by the steps of the next chunk.
template <typename Load, typename F>
__device__ void halo_mainloop(float (&acc)[Load::kTile.positions / 2], Load& load, F multiplying) {
  constexpr HaloTile kTile = Load::kTile;
  constexpr int kChunk = Load::kChunk, kStride = Load::kStride, kAhead = halo_ahead(kTile);
  const HaloArgs& a = load.a;
  const int steps = 9 * (load.block.end - load.block.begin);
  const uint32_t plane = plane_bytes(kTile.positions, a.pitch, kStride, kChunk);
  const uint64_t filters = load.filter_descriptor();
  const uint64_t input = ptx::matrix_descriptor(load.input, 128, plane);
  // Step s: tap (ky, kx) of `chunk`, filters in `stage`; the filters of step s + kAhead go to `next_stage`.
  int chunk = load.block.begin, ky = 0, kx = 0, stage = 0, next_stage = kAhead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kAhead - 1>();
    ptx::fence_async_proxy();  // this thread's copies, for the wgmma of all
    // All warps see the copies that arrived, and all have finished the wgmmas before the last.
    __syncthreads();
    const int position = tap_position(kTile.positions, a.pitch, kStride, ky, kx);
    const uint64_t desc_a = ptx::advance_descriptor(filters, stage * Load::kFilterBytes);
    const uint64_t desc_b = ptx::advance_descriptor(input, load.input_of(chunk) - load.input + position * 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k)
      ptx::wgmma<Load::kTransposed>(acc, ptx::advance_descriptor(desc_a, k * Load::kFilterStep),
                                    ptx::advance_descriptor(desc_b, 2 * k * plane), step + k, typename Load::Element{});
    ptx::wgmma_commit();
    if (ky == 0 && kx == 1 && chunk + 1 < load.block.end) load.load_input(chunk + 1);
    if (step + kAhead < steps) load.load_filters(next_stage);
    ptx::cp_async_commit();
    multiplying(chunk, 3 * ky + kx);
    ptx::wgmma_wait<1>();
    if (++kx == 3) kx = 0, ++ky;
    if (ky == 3) ky = 0, ++chunk;
    if (++stage == kTile.stages) stage = 0;
    if (++next_stage == kTile.stages) next_stage = 0;
  }
  ptx::wgmma_wait<0>();
  ptx::fence_accumulators(acc);
}

}  // namespace resnet_fast::cuda
