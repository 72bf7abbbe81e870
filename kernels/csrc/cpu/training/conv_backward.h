// The arguments of conv_backward, and its driver for products in bfloat16.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"
#include "cpu/nhwc.h"

namespace resnet_fast {

struct BackwardArguments {
  const char* op;
  const Tensor &grad, &x, &weight;
  const OptionalTensor &y, &coefficients, &scale_shift, &residual;
  bool relu;
  Layer layer;
  Algorithm algorithm;
  bool need_x, need_weight, finish;
  const std::vector<Tensor>&ys, &stats;
};

std::tuple<Tensor, Tensor, Tensor> bf16_conv_backward(const BackwardArguments& a);

}  // namespace resnet_fast
