// Stores to addresses of shared memory, beside the loads of ptx.cuh.
#pragma once

#include "cuda/ptx.cuh"

namespace resnet_fast::cuda::ptx {

// Stores 16 bytes.
__device__ inline void store_shared(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

}  // namespace resnet_fast::cuda::ptx
