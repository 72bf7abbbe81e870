// Checks of arguments, each with a message that names the argument, what it got and what it wants.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

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

inline bool supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  RESNET_FAST_CHECK(supported(t.scalar_type()), op, ": ", name, " has dtype ", dtype_name(t.scalar_type()),
                    ", want float32, float64 or bfloat16");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  RESNET_FAST_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " has dtype ", dtype_name(t.scalar_type()),
                    ", want ", dtype_name(other.scalar_type()), " as ", other_name, " has");
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  bool same = t.dim() == other.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == other.size(i);
  RESNET_FAST_CHECK(same, op, ": ", name, " has shape ", shape(t), ", want ", shape(other), " as ", other_name, " has");
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* meaning) {
  RESNET_FAST_CHECK(t.dim() == rank, op, ": ", name, " has shape ", shape(t), ", want ", rank, " dimensions ", meaning);
}

}  // namespace resnet_fast
