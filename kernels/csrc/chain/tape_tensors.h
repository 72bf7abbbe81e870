// Tensors of a tape: element types, and tensors on given memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "chain/tape.h"
#include "checks.h"

namespace resnet_fast {

inline int64_t element_size(int64_t dtype) {
  if (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int32()) return 4;
  if (dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64()) return 8;
  return dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_int8() ? 1 : 2;
}

inline int64_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A tensor on memory that it does not own.
inline Tensor from_blob(char* memory, const View& v, int64_t device_type, int64_t device) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      memory + v.offset * element_size(v.dtype), static_cast<int64_t>(v.sizes.size()), v.sizes.data(), v.strides.data(),
      0, static_cast<int32_t>(v.dtype), static_cast<int32_t>(device_type), static_cast<int32_t>(device), &made));
  return Tensor(made);
}

}  // namespace resnet_fast
