// Launcher of the batch norm kernels on CUDA devices, and their geometry.
#include "batch_norm.cuh"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "launch.h"

namespace resnet_fast {
namespace {

using cuda::BnArgs;

// In the order in which callers number them; kAdd and kRelu variants follow the plain ones.
enum Kernel {
  kStatsPartial,
  kStatsFinal,
  kApply,
  kApplyAdd,
  kSums,
  kSumsAdd,
  kFinal,
  kBackward,
  kBackwardRelu,
  kCount
};

template <typename T, bool kVector>
const void* kernel_of(int64_t kernel) {
  using namespace cuda;
  switch (kernel) {
    case kStatsPartial: return reinterpret_cast<const void*>(&bn_stats_partial_kernel<T, kVector>);
    case kStatsFinal: return reinterpret_cast<const void*>(&bn_stats_final_kernel<T>);
    case kApply: return reinterpret_cast<const void*>(&bn_apply_kernel<T, kVector, false>);
    case kApplyAdd: return reinterpret_cast<const void*>(&bn_apply_kernel<T, kVector, true>);
    case kSums: return reinterpret_cast<const void*>(&bn_backward_sums_kernel<T, kVector, false>);
    case kSumsAdd: return reinterpret_cast<const void*>(&bn_backward_sums_kernel<T, kVector, true>);
    case kBackward: return reinterpret_cast<const void*>(&bn_backward_apply_kernel<T, kVector, false>);
    case kBackwardRelu: return reinterpret_cast<const void*>(&bn_backward_apply_kernel<T, kVector, true>);
    default: return nullptr;
  }
}

template <typename T>
const void* kernel_of(int64_t kernel, bool vector) {
  return vector ? kernel_of<T, true>(kernel) : kernel_of<T, false>(kernel);
}

// across, row_blocks, channel_blocks, parts, part_rows, and blocks of the second step of sums.
std::vector<int64_t> batch_norm_plan(int64_t rows, int64_t channels) {
  RESNET_FAST_CHECK(rows >= 1 && channels >= 1, "batch_norm: rows and channels are ", rows, " and ", channels,
                    ", want at least 1");
  const cuda::BnPlan p = cuda::plan_batch_norm(rows, channels);
  return {p.across, p.row_blocks, p.channel_blocks,
          p.parts,  p.part_rows,  (channels + cuda::kBnFinalChannels - 1) / cuda::kBnFinalChannels};
}

// Launches kernel number `kernel` on checked tensors, its parameters in order; empty ones are null. args: rows,
// part_rows, channels, parts, across.
void batch_norm_launch(int64_t kernel, bool vector, const std::vector<Tensor>& tensors,
                       const std::vector<int64_t>& grid, const std::vector<int64_t>& args, double eps) {
  RESNET_FAST_CHECK(kernel >= 0 && kernel < kCount, "batch_norm: kernel is ", kernel, ", want 0 to ", kCount - 1);
  RESNET_FAST_CHECK(!tensors.empty() && tensors[0].is_cuda(), "batch_norm: tensors want one on a CUDA device first");
  RESNET_FAST_CHECK(grid.size() == 2 && grid[0] <= INT32_MAX && grid[1] <= 65535,
                    "batch_norm: the image has more rows or channels than one launch covers");
  RESNET_FAST_CHECK(args.size() == 5, "batch_norm: args has ", args.size(), " integers, want 5");
  const void* function = nullptr;
  switch (tensors[0].scalar_type()) {
    case ScalarType::Half: function = kernel_of<__half>(kernel, vector); break;
    case ScalarType::BFloat16: function = kernel_of<__nv_bfloat16>(kernel, vector); break;
    case ScalarType::Float:
      function = kernel == kFinal ? reinterpret_cast<const void*>(&cuda::bn_backward_final_kernel<float>)
                                  : kernel_of<float>(kernel, vector);
      break;
    default: break;
  }
  RESNET_FAST_CHECK(function != nullptr, "batch_norm: kernel ", kernel, " has no instance for ",
                    dtype_name(tensors[0].scalar_type()));
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  BnArgs a = {args[0],
              args[1],
              static_cast<int32_t>(args[2]),
              static_cast<int32_t>(args[3]),
              static_cast<int32_t>(args[4]),
              static_cast<float>(eps)};
  std::vector<void*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(t.numel() ? t.data_ptr() : nullptr);
  std::vector<void*> parameters;
  for (void*& p : pointers) parameters.push_back(&p);
  parameters.push_back(&a);
  const cudaError_t error =
      cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1])),
                       dim3(cuda::kBnThreads), parameters.data(), 0, current_stream(tensors[0]));
  RESNET_FAST_CHECK(error == cudaSuccess, "batch_norm: launch failed: ", cudaGetErrorString(error));
  check_launch("batch_norm");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_plan", TORCH_BOX(&batch_norm_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("batch_norm_launch", TORCH_BOX(&batch_norm_launch)); }

}  // namespace resnet_fast
