// Tiles and launch geometry of the 3x3 convolution for Hopper: pure functions of shapes. No CUDA, no PyTorch.
//
// The images of a batch are stacked with a line of zeros between them, and every line ends with a pixel of zeros.
// Positions number the pixels in this order. A tile is a run of lines. It computes `positions` outputs; those at zeros
// are not stored. A tap is a distance between positions: (ky - 1) * pitch + kx - 1. With stride 2 the input is split
// into four such runs by even and odd rows and columns, each as wide as the output; a tap is one of them and a distance
// in it.
#pragma once

#include <cstdint>

#include "cuda/hopper/plan.h"

namespace resnet_fast::cuda {

// A block computes 64 x warpgroups channels (wgmma's M) of `positions` positions (its N). A k step is one tap and at
// most 64 channels. The pipeline holds the filters of `stages` steps.
struct HaloTile {
  int positions, warpgroups, stages;

  constexpr int channels() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * warpgroups; }
};

constexpr HaloTile kHaloTiles[] = {
    {232, 1, 4},  // 4 lines of 56: fewest filter bytes per FLOP; 112 blocks at batch 8
    {216, 1, 4},  // 7 lines of 28, an image of 14x14
    {120, 1, 4},  // 4 lines of 28: 112 blocks of 128 channels at batch 8; 2 of 56
    {112, 1, 4},  // 7 lines of 14
    {64, 1, 5},  // 4 lines of 14: 128 blocks at batch 8
    {56, 1, 5},  // an image of 7x7
    {120, 2, 4},  // 128 channels: the input is read half as often; for large batches
    {232, 2, 4},
};
constexpr int kHaloTileCount = sizeof(kHaloTiles) / sizeof(kHaloTiles[0]);

// Kernels of a tile: one for each channel chunk (64, 32 or 16) and stride (1 or 2).
constexpr int kHaloChunks = 3, kHaloKernels = 2 * kHaloChunks;

// Arguments of the kernel, by value. All are 32-bit integers: Python passes them as a list.
struct HaloArgs {
  int32_t batch, height, width, channels, out_channels;
  int32_t stride, relu;
  int32_t out_height, out_width;
  int32_t pitch;  // positions of a line: out_width + 1
  int32_t lines;  // of a tile
  int32_t images, tiles;  // `images` consecutive images make `tiles` tiles
  int32_t chunk, chunks;  // channels of a k step, and how many chunks there are
  int32_t channel_blocks;  // blocks along the output channels
  int32_t splits;  // split-K: blocks that share an output tile, by chunks
  uint32_t pitch_inverse, height_inverse;  // to divide by pitch and by out_height + 1
};

constexpr int kHaloArgs = sizeof(HaloArgs) / sizeof(int32_t);

struct HaloPlan {
  HaloArgs args;
  int64_t blocks;  // grid x; y is splits
  int threads, shared;
  int64_t partial_floats, counters;  // split-K workspace: floats, and integers that are zero before and after
};

// Positions of one of the four runs of stride 2, and of all input that a tile reads: with a line and a position before
// and, for stride 1, the same behind.
constexpr int run_positions(int positions, int pitch) { return positions + pitch + 2; }
constexpr int halo_positions(int positions, int pitch, int stride) {
  return stride == 1 ? positions + 2 * pitch + 2 : 4 * run_positions(positions, pitch);
}
// What a tap adds to the position of an output. Position 0 lies before the line above the tile. The runs of stride 2:
// rows and columns even, odd columns, odd rows, both odd. Tap 0 reads the odd ones before, tap 2 those behind.
constexpr int tap_position(int positions, int pitch, int stride, int ky, int kx) {
  if (stride == 1) return ky * pitch + kx;
  const int run = (ky == 1 ? 0 : 2) + (kx == 1 ? 0 : 1);
  return run * run_positions(positions, pitch) + (ky == 0 ? 0 : pitch) + (kx == 0 ? 0 : 1);
}
// Bytes from 8 channels of the input to the next 8, of `chunk` channels. Adjacent threads store the vectors of one
// pixel, then those of the next: the padding makes eight of them fall into different banks.
constexpr int plane_bytes(int positions, int pitch, int stride, int chunk) {
  return (halo_positions(positions, pitch, stride) + 7) / 8 * 128 + 1024 / chunk;
}
// The same for filters: an odd multiple of 16.
constexpr int filter_plane_bytes(HaloTile t) { return t.channels() * 16 + 16; }
constexpr int filter_bytes(HaloTile t, int chunk) { return chunk / 8 * filter_plane_bytes(t); }
// Bytes of a position of the output tile, padded by 16: 8 positions fall into different banks.
constexpr int output_pitch(HaloTile t) { return t.channels() * 2 + 16; }

