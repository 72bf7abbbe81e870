// Launches of tapes: the module's kernels through the CUDA runtime, Triton's through the driver.
#include <cuda.h>
#include <dlfcn.h>

#include <map>
#include <string>

#include "chain/tape.h"
#include "cuda/kernel_names.h"
#include "cuda/launch.h"

namespace resnet_fast {
namespace {

using DriverLaunch = CUresult (*)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                  CUstream, void**, void**);

// Looked up at run time: linking against the driver would keep the module from loading where there is none.
DriverLaunch driver_launch() {
  static const auto found = reinterpret_cast<DriverLaunch>([] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return driver ? dlsym(driver, "cuLaunchKernel") : nullptr;
  }());
  RESNET_FAST_CHECK(found != nullptr, "run_tape: libcuda.so.1 has no cuLaunchKernel: is a driver installed?");
  return found;
}

std::map<std::string, const void*>& names() {
  static std::map<std::string, const void*> found;
  return found;
}

}  // namespace

void name_kernel(const std::string& name, const void* function) { names()[name] = function; }

const void* find_on_gpu(const char* name) {
  const auto found = names().find(name);
  return found == names().end() ? nullptr : found->second;
}

void launch_on_gpu(const Launch& l, void** parameters, void* stream) {
  if (l.driver) {
    const CUresult error =
        driver_launch()(reinterpret_cast<CUfunction>(l.function), l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1,
                        l.shared, static_cast<CUstream>(stream), parameters, nullptr);
    RESNET_FAST_CHECK(error == CUDA_SUCCESS, "run_tape: the driver's launch failed with error ",
                      static_cast<int>(error));
    return;
  }
  check_result("run_tape", "launch",
               cudaLaunchKernel(reinterpret_cast<const void*>(l.function), dim3(l.grid[0], l.grid[1], l.grid[2]),
                                dim3(l.threads), parameters, l.shared, static_cast<cudaStream_t>(stream)));
}

void prepare_on_gpu(const Tape& tape) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(tape.device));
  for (const Step& step : tape.steps) {
    if (!step.launches || step.launch.driver || step.launch.shared == 0) continue;
    allow_shared_memory("tape", reinterpret_cast<const void*>(step.launch.function));
  }
}

void* stream_on_gpu(int64_t device) { return current_stream(static_cast<int32_t>(device)); }

}  // namespace resnet_fast
