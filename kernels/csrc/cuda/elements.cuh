// Element types of the kernels: 16-byte packs, and conversion to float32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnet_fast::cuda {

// 16 bytes: what a thread loads or stores in one access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Kernels compute in float32 and round 16-bit types once, at the end.
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(double v, double& out) { out = v; }
__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Two adjacent elements: one conversion for 16-bit types.
template <typename T>
struct Vec2Of;
template <>
struct Vec2Of<__half> {
  using Type = __half2;
};
template <>
struct Vec2Of<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct Vec2Of<float> {
  using Type = float2;
};
template <typename T>
using vec2_of = typename Vec2Of<T>::Type;
__device__ inline float2 widen2(__half2 v) { return __half22float2(v); }
__device__ inline float2 widen2(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ inline uint32_t narrow2(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ inline uint32_t narrow2(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// Keeps NaN; fmax would drop it.
template <typename F>
__device__ F relu(F v) {
  return v < 0 ? 0 : v;
}

// Rounding and ReLU of two elements, one instruction each for 16-bit types. ReLU may follow rounding: rounding keeps
// order and zero.
__device__ inline float2 widen2(float2 v) { return v; }
__device__ inline float2 round2(float2 v, float) { return v; }
__device__ inline __half2 round2(float2 v, __half) { return __float22half2_rn(v); }
__device__ inline __nv_bfloat162 round2(float2 v, __nv_bfloat16) { return __float22bfloat162_rn(v); }
__device__ inline float2 relu2(float2 v) { return {relu(v.x), relu(v.y)}; }
__device__ inline __half2 relu2(__half2 v) { return __hmax2_nan(v, __float2half2_rn(0.0f)); }
__device__ inline __nv_bfloat162 relu2(__nv_bfloat162 v) { return __hmax2_nan(v, __float2bfloat162_rn(0.0f)); }

}  // namespace resnet_fast::cuda
