// y = conv2d([relu](scale * x + shift), weight, stride, padding=1) + bias, 3x3, NHWC, 16 bits, for sm_90a, with partial
// statistics of y: a convolution between two batch norms in training.
//
// The halo of a tile is normalised once, in shared memory, by the threads that copied it, while wgmma works on the
// halo before. Statistics are taken of the accumulators: mean, then squared deviations from it, so that nothing
// cancels.
#pragma once

#include "cuda/hopper/training/prologue.cuh"

namespace resnet_fast::cuda {

// [relu](scale * x + shift) of the copied halo of a chunk, in place. scale_shift: [2, channels]; null, with relu false:
// nothing to do.
template <typename Load>
__device__ void normalize_halo(const Load& load, const float* scale_shift, int chunk, int part, int parts) {
  using T = typename Load::Element;
  if (scale_shift == nullptr && !load.a.relu) return;
  const int channel = chunk * Load::kChunk + load.vector * 8;
  const Floats8 scale = scale_shift == nullptr ? Floats8(1.0f) : Floats8(scale_shift + channel);
  const Floats8 shift = scale_shift == nullptr ? Floats8(0.0f) : Floats8(scale_shift + load.a.channels + channel);
  // ReLU follows rounding, which keeps order and zero; it keeps NaN.
  const vec2_of<T> least = round2(load.a.relu ? float2{0, 0} : float2{-INFINITY, -INFINITY}, T{});
  const uint32_t plane = load.input_of(chunk) +
                         load.vector * plane_bytes(Load::kTile.positions, load.a.pitch, Load::kStride, Load::kChunk);
  for_each_copied(load, part, parts, [&](int position) {
    float4 pack = ptx::load_shared(plane + position * 16);
    vec2_of<T>* v = reinterpret_cast<vec2_of<T>*>(&pack);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = widen2(v[i]);
      v[i] = __hmax2_nan(round2(float2{fmaf(w.x, scale.value[2 * i], shift.value[2 * i]),
                                       fmaf(w.y, scale.value[2 * i + 1], shift.value[2 * i + 1])},
                                T{}),
                         least);
    }
    ptx::store_shared(plane + position * 16, pack);
  });
}

// Which positions of a tile are pixels. The lanes of a warp look at 32 positions at once.
template <HaloTile kTile>
struct PixelBits {
  uint32_t words[(kTile.positions + 31) / 32];

  __device__ PixelBits(const HaloArgs& a, const HaloBlock<kTile>& block) {
    const int positions = (block.last - block.first) * a.pitch;
#pragma unroll
    for (int i = 0; i < (kTile.positions + 31) / 32; ++i) {
      const int p = 32 * i + threadIdx.x % 32;
      words[i] = __ballot_sync(~0u, p < positions && coord_at(a, block.first, p).image >= 0) >> 2 * (threadIdx.x % 4);
    }
  }

  // Whether acc[4 * j + e] and acc[4 * j + 2 + e] of this thread, of position 8 * j + 2 * (lane % 4) + e, are of a
  // pixel.
  __device__ bool inside(int j, int e) const { return (words[j / 4] >> (8 * (j % 4) + e) & 1) != 0; }
};

// Sum over the four threads that hold a channel.
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Mean, and sum of squared deviations from it, of each of this thread's two channels over the tile's pixels, to
// partial[part, 0 and 1, channel]. The order of every sum depends on the shape alone.
template <HaloTile kTile>
__device__ void store_stats(const float (&acc)[kTile.positions / 2], const HaloArgs& a, const HaloBlock<kTile>& block,
                            float* partial) {
  const int64_t part = blockIdx.x / a.channel_blocks, rows = tile_pixels(a);
  const int64_t pixels = int64_t{a.batch} * a.out_height * a.out_width;
  const float count = static_cast<float>(min(pixels - part * rows, rows));
  const PixelBits<kTile> bits(a, block);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sums[2] = {}, squares[2] = {};  // of even and odd positions: two chains of additions
#pragma unroll
    for (int j = 0; j < kTile.positions / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[e] += bits.inside(j, e) ? acc[4 * j + 2 * i + e] : 0.0f;
    const float mean = quad_sum(sums[0] + sums[1]) / count;
#pragma unroll
    for (int j = 0; j < kTile.positions / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float d = bits.inside(j, e) ? acc[4 * j + 2 * i + e] - mean : 0.0f;
        squares[e] = fmaf(d, d, squares[e]);
      }
    const float m2 = quad_sum(squares[0] + squares[1]);
    const int channel = block.channel + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    if (threadIdx.x % 4 == 0 && channel < a.out_channels) {
      float* to = partial + part * 2 * a.out_channels + channel;
      to[0] = mean, to[a.out_channels] = m2;
    }
  }
}

