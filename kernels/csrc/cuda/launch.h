// What every launcher of a CUDA kernel needs: the current stream, and launches that are checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace resnet_fast {

// PyTorch's current stream on a device. Throws if PyTorch was built without CUDA.
cudaStream_t current_stream(int32_t device);

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  RESNET_FAST_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

// Launches a kernel with `shared` bytes of dynamic shared memory. Throws, in the name of `op`, if the launch fails.
void launch_kernel(const char* op, const void* kernel, dim3 grid, int threads, void** parameters, int shared,
                   cudaStream_t stream);

}  // namespace resnet_fast
