// The element types of tensors in C++: conversions between them, and dispatch on the type of a tensor.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu/kernels/bf16/kernels.h"

namespace resnet_fast {

template <typename T>
constexpr torch::headeronly::ScalarType kScalarType = torch::headeronly::ScalarType::Float;
template <>
inline constexpr torch::headeronly::ScalarType kScalarType<double> = torch::headeronly::ScalarType::Double;
template <>
inline constexpr torch::headeronly::ScalarType kScalarType<BFloat16> = torch::headeronly::ScalarType::BFloat16;

inline float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

template <typename S, typename T>
inline S narrow_to(T v) {
  return static_cast<S>(v);
}
// Round to nearest even; NaN stays NaN (it could round to infinity otherwise).
template <>
inline BFloat16 narrow_to<BFloat16, float>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline BFloat16 narrow_to<BFloat16, double>(double v) {
  return narrow_to<BFloat16>(static_cast<float>(v));
}

template <typename T, typename S>
inline T convert(S v) {
  if constexpr (std::is_same_v<S, T>) {
    return v;
  } else {
    return narrow_to<T>(widen(v));
  }
}

// Calls body with a value of the C++ type of `type`.
template <typename Body>
void dispatch_dtype(torch::headeronly::ScalarType type, const Body& body) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::Float) {
    body(float{});
  } else if (type == ScalarType::Double) {
    body(double{});
  } else if (type == ScalarType::BFloat16) {
    body(BFloat16{});
  } else {
    throw std::runtime_error("resnet_fast: unchecked dtype");
  }
}

}  // namespace resnet_fast
