// The instruction set in use: the best that the CPU and the operating system support, capped by ATEN_CPU_CAPABILITY
// (default, avx2 or avx512; the variable PyTorch itself reads). Chosen once, at first use.
#pragma once

#include "cpu/kernels/bf16/kernels.h"
#include "cpu/kernels/kernels.h"

namespace resnet_fast {

enum class Isa { baseline, avx2, avx512 };

Isa isa();

template <typename T>
const Kernels<T>& kernels_in_use();

}  // namespace resnet_fast
