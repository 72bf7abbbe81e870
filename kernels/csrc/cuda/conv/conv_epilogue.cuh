// Epilogue of the convolution. Accumulators are in registers, in the layout of conv_mma.cuh. Warps that share a warp
// tile reduce through shared memory, split-K blocks through global memory in a fixed order. Then scale, shift, residual
// and ReLU. Groups of four lanes transpose what they load and store, 16 bytes each.
#pragma once

#include <type_traits>

#include "cuda/conv/conv_load.cuh"

namespace resnet_fast::cuda {

// Warp tile: pixels first .. first + rows - 1 of the block, in `active` runs of 16 (the same number in all warps; the
// last runs may hold no pixel), the n-th slice of its channels, the k-th slice of k.
struct ConvWarp {
  int first, rows, active, n, k;
};

template <int kIndex>
__device__ ConvWarp conv_warp(const ConvBlock& block) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int warp = threadIdx.x / 32, m = warp % kTile.warps_m;
  const int active = (block.rows + 16 * kTile.warps_m - 1) / (16 * kTile.warps_m);
  return {m * 16 * active, min(block.rows - m * 16 * active, 16 * active), active, warp / kTile.warps_m % kTile.warps_n,
          warp / (kTile.warps_m * kTile.warps_n)};
}

// What a warp finalizes: `rows` pixels from pixel `first` of the batch on, channels from `channel` on.
struct ConvOutput {
  int first, rows, channel;
};

// Two warps that share a warp tile exchange halves: each adds the other's accumulators of one half of the pixels to its
// own and keeps that half, first in acc.
template <int kIndex, typename Acc>
__device__ ConvOutput reduce_warps(Acc& acc, unsigned char* memory, const ConvBlock& block, const ConvWarp& warp) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  static_assert(kTile.warps_k <= 2, "at most two warps share a warp tile");
  const int channel = block.channel + warp.n * kTile.nt * 8;
  // The operands are no longer needed: their space is free.
  ptx::cp_async_wait<0>();
  __syncthreads();
  if constexpr (kTile.warps_k == 1) return {block.first + warp.first, warp.rows, channel};
  constexpr int kReducedMt = kTile.reduced_mt(), kSize = kReducedMt * kTile.nt * 32,
                kWarpStride = kTile.warps_m * kTile.warps_n * kSize;
  // A lane reads exactly what the same lane of the partner warp wrote: no bank conflicts.
  float4* sent = reinterpret_cast<float4*>(memory) + threadIdx.x / 32 * kSize + threadIdx.x % 32;
  const float4* received = sent + (warp.k == 0 ? kWarpStride : -kWarpStride);
#pragma unroll
  for (int i = 0; i < kTile.mt; ++i) {
    if (i >= warp.active || (i < kReducedMt) == (warp.k == 0)) continue;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float (&v)[4] = acc[i][j];
      sent[(i % kReducedMt * kTile.nt + j) * 32] = {v[0], v[1], v[2], v[3]};
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kReducedMt; ++i) {
    const int own = warp.k == 0 ? i : i + kReducedMt;
    if (own >= warp.active || own >= kTile.mt) continue;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float4 v = received[(i * kTile.nt + j) * 32];
      float (&own_acc)[4] = acc[i][j];
      if (i + kReducedMt < kTile.mt && warp.k != 0) {
#pragma unroll
        for (int e = 0; e < 4; ++e) own_acc[e] = acc[min(i + kReducedMt, kTile.mt - 1)][j][e];
      }
      own_acc[0] += v.x, own_acc[1] += v.y, own_acc[2] += v.z, own_acc[3] += v.w;
    }
  }
  const int skipped = warp.k * 16 * kReducedMt;
  return {block.first + warp.first + skipped, min(warp.rows - skipped, 16 * kReducedMt), channel};
}

