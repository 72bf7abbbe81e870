#if defined(__x86_64__)
// 32 registers: 12 pixels x 2 accumulators, 2 vectors of the panel, broadcasts; 12 offsets still fit the integer
// registers.
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#define RESNET_FAST_VECTOR_BYTES 64
#include "cpu/kernels/kernel_table.h"

namespace resnet_fast {
extern const Kernels<float> kFloatAvx512 = kernel_table<float, 12, 12, 7, 14, 1>("avx512");
extern const Kernels<double> kDoubleAvx512 = kernel_table<double, 12, 12, 7, 14, 1>("avx512");
}  // namespace resnet_fast
#endif  // __x86_64__
