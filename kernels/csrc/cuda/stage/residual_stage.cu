// Launcher of the stage kernels, and their list for Python.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/kernel_names.h"
#include "cuda/launch.h"
#include "cuda/stage/residual_stage_kernels.cuh"

namespace resnet_fast {
namespace {

using cuda::Entry;

struct Kernel {
  Entry entry;
  int element_size, channels, size, images, threads, shared;
  const void *first, *bfloat16;  // first: float16 or float32
};

template <typename F>
const void* pointer(F* function) {
  return reinterpret_cast<const void*>(function);
}

#define RESNET_FAST_STAGE_ROW(first, second, entry, bytes, channels, size, images, warps) \
  {entry,                                                                                 \
   bytes,                                                                                 \
   channels,                                                                              \
   size,                                                                                  \
   images,                                                                                \
   cuda::StageShape<bytes, channels, size, entry, images, warps>::kThreads,               \
   cuda::StageShape<bytes, channels, size, entry, images, warps>::kSharedBytes,           \
   first,                                                                                 \
   second},
#define RESNET_FAST_HALF_ROW(name, entry, bytes, channels, size, images, warps)                                       \
  RESNET_FAST_STAGE_ROW(pointer(&cuda::RESNET_FAST_STAGE_NAME(name, channels, size, images, float16)),                \
                        pointer(&cuda::RESNET_FAST_STAGE_NAME(name, channels, size, images, bfloat16)), entry, bytes, \
                        channels, size, images, warps)
#define RESNET_FAST_TF32_ROW(name, entry, bytes, channels, size, images, warps)                                        \
  RESNET_FAST_STAGE_ROW(pointer(&cuda::RESNET_FAST_STAGE_NAME(name, channels, size, images, float32)), nullptr, entry, \
                        bytes, channels, size, images, warps)
const Kernel kKernels[] = {RESNET_FAST_STAGES(RESNET_FAST_HALF_ROW) RESNET_FAST_TF32_STAGES(RESNET_FAST_TF32_ROW)};

std::vector<int64_t> residual_stage_kernels() {
  std::vector<int64_t> rows;
  for (const Kernel& k : kKernels)
    for (const int field :
         {static_cast<int>(k.entry), k.element_size, k.channels, k.size, k.images, k.threads, k.shared})
      rows.push_back(field);
  return rows;
}

void check_operand(const char* name, const Tensor& t, const Tensor& x, int64_t bytes) {
  RESNET_FAST_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), "residual_stage_launch: ", name,
                    " is not on the CUDA device that x is on");
  RESNET_FAST_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "residual_stage_launch: ", name,
                    " does not begin at a multiple of 16 bytes");
  RESNET_FAST_CHECK(t.numel() * t.element_size() >= bytes, "residual_stage_launch: ", name, " has ",
                    t.numel() * t.element_size(), " bytes, want ", bytes);
}

// Launches `kernel` on tensors as residual_stage.cuh describes them; x and y are dense in its order of elements.
void residual_stage_launch(int64_t kernel, const Tensor& x, const Tensor& filters, const Tensor& y, int64_t blocks,
                           int64_t classes, bool channels_last) {
  constexpr int64_t kCount = sizeof(kKernels) / sizeof(Kernel);
  RESNET_FAST_CHECK(kernel >= 0 && kernel < kCount, "residual_stage_launch: kernel is ", kernel, ", want 0 to ",
                    kCount - 1);
  const Kernel& k = kKernels[kernel];
  const void* function = x.scalar_type() == ScalarType::BFloat16 ? k.bfloat16 : k.first;
  RESNET_FAST_CHECK(x.scalar_type() == ScalarType::BFloat16
                        ? k.bfloat16 != nullptr
                        : x.scalar_type() == (k.element_size == 2 ? ScalarType::Half : ScalarType::Float),
                    "residual_stage_launch: x has dtype ", dtype_name(x.scalar_type()), ", want ",
                    k.element_size == 2 ? "float16 or bfloat16" : "float32");
  check_same_dtype("residual_stage_launch", "y", y, "x", x);
  RESNET_FAST_CHECK(blocks > 0, "residual_stage_launch: blocks is ", blocks, ", want at least 1");
  RESNET_FAST_CHECK(classes >= 0 && (classes == 0 || k.size == 8), "residual_stage_launch: classes is ", classes,
                    " behind a stage of ", k.size, " x ", k.size, " pixels, which has no linear layer");
  const int64_t images = x.size(0), activation = int64_t{k.channels} * k.size * k.size;
  const int64_t input =
      k.entry == Entry::kStem ? int64_t{3} * k.size * k.size : (k.entry == Entry::kMap ? 1 : 2) * activation;
  check_operand("x", x, x, k.element_size * images * input);
  check_operand("y", y, x, k.element_size * images * (classes > 0 ? classes : activation));
  const int64_t steps = k.channels * k.element_size / 32,
                slices = 2 * blocks * steps - (k.entry == Entry::kStrided ? steps / 2 : 0);
  check_operand("filters", filters, x, slices * 288 * k.channels + classes * (k.element_size * k.channels + 4));
  const int64_t grid = (images + k.images - 1) / k.images;
  RESNET_FAST_CHECK(grid <= 2147483647, "residual_stage_launch: x has ", images, " images, more than a launch covers");
  if (grid == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const void *px = x.data_ptr(), *pfilters = filters.data_ptr();
  void* py = y.data_ptr();
  int64_t batch = images;
  int block_count = static_cast<int>(blocks), class_count = static_cast<int>(classes);
  bool by_pixel = channels_last;
  void* parameters[] = {&px, &pfilters, &py, &batch, &block_count, &class_count, &by_pixel};
  launch_kernel("residual_stage_launch", function, dim3(static_cast<unsigned>(grid)), k.threads, parameters, k.shared,
                current_stream(x));
}

const bool named = [] {
  constexpr const char* kEntries[] = {"stem", "map", "strided"};
  for (const Kernel& k : kKernels) {
    const std::string size = std::to_string(k.size);
    const std::string name = std::string("residual_stage_") + kEntries[static_cast<int>(k.entry)] + "_" +
                             std::to_string(k.channels) + "x" + size + "x" + size + "_" + std::to_string(k.images) +
                             "_";
    name_kernel(name + (k.element_size == 2 ? "float16" : "float32"), k.first);
    if (k.bfloat16 != nullptr) name_kernel(name + "bfloat16", k.bfloat16);
  }
  return true;
}();

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("residual_stage_kernels", TORCH_BOX(&residual_stage_kernels));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("residual_stage_launch", TORCH_BOX(&residual_stage_launch)); }

}  // namespace resnet_fast
