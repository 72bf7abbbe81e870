// Dense channels_last tensors, their checks, and conversion between their type and that of the arithmetic.
#pragma once

#include <algorithm>
#include <optional>

#include "checks.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/kept_memory.h"

namespace resnet_fast {

// The shape of a tensor [N, C, H, W] in channels_last, without gaps.
struct NhwcShape {
  int64_t images, channels, height, width;

  explicit NhwcShape(const Tensor& t) : images(t.size(0)), channels(t.size(1)), height(t.size(2)), width(t.size(3)) {}
  NhwcShape(int64_t n, int64_t c, int64_t h, int64_t w) : images(n), channels(c), height(h), width(w) {}
  int64_t row() const { return width * channels; }
  int64_t image() const { return height * row(); }
  int64_t pixels() const { return images * height * width; }
};

inline void check_nhwc(const char* op, const char* name, const Tensor& t) {
  check_rank(op, name, t, 4, "[batch, channels, height, width]");
  check_dtype(op, name, t);
  RESNET_FAST_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU");
  const NhwcShape i(t);
  const bool dense = (i.channels == 1 || t.stride(1) == 1) && (i.width == 1 || t.stride(3) == i.channels) &&
                     (i.height == 1 || t.stride(2) == i.row()) && (i.images == 1 || t.stride(0) == i.image());
  RESNET_FAST_CHECK(dense || t.numel() == 0, op, ": ", name, " of shape ", shape(t),
                    " is not contiguous in channels_last");
}

// The type of the arithmetic: float64 for float64, else float32.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(storage, compute) with values of the types of the tensor's elements and of the arithmetic.
template <typename Body>
void dispatch_compute(const Tensor& t, const Body& body) {
  if (t.scalar_type() == ScalarType::Double) {
    body(double{}, double{});
  } else if (t.scalar_type() == ScalarType::Float) {
    body(float{}, float{});
  } else {
    body(BFloat16{}, float{});
  }
}

// The data of a matrix [rows, channels] of the compute type, or null.
template <typename T>
const T* check_rows(const char* op, const char* name, const std::optional<Tensor>& t, int64_t rows, int64_t channels) {
  if (!t) return nullptr;
  check_defined(op, name, *t);
  const bool fits = t->dim() == 2 && t->size(0) == rows && t->size(1) == channels && t->is_cpu() &&
                    t->scalar_type() == kScalarType<T> && t->stride(1) == 1 && t->stride(0) == channels;
  RESNET_FAST_CHECK(fits, op, ": ", name, " has shape ", shape(*t), " and dtype ", dtype_name(t->scalar_type()),
                    ", want a contiguous [", rows, ", ", channels, "] of ", dtype_name(kScalarType<T>));
  return static_cast<const T*>(t->data_ptr());
}

inline Tensor empty_nhwc(const NhwcShape& s, const Tensor& like) {
  return empty_tensor({s.images, s.channels, s.height, s.width}, like.scalar_type());
}

inline Tensor empty_rows(int64_t rows, int64_t channels, const Tensor& like) {
  return empty_tensor({rows, channels}, compute_type(like));
}

// `n` elements in the compute type: in place, or converted into `buffer`.
template <typename T>
const T* as_compute(const T* from, int64_t, T*) {
  return from;
}
template <typename T>
const T* as_compute(const BFloat16* from, int64_t n, T* buffer) {
  kernels_in_use<BFloat16>().widen(from, n, buffer);
  return buffer;
}
template <typename T>
void store_as(const T* from, int64_t n, T* to) {
  if (from != to) std::copy_n(from, n, to);
}
template <typename T>
void store_as(const T* from, int64_t n, BFloat16* to) {
  kernels_in_use<BFloat16>().narrow(from, n, to);
}

// Where a kernel writes results for `to`: in place, or in `buffer`, from which store_as converts them.
template <typename T>
T* compute_target(T* to, T*) {
  return to;
}
template <typename T>
T* compute_target(BFloat16*, T* buffer) {
  return buffer;
}

}  // namespace resnet_fast
