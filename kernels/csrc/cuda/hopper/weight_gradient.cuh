// dw[k, tap, c] = sum over p of dy[p, k] [relu](scale x + shift)[p + tap, c], 3x3, NHWC, 16 bits, for sm_90a, where
// dy = a grad + b (y - mean) + constant or grad.
//
// GEMM: M is output channels, N input channels, K positions (weight_gradient_plan.h). dy and x of a tile lie in shared
// memory as planes of 8 channels, 16 bytes per position: 8 positions of a plane are a core matrix of wgmma with
// channels contiguous, so all nine taps read one tile of x at nine addresses. dy goes through registers, transposed by
// ldmatrix: a warp reads it once for the products of its warpgroup, and each warp at a distance of its own.
//
// Zeros of dy stand at the padding, and so do zeros of x. A NaN or infinity in either may reach all taps of its
// channel.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/hopper/weight_gradient_plan.h"
#include "cuda/ptx.cuh"
#include "cuda/ptx_wgmma_registers.cuh"

namespace resnet_fast::cuda {

// A block's tiles: their copies to shared memory and the prologue there. Both go over the same vectors of 16 bytes in
// the same threads. Adjacent threads take adjacent channels.
template <typename T, int kIndex>
struct GradientTiles {
  static constexpr GradientTile kTile = kGradientTiles[kIndex];
  const T *grad, *y;
  const float* coefficients;
  const T* x;
  const float* scale_shift;
  const GradientArgs& a;
  unsigned char* shared;
  int row, column;  // first channels of the block

  __device__ float* table() const { return reinterpret_cast<float*>(shared); }
  // Offsets in shared memory.
  __device__ int stage(int n) const { return 4 * table_floats(kTile) + n * a.stage; }
  __device__ int x_of(int n) const { return stage(n) + a.x_at; }

  struct Pixel {
    bool inside;  // an output pixel; otherwise zeros stand here
    int image, row, column;
  };
  // What lies `distance` >= 0 positions behind the first of `line`. Without branches: lanes differ.
  __device__ Pixel pixel_behind(int line, int distance) const {
    const int down = static_cast<int>(__umulhi(static_cast<uint32_t>(distance), a.pitch_inverse));
    const int at = line + down, along = distance - down * a.pitch;
    const int image = static_cast<int>(__umulhi(static_cast<uint32_t>(at), a.height_inverse));
    const int row_of = at - image * (a.out_height + 1);
    const bool inside = (at >= 0) & (along < a.out_width) & (row_of < a.out_height) & (image < a.batch);
    return {inside, image, row_of, along};
  }
  // The offset of a vector, 0 if it is not of the tensor. Pixels are fewer than 2^31.
  __device__ static uint64_t offset_of(bool inside, int pixel, int channels, int channel) {
    return uint64_t{inside ? static_cast<uint32_t>(pixel) : 0} * static_cast<uint32_t>(channels) +
           (inside ? static_cast<uint32_t>(channel) : 0);
  }

  struct Start {
    int line, column;  // where a tile begins
  };
  __device__ Start start_of(int tile) const {
    const int line = tile * a.positions / a.pitch;
    return {line, tile * a.positions - line * a.pitch};
  }

  // A thread takes a vector of dy and one of x a step.
  static constexpr int kRowVectors = kTile.rows / 8, kColumnVectors = kTile.columns / 8;
  static constexpr int kRowPositions = kGradientThreads / kRowVectors;
  static constexpr int kColumnPositions = kGradientThreads / kColumnVectors;

  // Offsets of the first vectors in the planes.
  __device__ int row_vector() const {
    return threadIdx.x % kRowVectors * a.row_plane + (a.margin + threadIdx.x / kRowVectors) * 16;
  }
  __device__ int column_vector() const {
    return threadIdx.x % kColumnVectors * a.column_plane + threadIdx.x / kColumnVectors * 16;
  }

  // A bit a step: whether the vector is one of the tensor. The others are zeros, before the prologue and behind it.
  struct Valid {
    uint32_t rows, columns;
  };

