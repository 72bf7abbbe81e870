// The interface between the scheduler of a stage and the kernels.
//
// Plain structs and function pointers only: the kernel files behind it are compiled for instruction sets that
// the rest of the library may not use, so they share no inline function with anyone (no STL, no torch header).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace resnet_fast {

// Pixels that one call of a convolution kernel handles: 42 tiles of 6 or 21 of 12, and partial sums that stay in L1/L2.
constexpr int kMaxPixels = 252;
// Filter bytes that stay in L1 while the pixels of a call pass by; the rest of L1 is for the input rows.
constexpr int kFilterBlockBytes = 18 * 1024;
constexpr int kMaxRuns = 1024;

// One convolution over a list of output pixels and a range of output channels:
//
//   output[p][k] = act(bias[k] + sum_{run, i} input[p][run_offset[run] + i] * filter[run][i][k] (+ residual[p][k]))
//
// A run is a stretch of input that is contiguous in memory: all channels of a filter row where the pixels of the input
// follow each other without a gap, else a block of the channels of one tap.
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
// Its interpolation points: 0, +-kPointA, +-kPointB, infinity. With kPointA * kPointB = 1 powers stay near 1: these err
// less than half of what 0, +-1, +-2 do, and 5% less than 0, +-sqrt(1/2), +-sqrt(2).
constexpr double kPointA = 2.0 / 3.0, kPointB = 3.0 / 2.0;
constexpr double kSquareA = kPointA * kPointA, kSquareB = kPointB * kPointB;
// Products of the distances from kPointA and kPointB to the other points.
constexpr double kDistanceA = 2 * kSquareA * (kSquareA - kSquareB), kDistanceB = 2 * kSquareB * (kSquareB - kSquareA);

// Memory that is read soon: asked for while there is something to compute.
struct Ahead {
  static constexpr int kMost = 5;
  const char* from[kMost];
  int64_t bytes[kMost];
  int count;
};

// A 3x3 convolution with stride 1 over output tiles [tile_begin, tile_end), counted through image, tile row and tile
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
  bool mixed;  // smaller tiles at the far edges, where the map is no multiple of a tile
  int tile_begin, tile_end;

  const T* filter;  // panels of [point][channel][output channel of the panel], or compact: [channel][tap][...]
  const T* bias;
  bool compact;
  int channels;
  int panel_begin, panel_end;
  int panel_group;  // panels whose products are stored before they are transformed back
  int out_vectors;
  int64_t panel_stride;
  bool relu;
  bool far_output;  // the output, and the residual, are not in a cache
  Ahead ahead;
  T* scratch;  // WinogradScratch::numel() elements
  // A vector of sums, or nullptr: what is not finite in a tile's input, and would spread in it, makes them so.
  T* spread;
};

// Unnamed, so that every file has its own: see above.
namespace {
// How one side of a map is cut: tiles of kTileOut outputs, and a last one that is smaller, where that saves products.
// A tile of 3 outputs needs the points 0, +-A, B, infinity, one of 2 needs 0, +-A, infinity: both take the values of
// the filter that are there anyway. A tile of 1 output is computed as one of 2.
struct TileSide {
  int tiles, edge;  // edge: outputs of the last tile

  TileSide(int size, bool mixed)
      : tiles((size + kTileOut - 1) / kTileOut), edge(!mixed || size % kTileOut == 0 ? kTileOut
                                                      : size % kTileOut == 3         ? 3
                                                                                     : 2) {}
  int outputs(int tile) const { return tile + 1 == tiles ? edge : kTileOut; }
  // Does a smaller last tile do without this point?
  bool skips(int point) const { return point == 4 ? edge < 4 : point == 3 && edge < 3; }
};

// Tiles that skip a point leave no gap there: at each point those that have it follow each other. Points share four
// lists of tiles, by whether the last row and the last column of tiles skip them.
struct Tiling {
  TileSide rows, columns;

  Tiling(int height, int width, bool mixed) : rows(height, mixed), columns(width, mixed) {}
  bool plain() const { return rows.edge == kTileOut && columns.edge == kTileOut; }
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

// Channels of a compact filter that are transformed at a time, for a row of points: they stay in L1.
constexpr int kExpandedChannels = 32;

// Channels of a tile of the transformed input that lie together, and are summed in one go: a cache line of floats.
constexpr int kInputPanel = 16;

// Elements of scratch memory for a call of so many tiles: the transformed input, the products, a strip of half
// transformed rows, a block of a transformed filter.
struct WinogradScratch {
  int tiles;
  int64_t input_panel;  // from one panel of the transformed input to the next
  int64_t input_point, product_point;  // from one point to the next; no multiple of a page, or lines evict each other
  int64_t input, products, strip;
  int64_t filter_point, filter;

