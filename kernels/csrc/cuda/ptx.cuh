// PTX instructions that CUDA C++ has no intrinsic for, one function each. Fragments are those of the PTX manual: of an
// 8x8 matrix of 16-bit elements, lane l of a warp holds row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnet_fast::cuda::ptx {

// The 32-bit shared-memory address that ldmatrix and cp.async take.
__device__ inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Loads four 8x8 matrices of 16-bit elements. Lanes 8j to 8j + 7 pass the addresses of matrix j's rows of 16 bytes.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Loads kCount (2 or 4) matrices transposed: lane l holds rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
template <int kCount>
__device__ void ldmatrix_transposed(uint32_t (&out)[4], uint32_t address) {
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  }
}

// Stores kCount transposed matrices to shared memory. sm_90 and later.
template <int kCount>
__device__ void stmatrix_transposed(uint32_t address, const uint32_t (&in)[4]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kCount == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(in[0]),
                 "r"(in[1]), "r"(in[2]), "r"(in[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(in[0]), "r"(in[1])
                 : "memory");
  }
#else
  __trap();
#endif
}

// acc += a b: a is 16x16, b 16x8, acc 16x8 in float32. The last argument selects the element type. Not volatile: mma
// touches no memory, so the compiler may schedule it.
__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc += a b in TF32: a is 16x8, b 8x8. An 8x8 matrix of ldmatrix holds 8x4 elements of 32 bits.
__device__ inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds float32 to the nearest TF32: mma alone truncates the low bits.
__device__ inline uint32_t to_tf32(uint32_t bits) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(__uint_as_float(bits)));
  return out;
}

// The maximum, NaN if either is NaN: fmaxf drops NaN.
__device__ inline float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// Returns v, opaque to the compiler: what is derived from it is recomputed where it is used instead of held in
// registers across a loop.
__device__ inline int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Starts copying 16 bytes from global to shared memory; they arrive by the wait that covers them. Bypasses L1: a block
// reads no operand twice.
__device__ inline void cp_async(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

// Copies the first `bytes` (0 to 16) and zero-fills the rest.
__device__ inline void cp_async(uint32_t dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Loads 16 bytes from a shared-memory address.
__device__ inline float4 load_shared(uint32_t address) {
  float4 out;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
               : "r"(address)
               : "memory");
  return out;
}

// Closes the current group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies except the newest kPending groups.
template <int kPending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads (zeros if not `valid`) and stores 16 bytes of global memory under a predicate. A branch would let the lanes of
// a warp diverge before they exchange data.
__device__ inline uint4 load_predicated(bool valid, const void* src) {
  uint4 out;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5];\n}"
      : "=&r"(out.x), "=&r"(out.y), "=&r"(out.z), "=&r"(out.w)
      : "r"(static_cast<int>(valid)), "l"(src));
  return out;
}

__device__ inline void store_predicated(bool valid, void* dst, uint4 v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<int>(valid)),
               "l"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace resnet_fast::cuda::ptx
