// Tiles and launch geometry of the convolution: pure functions of shapes, for the launcher and the tests. No CUDA, no
// PyTorch.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// How operands are loaded into shared memory.
enum class Load {
  kHalo,  // 3x3, stride 1, padding 1: a block's pixels and their halo, once for all nine taps
  kGather,  // any filter: 16-byte vectors of the input pixels under a tap, tap by tap
  kScalar,  // any channels and alignment: the same, element by element
};
// Tensor cores (float32 as TF32), or FMA units in exact float32.
enum class Math { kTensor, kSimt };

// A block computes m() pixels x n() channels. A warp computes mt x 16 of the pixels (short blocks skip all but min_mt)
// and nt x 8 of the channels. warps_k warps compute the same warp tile, each over a slice of k. A k step takes
// `row_bytes` of channels under `taps` taps of one filter row. The pipeline has `stages` stages.
struct ConvTile {
  Load load;
  Math math;
  int mt, min_mt, nt, warps_m, warps_n, warps_k, row_bytes, taps, stages, blocks_per_sm;

  constexpr int m() const { return 16 * mt * warps_m; }
  constexpr int n() const { return 8 * nt * warps_n; }
  constexpr int warps() const { return warps_m * warps_n * warps_k; }
  constexpr int threads() const { return 32 * warps(); }
  // An odd multiple of 16 bytes: 8 consecutive rows fall into different banks for ldmatrix.
  constexpr int pitch() const { return row_bytes + 16; }
  constexpr int scale_shift_bytes() const { return 2 * n() * 4; }  // first in shared memory
  constexpr int filter_bytes() const { return taps * n() * pitch(); }
  // After reduce_warps each of the warps_k warps holds this many times 16 pixels.
  constexpr int reduced_mt() const { return (mt + warps_k - 1) / warps_k; }
  constexpr int acc_floats() const { return warps() * reduced_mt() * nt * 128; }
};

constexpr ConvTile kConvTiles[] = {
    // Warp tiles of 64 x 64 load half as many fragments per mma as 32 x 32. For 64 channels.
    {Load::kHalo, Math::kTensor, 4, 4, 8, 4, 1, 1, 64, 1, 3, 2},
    // Many pixels, few channels: in deep layers filters outweigh pixels, so few blocks should read them.
    {Load::kHalo, Math::kTensor, 9, 6, 4, 2, 1, 2, 64, 3, 3, 2},
    {Load::kHalo, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 3, 3, 2},  // small batches
    {Load::kHalo, Math::kTensor, 4, 4, 2, 4, 1, 1, 32, 3, 3, 2},  // 16 channels
    {Load::kGather, Math::kTensor, 4, 4, 4, 2, 2, 1, 64, 1, 4, 2},
    {Load::kGather, Math::kTensor, 2, 2, 4, 4, 1, 1, 64, 1, 4, 2},  // 32 channels
    {Load::kGather, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 1, 4, 2},  // small batches
    {Load::kScalar, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 1, 3, 2},  // stems, odd channels
    {Load::kScalar, Math::kTensor, 2, 2, 2, 4, 1, 1, 64, 1, 3, 2},  // the same for few filters
    {Load::kGather, Math::kSimt, 4, 4, 4, 1, 2, 2, 64, 1, 4, 2},
    {Load::kScalar, Math::kSimt, 4, 4, 4, 1, 2, 2, 64, 1, 3, 2},
};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(kConvTiles[0]);

// Whether the tile is compiled for an element type: SIMT for float32 alone.
constexpr bool has_instance(ConvTile tile, int element_size) { return tile.math == Math::kTensor || element_size == 4; }

// Arguments of the kernel, by value. All are int32: Python passes them as a list.
struct ConvArgs {
  int32_t batch, height, width, channels;
  int32_t out_height, out_width, out_channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int32_t relu;
  int32_t vectorized;  // residual and y: aligned, rows of whole 16-byte vectors
  int32_t pixels;  // of the output, over the batch
  int32_t tile_pixels;  // of a block, at most m()
  int32_t channel_blocks;  // blocks along the output channels
  int32_t k_blocks;  // of the reduction: channel slices (kHalo) or k steps
  int32_t splits;  // split-K: blocks that share an output tile
};
constexpr int kConvArgs = sizeof(ConvArgs) / sizeof(int32_t);

struct ConvPlan {
  ConvArgs args;
  int64_t blocks;  // grid x; y is splits
  int threads, shared;
  int64_t partial_floats, counters;  // split-K workspace: floats, and integers that are zero before and after
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Halo of a block: a row and a pixel on either side.
constexpr int64_t halo_pixels(int64_t width) { return 2 * (width + 1); }

// Input rows of one shared-memory buffer. kHalo double-buffers if there is more than one channel slice; the others have
// a buffer per stage.
constexpr int64_t input_rows(ConvTile tile, const ConvArgs& a) {
  return tile.load == Load::kHalo ? a.tile_pixels + halo_pixels(a.width) : tile.m();
}
constexpr int64_t input_buffers(ConvTile tile, const ConvArgs& a) {
  return tile.load == Load::kHalo ? (a.k_blocks > 1 ? 2 : 1) : tile.stages;
}

constexpr int kZeroRowBytes = 256;  // zeros, read by taps in the padding
constexpr int kRowInfoBytes = 16;  // of kScalar: where an output pixel's input begins

// Completes `a`, which holds the shape, tile_pixels and splits.
constexpr ConvPlan plan_conv(ConvTile tile, ConvArgs a, int element_size) {
  const int64_t row = tile.row_bytes / element_size, taps = int64_t{a.kernel_h} * a.kernel_w;
  a.pixels = static_cast<int32_t>(int64_t{a.batch} * a.out_height * a.out_width);
  a.channel_blocks = static_cast<int32_t>(ceil_div(a.out_channels, tile.n()));
  a.k_blocks =
      static_cast<int32_t>(tile.load == Load::kHalo ? ceil_div(a.channels, row) : ceil_div(taps * a.channels, row));
  const int64_t tiles = ceil_div(a.pixels, a.tile_pixels) * a.channel_blocks;
  const int64_t operands = kZeroRowBytes + input_rows(tile, a) * input_buffers(tile, a) * tile.pitch() +
                           tile.stages * tile.filter_bytes() +
                           (tile.load == Load::kScalar ? tile.m() * kRowInfoBytes : 0);
  // reduce_warps reuses the space of the operands.
  const int64_t acc = tile.warps_k > 1 ? 4 * tile.acc_floats() : 0;
  const int64_t shared = tile.scale_shift_bytes() + (operands > acc ? operands : acc);
  return {a,
          tiles,
          tile.threads(),
          static_cast<int>(shared),
          a.splits > 1 ? tiles * a.splits * tile.acc_floats() : 0,
          a.splits > 1 ? 2 * tiles : 0};
}

// Whether a tile can compute a convolution. aligned: operands begin at multiples of 16 bytes.
constexpr bool supports(ConvTile tile, const ConvArgs& a, int element_size, bool aligned) {
  const bool vectors = aligned && a.channels > 0 && a.channels % (16 / element_size) == 0;
  switch (tile.load) {
    case Load::kHalo:
      return vectors && a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 1 && a.stride_w == 1 && a.pad_h == 1 &&
             a.pad_w == 1;
    case Load::kGather: return vectors;
    case Load::kScalar: return true;
  }
  return false;
}

}  // namespace resnet_fast::cuda
