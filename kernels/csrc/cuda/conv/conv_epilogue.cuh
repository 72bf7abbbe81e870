// The end of the convolution. Sums stay in registers, in the layout of conv_math.cuh: those of warps that share a part
// are exchanged through shared memory, those of split blocks go through global memory and are added in a fixed order.
// Then scale, shift, residual and ReLU; lanes transpose among four of them what they read and write, 16 bytes at a
// time.
#pragma once

#include <type_traits>

#include "cuda/conv/conv_load.cuh"

namespace resnet_fast::cuda {

// A warp's part of a block: pixels `first` .. `first` + `rows` - 1 of it, in `active` runs of 16 (the same number in
// all warps, the last ones may hold no pixel), the n-th of its slices of channels and the k-th of its slices of
// products.
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

// What a warp brings to its end: `rows` pixels from `first` of all on, channels from `channel` on.
struct ConvOutput {
  int first, rows, channel;
};

// Each of two warps that share a part adds the other's sums to its own for half of the pixels, and keeps these: they
// become its first sums.
template <int kIndex, typename Sums>
__device__ ConvOutput join_warps(Sums& sums, unsigned char* memory, const ConvBlock& block, const ConvWarp& warp) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  static_assert(kTile.warps_k <= 2, "two warps share a part, or none");
  const int channel = block.channel + warp.n * kTile.nt * 8;
  // The operands were read for the last time, and their place is free.
  ptx::copy_async_wait<0>();
  __syncthreads();
  if constexpr (kTile.warps_k == 1) return {block.first + warp.first, warp.rows, channel};
  constexpr int kKept = kTile.kept(), kSize = kKept * kTile.nt * 32, kApart = kTile.warps_m * kTile.warps_n * kSize;
  // Each lane finds what it needs where its partner put it: no two lanes meet in a bank.
  float4* mine = reinterpret_cast<float4*>(memory) + threadIdx.x / 32 * kSize + threadIdx.x % 32;
  const float4* other = mine + (warp.k == 0 ? kApart : -kApart);
#pragma unroll
  for (int i = 0; i < kTile.mt; ++i) {
    if (i >= warp.active || (i < kKept) == (warp.k == 0)) continue;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float (&v)[4] = sums[i][j];
      mine[(i % kKept * kTile.nt + j) * 32] = {v[0], v[1], v[2], v[3]};
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int own = warp.k == 0 ? i : i + kKept;
    if (own >= warp.active || own >= kTile.mt) continue;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float4 v = other[(i * kTile.nt + j) * 32];
      float (&sum)[4] = sums[i][j];
      if (i + kKept < kTile.mt && warp.k != 0) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = sums[min(i + kKept, kTile.mt - 1)][j][e];
      }
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
  }
  const int skipped = warp.k * 16 * kKept;
  return {block.first + warp.first + skipped, min(warp.rows - skipped, 16 * kKept), channel};
}

// Sums of a block's part of the products come together: all but the last block to arrive leave theirs in `partial` and
// are done; the last one waits for those that are still writing and adds all in the order of the parts, so that it does
// not matter who was last, and leaves the counters at zero, as it found them: a later launch on the same stream may
// take them again. Returns whether this block has the whole sum.
template <int kIndex, typename Sums>
__device__ bool join_splits(Sums& sums, float* partial, int* counters, const ConvArgs& a, const ConvOutput& output,
                            int split) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  int* counter = counters + int64_t{blockIdx.x} * 2;
  const bool early = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) != a.splits - 1);
  constexpr int kSize = kTile.kept_floats() / 4;
  float4* here = reinterpret_cast<float4*>(partial) + int64_t{blockIdx.x} * a.splits * kSize +
                 threadIdx.x / 32 * (kTile.kept() * kTile.nt * 32) + threadIdx.x % 32;
  // The same in all lanes, and this way the compiler knows: it keeps them together for the exchanges to come.
  const int runs = __shfl_sync(~0u, (output.rows + 15) / 16, 0);
  if (__any_sync(~0u, early)) {
#pragma unroll
    for (int i = 0; i < kTile.kept(); ++i) {
      if (i >= runs) break;
#pragma unroll
      for (int j = 0; j < kTile.nt; ++j) {
        const float (&v)[4] = sums[i][j];
        here[split * kSize + (i * kTile.nt + j) * 32] = {v[0], v[1], v[2], v[3]};
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
    // All others are through with both.
    atomicExch(counter, 0);
    atomicExch(counter + 1, 0);
  }
  __threadfence();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile.kept(); ++i) {
    if (i >= runs) break;
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      float (&v)[4] = sums[i][j];
      float4 sum = {};
#pragma unroll 1
      for (int s = 0; s < a.splits; ++s) {
        const float4 part =
            s == split ? float4{v[0], v[1], v[2], v[3]} : __ldcg(here + s * kSize + (i * kTile.nt + j) * 32);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      }
      v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
    }
  }
  return true;
}

// Four lanes hold a 4x4 matrix, a row each: they get a column each.
__device__ inline void transpose4(uint32_t (&v)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2) {
    const bool high = lane & apart;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & apart) continue;
      // One keeps the first and gives the second, the other the reverse.
      const uint32_t given = high ? v[i] : v[i + apart];
      const uint32_t taken = __shfl_xor_sync(~0u, given, apart);
      (high ? v[i] : v[i + apart]) = taken;
    }
  }
}

