#include "cuda/hopper/training/instances.cuh"

namespace resnet_fast::cuda {
RESNET_FAST_HALO_TRAINING_KERNELS(__half)
}  // namespace resnet_fast::cuda
