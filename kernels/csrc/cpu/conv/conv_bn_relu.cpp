// conv_bn, conv_bn_relu and conv_bn_add_relu: a chain of one convolution, whose filter is packed by the call.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"

namespace resnet_fast {
namespace {

using Pair = std::vector<int64_t>;

Tensor fused_conv(const char* op, const std::vector<Tensor>& inputs, bool relu, const Tensor& weight,
                  const OptionalTensor& bias, const BatchNorm& bn, const Pair& stride, const Pair& padding) {
  const Tensor& x = inputs[0];
  check_rank(op, "x", x, 4, "[batch, channels, height, width]");
  check_dtype(op, "x", x);
  check_conv_bn(op, weight, bias, bn);
  RESNET_FAST_CHECK(weight.is_cpu(), op, ": weight is not on the CPU, as x is");
  check_same_dtype(op, "weight", weight, "x", x);
  RESNET_FAST_CHECK(x.size(1) == weight.size(1), op, ": x has ", x.size(1), " channels, want ", weight.size(1),
                    ", the in_channels of weight ", shape(weight));
  check_strides(op, stride, padding);
  const Layer layer{0,
                    inputs.size() > 1 ? 1 : -1,
                    relu,
                    weight.size(0),
                    weight.size(2),
                    weight.size(3),
                    stride[0],
                    stride[1],
                    padding[0],
                    padding[1]};
  return run_chain(op, inputs, {pack_filters(weight, bias, bn, Algorithm::kDirect)}, {layer});
}

Tensor conv_bn(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
               const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
               double eps, const Pair& stride, const Pair& padding) {
  const BatchNorm bn{bn_weight, bn_bias, running_mean, running_var, eps};
  return fused_conv("conv_bn", {x}, false, weight, bias, bn, stride, padding);
}

Tensor conv_bn_relu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
                    const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, double eps, const Pair& stride, const Pair& padding) {
  const BatchNorm bn{bn_weight, bn_bias, running_mean, running_var, eps};
  return fused_conv("conv_bn_relu", {x}, true, weight, bias, bn, stride, padding);
}

Tensor conv_bn_add_relu(const Tensor& x, const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                        const Pair& stride, const Pair& padding) {
  const BatchNorm bn{bn_weight, bn_bias, running_mean, running_var, eps};
  return fused_conv("conv_bn_add_relu", {x, residual}, true, weight, bias, bn, stride, padding);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("conv_bn", TORCH_BOX(&conv_bn));
  m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu));
  m.impl("conv_bn_add_relu", TORCH_BOX(&conv_bn_add_relu));
}

}  // namespace resnet_fast
