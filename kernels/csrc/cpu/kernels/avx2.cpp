#if defined(__x86_64__)
// 16 registers: 6 pixels x 2 accumulators, 2 vectors of the panel, 1 broadcast. FMA latency 4 x 2 ports needs 8
// accumulators in flight.
#pragma GCC target("avx2,fma")
#define RESNET_FAST_VECTOR_BYTES 32
#include "cpu/kernels/kernel_table.h"

namespace resnet_fast {
extern const Kernels<float> kFloatAvx2 = kernel_table<float, 6, 12, 3, 6, 2>("avx2");
extern const Kernels<double> kDoubleAvx2 = kernel_table<double, 6, 12, 3, 6, 2>("avx2");
}  // namespace resnet_fast
#endif  // __x86_64__
