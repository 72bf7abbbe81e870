// Launcher of conv_bn_relu_pool on CUDA devices; its kernels and geometry for Python.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "cuda/kernel_names.h"
#include "cuda/launch.h"
#include "cuda/stem/conv_bn_relu_pool.cuh"

namespace resnet_fast {
namespace {

using cuda::kStemFields;
using cuda::kStemStrides;
using cuda::StemArgs;
using cuda::StemPlan;

constexpr const char* kName = "conv_bn_relu_pool";

template <typename T, int kIndex>
const void* instance() {
  if constexpr (cuda::kStemKernels[kIndex].math == cuda::Math::kTensor || sizeof(T) == 4)
    return reinterpret_cast<const void*>(&cuda::conv_bn_relu_pool_fwd_kernel<T, kIndex>);
  else
    return nullptr;
}

template <typename T, int... kIndex>
const void* instance(int64_t kernel, std::integer_sequence<int, kIndex...>) {
  const void* const kernels[] = {instance<T, kIndex>()...};
  return kernels[kernel];
}

const void* instance(int64_t kernel, ScalarType type) {
  constexpr auto kAll = std::make_integer_sequence<int, cuda::kStemKernelCount>{};
  switch (type) {
    case ScalarType::Half: return instance<__half>(kernel, kAll);
    case ScalarType::BFloat16: return instance<__nv_bfloat16>(kernel, kAll);
    case ScalarType::Float: return instance<float>(kernel, kAll);
    default: return nullptr;
  }
}

StemArgs unpack(const std::vector<int64_t>& args) {
  RESNET_FAST_CHECK(args.size() == kStemStrides + kStemFields, kName, ": args has ", args.size(), " integers, want ",
                    kStemStrides + kStemFields);
  int32_t fields[kStemFields];
  for (int i = 0; i < kStemFields; ++i) {
    const int64_t value = args[kStemStrides + i];
    fields[i] = static_cast<int32_t>(value);
    RESNET_FAST_CHECK(fields[i] == value && value >= 0, kName, ": args has ", value, ", want 0 to 2147483647");
  }
  StemArgs a;
  std::memcpy(&a, args.data(), kStemStrides * sizeof(int64_t));
  std::memcpy(reinterpret_cast<char*>(&a) + kStemStrides * sizeof(int64_t), fields, sizeof fields);
  return a;
}

void check_kernel(int64_t kernel) {
  RESNET_FAST_CHECK(kernel >= 0 && kernel < cuda::kStemKernelCount, kName, ": kernel is ", kernel, ", want 0 to ",
                    cuda::kStemKernelCount - 1);
}

void check_args(int64_t kernel, const StemArgs& a) {
  const int filter = cuda::kStemKernels[kernel].filter;
  RESNET_FAST_CHECK(a.height + 2 * a.pad_h >= filter && a.width + 2 * a.pad_w >= filter, kName, ": x has ", a.height,
                    " x ", a.width, " pixels and padding ", a.pad_h, " x ", a.pad_w, ", less than a filter of ", filter,
                    " x ", filter);
  // Elements of a row and the first elements of its patches fit 32 bits.
  RESNET_FAST_CHECK(a.height <= 1 << 28 && a.width <= 1 << 28 && a.pad_h <= 1 << 16 && a.pad_w <= 1 << 16, kName,
                    ": x has ", a.height, " x ", a.width, " pixels and padding ", a.pad_h, " x ", a.pad_w,
                    ", more than 32 bits count");
  RESNET_FAST_CHECK(a.out_channels % 16 == 0, kName, ": weight has ", a.out_channels,
                    " filters, want a multiple of 16");
  RESNET_FAST_CHECK(a.rows <= 64 && a.tiles <= 64, kName, ": rows and tiles are ", a.rows, " and ", a.tiles,
                    ", want at most 64");
}

// One row per kernel: filter, whether windows overlap, whether it is SIMT.
std::vector<int64_t> conv_bn_relu_pool_kernels() {
  std::vector<int64_t> rows;
  for (const cuda::StemKernel& k : cuda::kStemKernels)
    for (const int field : {k.filter, static_cast<int>(k.overlap), static_cast<int>(k.math == cuda::Math::kSimt)})
      rows.push_back(field);
  return rows;
}

// [blocks, threads, shared, completed args]; empty if nothing fits `shared` bytes a block.
std::vector<int64_t> conv_bn_relu_pool_plan(int64_t kernel, const std::vector<int64_t>& args, int64_t element_size,
                                            bool aligned, int64_t multiprocessors, int64_t shared) {
  check_kernel(kernel);
  RESNET_FAST_CHECK(element_size == 2 || element_size == 4, kName, ": element_size is ", element_size, ", want 2 or 4");
  RESNET_FAST_CHECK(multiprocessors >= 1 && shared >= 0, kName, ": multiprocessors and shared are ", multiprocessors,
                    " and ", shared, ", want at least 1 and 0");
  const StemArgs given = unpack(args);
  check_args(kernel, given);
  const StemPlan plan = cuda::plan_stem(cuda::kStemKernels[kernel], given, static_cast<int>(element_size), aligned,
                                        static_cast<int>(multiprocessors), static_cast<int>(shared));
  if (plan.shared == 0 || plan.patches > INT32_MAX) return {};
  std::vector<int64_t> out = {plan.blocks, cuda::kStemThreads, plan.shared};
  const StemArgs& a = plan.args;
  for (const int64_t stride : {a.image_stride, a.channel_stride, a.row_stride, a.column_stride}) out.push_back(stride);
  int32_t fields[kStemFields];
  std::memcpy(fields, reinterpret_cast<const char*>(&a) + kStemStrides * sizeof(int64_t), sizeof fields);
  out.insert(out.end(), fields, fields + kStemFields);
  return out;
}

// Launches `kernel` by a plan of the above; completes its args again.
void conv_bn_relu_pool_launch(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift, Tensor y,
                              int64_t kernel, int64_t blocks, const std::vector<int64_t>& args) {
  check_kernel(kernel);
  StemArgs a = unpack(args);
  check_args(kernel, a);
  RESNET_FAST_CHECK(a.rows > 0 && a.tiles > 0, kName, ": rows and tiles are ", a.rows, " and ", a.tiles,
                    ", want those of a plan");
  const cuda::StemKernel& k = cuda::kStemKernels[kernel];
  check_rank(kName, "x", x, 4, "[batch, 3, height, width]");
  const int64_t shape[] = {a.batch, cuda::kStemChannels, a.height, a.width},
                strides[] = {a.image_stride, a.channel_stride, a.row_stride, a.column_stride};
  for (int i = 0; i < 4; ++i) {
    RESNET_FAST_CHECK(x.size(i) == shape[i], kName, ": x has shape ", resnet_fast::shape(x), ", want [", shape[0], ", ",
                      shape[1], ", ", shape[2], ", ", shape[3], "]");
    RESNET_FAST_CHECK(x.stride(i) == strides[i], kName, ": x has stride ", x.stride(i), " in dimension ", i, ", want ",
                      strides[i]);
  }
  const auto size = static_cast<int>(x.element_size());
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  RESNET_FAST_CHECK(x.is_cuda(), kName, ": x is not on a CUDA device");
  const StemPlan plan = cuda::plan_stem(k, a, size, aligned, 1, INT32_MAX);
  const auto holds = [&](const char* name, const Tensor& tensor, int64_t elements) {
    RESNET_FAST_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), kName, ": ", name,
                      " is not on the device that x is on");
    RESNET_FAST_CHECK(tensor.numel() >= elements, kName, ": ", name, " has ", tensor.numel(), " elements, want ",
                      elements);
  };
  a = plan.args;
  holds("weight", weight, int64_t{a.out_channels} * k.filter * k.filter * cuda::kStemChannels);
  holds("scale", scale, a.out_channels);
  holds("shift", shift, a.out_channels);
  holds("y", y, int64_t{a.batch} * a.pooled_height * a.pooled_width * a.out_channels);
  check_same_dtype(kName, "weight", weight, "x", x);
  check_same_dtype(kName, "y", y, "x", x);
  for (const auto& [name, p] : {std::pair("y", y.data_ptr()), std::pair("weight", weight.data_ptr())})
    RESNET_FAST_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, kName, ": ", name,
                      " does not begin at a multiple of 16 bytes");
  const void* function = instance(kernel, x.scalar_type());
  RESNET_FAST_CHECK(function != nullptr, kName, ": x has dtype ", dtype_name(x.scalar_type()), ", which kernel ",
                    kernel, " does not compute");
  RESNET_FAST_CHECK(plan.patches <= INT32_MAX, kName, ": x has ", plan.patches, " patches, more than a launch covers");
  if (plan.patches == 0 || a.out_channels == 0) return;
  RESNET_FAST_CHECK(blocks >= 1 && blocks <= INT32_MAX, kName, ": blocks is ", blocks, ", want 1 to 2147483647");

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const void *px = x.data_ptr(), *pweight = weight.data_ptr(), *pscale = scale.data_ptr(), *pshift = shift.data_ptr();
  void* py = y.data_ptr();
  void* parameters[] = {&px, &pweight, &pscale, &pshift, &py, &a};
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(cuda::ceil_div(a.out_channels, cuda::kStemFilters)));
  launch_kernel(kName, function, grid, cuda::kStemThreads, parameters, plan.shared, current_stream(x));
}

const bool named = [] {
  for (const ScalarType type : {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float})
    for (int i = 0; i < cuda::kStemKernelCount; ++i)
      if (const void* function = instance(i, type))
        name_kernel(std::string("conv_bn_relu_pool_fwd_kernel<") + dtype_name(type) + ", " + std::to_string(i) + ">",
                    function);
  return true;
}();

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_bn_relu_pool_kernels", TORCH_BOX(&conv_bn_relu_pool_kernels));
  m.impl("conv_bn_relu_pool_plan", TORCH_BOX(&conv_bn_relu_pool_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("conv_bn_relu_pool_launch", TORCH_BOX(&conv_bn_relu_pool_launch));
}

}  // namespace resnet_fast
