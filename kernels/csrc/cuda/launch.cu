// The current stream, asked of whatever PyTorch the module was loaded into.
#include "cuda/launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

namespace resnet_fast {
namespace {

using StreamOf = int32_t (*)(int32_t device, void** stream);

// PyTorch for CPUs lacks the function, so linking with it would keep the module from loading there. Python loads
// PyTorch's libraries into a scope of their own, which RTLD_DEFAULT does not search: the library is asked by name.
StreamOf find_stream_of() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<StreamOf>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

int64_t stream_number(int64_t device) {
  return reinterpret_cast<int64_t>(current_stream(static_cast<int32_t>(device)));
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

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_stream", TORCH_BOX(&stream_number));
}

}  // namespace resnet_fast
