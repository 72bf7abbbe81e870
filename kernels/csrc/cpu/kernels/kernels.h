// The interface between the drivers (cpu/conv, cpu/training) and the kernels of each instruction set.
//
// Plain structs and function pointers only. The kernel files use instructions that the rest of the library may not use,
// so they share no inline function with it: no STL, no torch header.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace resnet_fast {

// Most pixels of one call of a convolution kernel: 42 tiles of 6 or 21 of 12. Their partial sums stay in L1/L2.
constexpr int kMaxPixels = 252;
// Bytes of a filter block: it stays in L1 for all pixels of a call. The rest of L1 holds the input rows.
constexpr int kFilterBlockBytes = 18 * 1024;
constexpr int kMaxRuns = 1024;

// One convolution over a list of output pixels and a range of output channels:
//
//   output[p][k] = act(bias[k] + sum_{run, i} input[p][run_offset[run] + i] * filter[run][i][k] (+ residual[p][k]))
//
// A run is a contiguous stretch of the input: all channels of a filter row where input pixels are dense, else a block
// of the channels of one tap.
template <typename T>
struct ConvCall {
  const T* input;  // pixel (0, 0) of the first image; a halo of zeros surrounds every image
  const T* residual;  // or nullptr
  T* output;
  const int64_t* input_offset;  // of each output pixel's top-left tap, in elements
  const int64_t* residual_offset;
  const int64_t* output_offset;
  int pixels;  // <= kMaxPixels

  const T* filter;  // panels [panel_begin, panel_end) are read
  const T* bias;
  int panel_begin, panel_end;
  int out_vectors;  // output channels in vectors; the last panel may be half full
  int64_t panel_stride;  // elements of a full panel

  const int64_t* run_offset;  // of a run from the top-left tap, without its channel block
  int runs;
  int channels;  // length of a run if it is one block, else channels of a tap
  int block;  // channels of one block
  bool relu;
};

// Winograd's F(4x4, 3x3): an output tile of 4 x 4 pixels from an input tile of 6 x 6 with 36 multiplications a channel.
constexpr int kTileOut = 4;
constexpr int kTileIn = 6;
constexpr int kTilePoints = kTileIn * kTileIn;
// Interpolation points: 0, +-kPointA, +-kPointB, infinity. With kPointA * kPointB = 1 powers stay near 1: the error is
// less than half that of 0, +-1, +-2, and 5% below that of 0, +-sqrt(1/2), +-sqrt(2).
constexpr double kPointA = 2.0 / 3.0, kPointB = 3.0 / 2.0;
constexpr double kSquareA = kPointA * kPointA, kSquareB = kPointB * kPointB;
// Products of the distances from kPointA and kPointB to the other points.
constexpr double kDistanceA = 2 * kSquareA * (kSquareA - kSquareB), kDistanceB = 2 * kSquareB * (kSquareB - kSquareA);

// Memory to prefetch while the kernel computes: it is read next.
struct PrefetchList {
  static constexpr int kMax = 5;
  const char* from[kMax];
  int64_t bytes[kMax];
  int count;
};

// A 3x3 convolution with stride 1 over output tiles [tile_begin, tile_end), numbered by image, tile row and tile
// column, and a range of output channels. The input's halo reaches to the end of the last tiles.
template <typename T>
struct WinogradCall {
  const T* input;  // the first tap of pixel (0, 0) of the first image
  int64_t input_image, input_row, input_pixel;
  const T* residual;  // or nullptr
  int64_t residual_image, residual_row, residual_pixel;
  T* output;
  int64_t output_image, output_row, output_pixel;
  int height, width;  // of the output
  bool edge_tiles;  // smaller tiles at the far edges, where the output is no multiple of a tile
  int tile_begin, tile_end;

