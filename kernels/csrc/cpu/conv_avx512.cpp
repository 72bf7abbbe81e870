#if defined(__x86_64__)
// 32 registers: 12 pixels x 2 vectors of sums, 2 of the panel, broadcasts; 12 offsets still fit the integer registers.
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#define RESNET_FAST_VECTOR_BYTES 64
#include "conv_kernel.h"

namespace resnet_fast {
extern const ConvKernels<float> kConvFloatAvx512 = kernels<float, 12, 12>("avx512");
extern const ConvKernels<double> kConvDoubleAvx512 = kernels<double, 12, 12>("avx512");
}  // namespace resnet_fast
#endif  // __x86_64__
