// Average pooling and the linear layer, on the last activation in shared memory.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/stage/residual_stage_activations.cuh"

namespace resnet_fast::cuda::stage {

// means[c] of an image's activation, added by rows and, within a row, by columns: a fixed order. rows: kSize row sums a
// channel. Contains barriers: all threads call it.
template <class S, typename T>
__device__ void average(float* means, float* rows, const char* activation) {
  constexpr int kPairs = S::kChannels / 2;
  for (int i = threadIdx.x; i < S::kSize * kPairs; i += S::kThreads) {
    const int pair = i % kPairs, y = i / kPairs;
    const int byte = 2 * pair * static_cast<int>(sizeof(T));
    const char* lane_address = plane_of<S>(activation, byte / 16) + byte % 16 + 16 * ((y + 1) * S::kPitch + 1);
    float2 sum = {0, 0};
#pragma unroll
    for (int x = 0; x < S::kSize; ++x) {
      const float2 v = widen2(*reinterpret_cast<const vec2_of<T>*>(lane_address + 16 * x));
      sum.x += v.x, sum.y += v.y;
    }
    *reinterpret_cast<float2*>(rows + 2 * i) = sum;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < S::kChannels; c += S::kThreads) {
    float sum = 0;
    for (int y = 0; y < S::kSize; ++y) sum += rows[y * S::kChannels + c];
    means[c] = sum / (S::kSize * S::kSize);
  }
  __syncthreads();
}

// y[k] = bias[k] + weight[k] . means, one warp per class, reduced as a tree. weight: [classes][kChannels]; bias:
// float32.
template <class S, typename T>
__device__ void classify(T* y, const float* means, const T* weight, const float* bias, int classes) {
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < classes; k += S::kWarps) {
    float sum = 0;
#pragma unroll
    for (int c = 2 * lane; c < S::kChannels; c += 64) {
      const float2 w = widen2(*reinterpret_cast<const vec2_of<T>*>(weight + k * S::kChannels + c));
      sum += w.x * means[c] + w.y * means[c + 1];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) narrow(sum + bias[k], y[k]);
  }
}

}  // namespace resnet_fast::cuda::stage