  const T* filter;  // panels of [point][channel][output channel of the panel], or compact: [channel][tap][...]
  const T* bias;
  bool compact;
  int channels;
  int panel_begin, panel_end;
  int panel_group;  // panels whose GEMM results are stored before they are transformed back
  int out_vectors;
  int64_t panel_stride;
  bool relu;
  bool output_uncached;  // the output, and the residual, are not in a cache
  PrefetchList prefetch;
  T* scratch;  // WinogradScratch::numel() elements
  // A vector of sums, or nullptr. Inf or NaN in a tile's input, which Winograd spreads over the tile, makes it
  // non-finite.
  T* spread;
};

// Unnamed: every file has its own copy, see above.
namespace {
// The tiles along one side of the output: kTileOut outputs each, the last one fewer where that saves multiplications.
// A tile of 3 outputs needs the points 0, +-A, B, infinity; one of 2 needs 0, +-A, infinity. Both use the transformed
// filter as it is. A tile of 1 output is computed as one of 2.
struct TileSide {
  int tiles, edge;  // edge: outputs of the last tile

  TileSide(int size, bool edge_tiles)
      : tiles((size + kTileOut - 1) / kTileOut), edge(!edge_tiles || size % kTileOut == 0 ? kTileOut
                                                      : size % kTileOut == 3              ? 3
                                                                                          : 2) {}
  int outputs(int tile) const { return tile + 1 == tiles ? edge : kTileOut; }
  // Whether a smaller last tile does not need this point.
  bool skips(int point) const { return point == 4 ? edge < 4 : point == 3 && edge < 3; }
};

// At each point the tiles that need it are stored densely. There are four lists of tiles, by whether the last row and
// the last column of tiles skip the point.
struct Tiling {
  TileSide rows, columns;

  Tiling(int height, int width, bool edge_tiles) : rows(height, edge_tiles), columns(width, edge_tiles) {}
  bool uniform() const { return rows.edge == kTileOut && columns.edge == kTileOut; }
  int list(int point) const { return 2 * rows.skips(point / kTileIn) + columns.skips(point % kTileIn); }
};

// Tiles so far on each list.
struct TileCounts {
  int of[4] = {0, 0, 0, 0};

  void add(int tiles, bool small_row, bool small_column) {
    of[0] += tiles;
    if (!small_column) of[1] += tiles;
    if (!small_row) of[2] += tiles;
    if (!small_row && !small_column) of[3] += tiles;
  }
};

// Channels of a compact filter transformed at a time, for a row of points: they stay in L1.
constexpr int kExpandedChannels = 32;

// Channels of a tile of the transformed input that are contiguous, and accumulated in one go: a cache line of floats.
constexpr int kInputPanel = 16;

// Scratch memory of a call, in elements: the transformed input, the accumulators, a strip of half transformed rows, a
// block of a transformed filter.
struct WinogradScratch {
  int tiles;
  int64_t input_panel;  // stride of panels of the transformed input
  int64_t input_point, acc_point;  // stride of points; no multiple of a page, or lines evict each other
  int64_t input, accumulators, strip;
  int64_t filter_point, filter;

  WinogradScratch(int channels, int tiles, int tiles_w, int panel_group, int panel, bool compact)
      : tiles(tiles), input_panel(static_cast<int64_t>(tiles) * kInputPanel),
        input_point((channels + kInputPanel - 1) / kInputPanel * input_panel + 16),
        acc_point(static_cast<int64_t>(tiles) * panel_group * panel + 16), input(kTilePoints * input_point),
        accumulators(kTilePoints * acc_point), strip(static_cast<int64_t>(kTileIn) * (kTileOut * tiles_w + 2) * 16),
        filter_point(kExpandedChannels * panel + 16), filter(compact ? kTileIn * filter_point : 0) {}
  int64_t numel() const { return input + accumulators + strip + filter; }
};
}  // namespace

// Channels that are contiguous in transformed tiles of the weight gradient: whole cache lines, and the columns of a
// register tile.
namespace {
template <typename T>
constexpr int gemm_panel(int lanes) {
  return 2 * lanes > 64 / static_cast<int>(sizeof(T)) ? 2 * lanes : 64 / static_cast<int>(sizeof(T));
}
}  // namespace

