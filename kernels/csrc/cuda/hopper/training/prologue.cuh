// What the prologues of the training kernels for Hopper share: they work on the halo in shared memory, each thread on
// the vectors that it copied itself, so that its own wait is enough.
#pragma once

#include "cuda/hopper/halo_tile.cuh"
#include "cuda/hopper/training/plan.h"
#include "cuda/ptx_shared.cuh"

namespace resnet_fast::cuda {

// The first tap at which the copies of the next chunk, which begin at tap 1, have arrived. The prologue has the taps
// from there on for its work, beside wgmma.
constexpr int first_prologue_tap(HaloTile t) { return 1 + halo_ahead(t); }

// Eight consecutive floats, 16-byte aligned.
struct Floats8 {
  float value[8];

  __device__ explicit Floats8(const float* p) {
    *reinterpret_cast<float4*>(value) = __ldg(reinterpret_cast<const float4*>(p));
    *reinterpret_cast<float4*>(value + 4) = __ldg(reinterpret_cast<const float4*>(p) + 1);
  }
  __device__ explicit Floats8(float v) {
#pragma unroll
    for (float& each : value) each = v;
  }
};

// Calls f(position) for this thread's positions of the halo of an image, those of part `part` of `parts`. Zeros beside
// the images are left out: they are the padding of what the prologue makes.
template <typename Load, typename F>
__device__ void for_each_copied(const Load& load, int part, int parts, F f) {
  const int count = halo_positions(Load::kTile.positions, load.a.pitch, Load::kStride) - load.first_row;
  const int copied = (count + Load::kAtOnce - 1) / Load::kAtOnce, end = copied * (part + 1) / parts;
#pragma unroll 2
  for (int i = copied * part / parts; i < end; ++i) {
    const int position = load.first_row + i * Load::kAtOnce;
    if (load.pixel_at(position) >= 0) f(position);
  }
}

}  // namespace resnet_fast::cuda