// Scale and shift of a lane's channels, and what they make of its sums.
template <int kIndex, typename Sums>
class Affine {
  static constexpr ConvTile kTile = kConvTiles[kIndex];

 public:
  // constants: scale, and n() floats on shift, from the warp's first channel on, in shared memory.
  __device__ Affine(const Sums& sums, const float* constants, bool bounded) : sums_(sums), relu_(bounded) {
#pragma unroll
    for (int j = 0; j < kTile.nt; ++j) {
      const float* here = constants + 8 * j + threadIdx.x % 4 * 2;
      scale_[j] = *reinterpret_cast<const float2*>(here);
      shift_[j] = *reinterpret_cast<const float2*>(here + kTile.n());
    }
  }

  // The two neighbours of 8 h rows down from the i-th 16, and of the j-th 8 channels; r is added to them.
  __device__ float2 operator()(int i, int j, int h, float2 r) const {
    const float low = fmaf(sums_[i][j][2 * h], scale_[j].x, shift_[j].x) + r.x;
    const float high = fmaf(sums_[i][j][2 * h + 1], scale_[j].y, shift_[j].y) + r.y;
    return {relu_ ? relu(low) : low, relu_ ? relu(high) : high};
  }

 private:
  const Sums& sums_;
  float2 scale_[kTile.nt], shift_[kTile.nt];
  bool relu_;
};

// Element by element, for odd channels and unaligned tensors.
template <typename T, int kIndex, typename Finished>
__device__ void write_elements(const Finished& finished, const T* residual, T* y, const ConvArgs& a,
                               const ConvOutput& output) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTile.kept(); ++i) {
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
        const float2 z = finished(i, j, h, r);
        if (low) narrow(z.x, y[at]);
        if (high) narrow(z.y, y[at + 1]);
      }
    }
  }
}

// float32: four lanes have 32 bytes in a row, a whole sector.
template <int kIndex, typename Finished>
__device__ void write_pieces(const Finished& finished, const float* residual, float* y, const ConvArgs& a,
                             const ConvOutput& output) {
  constexpr ConvTile kTile = kConvTiles[kIndex];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTile.kept(); ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * i + 8 * h + lane / 4;
#pragma unroll
      for (int j = 0; j < kTile.nt; ++j) {
        const int channel = output.channel + 8 * j + lane % 4 * 2;
        if (row >= output.rows || channel >= a.out_channels) continue;
        const int64_t at = int64_t{output.first + row} * a.out_channels + channel;
        const float2 r = residual != nullptr ? *reinterpret_cast<const float2*>(residual + at) : float2{};
        *reinterpret_cast<float2*>(y + at) = finished(i, j, h, r);
      }
    }
  }
}

// 16 bits: four lanes hold two channels each of four pieces of eight, those of four neighbours or, in narrow tiles, of
// two neighbours in two pixels. Transposed, each has a whole piece. Rows that are not there take part in the exchange,
// which wants all lanes.
template <int kIndex, typename T, typename Finished>
__device__ void write_pieces(const Finished& finished, const T* residual, T* y, const ConvArgs& a,
                             const ConvOutput& output) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  constexpr ConvTile kTile = kConvTiles[kIndex];
  constexpr int kAcross = kTile.nt >= 4 ? 4 : 2;
  static_assert(kTile.nt % kAcross == 0);
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < kTile.kept(); ++i) {
#pragma unroll
    for (int group = 0; group < kTile.nt / 2; ++group) {
      const auto tile_of = [&](int piece) { return kAcross == 4 ? group / 2 * 4 + piece : piece % 2; };
      const auto half_of = [&](int piece) { return kAcross == 4 ? group % 2 : piece / 2; };
      const int row = 16 * i + 8 * half_of(quad) + lane / 4, channel = output.channel + 8 * tile_of(quad);
      const bool there = row < output.rows && channel < a.out_channels;
      const int64_t at = int64_t{output.first + row} * a.out_channels + channel;
      uint32_t v[4] = {};
      if (residual != nullptr) {
        const uint4 r = ptx::load_if(there, residual + at);
        v[0] = r.x, v[1] = r.y, v[2] = r.z, v[3] = r.w;
        transpose4(v);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float2 z = finished(i, tile_of(p), half_of(p), widen2(reinterpret_cast<const Two&>(v[p])));
        v[p] = narrow2(z.x, z.y, T{});
      }
      transpose4(v);
      ptx::store_if(there, y + at, {v[0], v[1], v[2], v[3]});
    }
  }
}

template <typename T, int kIndex, typename Sums>
__device__ void finish(const Sums& sums, const float* constants, const T* residual, T* y, const ConvArgs& a,
                       const ConvOutput& output) {
  const Affine<kIndex, Sums> finished(sums, constants, a.relu);
  if (a.vectors) {
    write_pieces<kIndex>(finished, residual, y, a, output);
  } else {
    write_elements<T, kIndex>(finished, residual, y, a, output);
  }
}

}  // namespace resnet_fast::cuda