// Batch norm in training, on dense pixels of dense channels.
// out = [relu](x * scale + shift [+ residual [* residual_scale + residual_shift]])
template <typename T>
struct NormalizeCall {
  const T *x, *scale, *shift;  // scale and shift may be null
  const T *residual, *residual_scale, *residual_shift;  // any of them may be null
  bool relu;
  T* out;
  int64_t pixels;
  int channels;
};

// Batch norm's backward: the gradient of its input y.  out = a * grad + b * (y - mean) + constant
template <typename T>
struct InputGradientCall {
  const T *grad, *y;
  const T* coefficients;  // [a | b | constant | mean]
  T* out;
  int64_t pixels;
  int channels;
};

// ReLU's backward and batch norm's reductions.
//
//   out = grad where relu_source [* scale + shift] > 0, else 0
//   sums of out, out * (y - mean), out * (second - second_mean)
template <typename T>
struct MaskedSumsCall {
  const T* grad;
  const T *relu_source, *scale, *shift;  // no mask where relu_source is null
  const T *y, *mean, *second, *second_mean;  // or null
  T* out;  // may be grad
  T* sums;  // [3][channels]
  int64_t pixels;
  int channels;
};

// The type in which products of elements of T are accumulated.
template <typename T>
struct AccumulatorOf {
  typedef T type;
};

// Winograd tiles of the weight gradient: output pixels and input pixels along a side, points.
template <typename T>
struct GradientTile {
  static constexpr int out = kTileOut, in = kTileIn, points = kTilePoints;
};

// acc[i][j] (+)= sum_{t < count} d[d_offset[t]][i] * x[x_offset[t]][j], for rows i of [row_begin, row_end) and columns
// j up to whole vectors; += with `accumulate`.
template <typename T>
struct OuterCall {
  const T *d, *x;
  const int64_t *d_offset, *x_offset;  // count + kOuterPrefetch of them: the last ones are only prefetched
  int count, row_begin, row_end, columns;
  bool accumulate;
  typename AccumulatorOf<T>::type* acc;
  int64_t acc_row;
};

// out = the maximum of rows x columns taps, NaN if one of them is
template <typename T>
struct PoolCall {
  const T* input;  // the first tap; whole vectors are read
  int64_t row, pixel;
  int rows, columns;
  T* out;
  int channels;
};
constexpr int kOuterPrefetch = 8;

// The kernels of one instruction set for one type.
template <typename T>
struct Kernels {
  const char* isa;
  int lanes;  // elements of a vector
  int panel_vectors;  // vectors of output channels of a register tile
  int tile_pixels;  // output pixels of a register tile
  void (*conv)(const ConvCall<T>&);
  void (*winograd)(const WinogradCall<T>&);
  // Transforms a compact panel of two vectors, or of one: see expand_filter.
  void (*expand_panel)(const T* compact, int channels, int64_t point, T* out);
  void (*expand_half_panel)(const T* compact, int channels, int64_t point, T* out);
  void (*add_relu)(const T* a, const T* b, T* out, int64_t n);
  void (*max_pool)(const PoolCall<T>&);
  void (*normalize)(const NormalizeCall<T>&);
  void (*input_gradient)(const InputGradientCall<T>&);
  void (*masked_sums)(const MaskedSumsCall<T>&);
  // Mean, and sum of squared differences from it.
  void (*channel_stats)(const T* x, int64_t pixels, int channels, T* mean, T* square_sum);
  void (*outer_products)(const OuterCall<T>&);
  // Transform tiles of the input, or of the output's gradient, to out[point][panel][tile][channel of the panel].
  void (*winograd_input)(const WinogradCall<T>&, int64_t panel, int64_t point, T* strip, T* out);
  void (*winograd_gradient)(const WinogradCall<T>&, int64_t panel, int64_t point, T* out);
  void (*winograd_filter_gradient)(const T* sums, int64_t point, int columns, T* out);
};

extern const Kernels<float> kFloatBaseline, kFloatAvx2, kFloatAvx512;
extern const Kernels<double> kDoubleBaseline, kDoubleAvx2, kDoubleAvx512;

}  // namespace resnet_fast
