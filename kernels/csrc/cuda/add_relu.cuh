// y = relu(a + b) over n elements, 16 bytes per thread.
#pragma once

#include "cuda/elements.cuh"

namespace resnet_fast::cuda {

constexpr int kAddReluThreads = 256;

// Blocks of a launch over n elements, for the launcher and the tests.
template <typename T>
constexpr int64_t add_relu_blocks(int64_t n) {
  constexpr int64_t per_block = kAddReluThreads * (16 / static_cast<int64_t>(sizeof(T)));
  return (n + per_block - 1) / per_block;
}

template <typename T>
__device__ T add_relu_element(T a, T b) {
  T out;
  narrow(relu(widen(a) + widen(b)), out);
  return out;
}

// vectorized: a, b and out are aligned to 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kAddReluThreads)
    add_relu_fwd_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t n,
                        bool vectorized) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kAddReluThreads + threadIdx.x) * kSize;
  if (vectorized && first + kSize <= n) {
    const Pack<T> pa = *reinterpret_cast<const Pack<T>*>(a + first);
    const Pack<T> pb = *reinterpret_cast<const Pack<T>*>(b + first);
    Pack<T> po;
#pragma unroll
    for (int i = 0; i < kSize; ++i) po.value[i] = add_relu_element(pa.value[i], pb.value[i]);
    *reinterpret_cast<Pack<T>*>(out + first) = po;
    return;
  }
  for (int64_t i = first; i < first + kSize && i < n; ++i) out[i] = add_relu_element(a[i], b[i]);
}

}  // namespace resnet_fast::cuda
