// Tiles and launch geometry of the weight gradient of the 3x3 convolution for Hopper: pure functions of shapes. No
// CUDA, no PyTorch.
//
// Positions number the output pixels of the whole batch as in conv_halo_plan.h: a line of zeros follows every image, a
// pixel of zeros every line. A tile is a run of `positions` of them, wherever it begins. With stride 2 the input lies
// in the four runs of conv_halo_plan.h.
#pragma once

#include <cstdint>

#include "cuda/hopper/conv_halo_plan.h"

namespace resnet_fast::cuda {

// A block sums dy[p, k] x[p + tap, c] for `rows` channels k, `columns` channels c and all nine taps. wgmma's M is 64:
// with fewer rows it holds them 64 / rows times, each shifted by a line, so that one product serves that many taps.
// Three warpgroups share the taps, one row of them each, or with copies the positions, so that dy is read once. A group
// is the products of 16 `steps` positions, issued together. The pipeline holds `stages` tiles.
struct GradientTile {
  int rows, columns, steps, stages;

  constexpr int copies() const { return 64 / rows; }
  constexpr int parts() const { return copies() == 1 ? 1 : 3; }  // of a tile's positions, a warpgroup each
  // Products a warpgroup issues for 16 positions.
  constexpr int products() const { return copies() == 2 ? 6 : 3; }
  constexpr int accumulators() const { return products() * columns / 2; }  // of a thread
};

constexpr GradientTile kGradientTiles[] = {
    {64, 64, 1, 2},  // 96 accumulators a thread
    {64, 32, 1, 2},  // from 32 to 64 channels
    {32, 32, 1, 3},  // 96 accumulators a thread
    {32, 16, 1, 3},  // from 16 to 32 channels
    {16, 16, 2, 3},  // stride 1 alone: of four copies three are of use
};
constexpr int kGradientTileCount = sizeof(kGradientTiles) / sizeof(kGradientTiles[0]);

constexpr int kGradientThreads = 384;

// Arguments of the kernel, by value. All are 32-bit integers: Python passes them as a list.
struct GradientArgs {
  int32_t batch, height, width, channels, out_channels;
  int32_t stride;
  int32_t affine, relu;  // x is [relu](scale * x + shift), or x
  int32_t batch_norm;  // dy is a * grad + b * (y - mean) + constant, or grad
  int32_t positions, splits;  // of a tile; blocks that share the pixels
  int32_t out_height, out_width;
  int32_t pitch;  // positions of a line: out_width + 1
  int32_t tiles;
  int32_t shift;  // from a copy of the rows to the next, in positions
  int32_t groups;  // of a warpgroup in a tile; even
  int32_t column_blocks;  // blocks along the input channels
  int32_t margin;  // positions of zeros on both sides of dy
  int32_t halo, run;  // positions of x that a tile loads; with stride 2 four runs of these
  int32_t row_plane, column_plane;  // bytes of 8 channels of dy and of x
  int32_t y_at, x_at, stage;  // bytes to the planes of y and of x in a stage, and to the next stage
  uint32_t pitch_inverse, height_inverse;  // to divide by pitch and by out_height + 1
};

constexpr int kGradientArgs = sizeof(GradientArgs) / sizeof(int32_t);

struct GradientPlan {
  GradientArgs args;
  int64_t blocks;  // grid x; y is splits
  int shared;
  int64_t partial_floats;
  bool fits;  // shared memory and masks
};

// Row and column of the tap that a product of a warpgroup gives, by copy; row -1: none. Copies are a line of the same
// run apart: with stride 2 taps of rows 0 and 2.
constexpr int tap_row(GradientTile t, int stride, int warpgroup, int product, int copy) {
  if (t.copies() == 1) return warpgroup;
  if (t.copies() == 4) return copy < 3 ? copy : -1;
  if (product < 3) return copy * stride;
  return copy == 0 ? 3 - stride : -1;
}
constexpr int tap_column(int product) { return product % 3; }

// Positions of x behind the halo that products with zeros of dy read: two copies read the lone row of taps a line
// further.
constexpr int past_halo(GradientTile t, const GradientArgs& a) {
  return t.copies() == 2 && a.stride == 1 ? a.shift : 0;
}
// Bytes of a plane of `positions`, one of `planes`. Adjacent threads store to all planes of a position, then of the
// next: 8 of them to different banks.
constexpr int plane_of(int positions, int planes) { return (positions + 7) / 8 * 128 + 128 / planes; }
// In front of the stages: a, b, and constant - b * mean of each row; scale and shift of each column.
constexpr int table_floats(GradientTile t) { return 3 * t.rows + 2 * t.columns; }

// A thread copies a vector of dy and one of x a step. Masks of 32 bits tell which vectors are no zeros.
constexpr int steps_of(int positions, int channels) {
  const int at_once = kGradientThreads / (channels / 8);
  return (positions + at_once - 1) / at_once;
}
constexpr int load_steps(GradientTile t, const GradientArgs& a) {
  const int rows = steps_of(a.positions, t.rows), columns = steps_of(a.halo, t.columns);
  return rows > columns ? rows : columns;
}
constexpr int kMostSteps = 32;

// Whether a tile can compute the weight gradient of a 3x3 convolution of padding 1, stride 1 or 2, with 16-bit elements
// and aligned operands. The last bounds keep division by multiplication exact and numbers of positions below 2^31.
constexpr bool supports(GradientTile t, const GradientArgs& a) {
  if (a.batch <= 0 || a.height <= 0 || a.width <= 0 || a.stride < 1 || a.stride > 2 || a.splits <= 0) return false;
  if (a.channels <= 0 || a.channels % 8 != 0 || a.out_channels <= 0 || a.out_channels % 8 != 0) return false;
  if (a.stride == 2 && t.copies() == 4) return false;
  const int64_t image = (a.height - 1) / a.stride + 2, pitch = (a.width - 1) / a.stride + 2;
  return pitch <= 4096 && a.positions > 0 && a.positions <= 4096 && a.batch * image < (int64_t{1} << 32) / image &&
         a.batch * image < (int64_t{1} << 30) / pitch && int64_t{a.batch} * a.height * a.width < (int64_t{1} << 31);
}

// Completes `a`, which holds the shape, splits and the least number of positions of a tile.
constexpr GradientPlan plan_gradient(GradientTile t, GradientArgs a) {
  a.out_height = (a.height - 1) / a.stride + 1;
  a.out_width = (a.width - 1) / a.stride + 1;
  a.pitch = a.out_width + 1;
  a.shift = a.pitch;
  a.margin = (t.copies() == 1 ? 0 : t.copies() == 2 ? 1 : 2) * a.shift;
  const int group = 16 * t.steps * t.parts();
  a.groups = (a.positions + a.margin + 2 * group - 1) / (2 * group) * 2;
  a.positions = a.groups * group - a.margin;
  a.halo = halo_positions(a.positions, a.pitch, a.stride);
  a.run = run_positions(a.positions, a.pitch);
  a.row_plane = plane_of(a.positions + 2 * a.margin, t.rows / 8);
  a.column_plane = plane_of(a.halo + past_halo(t, a), t.columns / 8);
  a.y_at = t.rows / 8 * a.row_plane;
  a.x_at = (a.batch_norm ? 2 : 1) * a.y_at;
  a.stage = a.x_at + t.columns / 8 * a.column_plane;
  const int64_t all = int64_t{a.batch} * (a.out_height + 1) * a.pitch;
  a.tiles = static_cast<int32_t>((all + a.positions - 1) / a.positions);
  if (a.splits > a.tiles) a.splits = a.tiles;
  a.column_blocks = (a.channels + t.columns - 1) / t.columns;
  a.pitch_inverse = inverse_of(static_cast<uint32_t>(a.pitch));
  a.height_inverse = inverse_of(static_cast<uint32_t>(a.out_height + 1));
  const int64_t blocks = int64_t{a.column_blocks} * ((a.out_channels + t.rows - 1) / t.rows);
  const int sums = 4 * (t.parts() - 1) * 128 * t.accumulators();  // of two warpgroups, once the tiles are done
  const int tiles = 4 * table_floats(t) + t.stages * a.stage, shared = tiles > sums ? tiles : sums;
  const bool fits = shared <= kMaxShared && load_steps(t, a) <= kMostSteps;
  return {a, blocks, shared, int64_t{a.splits} * a.out_channels * 9 * a.channels, fits};
}

}  // namespace resnet_fast::cuda
