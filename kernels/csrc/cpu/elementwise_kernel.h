// Elementwise kernels, one source for every instruction set.
#pragma once

#include "simd.h"

namespace resnet_fast {
namespace {

template <typename T>
void add_relu(const T* a, const T* b, T* out, int64_t n) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Simd<T>::store(out + i, relu<T>(Simd<T>::load(a + i) + Simd<T>::load(b + i)));
  }
  for (; i < n; ++i) {
    const T sum = a[i] + b[i];
    out[i] = sum < T(0) ? T(0) : sum;
  }
}

}  // namespace
}  // namespace resnet_fast
