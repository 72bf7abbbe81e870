// Launches, and PyTorch's current stream, from whichever PyTorch the module is loaded into.
#include "cuda/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <vector>

namespace resnet_fast {
namespace {

using StreamOf = int32_t (*)(int32_t device, void** stream);

// Looked up at run time: CPU builds of PyTorch lack the function, and linking against it would keep the module from
// loading there. Looked up by library: Python loads PyTorch's libraries into a scope that RTLD_DEFAULT does not search.
StreamOf find_stream_of() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<StreamOf>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

int64_t cuda_stream(int64_t device) { return reinterpret_cast<int64_t>(current_stream(static_cast<int32_t>(device))); }

// The current stream on the device of x, and the CUDA graph capture that it takes part in, 0 if none.
std::vector<int64_t> current_capture(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  RESNET_FAST_CHECK(error == cudaSuccess, "current_capture: ", cudaGetErrorString(error));
  return {reinterpret_cast<int64_t>(stream), status == cudaStreamCaptureStatusNone ? 0 : static_cast<int64_t>(id) + 1};
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const StreamOf stream_of = find_stream_of();
  RESNET_FAST_CHECK(
      stream_of != nullptr,
      "current_stream: this PyTorch has no aoti_torch_get_current_cuda_stream: it was built without CUDA");
  void* stream = nullptr;
  RESNET_FAST_CHECK(stream_of(device, &stream) == 0, "current_stream: PyTorch gives no stream of CUDA device ", device,
                    ": is there such a device?");
  return static_cast<cudaStream_t>(stream);
}

void launch_kernel(const char* op, const void* kernel, dim3 grid, int threads, void** parameters, int shared,
                   cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  // Over 48 KB of dynamic shared memory is opt-in.
  if (shared > 0) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters,
                             static_cast<size_t>(shared), stream);
  RESNET_FAST_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
  check_launch(op);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) { m.impl("cuda_stream", TORCH_BOX(&cuda_stream)); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("current_capture", TORCH_BOX(&current_capture)); }

}  // namespace resnet_fast