// The input is double-buffered if a block has more than one chunk.
constexpr int input_bytes(HaloTile t, const HaloArgs& a) {
  return (a.chunks > a.splits ? 2 : 1) * (a.chunk / 8) * plane_bytes(t.positions, a.pitch, a.stride, a.chunk);
}
constexpr int shared_bytes(HaloTile t, const HaloArgs& a) {
  return input_bytes(t, a) + t.stages * filter_bytes(t, a.chunk) + t.positions * output_pitch(t);
}

// Whether a tile can compute a 3x3 convolution of padding 1, stride 1 or 2, 16-bit elements and aligned operands. The
// last bound keeps division by multiplication exact and pixel numbers below 2^31.
constexpr bool supports(HaloTile t, const HaloArgs& a) {
  if (a.batch <= 0 || a.height <= 0 || a.width <= 0 || a.stride < 1 || a.stride > 2 || a.splits <= 0) return false;
  const int64_t image = (a.height - 1) / a.stride + 2, pitch = (a.width - 1) / a.stride + 2;
  return a.channels > 0 && a.channels % 16 == 0 && a.out_channels > 0 && a.out_channels % 8 == 0 &&
         pitch <= t.positions && a.batch * image < (1 << 21) / image;
}

// Completes `a`, which holds the shape and splits. A tile takes as many lines as it has positions for, or whole images
// if two of them and the line between fit.
constexpr HaloPlan plan_halo(HaloTile t, HaloArgs a) {
  a.out_height = (a.height - 1) / a.stride + 1;
  a.out_width = (a.width - 1) / a.stride + 1;
  a.pitch = a.out_width + 1;
  a.lines = t.positions / a.pitch;
  const int image = a.out_height + 1;
  a.images = 1, a.tiles = 1;
  if (a.lines >= image + a.out_height) {
    a.images = (a.lines + 1) / image;
    if (a.images > a.batch) a.images = a.batch;
    a.lines = a.images * image - 1;
  } else {
    if (a.lines > a.out_height) a.lines = a.out_height;
    a.tiles = (a.out_height + a.lines - 1) / a.lines;
    a.lines = (a.out_height + a.tiles - 1) / a.tiles;  // tiles of equal size
  }
  a.chunk = a.channels % 64 == 0 ? 64 : a.channels % 32 == 0 ? 32 : 16;
  a.chunks = a.channels / a.chunk;
  a.channel_blocks = (a.out_channels + t.channels() - 1) / t.channels();
  a.pitch_inverse = inverse_of(static_cast<uint32_t>(a.pitch));
  a.height_inverse = inverse_of(static_cast<uint32_t>(image));
  if (a.splits > a.chunks) a.splits = a.chunks;
  const int64_t groups = (a.batch + a.images - 1) / a.images, blocks = groups * a.tiles * a.channel_blocks;
  const bool split = a.splits > 1;
  return {a,
          blocks,
          t.threads(),
          shared_bytes(t, a),
          split ? blocks * a.splits * t.channels() * t.positions : 0,
          split ? blocks : 0};
}

}  // namespace resnet_fast::cuda
