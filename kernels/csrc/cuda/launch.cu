// Launches, and PyTorch's current stream, from whichever PyTorch the module is loaded into.
#include "cuda/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <set>
#include <utility>
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

void allow_shared_memory(const char* op, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  check_result(op, "launch", cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (!allowed.insert({kernel, device}).second) return;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  if (error != cudaSuccess) allowed.erase({kernel, device});
  check_result(op, "launch", error);
}

void launch_kernel(const char* op, const void* kernel, dim3 grid, int threads, void** parameters, int shared,
                   cudaStream_t stream) {
  if (shared > 0) allow_shared_memory(op, kernel);
  check_result(op, "launch",
               cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), parameters,
                                static_cast<size_t>(shared), stream));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) { m.impl("cuda_stream", TORCH_BOX(&cuda_stream)); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("current_capture", TORCH_BOX(&current_capture)); }

}  // namespace resnet_fast
