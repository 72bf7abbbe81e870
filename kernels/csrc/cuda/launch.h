// What every launcher of a CUDA kernel needs of PyTorch and of the runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"

namespace resnet_fast {

// The stream that PyTorch works on now, on the device of t.
inline cudaStream_t current_stream(const Tensor& t) {
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(t.get_device_index()).nativeHandle());
#else
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  RESNET_FAST_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace resnet_fast
