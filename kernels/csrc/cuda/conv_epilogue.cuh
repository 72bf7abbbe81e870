// The end of the convolution: sums of the warps come together in shared memory, those of split blocks through global
// memory, always in the same order; then scale, shift, residual and ReLU, 16 bytes a thread and access.
#pragma once

#include "conv_load.cuh"

namespace resnet_fast::cuda {

// Adds the sums of the warps that share a part and leaves them in rows of pixels, sum_pitch() floats apart: 8 more than a
// multiple of 16, so that the four rows a quarter of a warp writes at once fall into different banks.
template <int kIndex, typename Sums>
__device__ void gather_sums(const Sums& sums, float* shared, const ConvArgs& a, int warp_m, int warp_n, int warp_k,
                            int active) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int lane = threadIdx.x % 32;
  float* mine = shared + (warp_m * a.warp_rows + lane / 4) * kTile.sum_pitch() + warp_n * kTile.nt * 8 + lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < kTile.warps_k; ++k) {
    if (k == warp_k) {
#pragma unroll
      for (int i = 0; i < kTile.mt; ++i) {
        if (i >= active) break;
#pragma unroll
        for (int j = 0; j < kTile.nt; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float2* to = reinterpret_cast<float2*>(mine + (16 * i + 8 * h) * kTile.sum_pitch() + 8 * j);
            float2 v = {sums[i][j][2 * h], sums[i][j][2 * h + 1]};
            if (k > 0) v = {to->x + v.x, to->y + v.y};
            *to = v;
          }
        }
      }
    }
    __syncthreads();
  }
}

// Calls each(row, column) for this thread's pieces of four channels of the block's pixels.
template <int kIndex, typename Each>
__device__ void for_quads(const ConvBlock& block, Each each) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  constexpr int kQuads = kTile.n() / 4;
  for (int at = threadIdx.x; at < block.rows * kQuads; at += kTile.threads()) each(at / kQuads, at % kQuads * 4);
}

// Sums of a block's part of the products come together: all but the last block to arrive leave theirs in `partial` and
// are done; the last one waits for those that are still writing and adds all in the order of the parts, so that it does
// not matter who was last. Returns whether this block has the whole sum.
template <int kIndex>
__device__ bool join_splits(float* shared, float* partial, int* counters, const ConvArgs& a, const ConvBlock& block,
                            int split) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  __shared__ int arrived;
  int* counter = counters + int64_t{blockIdx.x} * 2;
  if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
  __syncthreads();
  const int64_t size = int64_t{a.tile_pixels} * kTile.n();
  float* here = partial + int64_t{blockIdx.x} * a.splits * size;
  if (arrived != a.splits - 1) {
    for_quads<kIndex>(block, [&](int row, int column) {
      *reinterpret_cast<float4*>(here + split * size + row * kTile.n() + column) =
          *reinterpret_cast<const float4*>(shared + row * kTile.sum_pitch() + column);
    });
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(counter + 1, 1);
    return false;
  }
  if (threadIdx.x == 0)
    while (atomicAdd(counter + 1, 0) != a.splits - 1) {
    }
  __threadfence();
  __syncthreads();
  for_quads<kIndex>(block, [&](int row, int column) {
    float4& own = *reinterpret_cast<float4*>(shared + row * kTile.sum_pitch() + column);
    float4 sum = {};
    for (int s = 0; s < a.splits; ++s) {
      const float4 v =
          s == split ? own : __ldcg(reinterpret_cast<const float4*>(here + s * size + row * kTile.n() + column));
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    own = sum;
  });
  __syncthreads();
  return true;
}

template <typename T, int kIndex>
__device__ void finish(const float* shared, const float* scale, const float* shift, const T* residual, T* y,
                       const ConvArgs& a, const ConvBlock& block) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kPacks = kTile.n() / kSize;
  static_assert(kTile.threads() % kPacks == 0, "a thread keeps its channels");
  const int column = threadIdx.x % kPacks * kSize, channel = block.channel + column;
  const int count = min(kSize, a.out_channels - channel);
  if (count <= 0) return;
  float factor[kSize], summand[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    factor[e] = e < count ? scale[channel + e] : 0;
    summand[e] = e < count ? shift[channel + e] : 0;
  }
  for (int row = threadIdx.x / kPacks; row < block.rows; row += kTile.threads() / kPacks) {
    const int64_t at = (block.first + row) * a.out_channels + channel;
    const float* from = shared + row * kTile.sum_pitch() + column;
    float v[kSize];
    // Four lanes begin with the other half of their eight, so that eight lanes read from all banks.
    const int swap = kSize == 8 ? threadIdx.x / 4 % 2 * 4 : 0;
#pragma unroll
    for (int e = 0; e < kSize; e += 4) {
      const float4 quad = *reinterpret_cast<const float4*>(from + (e ^ swap));
      v[e] = quad.x, v[e + 1] = quad.y, v[e + 2] = quad.z, v[e + 3] = quad.w;
    }
    if constexpr (kSize == 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float low = swap ? v[e + 4] : v[e], high = swap ? v[e] : v[e + 4];
        v[e] = low, v[e + 4] = high;
      }
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) v[e] = fmaf(v[e], factor[e], summand[e]);
    Pack<T> pack;
    if (a.vectors) {
      if (residual != nullptr) {
        pack = *reinterpret_cast<const Pack<T>*>(residual + at);
#pragma unroll
        for (int e = 0; e < kSize; ++e) v[e] += widen(pack.value[e]);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) narrow(a.relu ? relu(v[e]) : v[e], pack.value[e]);
      *reinterpret_cast<Pack<T>*>(y + at) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (e >= count) break;
        if (residual != nullptr) v[e] += widen(residual[at + e]);
        T out;
        narrow(a.relu ? relu(v[e]) : v[e], out);
        y[at + e] = out;
      }
    }
  }
}

}  // namespace resnet_fast::cuda
