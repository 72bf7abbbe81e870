// Geometry of the 3x3 convolutions of Hopper: pure functions of shapes. No CUDA, no PyTorch.
//
// The images of a batch stand below each other with a row of zeros between them, and every row ends with a pixel of
// zeros: positions in a run, line by line. A tile is a run of lines; its outputs are `columns` positions, some of them
// zeros that nobody stores, and a tap is a distance between positions: (ky - 1) * pitch + kx - 1. With stride 2 the
// input is four such runs, of the even and odd rows and columns, each as wide as the output: a tap is one of them and a
// distance in it.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// A block computes 64 x warpgroups channels of `columns` positions. Products come in steps of one tap and at most 64
// channels; `stages` steps of filters are under way or in use at a time.
struct HaloTile {
  int columns, warpgroups, stages;

  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * warpgroups; }
};

constexpr HaloTile kHaloTiles[] = {
    {232, 1, 4},  // 4 lines of 56: the fewest filters read for a product; 112 blocks at batch 8
    {216, 1, 4},  // 7 lines of 28, an image of 14x14
    {120, 1, 4},  // 4 lines of 28: 112 blocks of 128 channels at batch 8; 2 of 56
    {112, 1, 4},  // 7 lines of 14
    {64, 1, 5},  // 4 lines of 14: 128 blocks at batch 8
    {56, 1, 5},  // an image of 7x7
    {120, 2, 4},  // 128 channels: input read half as often, for large batches
    {232, 2, 4},
};
constexpr int kHaloTileCount = sizeof(kHaloTiles) / sizeof(kHaloTiles[0]);

// Slices of channels are of 64, 32 or 16, strides 1 or 2: a kernel for each.
constexpr int kHaloSlices = 3, kHaloKernels = 2 * kHaloSlices;

// Everything a kernel must know, by value: integers of 32 bits alone, so that it can be passed as a list.
struct HaloArgs {
  int32_t batch, height, width, channels, out_channels;
  int32_t stride, relu;
  int32_t out_height, out_width;
  int32_t pitch;  // positions of a line: out_width + 1
  int32_t lines;  // of a tile
  int32_t images, tiles;  // `images` in a row make `tiles` tiles
  int32_t chunk, chunks;  // channels of a step; all channels are `chunks` of them
  int32_t columns;  // blocks for all output channels
  int32_t splits;  // blocks that share a sum: each has some chunks
  uint32_t pitch_inverse, height_inverse;  // for division by pitch and by out_height + 1
};

constexpr int kHaloArgs = sizeof(HaloArgs) / sizeof(int32_t);

struct HaloPlan {
  HaloArgs args;
  int64_t blocks;  // grid x; y is splits
  int threads, shared;
  int64_t partial_floats, counters;  // workspace of split sums: floats, and integers that are zero before and after
};

constexpr int kMaxShared = 227 * 1024;

// n / d is the upper half of n * inverse_of(d), for 1 < d and n * d < 2^32.
constexpr uint32_t inverse_of(uint32_t d) { return static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d); }

// Positions of one of the runs, and of all that a tile's outputs read: a line and one position before, with stride 1
// the same behind.
constexpr int run_positions(int columns, int pitch) { return columns + pitch + 2; }
constexpr int halo_positions(int columns, int pitch, int stride) {
  return stride == 1 ? columns + 2 * pitch + 2 : 4 * run_positions(columns, pitch);
}
// What a tap adds to the position of an output. Position 0 lies before the line above the tile. Of stride 2 the runs
// are even rows and columns, odd columns, odd rows, both odd; tap 0 reads the odd ones before, tap 2 those behind.
constexpr int tap_position(int columns, int pitch, int stride, int ky, int kx) {
  if (stride == 1) return ky * pitch + kx;
  const int run = (ky == 1 ? 0 : 2) + (kx == 1 ? 0 : 1);
  return run * run_positions(columns, pitch) + (ky == 0 ? 0 : pitch) + (kx == 0 ? 0 : 1);
}
// Bytes from 8 channels of the input to the next 8. An odd number of 16-byte banks, as for the filters below: pieces of
// one pixel, which neighbouring threads store, fall into different ones.
constexpr int plane_bytes(int columns, int pitch, int stride) {
  return (halo_positions(columns, pitch, stride) + 7) / 8 * 128 + 16;
}
constexpr int filter_plane_bytes(HaloTile t) { return t.rows() * 16 + 16; }
constexpr int filter_bytes(HaloTile t, int chunk) { return chunk / 8 * filter_plane_bytes(t); }
// A position of the output tile, and the 16 bytes that keep 8 of them in different banks.
constexpr int output_pitch(HaloTile t) { return t.rows() * 2 + 16; }