// Adds the bias and rounds; the accumulators hold the result, which also goes to the output tile in shared memory.
template <typename T, HaloTile kTile>
__device__ void round_to_tile(float (&acc)[kTile.positions / 2], const float (&bias)[2], uint32_t tile) {
  constexpr int kGroups = kTile.positions / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lane_address =
      tile + (lane % 8 + lane / 16 * 8) * output_pitch(kTile) + (warp * 16 + lane / 8 % 2 * 8) * 2;
  const auto group = [&](int j, int i) {  // channel i of this thread, group j of 8 positions
    float* z = acc + 4 * j + 2 * i;
    const vec2_of<T> rounded = round2(float2{z[0] + bias[i], z[1] + bias[i]}, T{});
    const float2 stored = widen2(rounded);
    z[0] = stored.x, z[1] = stored.y;
    return reinterpret_cast<const uint32_t&>(rounded);
  };
#pragma unroll
  for (int j = 0; j + 1 < kGroups; j += 2)
    ptx::stmatrix_transposed<4>(lane_address + j * 8 * output_pitch(kTile),
                                {group(j, 0), group(j, 1), group(j + 1, 0), group(j + 1, 1)});
  if constexpr (kGroups % 2 == 1)
    ptx::stmatrix_transposed<2>(lane_address + (kGroups - 1) * 8 * output_pitch(kTile),
                                {group(kGroups - 1, 0), group(kGroups - 1, 1), 0, 0});
}

// x: [batch, height, width, channels]; scale_shift: [2, channels] or null; a.relu: of x; weight: [out_channels, 3, 3,
// channels]; bias: [out_channels] or null; y: [batch, out_height, out_width, out_channels]; partial: [tiles of the
// batch, 2, out_channels], mean and squared deviations of a tile's pixels, or null.
template <typename T, int kIndex, int kChunk, int kStride>
__global__ void __launch_bounds__(kHaloTrainingTiles[kIndex].threads(), 1)
    conv_halo_stats_kernel(const T* __restrict__ x, const float* __restrict__ scale_shift, const T* __restrict__ weight,
                           const float* __restrict__ bias, T* __restrict__ y, float* __restrict__ partial,
                           const __grid_constant__ HaloArgs a) {
#ifdef RESNET_FAST_WGMMA
  constexpr HaloTile kTile = kHaloTrainingTiles[kIndex];
  constexpr int kFirst = first_prologue_tap(kTile);
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::smem_address(shared);
  const HaloBlock<kTile> block(a);
  HaloLoad<T, kTile, kChunk, kStride> load(x, weight, a, block, memory);

  halo_start(load);
  float own_bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = block.channel + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    own_bias[i] = bias != nullptr && channel < a.out_channels ? bias[channel] : 0.0f;
  }
  ptx::cp_async_wait<halo_ahead(kTile) - 1>();
  normalize_halo(load, scale_shift, block.begin, 0, 1);

  float acc[kTile.positions / 2];
  halo_mainloop(acc, load, [&](int chunk, int tap) {
    if (tap >= kFirst && chunk + 1 < block.end) normalize_halo(load, scale_shift, chunk + 1, tap - kFirst, 9 - kFirst);
  });
  __syncthreads();  // wgmma has read the operands, whose place the tile takes
  round_to_tile<T, kTile>(acc, own_bias, memory);
  if (partial != nullptr) store_stats(acc, a, block, partial);
  __syncthreads();
  for_each_output(a, block, memory, [&](uint32_t from, int64_t at) {
    if (at >= 0) *reinterpret_cast<float4*>(y + at) = ptx::load_shared(from);
  });
#else
  __trap();  // not sm_90a: the launcher checks the architecture
#endif
}

}  // namespace resnet_fast::cuda
