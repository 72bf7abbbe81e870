// A warp's multiply-accumulate over one k step in shared memory: loads fragments, accumulates in registers.
//
// Accumulators lie as mma leaves them, with SIMT too: acc[i][j][2 h + e] is pixel 16 i + 8 h + lane / 4 and channel
// 8 j + 2 (lane % 4) + e of the warp tile.
#pragma once

#include "cuda/conv/conv_load.cuh"

namespace resnet_fast::cuda {

template <typename T, int kIndex>
struct TensorMma {
  using Traits = ConvTraits<T, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kSliceBytes = 32;  // k of one mma: 16 elements of 16 bits, 8 of 32
  static_assert(kTile.nt % 2 == 0, "filters are loaded 16 at a time");

  // The row of 16 bytes whose address this lane passes to ldmatrix, from the warp's first pixel or filter. Pixels:
  // lanes 0 to 15 pass the left halves of the k slice of 16 pixels, lanes 16 to 31 the right halves.
  __device__ static int pixel() { return threadIdx.x % 16; }
  __device__ static uint32_t pixel_offset() { return pixel() * Traits::kPitch + threadIdx.x / 16 % 2 * 16; }
  // Filters: the left and right halves of 8 filters, then of the next 8.
  __device__ static uint32_t filter_offset() {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 16;
  }

  // Accumulates kSlices slices of k, kSliceStride bytes apart. pixels(i): this lane's address in the i-th 16 pixels.
  // Only the first `active` of these hold pixels, the same number in all warps.
  template <int kSlices, int kSliceStride, typename Address>
  __device__ static void accumulate(float (&acc)[kTile.mt][kTile.nt][4], Address pixels, uint32_t filters, int active) {
    uint32_t at[kTile.mt];
#pragma unroll
    for (int i = 0; i < kTile.mt; ++i) at[i] = pixels(i);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      uint32_t b[kTile.nt / 2][4];
#pragma unroll
      for (int j = 0; j < kTile.nt / 2; ++j) {
        ptx::ldmatrix_x4(b[j], filters + j * 16 * Traits::kPitch + k * kSliceStride);
        round(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kTile.mt; ++i) {
        if (i >= kTile.min_mt && i >= active) break;
        uint32_t a[4];
        ptx::ldmatrix_x4(a, at[i] + k * kSliceStride);
        round(a);
#pragma unroll
        for (int j = 0; j < kTile.nt; ++j) mma_tile(acc[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

 private:
  // mma alone truncates to TF32.
  __device__ static void round(uint32_t (&v)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = ptx::to_tf32(v[i]);
    }
  }
  __device__ static void mma_tile(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (sizeof(T) == 4)
      ptx::mma_m16n8k8_tf32(acc, a, b0, b1);
    else
      ptx::mma_m16n8k16(acc, a, b0, b1, T{});
  }
};

// The same in exact float32: a lane reads the rows of its accumulators.
template <int kIndex>
struct SimtMma {
  using Traits = ConvTraits<float, kIndex>;
  static constexpr ConvTile kTile = Traits::kTile;
  static constexpr int kSliceBytes = 16;

  __device__ static uint32_t pixel_offset() { return threadIdx.x % 32 / 4 * Traits::kPitch; }
  __device__ static uint32_t filter_offset() { return threadIdx.x % 4 * 2 * Traits::kPitch; }

  template <int kSlices, int kSliceStride, typename Address>
  __device__ static void accumulate(float (&acc)[kTile.mt][kTile.nt][4], Address pixels, uint32_t filters, int) {
    const uint32_t at = pixels(0);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
      float4 b[kTile.nt][2];
#pragma unroll
      for (int j = 0; j < 2 * kTile.nt; ++j)
        b[j / 2][j % 2] = ptx::load_shared(filters + (j / 2 * 8 + j % 2) * Traits::kPitch + k * kSliceStride);
#pragma unroll
      for (int i = 0; i < 2 * kTile.mt; ++i) {
        const float4 a = ptx::load_shared(at + i * 8 * Traits::kPitch + k * kSliceStride);
#pragma unroll
        for (int j = 0; j < 2 * kTile.nt; ++j) {
          float& element = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
          const float4 f = b[j / 2][j % 2];
          element = fmaf(a.x, f.x, element), element = fmaf(a.y, f.y, element), element = fmaf(a.z, f.z, element),
          element = fmaf(a.w, f.w, element);
        }
      }
    }
  }
};

}  // namespace resnet_fast::cuda
