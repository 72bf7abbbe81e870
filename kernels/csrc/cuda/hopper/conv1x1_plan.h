// Tiles and launch geometry of the 1x1 convolution for Hopper: pure functions of shapes. No CUDA, no PyTorch.
//
// A GEMM: M is output channels, N the output pixels of the batch, K input channels. At 200 FLOP a byte the tensor cores
// and memory of an H200 balance; the layers of a bottleneck do 28 (64 to 256 channels with residual) to 380 (2048 to
// 512). So tiles are chosen for bytes in flight, and for blocks whose epilogues overlap the loads of others.
#pragma once

#include <cstdint>

#include "cuda/hopper/plan.h"

namespace resnet_fast::cuda {

// A block computes 64 x warpgroups channels (wgmma's M) of `pixels` pixels (its N). Registers allow `blocks` of them on
// a multiprocessor, or more.
struct Conv1x1Tile {
  int pixels, warpgroups, blocks;

  constexpr int channels() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * warpgroups; }
};

constexpr Conv1x1Tile kConv1x1Tiles[] = {
    {64, 1, 3},  // small batches: most blocks
    {128, 1, 3},  // half the filters' bytes for a pixel
    {256, 1, 2},  // to 64 channels from many pixels: filters are a fifth of the bytes
    {128, 2, 2},  // wide outputs with residual: the input is read half as often
    {256, 2, 1},  // deep layers of large batches: fewest bytes of operands
};
constexpr int kConv1x1TileCount = sizeof(kConv1x1Tiles) / sizeof(kConv1x1Tiles[0]);

constexpr int kConv1x1Chunk = 64, kConv1x1Stages = 8;  // channels of a k step; the most stages
constexpr int kMultiprocessors = 132;  // of an H100 SXM or H200: a plan may give few blocks more shared memory

// Arguments of the kernel, by value. All are 32-bit integers: Python passes them as a list.
struct Conv1x1Args {
  int32_t batch, height, width, channels, out_channels;
  int32_t stride, relu, residual;  // residual: whether there is one
  int32_t out_height, out_width;
  int32_t pixels;  // of the output, over the batch
  int32_t chunks;  // k steps
  int32_t channel_blocks;  // blocks along the output channels
  int32_t splits;  // split-K: blocks that share an output tile, by chunks
  int32_t stages;  // of the pipeline: k steps that fit shared memory
  int32_t output;  // offset of the output tile in shared memory
  uint32_t width_inverse, height_inverse;  // to divide by out_width and out_height; 0 for a divisor of 1
};

struct Conv1x1Plan {
  Conv1x1Args args;
  int64_t blocks;  // grid x; y is splits
  int threads, shared;
  int64_t partial_floats, counters;  // split-K workspace: floats, and integers that are zero before and after
};

// Operands lie in planes of 8 channels, 16 bytes for each row (an output channel or a pixel). The bytes of a plane are
// an odd multiple of 16: vectors of one row, which adjacent threads store, fall into different banks.
constexpr int filter_plane_bytes(Conv1x1Tile t) { return t.channels() * 16 + 16; }
constexpr int pixel_plane_bytes(Conv1x1Tile t) { return t.pixels * 16 + 16; }
constexpr int filter_bytes(Conv1x1Tile t) { return kConv1x1Chunk / 8 * filter_plane_bytes(t); }
constexpr int stage_bytes(Conv1x1Tile t) { return filter_bytes(t) + kConv1x1Chunk / 8 * pixel_plane_bytes(t); }
// Bytes of a pixel of the output tile, padded by 16: 8 pixels fall into different banks.
constexpr int output_pitch(Conv1x1Tile t) { return t.channels() * 2 + 16; }
constexpr int output_bytes(Conv1x1Tile t) { return t.pixels * output_pitch(t); }

// Whether a tile can compute a 1x1 convolution without padding, of 16-bit elements and aligned operands. The last bound
// keeps division by multiplication exact, and pixel numbers below 2^31.
constexpr bool supports(Conv1x1Tile t, const Conv1x1Args& a) {
  if (a.batch <= 0 || a.height <= 0 || a.width <= 0 || a.stride <= 0 || a.splits <= 0) return false;
  if (a.channels <= 0 || a.channels % 8 != 0 || a.out_channels <= 0 || a.out_channels % 8 != 0) return false;
  const int64_t height = (a.height - 1) / a.stride + 1, width = (a.width - 1) / a.stride + 1;
  const int64_t longer = height > width ? height : width, image = int64_t{a.height} * a.width;
  return image < INT32_MAX / a.batch && (a.batch * height * width + t.pixels) < (int64_t{1} << 32) / longer;
}

// Completes `a`, which holds the shape, residual and splits. The output tile lies behind the stages if the residual
// arrives there meanwhile, else over them. There are as many stages as leave room for the other blocks that a
// multiprocessor may have: one block hides latency by its stages alone.
constexpr Conv1x1Plan plan_conv1x1(Conv1x1Tile t, Conv1x1Args a) {
  a.out_height = (a.height - 1) / a.stride + 1;
  a.out_width = (a.width - 1) / a.stride + 1;
  a.pixels = a.batch * a.out_height * a.out_width;
  a.chunks = (a.channels + kConv1x1Chunk - 1) / kConv1x1Chunk;
  a.channel_blocks = (a.out_channels + t.channels() - 1) / t.channels();
  a.width_inverse = a.out_width == 1 ? 0 : inverse_of(static_cast<uint32_t>(a.out_width));
  a.height_inverse = a.out_height == 1 ? 0 : inverse_of(static_cast<uint32_t>(a.out_height));
  if (a.splits > a.chunks) a.splits = a.chunks;
  const int64_t blocks = int64_t{a.pixels + t.pixels - 1} / t.pixels * a.channel_blocks;
  const int64_t load = (blocks * a.splits + kMultiprocessors - 1) / kMultiprocessors;
  const int resident = load < t.blocks ? static_cast<int>(load) : t.blocks;
  const int behind = a.residual ? output_bytes(t) : 0, steps = (a.chunks + a.splits - 1) / a.splits;
  a.stages = (kMultiprocessorShared / resident - kReservedShared - behind) / stage_bytes(t);
  a.stages = a.stages < 2 ? 2 : a.stages > kConv1x1Stages ? kConv1x1Stages : a.stages;
  if (a.stages > steps) a.stages = steps;
  a.output = a.residual ? a.stages * stage_bytes(t) : 0;
  const int stages = a.stages * stage_bytes(t) + behind;
  const bool split = a.splits > 1;
  return {a,
          blocks,
          t.threads(),
          stages > output_bytes(t) ? stages : output_bytes(t),
          split ? blocks * a.splits * t.channels() * t.pixels : 0,
          split ? blocks : 0};
}

}  // namespace resnet_fast::cuda
