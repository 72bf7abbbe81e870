// The kernels of one element type by tile. Each type is a source file of its own.
#pragma once

#include <array>
#include <utility>

#include "cuda/hopper/weight_gradient.cuh"

namespace resnet_fast::cuda {

template <typename T>
const void* gradient_kernel(int tile);

template <typename T, int... kIndex>
const void* gradient_instance(int tile, std::integer_sequence<int, kIndex...>) {
  static const std::array<const void*, sizeof...(kIndex)> kernels = {
      reinterpret_cast<const void*>(&weight_gradient_kernel<T, kIndex>)...};
  return kernels[tile];
}

#define RESNET_FAST_GRADIENT_KERNELS(T)                                                       \
  template <>                                                                                 \
  const void* gradient_kernel<T>(int tile) {                                                  \
    return gradient_instance<T>(tile, std::make_integer_sequence<int, kGradientTileCount>{}); \
  }

}  // namespace resnet_fast::cuda
