#include "cuda/conv/conv_instances.cuh"

namespace resnet_fast::cuda {
RESNET_FAST_CONV_KERNELS(float)
}  // namespace resnet_fast::cuda