  __device__ void load_step(Start start, int n, int step, Valid& valid) const {
    const uint32_t to = ptx::smem_address(shared) + stage(n);
    if (const int p = threadIdx.x / kRowVectors + step * kRowPositions; p < a.positions) {
      const int channel = row + threadIdx.x % kRowVectors * 8;
      const Pixel at = pixel_behind(start.line, start.column + p);
      const bool inside = at.inside & (channel < a.out_channels);
      const int pixel = (at.image * a.out_height + at.row) * a.out_width + at.column;
      const uint64_t offset = offset_of(inside, pixel, a.out_channels, channel);
      const uint32_t planes = to + row_vector() + step * kRowPositions * 16;
      ptx::cp_async(planes, grad + offset, inside ? 16 : 0);
      if (a.batch_norm) ptx::cp_async(planes + a.y_at, y + offset, inside ? 16 : 0);
      valid.rows |= static_cast<uint32_t>(inside) << step;
    }
    if (const int p = threadIdx.x / kColumnVectors + step * kColumnPositions; p < a.halo) {
      int position = p, row_of = 0, column_of = 0;  // parity of row and column
      if (a.stride == 2) {
        const int number = (p >= a.run) + (p >= 2 * a.run) + (p >= 3 * a.run);
        position -= number * a.run, row_of = number / 2, column_of = number % 2;
      }
      const int channel = column + threadIdx.x % kColumnVectors * 8;
      const Pixel at = pixel_behind(start.line - 2, start.column + position + a.pitch - 1);
      const int down = at.row * a.stride + row_of, along = at.column * a.stride + column_of;
      const bool inside = at.inside & (down < a.height) & (along < a.width) & (channel < a.channels);
      const uint64_t offset = offset_of(inside, (at.image * a.height + down) * a.width + along, a.channels, channel);
      ptx::cp_async(to + a.x_at + column_vector() + step * kColumnPositions * 16, x + offset, inside ? 16 : 0);
      valid.columns |= static_cast<uint32_t>(inside) << step;
    }
  }

  // Where the table holds channel i: of all vectors the first halves, then the second ones, free of bank conflicts.
  __device__ static int table_place(int i, int channels) { return i / 4 % 2 * (channels / 2) + i / 8 * 4 + i % 4; }

  // Stores the channels' coefficients, and zeros where no tile does: beside dy for the shifted copies, and past x.
  __device__ void prepare() const {
    float* to = table();
    if (a.batch_norm)
      for (int i = threadIdx.x; i < kTile.rows; i += kGradientThreads) {
        const int k = row + i;
        const bool inside = k < a.out_channels;
        const float slope = inside ? coefficients[a.out_channels + k] : 0;
        const int at = table_place(i, kTile.rows);
        to[at] = inside ? coefficients[k] : 0;
        to[kTile.rows + at] = slope;
        // Rounded to float32, far below the rounding of y to 16 bits.
        to[2 * kTile.rows + at] =
            inside ? fmaf(-slope, coefficients[3 * a.out_channels + k], coefficients[2 * a.out_channels + k]) : 0;
      }
    to += 3 * kTile.rows;
    if (a.affine || a.relu)
      for (int i = threadIdx.x; i < 2 * kTile.columns; i += kGradientThreads) {
        const int c = column + i % kTile.columns;
        to[i / kTile.columns * kTile.columns + table_place(i % kTile.columns, kTile.columns)] =
            !a.affine        ? i < kTile.columns
            : c < a.channels ? scale_shift[i / kTile.columns * a.channels + c]
                             : 0;
      }
    const auto clear = [&](int plane, int vectors) {
      for (int i = threadIdx.x; i < vectors; i += kGradientThreads)
        *reinterpret_cast<float4*>(shared + plane + i * 16) = {};
    };
    if (a.margin == 0) return;
#pragma unroll 1
    for (int n = 0; n < kTile.stages; ++n) {
      for (int v = 0; v < kTile.rows / 8; ++v) {
        const int plane = stage(n) + v * a.row_plane;
        clear(plane, a.margin);
        clear(plane + (a.margin + a.positions) * 16, a.margin);
      }
      for (int v = 0; v < kTile.columns / 8; ++v)
        clear(x_of(n) + v * a.column_plane + a.halo * 16, past_halo(kTile, a));
    }
  }

