#if defined(__x86_64__)
// 16 registers: 6 pixels x 2 vectors of sums, 2 of the panel, 1 broadcast. FMA latency 4 x 2 ports needs 8 sums in flight.
#pragma GCC target("avx2,fma")
#define RESNET_FAST_VECTOR_BYTES 32
#include "conv_kernel.h"

namespace resnet_fast {
extern const ConvKernels<float> kConvFloatAvx2 = kernels<float, 6, 12>("avx2");
extern const ConvKernels<double> kConvDoubleAvx2 = kernels<double, 6, 12>("avx2");
}  // namespace resnet_fast
#endif  // __x86_64__
