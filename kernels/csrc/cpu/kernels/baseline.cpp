// Any x86-64 (SSE2) or other CPU: separate multiplies and adds, 4 x 2 accumulators in 16 registers.
#define RESNET_FAST_VECTOR_BYTES 16
#include "cpu/kernels/kernel_table.h"

namespace resnet_fast {
extern const Kernels<float> kFloatBaseline = kernel_table<float, 4, 8, 2, 4, 2>("baseline");
extern const Kernels<double> kDoubleBaseline = kernel_table<double, 4, 8, 2, 4, 2>("baseline");
}  // namespace resnet_fast