  // Of a vector's channels, from the table.
  struct Coefficients {
    float v[8];
    __device__ Coefficients(const float* at, int vector, int channels) {
      const float4 halves[2] = {reinterpret_cast<const float4*>(at)[vector],
                                reinterpret_cast<const float4*>(at + channels / 2)[vector]};
      v[0] = halves[0].x, v[1] = halves[0].y, v[2] = halves[0].z, v[3] = halves[0].w;
      v[4] = halves[1].x, v[5] = halves[1].y, v[6] = halves[1].z, v[7] = halves[1].w;
    }
  };

  __device__ static float2 pair(uint32_t bits) { return widen2(reinterpret_cast<const vec2_of<T>&>(bits)); }

  // Replaces grad by dy, and x by [relu](scale x + shift).
  __device__ void prologue(int n, Valid valid) const {
    if (a.batch_norm) {
      const int vector = threadIdx.x % kRowVectors;
      const Coefficients slope_g(table(), vector, kTile.rows), slope_y(table() + kTile.rows, vector, kTile.rows);
      const Coefficients constant(table() + 2 * kTile.rows, vector, kTile.rows);
      unsigned char* to = shared + stage(n) + row_vector();
#pragma unroll 2
      for (uint32_t left = valid.rows; left != 0; left >>= 1, to += kRowPositions * 16) {
        if (left % 2 == 0) continue;
        uint4 g = *reinterpret_cast<const uint4*>(to);
        const uint4 y_vector = *reinterpret_cast<const uint4*>(to + a.y_at);
        const auto apply = [&](uint32_t& bits, uint32_t y_bits, int i) {
          const float2 u = pair(bits), v = pair(y_bits);
          bits = narrow2(fmaf(slope_g.v[i], u.x, fmaf(slope_y.v[i], v.x, constant.v[i])),
                         fmaf(slope_g.v[i + 1], u.y, fmaf(slope_y.v[i + 1], v.y, constant.v[i + 1])), T{});
        };
        apply(g.x, y_vector.x, 0), apply(g.y, y_vector.y, 2), apply(g.z, y_vector.z, 4), apply(g.w, y_vector.w, 6);
        *reinterpret_cast<uint4*>(to) = g;
      }
    }
    if (a.affine || a.relu) {
      const int vector = threadIdx.x % kColumnVectors;
      const float* at = table() + 3 * kTile.rows;
      const Coefficients scale(at, vector, kTile.columns), shift(at + kTile.columns, vector, kTile.columns);
      unsigned char* to = shared + x_of(n) + column_vector();
#pragma unroll 2
      for (uint32_t left = valid.columns; left != 0; left >>= 1, to += kColumnPositions * 16) {
        if (left % 2 == 0) continue;
        uint4 v = *reinterpret_cast<const uint4*>(to);
        const auto apply = [&](uint32_t& bits, int i) {
          const float2 u = pair(bits);
          bits = narrow2(fmaf(scale.v[i], u.x, shift.v[i]), fmaf(scale.v[i + 1], u.y, shift.v[i + 1]), T{});
          if (a.relu) {
            const vec2_of<T> z = relu2(reinterpret_cast<const vec2_of<T>&>(bits));
            bits = reinterpret_cast<const uint32_t&>(z);
          }
        };
        apply(v.x, 0), apply(v.y, 2), apply(v.z, 4), apply(v.w, 6);
        *reinterpret_cast<uint4*>(to) = v;
      }
    }
  }
};

// Adds the products of a tile. rows: the address of this lane's row of a fragment of dy; tap: the distance in bytes of
// what a product reads in x; between: called for each group, while its products run.
template <typename T, int kIndex, typename F>
__device__ void multiply_tile(float (&acc)[kGradientTiles[kIndex].products()][kGradientTiles[kIndex].columns / 2],
                              uint32_t rows, uint64_t input, const int (&tap)[kGradientTiles[kIndex].products()],
                              int groups, F between) {
  constexpr GradientTile kTile = kGradientTiles[kIndex];
  constexpr int kStepBytes = 16 * 16;
  uint32_t dy[2][kTile.steps][4];
  const auto load = [&](uint32_t (&to)[kTile.steps][4], int group) {
#pragma unroll
    for (int s = 0; s < kTile.steps; ++s)
      ptx::ldmatrix_transposed<4>(to[s], rows + (group * kTile.steps + s) * kStepBytes);
  };
  const auto multiply = [&](const uint32_t (&by)[kTile.steps][4], int group) {
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < kTile.steps; ++s)
#pragma unroll
      for (int i = 0; i < kTile.products(); ++i)
        ptx::wgmma_transposed(acc[i], by[s],
                              ptx::advance_descriptor(input, tap[i] + (group * kTile.steps + s) * kStepBytes), T{});
    ptx::wgmma_commit();
  };
  load(dy[0], 0);
#pragma unroll 1
  for (int group = 0; group < groups; group += 2) {
    multiply(dy[0], group);
    between(group);
    ptx::wgmma_wait<1>();  // the group before has read its fragments
    load(dy[1], group + 1);
    multiply(dy[1], group + 1);
    between(group + 1);
    ptx::wgmma_wait<1>();
    if (group + 2 < groups) load(dy[0], group + 2);
  }
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kTile.products(); ++i) ptx::fence_accumulators(acc[i]);
}

