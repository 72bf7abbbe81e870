// Tiles and launch geometry of the 3x3 convolutions of training for Hopper: the forward pass with statistics, and the
// data gradient. Tiles are those of conv_halo_plan.h, but all of a launch hold as many pixels, except the last: partial
// statistics say how many by their number alone. No CUDA, no PyTorch.
#pragma once

#include "cuda/hopper/conv_halo_plan.h"

namespace resnet_fast::cuda {

constexpr HaloTile kHaloTrainingTiles[] = {
    {232, 1, 4},  // 4 lines of 56, 14 of 14: fewest filter bytes per FLOP
    {136, 1, 4},  // 8 lines of 16, 4 of 32
    {120, 1, 4},  // 2 lines of 56, 4 of 28; two images of 7x7
    {72, 1, 5},  // an image of 8x8, 4 lines of 16
    {232, 2, 4},  // 128 channels: the input is read, and normalised, half as often
    {120, 2, 4},
};
constexpr int kHaloTrainingTileCount = sizeof(kHaloTrainingTiles) / sizeof(kHaloTrainingTiles[0]);

constexpr int kHaloTrainingKernels = kHaloTrainingTileCount * kHaloKernels;

// Whether there is a kernel of a tile: two warpgroups are for deep layers, large tiles and data gradients for stride 1.
constexpr bool has_training_kernel(HaloTile t, int chunk, int stride, bool gradient) {
  return stride == 1 ? t.warpgroups == 1 || chunk == 64 : t.warpgroups == 1 && t.positions <= 120 && !gradient;
}

// The data gradient is the convolution of the output's gradient with transposed filters. These arrive as they lie in
// memory, so a plane holds 8 output channels (wgmma's M) of all input channels of a step; padded as other planes are.
constexpr int gradient_filter_plane_bytes(int chunk) { return chunk * 16 + 16; }
constexpr int gradient_filter_bytes(HaloTile t, int chunk) {
  return t.channels() / 8 * gradient_filter_plane_bytes(chunk);
}
// Bytes of a position of the float32 tile in which the data gradient is finalised.
constexpr int gradient_pitch(HaloTile t) { return t.channels() * 4 + 16; }
// Bytes of the halo of y, which is read beside that of the gradient, a chunk at a time.
constexpr int staged_bytes(HaloTile t, const HaloArgs& a) {
  return a.chunk / 8 * plane_bytes(t.positions, a.pitch, a.stride, a.chunk);
}

// The output tile takes the place of the operands.
constexpr int stats_shared_bytes(HaloTile t, const HaloArgs& a) {
  const int operands = input_bytes(t, a) + t.stages * filter_bytes(t, a.chunk);
  const int output = t.positions * output_pitch(t);
  return operands > output ? operands : output;
}
constexpr int gradient_shared_bytes(HaloTile t, const HaloArgs& a) {
  const int operands = input_bytes(t, a) + staged_bytes(t, a) + t.stages * gradient_filter_bytes(t, a.chunk);
  const int output = t.positions * gradient_pitch(t);
  return operands > output ? operands : output;
}

// Pixels of a tile; the last tile may have fewer.
constexpr int tile_pixels(const HaloArgs& a) {
  return (a.images > 1 ? a.images * a.out_height : a.lines) * a.out_width;
}

// Whether a tile can compute it, if it fits shared memory.
constexpr bool supports_training(HaloTile t, const HaloArgs& a, bool gradient) {
  const int chunk = a.channels % 64 == 0 ? 64 : a.channels % 32 == 0 ? 32 : 16;
  return supports(t, a) && has_training_kernel(t, chunk, a.stride, gradient);
}

// Completes `a`, which holds the shape: that of the gradient's convolution for the data gradient. There is no split-K.
constexpr HaloPlan plan_halo_training(HaloTile t, HaloArgs a, bool gradient) {
  a.splits = 1;
  HaloPlan plan = plan_halo(t, a);
  HaloArgs& p = plan.args;
  if (p.images == 1) {
    p.lines = t.positions / p.pitch < p.out_height ? t.positions / p.pitch : p.out_height;
    while (p.out_height % p.lines != 0) --p.lines;
    p.tiles = p.out_height / p.lines;
  }
  plan.partial_floats = plan.counters = 0;
  plan.blocks = int64_t{(p.batch + p.images - 1) / p.images} * p.tiles * p.channel_blocks;
  plan.shared = gradient ? gradient_shared_bytes(t, p) : stats_shared_bytes(t, p);
  return plan;
}

}  // namespace resnet_fast::cuda
