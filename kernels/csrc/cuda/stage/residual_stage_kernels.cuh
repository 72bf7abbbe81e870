// The compiled stage kernels: residual_stage_<entry>_<channels>x<size>x<size>_<images a block>_<type>.
#pragma once

#include "cuda/stage/residual_stage.cuh"

namespace resnet_fast::cuda {

// f(entry's name, entry, bytes of a channel, channels, size, images a block, warps): the stages of the CIFAR networks
// and of networks twice as wide. In large batches several images a block share the loads of filters.
// clang-format off
#define RESNET_FAST_STAGES(f)                   \
  f(stem, Entry::kStem, 2, 16, 32, 1, 8)        \
  f(map, Entry::kMap, 2, 16, 32, 1, 8)          \
  f(strided, Entry::kStrided, 2, 32, 16, 1, 8)  \
  f(map, Entry::kMap, 2, 32, 16, 1, 8)          \
  f(strided, Entry::kStrided, 2, 64, 8, 1, 8)   \
  f(map, Entry::kMap, 2, 64, 8, 1, 8)           \
  f(strided, Entry::kStrided, 2, 64, 8, 2, 8)   \
  f(map, Entry::kMap, 2, 64, 8, 2, 8)           \
  f(strided, Entry::kStrided, 2, 64, 8, 4, 16)  \
  f(map, Entry::kMap, 2, 64, 8, 4, 16)          \
  f(map, Entry::kMap, 2, 32, 32, 1, 8)          \
  f(strided, Entry::kStrided, 2, 64, 16, 1, 16) \
  f(map, Entry::kMap, 2, 64, 16, 1, 16)         \
  f(strided, Entry::kStrided, 2, 128, 8, 1, 16) \
  f(map, Entry::kMap, 2, 128, 8, 1, 16)

// The same for float32, multiplied as TF32.
#define RESNET_FAST_TF32_STAGES(f)              \
  f(stem, Entry::kStem, 4, 16, 32, 1, 8)        \
  f(map, Entry::kMap, 4, 16, 32, 1, 8)          \
  f(strided, Entry::kStrided, 4, 32, 16, 1, 8)  \
  f(map, Entry::kMap, 4, 32, 16, 1, 8)          \
  f(strided, Entry::kStrided, 4, 64, 8, 1, 8)   \
  f(map, Entry::kMap, 4, 64, 8, 1, 8)           \
  f(strided, Entry::kStrided, 4, 64, 8, 2, 8)   \
  f(map, Entry::kMap, 4, 64, 8, 2, 8)

#define RESNET_FAST_STAGE_NAME(name, channels, size, images, suffix) \
  residual_stage_##name##_##channels##x##size##x##size##_##images##_##suffix
// clang-format on

// Blocks per multiprocessor: registers must allow as many as the shared memory of sm_80 does.
template <class S>
constexpr int kStageBlocks = 164 * 1024 / (S::kSharedBytes + 1024);

#define RESNET_FAST_STAGE_KERNEL(name, entry, bytes, channels, size, images, warps, suffix, type)                    \
  extern "C" __global__ void __launch_bounds__(                                                                      \
      32 * warps, (kStageBlocks<StageShape<bytes, channels, size, entry, images, warps>>))                           \
      RESNET_FAST_STAGE_NAME(name, channels, size, images, suffix)(                                                  \
          const type* x, const void* filters, type* y, int64_t batch, int blocks, int classes, bool channels_last) { \
    residual_stage<type, StageShape<bytes, channels, size, entry, images, warps>>(x, filters, y, batch, blocks,      \
                                                                                  classes, channels_last);           \
  }
#define RESNET_FAST_HALF_STAGE(name, entry, bytes, channels, size, images, warps)              \
  RESNET_FAST_STAGE_KERNEL(name, entry, bytes, channels, size, images, warps, float16, __half) \
  RESNET_FAST_STAGE_KERNEL(name, entry, bytes, channels, size, images, warps, bfloat16, __nv_bfloat16)
#define RESNET_FAST_TF32_STAGE(name, entry, bytes, channels, size, images, warps) \
  RESNET_FAST_STAGE_KERNEL(name, entry, bytes, channels, size, images, warps, float32, float)

RESNET_FAST_STAGES(RESNET_FAST_HALF_STAGE)
RESNET_FAST_TF32_STAGES(RESNET_FAST_TF32_STAGE)

}  // namespace resnet_fast::cuda