// Reduces the accumulators of the split-K blocks of an output tile. All but the last block to arrive store theirs in
// `partial` and are done. The last waits for the stores, adds all in the order of the splits, whichever block it is,
// and resets the counters to zero for the next launch on the stream. Returns whether this block holds the whole sum.
template <int kIndex, typename Acc>
__device__ bool reduce_split_k(Acc& acc, float* partial, int* counters, const ConvArgs& a, const ConvOutput& output,
                               int split) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  int* counter = counters + int64_t{blockIdx.x} * 2;
  const bool early = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) != a.splits - 1);
  constexpr int kSize = kTile.acc_floats() / 4;
  float4* partials = reinterpret_cast<float4*>(partial) + int64_t{blockIdx.x} * a.splits * kSize +
                     threadIdx.x / 32 * (kTile.reduced_mt() * kTile.nt * 32) + threadIdx.x % 32;
  // Uniform across the warp, and the shuffle tells the compiler so: it keeps the lanes converged for the exchanges
  // below.
  const int runs = __shfl_sync(~0u, (output.rows + 15) / 16, 0);
  if (__any_sync(~0u, early)) {
#pragma unroll
    for (int i = 0; i < kTile.reduced_mt(); ++i) {
      if (i >= runs) break;
#pragma unroll
      for (int j = 0; j < kTile.nt; ++j) {
        const float (&v)[4] = acc[i][j];
        partials[split * kSize + (i * kTile.nt + j) * 32] = {v[0], v[1], v[2], v[3]};
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(counter + 1, 1);
    return false;
  }
  if (threadIdx.x == 0) {
    while (atomicAdd(counter + 1, 0) != a.splits - 1) {
    }
    // No other block needs the counters any more.
    atomicExch(counter, 0);
    atomicExch(counter + 1, 0);
  }
  __threadfence();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile.reduced_mt(); ++i) {
    if (i >= runs) break;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      float (&v)[4] = acc[i][j];
      float4 sum = {};
#pragma unroll 1
      for (int s = 0; s < a.splits; ++s) {
        const float4 split_acc =
            s == split ? float4{v[0], v[1], v[2], v[3]} : __ldcg(partials + s * kSize + (i * kTile.nt + j) * 32);
        sum = {sum.x + split_acc.x, sum.y + split_acc.y, sum.z + split_acc.z, sum.w + split_acc.w};
      }
      v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
    }
  }
  return true;
}

// Transposes a 4x4 matrix that four lanes hold a row each of.
__device__ inline void transpose4(uint32_t (&v)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool high = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      // The low lane gives its second element, the high lane its first.
      const uint32_t given = high ? v[i] : v[i + distance];
      const uint32_t taken = __shfl_xor_sync(~0u, given, distance);
      (high ? v[i] : v[i + distance]) = taken;
    }
  }
}

// Applies scale, shift, residual and ReLU to a lane's accumulators.
template <int kIndex, typename Acc>
class ScaleShiftRelu {
  static constexpr ConvTile kTile = kConvTiles[kIndex];

 public:
  // scale_shift: in shared memory, scale from the warp's first channel on, shift n() floats behind it.
  __device__ ScaleShiftRelu(const Acc& acc, const float* scale_shift, bool relu) : acc_(acc), relu_(relu) {
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float* lane_scale = scale_shift + 8 * j + threadIdx.x % 4 * 2;
      scale_[j] = *reinterpret_cast<const float2*>(lane_scale);
      shift_[j] = *reinterpret_cast<const float2*>(lane_scale + kTile.n());
    }
  }

  // Two adjacent channels of the j-th 8, of row 8 h + lane / 4 of the i-th 16 pixels; r: their residual.
  __device__ float2 operator()(int i, int j, int h, float2 r) const {
    const float low = fmaf(acc_[i][j][2 * h], scale_[j].x, shift_[j].x) + r.x;
    const float high = fmaf(acc_[i][j][2 * h + 1], scale_[j].y, shift_[j].y) + r.y;
    return {relu_ ? relu(low) : low, relu_ ? relu(high) : high};
  }

 private:
  const Acc& acc_;
  float2 scale_[kTile.nt], shift_[kTile.nt];
  bool relu_;
};

// Element by element: odd channels, unaligned tensors.
template <typename T, int kIndex, typename Epilogue>
__device__ void store_scalars(const Epilogue& epilogue, const T* residual, T* y, const ConvArgs& a,
                              const ConvOutput& output) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTile.reduced_mt(); ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * i + 8 * h + lane / 4;
