#include "cuda/hopper/weight_gradient_instances.cuh"

namespace resnet_fast::cuda {
RESNET_FAST_GRADIENT_KERNELS(__nv_bfloat16)
}  // namespace resnet_fast::cuda
