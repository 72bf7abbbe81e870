// What every launcher of a CUDA kernel needs of PyTorch and of the runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace resnet_fast {

// The stream that PyTorch works on now, on a device. Raises where PyTorch was built without CUDA.
cudaStream_t current_stream(int32_t device);

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  RESNET_FAST_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace resnet_fast