// Two slices of input, where a block has more than one: one is read while the next one comes.
constexpr int input_bytes(HaloTile t, const HaloArgs& a) {
  return (a.chunks > a.splits ? 2 : 1) * (a.chunk / 8) * plane_bytes(t.columns, a.pitch, a.stride);
}
constexpr int shared_bytes(HaloTile t, const HaloArgs& a) {
  return input_bytes(t, a) + t.stages * filter_bytes(t, a.chunk) + t.columns * output_pitch(t);
}

// Whether a tile can compute a 3x3 convolution of padding 1 and stride 1 or 2, of 16-bit elements and aligned operands.
// Lines are counted by multiplication, which is exact so far; pixels fit 31 bits then.
constexpr bool suits(HaloTile t, const HaloArgs& a) {
  if (a.batch <= 0 || a.height <= 0 || a.width <= 0 || a.stride < 1 || a.stride > 2 || a.splits <= 0) return false;
  const int64_t image = (a.height - 1) / a.stride + 2, pitch = (a.width - 1) / a.stride + 2;
  return a.channels > 0 && a.channels % 16 == 0 && a.out_channels > 0 && a.out_channels % 8 == 0 &&
         pitch <= t.columns && a.batch * image < (1 << 21) / image;
}

// Fills in what follows from the shape and the choice of splits, already in `a`: as many lines as fit the columns;
// whole images where one and the line between fit twice.
constexpr HaloPlan plan_halo(HaloTile t, HaloArgs a) {
  a.out_height = (a.height - 1) / a.stride + 1;
  a.out_width = (a.width - 1) / a.stride + 1;
  a.pitch = a.out_width + 1;
  a.lines = t.columns / a.pitch;
  const int image = a.out_height + 1;
  a.images = 1, a.tiles = 1;
  if (a.lines >= image + a.out_height) {
    a.images = (a.lines + 1) / image;
    if (a.images > a.batch) a.images = a.batch;
    a.lines = a.images * image - 1;
  } else {
    if (a.lines > a.out_height) a.lines = a.out_height;
    a.tiles = (a.out_height + a.lines - 1) / a.lines;
    a.lines = (a.out_height + a.tiles - 1) / a.tiles;  // even tiles
  }
  a.chunk = a.channels % 64 == 0 ? 64 : a.channels % 32 == 0 ? 32 : 16;
  a.chunks = a.channels / a.chunk;
  a.columns = (a.out_channels + t.rows() - 1) / t.rows();
  a.pitch_inverse = inverse_of(static_cast<uint32_t>(a.pitch));
  a.height_inverse = inverse_of(static_cast<uint32_t>(image));
  if (a.splits > a.chunks) a.splits = a.chunks;
  const int64_t groups = (a.batch + a.images - 1) / a.images, blocks = groups * a.tiles * a.columns;
  const bool split = a.splits > 1;
  return {a,
          blocks,
          t.threads(),
          shared_bytes(t, a),
          split ? blocks * a.splits * t.rows() * t.columns : 0,
          split ? blocks : 0};
}

}  // namespace resnet_fast::cuda
