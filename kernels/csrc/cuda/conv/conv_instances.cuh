// The kernels of one element type by tile. Each type is a source file of its own, so that they compile in parallel.
#pragma once

#include <array>
#include <utility>

#include "cuda/conv/conv_bn_relu.cuh"

namespace resnet_fast::cuda {

// Null if the tile is not compiled for the type.
template <typename T>
const void* conv_kernel(int tile);

template <typename T, int kIndex>
const void* conv_instance() {
  if constexpr (has_instance(kConvTiles[kIndex], sizeof(T))) {
    return reinterpret_cast<const void*>(&conv_bn_relu_fwd_kernel<T, kIndex>);
  } else {
    return nullptr;
  }
}

template <typename T, int... kIndex>
const void* conv_instance(int tile, std::integer_sequence<int, kIndex...>) {
  static const std::array<const void*, sizeof...(kIndex)> kernels = {conv_instance<T, kIndex>()...};
  return kernels[tile];
}

#define RESNET_FAST_CONV_KERNELS(T)                                                   \
  template <>                                                                         \
  const void* conv_kernel<T>(int tile) {                                              \
    return conv_instance<T>(tile, std::make_integer_sequence<int, kConvTileCount>{}); \
  }

}  // namespace resnet_fast::cuda
