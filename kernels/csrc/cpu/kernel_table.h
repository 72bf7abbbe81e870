// All kernels of the selected instruction set.
#pragma once

#include "direct_kernel.h"
#include "elementwise_kernel.h"
#include "winograd_kernel.h"

namespace resnet_fast {
namespace {

// P rows of a register tile where the panel is full (two vectors), PH where it is half full (one vector).
template <typename T, int P, int PH>
constexpr Kernels<T> kernel_table(const char* isa) {
  return {isa, Simd<T>::lanes, 2, P, conv<T, P, PH>, winograd<T, P, PH>, add_relu<T>};
}

}  // namespace
}  // namespace resnet_fast
