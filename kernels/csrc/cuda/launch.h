// What every launcher of a CUDA kernel needs: the current stream, and launches that are checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace resnet_fast {

// PyTorch's current stream on a device. Throws if PyTorch was built without CUDA.
cudaStream_t current_stream(int32_t device);

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

// Throws, in the name of `op`, if `what` failed; the next call of the runtime must not find the error again.
inline void check_result(const char* op, const char* what, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  RESNET_FAST_CHECK(error == cudaSuccess, op, ": ", what, " failed: ", cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check_result(op, "launch", cudaGetLastError()); }

// Allows a kernel all the dynamic shared memory that a block of the current device can have; over 48 KB is opt-in. Not
// what one launch needs: a launch by another shape, a tape or a thread may need more, and the last limit set counts.
void allow_shared_memory(const char* op, const void* kernel);

// Launches a kernel with `shared` bytes of dynamic shared memory. Throws, in the name of `op`, if the launch fails.
void launch_kernel(const char* op, const void* kernel, dim3 grid, int threads, void** parameters, int shared,
                   cudaStream_t stream);

}  // namespace resnet_fast
