// What a warp does with a row of products in shared memory: fragments, and products into its sums.
//
// Sums lie in registers as mma leaves them, for plain products, too: sums[i][j][2 h + e] is pixel 16 i + 8 h + lane / 4
// and channel 8 j + 2 (lane % 4) + e of the warp's part.
#pragma once

#include "cuda/conv/conv_load.cuh"

namespace resnet_fast::cuda {

template <typename T, int kIndex>
struct TensorMath {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kSlice = 32;  // bytes of a row that one product takes: 16 elements of 16 bits, 8 of 32
  static_assert(kTile.nt % 2 == 0, "filters are loaded 16 at a time");

  // Where this lane reads, from the warp's first pixel and filter: ldmatrix takes the address of one row of 16 bytes
  // from each lane, lanes 0 to 15 the left halves of the slice of 16 pixels, lanes 16 to 31 the right halves.
  __device__ static int pixel() { return threadIdx.x % 16; }
  __device__ static uint32_t pixel_offset() { return pixel() * Traits::kPitch + threadIdx.x / 16 % 2 * 16; }
  // Filters: left and right halves of 8 filters, then of the next 8.
  __device__ static uint32_t filter_offset() {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 16;
  }

  // kSlices slices of one row of products, kApart bytes apart. `pixels(i)`: address of this lane's row of the i-th 16
  // pixels, of which the first `active` hold pixels, the same number in all warps.
  template <int kSlices, int kApart, typename Address>
  __device__ static void multiply(float (&sums)[kTile.mt][kTile.nt][4], Address pixels, uint32_t filters, int active) {
    uint32_t at[kTile.mt];
#pragma unroll
    for (int i = 0; i < kTile.mt; ++i) at[i] = pixels(i);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      uint32_t b[kTile.nt / 2][4];
#pragma unroll
      for (int j = 0; j < kTile.nt / 2; ++j) {
        ptx::ldmatrix_x4(b[j], filters + j * 16 * Traits::kPitch + k * kApart);
        round(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kTile.mt; ++i) {
        if (i >= kTile.always && i >= active) break;
        uint32_t a[4];
        ptx::ldmatrix_x4(a, at[i] + k * kApart);
        round(a);
#pragma unroll
        for (int j = 0; j < kTile.nt; ++j) product(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

 private:
  // mma would cut off what TF32 cannot hold.
  __device__ static void round(uint32_t (&v)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = ptx::to_tf32(v[i]);
    }
  }
  __device__ static void product(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (sizeof(T) == 4)
      ptx::mma_m16n8k8_tf32(sums, a, b0, b1);
    else
      ptx::mma_m16n8k16(sums, a, b0, b1, T{});
  }
};

// The same in exact float32. Lanes read rows as far apart as their sums are.
template <int kIndex>
struct PlainMath {
  using Traits = ConvTraits<float, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kSlice = 16;

  __device__ static uint32_t pixel_offset() { return threadIdx.x % 32 / 4 * Traits::kPitch; }
  __device__ static uint32_t filter_offset() { return threadIdx.x % 4 * 2 * Traits::kPitch; }

  template <int kSlices, int kApart, typename Address>
  __device__ static void multiply(float (&sums)[kTile.mt][kTile.nt][4], Address pixels, uint32_t filters, int) {
    const uint32_t at = pixels(0);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      float4 b[kTile.nt][2];
#pragma unroll
      for (int j = 0; j < 2 * kTile.nt; ++j)
        b[j / 2][j % 2] = ptx::load_shared(filters + (j / 2 * 8 + j % 2) * Traits::kPitch + k * kApart);
#pragma unroll
      for (int i = 0; i < 2 * kTile.mt; ++i) {
        const float4 a = ptx::load_shared(at + i * 8 * Traits::kPitch + k * kApart);
#pragma unroll
        for (int j = 0; j < 2 * kTile.nt; ++j) {
          float& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
          const float4 f = b[j / 2][j % 2];
          sum = fmaf(a.x, f.x, sum), sum = fmaf(a.y, f.y, sum), sum = fmaf(a.z, f.z, sum), sum = fmaf(a.w, f.w, sum);
        }
      }
    }
  }
};

}  // namespace resnet_fast::cuda
