// The kernels of one element type by tile, stride and chunk. Each type is a source file of its own.
#pragma once

#include <array>
#include <utility>

#include "cuda/hopper/conv_halo.cuh"

namespace resnet_fast::cuda {

// Kernel kHaloKernels * t + kHaloChunks * r + s: tile t, stride 1 + r, chunks of 64 >> s channels.
template <typename T>
const void* halo_kernel(int instance);

template <typename T, int... kInstance>
const void* halo_instance(int instance, std::integer_sequence<int, kInstance...>) {
  static const std::array<const void*, sizeof...(kInstance)> kernels = {
      reinterpret_cast<const void*>(&conv_halo_fwd_kernel<T, kInstance / kHaloKernels, (64 >> kInstance % kHaloChunks),
                                                          1 + kInstance % kHaloKernels / kHaloChunks>)...};
  return kernels[instance];
}

#define RESNET_FAST_HALO_KERNELS(T)                                                                      \
  template <>                                                                                            \
  const void* halo_kernel<T>(int instance) {                                                             \
    return halo_instance<T>(instance, std::make_integer_sequence<int, kHaloTileCount * kHaloKernels>{}); \
  }

}  // namespace resnet_fast::cuda
