// Geometry of the convolution's launches: pure functions of shapes, for the launcher and for whoever tests it. No CUDA,
// no PyTorch.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// How the operands come into shared memory.
enum class Load {
  kHalo,  // 3x3, stride 1, padding 1: the pixels of a block and their neighbours once for all nine taps
  kGather,  // any filter: a row of 16-byte pieces for each output pixel, tap by tap
  kMixed,  // any channels and alignment: element by element
};
// What multiplies: tensor cores (float32 as TF32), or the plain units in exact float32.
enum class Math { kTensor, kPlain };

// A block computes m() pixels x n() channels. A warp owns mt x 16 of these pixels, of which blocks with fewer pixels
// may leave out all but `always`, and nt x 8 of these channels; warps_k warps share each such part, with a slice of the
// products each. Products come in rows of `row_bytes` a pixel, `taps` rows a step (taps of one filter row, or one), and
// `stages` steps of filters are under way or in use at a time.
struct ConvTile {
  Load load;
  Math math;
  int mt, always, nt, warps_m, warps_n, warps_k, row_bytes, taps, stages, blocks_per_sm;

  constexpr int m() const { return 16 * mt * warps_m; }
  constexpr int n() const { return 8 * nt * warps_n; }
  constexpr int warps() const { return warps_m * warps_n * warps_k; }
  constexpr int threads() const { return 32 * warps(); }
  // Rows lie 16 bytes apart from a multiple of 32: an odd number of 16-byte banks, so that any 8 rows in sequence fall
  // into different ones.
  constexpr int pitch() const { return row_bytes + 16; }
  constexpr int constant_bytes() const { return 2 * n() * 4; }  // scale and shift, at the beginning of shared memory
  constexpr int filter_bytes() const { return taps * n() * pitch(); }
  // Once the warps that share a part have added their sums, each is left with this many times 16 of its pixels.
  constexpr int kept() const { return (mt + warps_k - 1) / warps_k; }
  constexpr int kept_floats() const { return warps() * kept() * nt * 128; }
};

constexpr ConvTile kConvTiles[] = {
    // 64 x 64 for each warp: half as many fragments loaded for each product as with 32 x 32. For 64 channels.
    {Load::kHalo, Math::kTensor, 4, 4, 8, 4, 1, 1, 64, 1, 3, 2},
    // Many pixels, few channels: the filters, which deep layers have more of than pixels, are read by few blocks.
    {Load::kHalo, Math::kTensor, 9, 6, 4, 2, 1, 2, 64, 3, 3, 2},
    {Load::kHalo, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 3, 3, 2},  // small batches
    {Load::kHalo, Math::kTensor, 4, 4, 2, 4, 1, 1, 32, 3, 3, 2},  // 16 channels
    {Load::kGather, Math::kTensor, 4, 4, 4, 2, 2, 1, 64, 1, 4, 2},
    {Load::kGather, Math::kTensor, 2, 2, 4, 4, 1, 1, 64, 1, 4, 2},  // 32 channels
    {Load::kGather, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 1, 4, 2},  // small batches
    {Load::kMixed, Math::kTensor, 2, 2, 4, 2, 2, 1, 64, 1, 3, 2},  // stems, odd channels
    {Load::kMixed, Math::kTensor, 2, 2, 2, 4, 1, 1, 64, 1, 3, 2},  // the same for few filters
    {Load::kGather, Math::kPlain, 4, 4, 4, 1, 2, 2, 64, 1, 4, 2},
    {Load::kMixed, Math::kPlain, 4, 4, 4, 1, 2, 2, 64, 1, 3, 2},
};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(kConvTiles[0]);

// Which kernels there are: exact float32 is for float32 alone.
constexpr bool has_instance(ConvTile tile, int element_size) { return tile.math == Math::kTensor || element_size == 4; }

// Everything a kernel must know, by value: integers of 32 bits alone, so that it can be passed as a list.
struct ConvArgs {
  int32_t batch, height, width, channels;
  int32_t out_height, out_width, out_channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int32_t relu;
  int32_t vectors;  // residual and y are aligned and their rows are whole 16-byte pieces
  int32_t pixels;  // output pixels of the batch
  int32_t tile_pixels;  // of them a block, at most m()
  int32_t columns;  // blocks for all output channels
  int32_t parts;  // what splits share: slices of channels (kHalo) or steps
  int32_t splits;  // blocks that share a sum
};
constexpr int kConvArgs = sizeof(ConvArgs) / sizeof(int32_t);

struct ConvPlan {
  ConvArgs args;
  int64_t blocks;  // grid x; y is splits
  int threads, shared;
  int64_t partial_floats, counters;  // workspace of split sums: floats, and integers that are zero before and after
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbouring pixels that a block of kHalo holds beside its own: a row and one pixel on either side.
constexpr int64_t halo_pixels(int64_t width) { return 2 * (width + 1); }

// Rows of input that one buffer of a block holds. kHalo has two buffers where there is more than one slice of channels;
// the others have one for each stage.
constexpr int64_t input_rows(ConvTile tile, const ConvArgs& a) {
  return tile.load == Load::kHalo ? a.tile_pixels + halo_pixels(a.width) : tile.m();
}
constexpr int64_t input_buffers(ConvTile tile, const ConvArgs& a) {
  return tile.load == Load::kHalo ? (a.parts > 1 ? 2 : 1) : tile.stages;
}

constexpr int kZeroBytes = 256;  // what taps in the padding read
constexpr int kRowInfoBytes = 16;  // where kMixed finds an output pixel's input

// Fills in what follows from the shape, the tile and the choice of tile_pixels and splits, already in `a`.
constexpr ConvPlan plan_conv(ConvTile tile, ConvArgs a, int element_size) {
  const int64_t row = tile.row_bytes / element_size, taps = int64_t{a.kernel_h} * a.kernel_w;
  a.pixels = static_cast<int32_t>(int64_t{a.batch} * a.out_height * a.out_width);
  a.columns = static_cast<int32_t>(ceil_div(a.out_channels, tile.n()));
  a.parts =
      static_cast<int32_t>(tile.load == Load::kHalo ? ceil_div(a.channels, row) : ceil_div(taps * a.channels, row));
  const int64_t tiles = ceil_div(a.pixels, a.tile_pixels) * a.columns;
  const int64_t operands = kZeroBytes + input_rows(tile, a) * input_buffers(tile, a) * tile.pitch() +
                           tile.stages * tile.filter_bytes() +
                           (tile.load == Load::kMixed ? tile.m() * kRowInfoBytes : 0);
  // Where warps share parts, their sums meet in the place of the operands.
  const int64_t sums = tile.warps_k > 1 ? 4 * tile.kept_floats() : 0;
  const int64_t shared = tile.constant_bytes() + (operands > sums ? operands : sums);
  return {a,
          tiles,
          tile.threads(),
          static_cast<int>(shared),
          a.splits > 1 ? tiles * a.splits * tile.kept_floats() : 0,
          a.splits > 1 ? 2 * tiles : 0};
}

// Whether a tile can compute a convolution, with operands aligned to 16 bytes or not.
constexpr bool suits(ConvTile tile, const ConvArgs& a, int element_size, bool aligned) {
  const bool pieces = aligned && a.channels > 0 && a.channels % (16 / element_size) == 0;
  switch (tile.load) {
    case Load::kHalo:
      return pieces && a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 1 && a.stride_w == 1 && a.pad_h == 1 &&
             a.pad_w == 1;
    case Load::kGather: return pieces;
    case Load::kMixed: return true;
  }
  return false;
}

}  // namespace resnet_fast::cuda
