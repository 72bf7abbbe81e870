// wgmma of Hopper with a in registers: acc[64 x kColumns] += a b over 16 values of k. b lies in shared memory MN-major
// without swizzle: core matrices of 8 values of k x 8 columns, 16 bytes a value of k.
#pragma once

#include "cuda/ptx_wgmma.cuh"

namespace resnet_fast::cuda::ptx {

// Describes b: bytes from 8 columns to the next 8 (the PTX manual's stride offset) and from 8 values of k to the next 8
// (its leading offset). The address is a multiple of 16.
__device__ inline uint64_t transposed_descriptor(uint32_t address, uint32_t column_bytes, uint32_t k_bytes) {
  return matrix_descriptor(address, column_bytes, k_bytes);
}

// a: of a warp's 16 rows, fragments as mma_m16n8k16 takes them. Held until a wait covers the wgmma.
#ifdef RESNET_FAST_WGMMA
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a0, a1, a2, a3, b, T, type)                                      \
  __device__ inline void wgmma_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b_desc, T) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type                           \
                 " {" RESNET_FAST_OPERANDS_##groups "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", 1, 1, 1, 1;"     \
                 : RESNET_FAST_ACC_##groups                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc)                                        \
                 : "memory");                                                                                     \
  }
#else
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a0, a1, a2, a3, b, T, type) \
  __device__ inline void wgmma_transposed(float (&)[kColumns / 2], const uint32_t (&)[4], uint64_t, T) { __trap(); }
#endif
#define RESNET_FAST_WGMMA_COLUMNS(kColumns, groups, a0, a1, a2, a3, b)       \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a0, a1, a2, a3, b, __half, "f16") \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a0, a1, a2, a3, b, __nv_bfloat16, "bf16")

RESNET_FAST_WGMMA_COLUMNS(16, 2, "%8", "%9", "%10", "%11", "%12")
RESNET_FAST_WGMMA_COLUMNS(32, 4, "%16", "%17", "%18", "%19", "%20")
RESNET_FAST_WGMMA_COLUMNS(64, 8, "%32", "%33", "%34", "%35", "%36")

#undef RESNET_FAST_WGMMA_COLUMNS
#undef RESNET_FAST_WGMMA_TYPE

}  // namespace resnet_fast::cuda::ptx
