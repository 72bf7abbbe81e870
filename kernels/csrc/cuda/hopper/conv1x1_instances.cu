// The kernels of conv1x1 by element type and tile.
#include <array>
#include <utility>

#include "cuda/hopper/conv1x1.cuh"

namespace resnet_fast::cuda {

template <typename T>
const void* conv1x1_kernel(int tile) {
  static const auto kernels = []<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    return std::array{reinterpret_cast<const void*>(&conv1x1_fwd_kernel<T, kIndex>)...};
  }(std::make_integer_sequence<int, kConv1x1TileCount>{});
  return kernels[tile];
}

template const void* conv1x1_kernel<__half>(int tile);
template const void* conv1x1_kernel<__nv_bfloat16>(int tile);

}  // namespace resnet_fast::cuda
