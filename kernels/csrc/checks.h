// Checks of arguments, each with a message that names the argument, what it got and what it wants.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace resnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

#define RESNET_FAST_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::resnet_fast::message(__VA_ARGS__))

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "a type that is not floating point";
  }
}

// Python's None may be passed for any tensor. Checked before it is used: PyTorch's own error names no argument.
inline void check_defined(const char* op, const char* name, const Tensor& t) {
  RESNET_FAST_CHECK(t.defined(), op, ": ", name, " is None, want a tensor");
}

inline bool supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  RESNET_FAST_CHECK(supported(t.scalar_type()), op, ": ", name, " has dtype ", dtype_name(t.scalar_type()),
                    ", want float32, float64 or bfloat16");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  check_defined(op, name, t);
  RESNET_FAST_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ", dtype_name(t.scalar_type()),
                    ", want ", dtype_name(other.scalar_type()), " as ", other_name, " has");
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  check_defined(op, name, t);
  bool same = t.dim() == other.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == other.size(i);
  RESNET_FAST_CHECK(same, op, ": ", name, " has shape ", shape(t), ", want ", shape(other), " as ", other_name, " has");
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* meaning) {
  check_defined(op, name, t);
  RESNET_FAST_CHECK(t.dim() == rank, op, ": ", name, " has shape ", shape(t), ", want ", rank, " dimensions ", meaning);
}

// The largest stride, window or number of channels, and the largest padding: sizes of padded activations fit 64 bits.
constexpr int64_t kMaxSize = INT32_MAX;
constexpr int64_t kMaxPadding = 65535;

// Height and width.
inline void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair, int64_t least,
                       int64_t most) {
  const auto fits = [&](int64_t v) { return v >= least && v <= most; };
  if (pair.size() == 2 && fits(pair[0]) && fits(pair[1])) return;
  std::ostringstream got;
  for (size_t i = 0; i < pair.size(); ++i) got << (i ? ", " : "") << pair[i];
  RESNET_FAST_CHECK(false, op, ": ", name, " is [", got.str(), "], want two integers from ", least, " to ", most);
}

inline void check_strides(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_pair(op, "stride", stride, 1, kMaxSize);
  check_pair(op, "padding", padding, 0, kMaxPadding);
}

}  // namespace resnet_fast