  WinogradScratch(int channels, int tiles, int tiles_w, int panel_group, int panel, bool compact)
      : tiles(tiles), input_panel(static_cast<int64_t>(tiles) * kInputPanel),
        input_point((channels + kInputPanel - 1) / kInputPanel * input_panel + 16),
        product_point(static_cast<int64_t>(tiles) * panel_group * panel + 16), input(kTilePoints * input_point),
        products(kTilePoints * product_point), strip(static_cast<int64_t>(kTileIn) * (kTileOut * tiles_w + 2) * 16),
        filter_point(kExpandedChannels * panel + 16), filter(compact ? kTileIn * filter_point : 0) {}
  int64_t numel() const { return input + products + strip + filter; }
};
}  // namespace

// Channels of transformed tiles that lie together where products of tiles are summed: whole cache lines, and the
// columns of a register tile.
namespace {
template <typename T>
constexpr int product_panel(int lanes) {
  return 2 * lanes > 64 / static_cast<int>(sizeof(T)) ? 2 * lanes : 64 / static_cast<int>(sizeof(T));
}
}  // namespace

// Batch norm in training. Pixels follow each other, and so do the channels of each.
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

// The gradient of a convolution's output from that of its batch norm's: out = a * grad + b * (y - mean) + constant
template <typename T>
struct InputGradientCall {
  const T *grad, *y;
  const T* coefficients;  // [a | b | constant | mean]
  T* out;
  int64_t pixels;
  int channels;
};

// out = grad where positive [* scale + shift] > 0, else 0; sums of out, out * (y - mean), out * (second - second_mean)
template <typename T>
struct MaskedSumsCall {
  const T* grad;
  const T *positive, *scale, *shift;  // no mask without the first
  const T *y, *mean, *second, *second_mean;  // or null
  T* out;  // may be grad
  T* sums;  // [3][channels]
  int64_t pixels;
  int channels;
};

// What products of elements of T are added up in.
template <typename T>
struct SumOf {
  typedef T type;
};

// The tiles by which Winograd sums a filter's gradient: output pixels along a side, points.
template <typename T>
struct GradientTile {
  static constexpr int out = kTileOut, in = kTileIn, points = kTilePoints;
};

// sums[i][j] = d[d_offset[t]][i] * x[x_offset[t]][j], summed over t < count, on top of what is there with `accumulate`:
// rows i of [row_begin, row_end), columns j up to whole vectors
template <typename T>
struct OuterCall {
  const T *d, *x;
  const int64_t *d_offset, *x_offset;  // count + kOuterAhead of them: the last ones are only asked for beforehand
  int count, row_begin, row_end, columns;
  bool accumulate;
  typename SumOf<T>::type* sums;
  int64_t sums_row;
};

// out = the largest of rows x columns taps, or NaN if one is
template <typename T>
struct PoolCall {
  const T* input;  // the first tap; whole vectors are read
  int64_t row, pixel;
  int rows, columns;
  T* out;
  int channels;
};
constexpr int kOuterAhead = 8;

// What one instruction set offers for one type of arithmetic.
template <typename T>
struct Kernels {
  const char* isa;
  int lanes;  // elements of a vector
  int panel_vectors;  // vectors of output channels that a tile covers
  int tile_pixels;  // output pixels that a tile covers
  void (*conv)(const ConvCall<T>&);
  void (*winograd)(const WinogradCall<T>&);
  // A compact panel of two vectors, or one, transformed: see expand_filter.
  void (*expand_panel)(const T* compact, int channels, int64_t point, T* out);
  void (*expand_half_panel)(const T* compact, int channels, int64_t point, T* out);
  void (*add_relu)(const T* a, const T* b, T* out, int64_t n);
  void (*max_pool)(const PoolCall<T>&);
  void (*normalize)(const NormalizeCall<T>&);
  void (*input_gradient)(const InputGradientCall<T>&);
  void (*masked_sums)(const MaskedSumsCall<T>&);
  // Mean, and sum of the squared distances from it.
  void (*moments)(const T* x, int64_t pixels, int channels, T* mean, T* square_sum);
  void (*outer_products)(const OuterCall<T>&);
  // Tiles of the input, or of the output's gradient, transformed to out[point][panel][tile][channel of the panel].
  void (*winograd_input)(const WinogradCall<T>&, int64_t panel, int64_t point, T* strip, T* out);
  void (*winograd_gradient)(const WinogradCall<T>&, int64_t panel, int64_t point, T* out);
  void (*winograd_filter_gradient)(const T* sums, int64_t point, int columns, T* out);
};

extern const Kernels<float> kFloatBaseline, kFloatAvx2, kFloatAvx512;
extern const Kernels<double> kDoubleBaseline, kDoubleAvx2, kDoubleAvx512;

}  // namespace resnet_fast
