// Launcher of avg_pool_flatten.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/avg_pool_flatten.cuh"
#include "cuda/launch.h"

namespace resnet_fast {
namespace {

constexpr const char* kName = "avg_pool_flatten";

template <typename T>
const void* kernel() {
  return reinterpret_cast<const void*>(&cuda::avg_pool_flatten_fwd_kernel<T>);
}

// x: dense in channels_last; y: a row per image.
void avg_pool_flatten_launch(const Tensor& x, Tensor y, const std::vector<int64_t>& window,
                             const std::vector<int64_t>& stride) {
  check_rank(kName, "x", x, 4, "[batch, channels, height, width]");
  RESNET_FAST_CHECK(window.size() == 2 && stride.size() == 2, kName, ": kernel and stride have ", window.size(),
                    " and ", stride.size(), " integers, want 2 each");
  for (int i = 0; i < 2; ++i)
    RESNET_FAST_CHECK(window[i] >= 1 && window[i] <= x.size(2 + i) && stride[i] >= 1 && stride[i] <= INT32_MAX, kName,
                      ": kernel is ", window[i], " and stride ", stride[i], " in an image of shape ", shape(x),
                      ", want a kernel of 1 to ", x.size(2 + i), " and a stride of at least 1");
  const int64_t out_height = (x.size(2) - window[0]) / stride[0] + 1,
                out_width = (x.size(3) - window[1]) / stride[1] + 1;
  RESNET_FAST_CHECK(x.size(2) * x.size(3) <= INT32_MAX && x.size(1) <= INT32_MAX, kName, ": x has shape ", shape(x),
                    ", want images of less than 2^31 pixels");
  RESNET_FAST_CHECK(x.is_cuda() && y.is_cuda() && x.get_device_index() == y.get_device_index(), kName,
                    ": x and y are not on one CUDA device");
  check_same_dtype(kName, "y", y, "x", x);
  RESNET_FAST_CHECK(y.numel() == x.size(0) * x.size(1) * out_height * out_width, kName, ": y has ", y.numel(),
                    " elements, want ", x.size(0) * x.size(1) * out_height * out_width);
  const auto size = static_cast<int>(x.element_size());
  RESNET_FAST_CHECK(x.size(1) % (16 / size) == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, kName,
                    ": x has ", x.size(1), " channels at ", x.data_ptr(), ", want packs of 16 bytes");
  RESNET_FAST_CHECK((x.size(1) == 1 || x.stride(1) == 1) && x.stride(3) == x.size(1) &&
                        x.stride(2) == x.size(1) * x.size(3) &&
                        (x.size(0) == 1 || x.stride(0) == x.size(1) * x.size(2) * x.size(3)),
                    kName, ": x is not dense in channels_last");
  const int64_t chunks = (x.size(1) + cuda::avg_channels(size) - 1) / cuda::avg_channels(size),
                blocks = chunks * x.size(0);
  RESNET_FAST_CHECK(blocks <= INT32_MAX, kName, ": x has shape ", shape(x), ", more than a launch covers");
  if (blocks == 0) return;

  const void* function = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Half: function = kernel<__half>(); break;
    case ScalarType::BFloat16: function = kernel<__nv_bfloat16>(); break;
    case ScalarType::Float: function = kernel<float>(); break;
    default: break;
  }
  RESNET_FAST_CHECK(function != nullptr, kName, ": x has dtype ", dtype_name(x.scalar_type()),
                    ", want float16, bfloat16 or float32");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::AvgPoolArgs args = {
      static_cast<int32_t>(x.size(1)), static_cast<int32_t>(x.size(2)),  static_cast<int32_t>(x.size(3)),
      static_cast<int32_t>(window[0]), static_cast<int32_t>(window[1]),  static_cast<int32_t>(stride[0]),
      static_cast<int32_t>(stride[1]), static_cast<int32_t>(out_height), static_cast<int32_t>(out_width),
      static_cast<int32_t>(chunks),
  };
  const void* from = x.data_ptr();
  void* to = y.data_ptr();
  void* parameters[] = {&from, &to, &args};
  launch_kernel(kName, function, dim3(static_cast<unsigned>(blocks)), cuda::kAvgThreads, parameters, 0,
                current_stream(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("avg_pool_flatten_launch", TORCH_BOX(&avg_pool_flatten_launch));
}

}  // namespace resnet_fast
