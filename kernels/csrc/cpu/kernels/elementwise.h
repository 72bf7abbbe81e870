// Elementwise kernels, one source for every instruction set.
#pragma once

#include "cpu/kernels/simd.h"

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

// One pixel of the output, all of its channels.
template <typename T>
void max_pool(const PoolCall<T>& call) {
  typedef typename Simd<T>::Vec Vec;
  for (int c = 0; c < call.channels; c += Simd<T>::lanes) {
    Vec most = Simd<T>::load(call.input + c);
    for (int r = 0; r < call.rows; ++r) {
      for (int s = 0; s < call.columns; ++s) {
        const Vec v = Simd<T>::load(call.input + r * call.row + s * call.pixel + c);
        most = (v > most) | (v != v) ? v : most;  // NaN stays: comparisons with it are false
      }
    }
    if (c + Simd<T>::lanes <= call.channels) {
      Simd<T>::store(call.out + c, most);
    } else {
      for (int i = 0; c + i < call.channels; ++i) call.out[c + i] = most[i];
    }
  }
}

}  // namespace
}  // namespace resnet_fast