#pragma unroll
      for (int j = 0; j < kTile.nt; ++j) {
        const int channel = output.channel + 8 * j + lane % 4 * 2;
        const int64_t at = int64_t{output.first + row} * a.out_channels + channel;
        const bool low = row < output.rows && channel < a.out_channels;
        const bool high = row < output.rows && channel + 1 < a.out_channels;
        float2 r = {};
        if (residual != nullptr) r = {low ? widen(residual[at]) : 0, high ? widen(residual[at + 1]) : 0};
        const float2 z = epilogue(i, j, h, r);
        if (low) narrow(z.x, y[at]);
        if (high) narrow(z.y, y[at + 1]);
      }
    }
  }
}

// float32: four lanes store 32 contiguous bytes, a whole sector.
template <int kIndex, typename Epilogue>
__device__ void store_vectors(const Epilogue& epilogue, const float* residual, float* y, const ConvArgs& a,
                              const ConvOutput& output) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTile.reduced_mt(); ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * i + 8 * h + lane / 4;
#pragma unroll
      for (int j = 0; j < kTile.nt; ++j) {
        const int channel = output.channel + 8 * j + lane % 4 * 2;
        if (row >= output.rows || channel >= a.out_channels) continue;
        const int64_t at = int64_t{output.first + row} * a.out_channels + channel;
        const float2 r = residual != nullptr ? *reinterpret_cast<const float2*>(residual + at) : float2{};
        *reinterpret_cast<float2*>(y + at) = epilogue(i, j, h, r);
      }
    }
  }
}

// 16 bits: four lanes hold two channels each of four vectors of eight channels: four adjacent vectors or, in narrow
// tiles, two of each of two pixels. After the transpose each lane holds a whole vector. Invalid rows take part: the
// exchange needs all lanes.
template <int kIndex, typename T, typename Epilogue>
__device__ void store_vectors(const Epilogue& epilogue, const T* residual, T* y, const ConvArgs& a,
                              const ConvOutput& output) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  constexpr ConvTile kTile = kConvTiles[kIndex];
  constexpr int kAcross = kTile.nt >= 4 ? 4 : 2;
  static_assert(kTile.nt % kAcross == 0);
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < kTile.reduced_mt(); ++i) {
#pragma unroll
    for (int group = 0; group < kTile.nt / 2; ++group) {
      const auto tile_of = [&](int vector) { return kAcross == 4 ? group / 2 * 4 + vector : vector % 2; };
      const auto half_of = [&](int vector) { return kAcross == 4 ? group % 2 : vector / 2; };
      const int row = 16 * i + 8 * half_of(quad) + lane / 4, channel = output.channel + 8 * tile_of(quad);
      const bool valid = row < output.rows && channel < a.out_channels;
      const int64_t at = int64_t{output.first + row} * a.out_channels + channel;
      uint32_t v[4] = {};
      if (residual != nullptr) {
        const uint4 r = ptx::load_predicated(valid, residual + at);
        v[0] = r.x, v[1] = r.y, v[2] = r.z, v[3] = r.w;
        transpose4(v);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float2 z = epilogue(i, tile_of(p), half_of(p), widen2(reinterpret_cast<const Two&>(v[p])));
        v[p] = narrow2(z.x, z.y, T{});
      }
      transpose4(v);
      ptx::store_predicated(valid, y + at, {v[0], v[1], v[2], v[3]});
    }
  }
}

template <typename T, int kIndex, typename Acc>
__device__ void finalize(const Acc& acc, const float* scale_shift, const T* residual, T* y, const ConvArgs& a,
                         const ConvOutput& output) {
  const ScaleShiftRelu<kIndex, Acc> epilogue(acc, scale_shift, a.relu);
  if (a.vectorized) {
    store_vectors<kIndex>(epilogue, residual, y, a, output);
  } else {
    store_scalars<T, kIndex>(epilogue, residual, y, a, output);
  }
}

}  // namespace resnet_fast::cuda
