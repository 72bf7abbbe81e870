// All kernels of the selected instruction set.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/direct_conv.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/winograd.h"
#include "cpu/kernels/winograd_weight_gradient.h"

namespace resnet_fast {
namespace {

// P rows of a register tile where the panel is full (two vectors), PH where it is half full (one vector); W, WH and S
// for the GEMMs of Winograd.
template <typename T, int P, int PH, int W, int WH, int S>
constexpr Kernels<T> kernel_table(const char* isa) {
  return {isa,
          Simd<T>::lanes,
          2,
          P,
          conv<T, P, PH>,
          winograd<T, W, WH, S>,
          expand_filter<T, 2>,
          expand_filter<T, 1>,
          add_relu<T>,
          max_pool<T>,
          normalize<T>,
          input_gradient<T>,
          masked_sums<T>,
          channel_stats<T>,
          outer_products<T, P, PH>,
          winograd_input<T>,
          winograd_gradient<T>,
          winograd_filter_gradient<T>};
}

}  // namespace
}  // namespace resnet_fast
