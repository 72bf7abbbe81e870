// The training kernels of one element type by tile, stride and chunk. Each type is a source file of its own.
#pragma once

#include <array>
#include <utility>

#include "cuda/hopper/training/conv_gradient.cuh"
#include "cuda/hopper/training/conv_stats.cuh"

namespace resnet_fast::cuda {

// Kernel kHaloKernels * t + kHaloChunks * r + s: tile t, stride 1 + r, chunks of 64 >> s channels; null if there is
// none.
template <typename T>
const void* halo_stats_kernel(int instance);
template <typename T>
const void* halo_gradient_kernel(int instance);

template <typename T, bool kGradient, int kInstance>
const void* training_instance() {
  constexpr int kIndex = kInstance / kHaloKernels, kChunk = 64 >> kInstance % kHaloChunks;
  constexpr int kStride = 1 + kInstance % kHaloKernels / kHaloChunks;
  if constexpr (!has_training_kernel(kHaloTrainingTiles[kIndex], kChunk, kStride, kGradient))
    return nullptr;
  else if constexpr (kGradient)
    return reinterpret_cast<const void*>(&conv_halo_gradient_kernel<T, kIndex, kChunk>);
  else
    return reinterpret_cast<const void*>(&conv_halo_stats_kernel<T, kIndex, kChunk, kStride>);
}

template <typename T, bool kGradient, int... kInstance>
const void* training_kernel(int instance, std::integer_sequence<int, kInstance...>) {
  static const std::array<const void*, sizeof...(kInstance)> kernels = {
      training_instance<T, kGradient, kInstance>()...};
  return kernels[instance];
}

#define RESNET_FAST_HALO_TRAINING_KERNELS(T)                                                             \
  template <>                                                                                            \
  const void* halo_stats_kernel<T>(int instance) {                                                       \
    return training_kernel<T, false>(instance, std::make_integer_sequence<int, kHaloTrainingKernels>{}); \
  }                                                                                                      \
  template <>                                                                                            \
  const void* halo_gradient_kernel<T>(int instance) {                                                    \
    return training_kernel<T, true>(instance, std::make_integer_sequence<int, kHaloTrainingKernels>{});  \
  }

}  // namespace resnet_fast::cuda
