// Any x86-64 (SSE2) or other CPU: multiplies and adds apart, 4 x 2 sums in 16 registers.
#define RESNET_FAST_VECTOR_BYTES 16
#include "conv_kernel.h"

namespace resnet_fast {
extern const ConvKernels<float> kConvFloatBaseline = kernels<float, 4, 8>("baseline");
extern const ConvKernels<double> kConvDoubleBaseline = kernels<double, 4, 8>("baseline");
}  // namespace resnet_fast
