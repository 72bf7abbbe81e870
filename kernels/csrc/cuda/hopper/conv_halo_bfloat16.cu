#include "cuda/hopper/conv_halo_instances.cuh"

namespace resnet_fast::cuda {
RESNET_FAST_HALO_KERNELS(__nv_bfloat16)
}  // namespace resnet_fast::cuda