// Adds the accumulators of the warpgroups in fixed order. Returns whether this warpgroup holds the sum.
template <typename T, int kIndex>
__device__ bool reduce_parts(float (&acc)[kGradientTiles[kIndex].products()][kGradientTiles[kIndex].columns / 2],
                             unsigned char* shared) {
  constexpr int kEach = kGradientTiles[kIndex].columns / 2, kCount = kGradientTiles[kIndex].accumulators();
  const int warpgroup = threadIdx.x / 128;
  float* sums = reinterpret_cast<float*>(shared) + threadIdx.x % 128;
  __syncthreads();  // all have read their tiles
  if (warpgroup > 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[((warpgroup - 1) * kCount + i) * 128] = acc[i / kEach][i % kEach];
  }
  __syncthreads();
  if (warpgroup > 0) return false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i / kEach][i % kEach] += sums[i * 128] + sums[(kCount + i) * 128];
  return true;
}

// grad, y: [batch, out_height, out_width, out_channels]; x: [batch, height, width, channels]; coefficients: a, b,
// constant and mean, [4, out_channels]; scale_shift: [2, channels]. y, coefficients and scale_shift are null where the
// arguments say that they are not applied. partial: [splits, out_channels, 3, 3, channels]. A block of grid y `s` sums
// the s-th share of the tiles.
template <typename T, int kIndex>
__global__ void __launch_bounds__(kGradientThreads, 1)
    weight_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ y, const float* __restrict__ coefficients,
                           const T* __restrict__ x, const float* __restrict__ scale_shift, float* __restrict__ partial,
                           const __grid_constant__ GradientArgs a) {
#ifdef RESNET_FAST_WGMMA
  constexpr GradientTile kTile = kGradientTiles[kIndex];
  constexpr int kProducts = kTile.products();
  extern __shared__ __align__(128) unsigned char shared[];
  const int column_block = static_cast<int>(blockIdx.x) % a.column_blocks;
  const int row_block = static_cast<int>(blockIdx.x) / a.column_blocks;
  const GradientTiles<T, kIndex> tiles = {
      grad, y, coefficients, x, scale_shift, a, shared, row_block * kTile.rows, column_block * kTile.columns};
  const int split = static_cast<int>(blockIdx.y);
  const int begin = static_cast<int>(int64_t{a.tiles} * split / a.splits);
  const int end = static_cast<int>(int64_t{a.tiles} * (split + 1) / a.splits);

  tiles.prepare();
  const int every = load_steps(kTile, a);
  typename GradientTiles<T, kIndex>::Valid valid[kTile.stages - 1] = {};
#pragma unroll
  for (int s = 0; s < kTile.stages - 1; ++s) {
    if (begin + s < end)
      for (int step = 0; step < every; ++step) tiles.load_step(tiles.start_of(begin + s), s, step, valid[s]);
    ptx::cp_async_commit();
  }
  __syncthreads();  // all see the coefficients

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  const int copy = warp * 16 / kTile.rows, plane = warp * 16 % kTile.rows / 8;
  // This lane's row of a fragment: 8 channels of a position. The matrices are two planes of 8 positions, then of 8
  // more.
  const int distance = a.margin - (tap_row(kTile, 1, 0, 0, copy) < 0 ? 0 : copy * a.shift);
  const uint32_t memory = ptx::smem_address(shared);
  const uint32_t lane_row = memory + (plane + lane / 8 % 2) * a.row_plane + (distance + lane / 16 * 8 + lane % 8) * 16;
  const uint64_t input = ptx::transposed_descriptor(memory, a.column_plane, 128);
  // Bytes to this warpgroup's part of the positions, and to the taps of its products.
  const int part = kTile.parts() == 1 ? 0 : warpgroup * a.groups * kTile.steps * 256;
  int tap[kProducts];
#pragma unroll
  for (int i = 0; i < kProducts; ++i)
    tap[i] = part + 16 * tap_position(a.positions, a.pitch, a.stride, tap_row(kTile, a.stride, warpgroup, i, 0),
                                      tap_column(i));

  float acc[kProducts][kTile.columns / 2];
#pragma unroll
  for (int i = 0; i < kProducts; ++i)
#pragma unroll
    for (int j = 0; j < kTile.columns / 2; ++j) acc[i][j] = 0;

  int stage = 0, next_stage = kTile.stages - 1;
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<kTile.stages - 2>();
    tiles.prologue(stage, valid[0]);
    ptx::fence_async_proxy();  // this thread's copies and stores, for the wgmma of all
    // All warps see the tile, and all have finished the products of the tile before.
    __syncthreads();
    const int ahead = tile + kTile.stages - 1, steps = ahead < end ? every : 0;
    const auto start = tiles.start_of(ahead);
    typename GradientTiles<T, kIndex>::Valid loaded = {};
    multiply_tile<T, kIndex>(acc, lane_row + part + tiles.stage(stage),
                             ptx::advance_descriptor(input, tiles.x_of(stage)), tap, a.groups, [&](int group) {
                               for (int step = group; step < steps; step += a.groups)
                                 tiles.load_step(start, next_stage, step, loaded);
                             });
    ptx::cp_async_commit();
#pragma unroll
    for (int s = 0; s + 2 < kTile.stages; ++s) valid[s] = valid[s + 1];
    valid[kTile.stages - 2] = loaded;
    if (++stage == kTile.stages) stage = 0;
    if (++next_stage == kTile.stages) next_stage = 0;
  }

  if constexpr (kTile.parts() > 1)
    if (!reduce_parts<T, kIndex>(acc, shared)) return;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int r = tap_row(kTile, a.stride, warpgroup, i, copy), s = tap_column(i);
    if (r < 0) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = tiles.row + plane * 8 + lane / 4 + 8 * half;
      float* to = partial + ((int64_t{split} * a.out_channels + k) * 9 + r * 3 + s) * a.channels;
#pragma unroll
      for (int j = 0; j < kTile.columns / 8; ++j) {
        const int c = tiles.column + 8 * j + lane % 4 * 2;
        if (k < a.out_channels && c < a.channels)
          *reinterpret_cast<float2*>(to + c) = {acc[i][4 * j + 2 * half], acc[i][4 * j + 2 * half + 1]};
      }
    }
  }
#else
  __trap();  // not sm_90a: the launcher checks the architecture
#endif
}

}  // namespace resnet_fast::cuda
