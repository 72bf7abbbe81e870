// What the launchers of the convolutions for Hopper share: argument structs as lists of integers, and checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace resnet_fast {

// The struct of 32-bit integers that `args` lists.
template <typename Args>
Args unpack_args(const char* op, const std::vector<int64_t>& args) {
  constexpr size_t kFields = sizeof(Args) / sizeof(uint32_t);
  RESNET_FAST_CHECK(args.size() == kFields, op, ": args has ", args.size(), " integers, want ", kFields);
  uint32_t fields[kFields];
  for (size_t i = 0; i < kFields; ++i) {
    fields[i] = static_cast<uint32_t>(args[i]);
    RESNET_FAST_CHECK(fields[i] == args[i], op, ": args has ", args[i], ", want 0 to 4294967295");
  }
  Args a;
  static_assert(sizeof a == sizeof fields);
  std::memcpy(&a, fields, sizeof a);
  return a;
}

// [blocks, threads, shared, partial_floats, counters, args] of a plan.
template <typename Plan>
std::vector<int64_t> pack_plan(const Plan& plan) {
  uint32_t fields[sizeof plan.args / sizeof(uint32_t)];
  static_assert(sizeof plan.args == sizeof fields);
  std::memcpy(fields, &plan.args, sizeof fields);
  std::vector<int64_t> out = {plan.blocks, plan.threads, plan.shared, plan.partial_floats, plan.counters};
  out.insert(out.end(), std::begin(fields), std::end(fields));
  return out;
}

// Checks that a tensor can be an operand beside x.
inline void check_operand(const char* op, const Tensor& x, const char* name, const Tensor& tensor, int64_t elements,
                          ScalarType type) {
  RESNET_FAST_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), op, ": ", name,
                    " is not on the device that x is on");
  RESNET_FAST_CHECK(tensor.scalar_type() == type, op, ": ", name, " has dtype ", dtype_name(tensor.scalar_type()),
                    ", want ", type == ScalarType::Int ? "int32" : dtype_name(type));
  RESNET_FAST_CHECK(tensor.numel() >= elements, op, ": ", name, " has ", tensor.numel(), " elements, want ", elements);
  RESNET_FAST_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, op, ": ", name,
                    " is not aligned to 16 bytes");
}

// Checks that x is on a device that the kernels are compiled for.
inline void check_device(const char* op, const Tensor& x) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index());
  RESNET_FAST_CHECK(major == 9 && minor == 0, op, ": the device has compute capability ", major, ".", minor,
                    ", want 9.0");
}

// The tensors of y = [relu](conv2d(x, weight) * scale + shift [+ residual]), and the split-K workspace.
struct ConvTensors {
  const char* op;
  const Tensor &x, &weight, &scale, &shift;
  const std::optional<Tensor>& residual;
  const Tensor& y;
  const std::optional<Tensor>&partial, &counters;

  void check(const char* name, const Tensor& tensor, int64_t elements, ScalarType type) const {
    check_operand(op, x, name, tensor, elements, type);
  }

  // Checks that the tensors hold a convolution of `taps` taps by `plan`.
  template <typename Plan>
  void check(const Plan& plan, int taps) const {
    const auto& a = plan.args;
    const int64_t outputs = int64_t{a.batch} * a.out_height * a.out_width * a.out_channels;
    const ScalarType type = x.scalar_type();
    RESNET_FAST_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, op, ": x has dtype ", dtype_name(type),
                      ", want float16 or bfloat16");
    check("x", x, int64_t{a.batch} * a.height * a.width * a.channels, type);
    check("weight", weight, int64_t{a.out_channels} * taps * a.channels, type);
    check("scale", scale, a.out_channels, ScalarType::Float);
    check("shift", shift, a.out_channels, ScalarType::Float);
    check("y", y, outputs, type);
    if (residual) check("residual", *residual, outputs, type);
    if (a.splits > 1) {
      RESNET_FAST_CHECK(partial && counters, op, ": partial and counters are None, want the workspace of split-K");
      check("partial", *partial, plan.partial_floats, ScalarType::Float);
      check("counters", *counters, plan.counters, ScalarType::Int);
    }
  }

  // Launches a kernel with these parameters and the plan's args. The kernels are for compute capability 9.0 alone.
  template <typename Plan>
  void launch(const void* kernel, const Plan& plan) const {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_device(op, x);
    const void *px = x.data_ptr(), *pw = weight.data_ptr(), *pscale = scale.data_ptr(), *pshift = shift.data_ptr();
    const void* presidual = residual ? residual->data_ptr() : nullptr;
    void *py = y.data_ptr(), *ppartial = partial ? partial->data_ptr() : nullptr;
    void* pcounters = counters ? counters->data_ptr() : nullptr;
    auto args = plan.args;
    void* parameters[] = {&px, &pw, &pscale, &pshift, &presidual, &py, &ppartial, &pcounters, &args};
    launch_kernel(op, kernel, dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(args.splits)),
                  plan.threads, parameters, plan.shared, current_stream(x));
  }
};

}  // namespace resnet_fast
