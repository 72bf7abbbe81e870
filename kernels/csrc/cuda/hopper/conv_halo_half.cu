#include "cuda/hopper/conv_halo_instances.cuh"

namespace resnet_fast::cuda {
RESNET_FAST_HALO_KERNELS(__half)
}  // namespace resnet_fast::cuda
