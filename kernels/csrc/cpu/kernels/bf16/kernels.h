// bfloat16: the interface between the scheduler of a stage and the kernels that multiply pairs of channels in bfloat16
// and add up in float32. Plain structs only, as in kernels/kernels.h.
//
// Maps are bfloat16, their pixels hold an even number of channels. A filter holds the two channels of a pair beside
// each other for every output channel: 32 bits of a map times 16 x 32 bits of a filter, two products for each of 16
// sums.
#pragma once

#include "cpu/kernels/kernels.h"

namespace resnet_fast {

struct BFloat16 {
  uint16_t bits;
};

// The same element of two images: what a filter's gradient sums, two products at a time.
struct Bf16Pair {
  BFloat16 first, second;
};
template <>
struct SumOf<Bf16Pair> {
  typedef float type;
};

// The same for every instruction set.
constexpr int kBf16Lanes = 16;  // output channels of a vector

// Winograd's F(2x2, 3x3) at the points 0, +-1 and infinity: 16 multiplications a channel for 4 outputs. Its transforms
// only add and subtract, so that rounding their results to bfloat16 costs a factor of 1.7 in the error of the products;
// the larger tiles cost 3.5 and more, which no convolution in bfloat16 may err.
constexpr int kBf16TileOut = 2;
constexpr int kBf16TileIn = 4;
constexpr int kBf16Points = kBf16TileIn * kBf16TileIn;
template <>
struct GradientTile<Bf16Pair> {
  static constexpr int out = kBf16TileOut, in = kBf16TileIn, points = kBf16Points;
};
// Channels of a tile of the transformed input that lie together: a cache line, or half of one for the last 16 channels.
constexpr int kBf16Panel = 32;

// Unnamed, so that every file has its own: see kernels/kernels.h.
namespace {
// Scratch memory of a call on so many tiles, in elements of bfloat16: the transformed input, and the products of one
// panel of output channels in float32.
struct Bf16Scratch {
  int tiles, channels;  // channels: of the transformed input, in whole vectors
  int64_t input_point, product_point;  // from one point to the next; no multiple of a page, or lines evict each other
  int64_t input, products;

  Bf16Scratch(int channels, int tiles)
      : tiles(tiles), channels((channels + 15) / 16 * 16),
        input_point(static_cast<int64_t>(this->channels) * tiles + 32),
        product_point(static_cast<int64_t>(tiles) * 2 * kBf16Lanes + 16), input(kBf16Points * input_point),
        products(2 * kBf16Points * product_point) {}
  int64_t numel() const { return input + products; }
};

// Which channel of a full panel of the transformed input lies at a place in it: the even ones first, since the
// transform takes pairs of channels apart into vectors of even and of odd ones.
constexpr int bf16_channel_at(int place) { return place < 16 ? 2 * place : 2 * (place - 16) + 1; }
}  // namespace

// `bias`, and nothing else, is float32: a float* in the guise of the other pointers.
template <>
struct Kernels<BFloat16> {
  const char* isa;
  bool native;  // has instructions for the products
  int lanes;
  int panel_vectors;
  int tile_pixels;
  void (*conv)(const ConvCall<BFloat16>&);
  // One panel after the other; `compact` and `panel_group` are not read.
  void (*winograd)(const WinogradCall<BFloat16>&);
  void (*widen)(const BFloat16* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, BFloat16* to);
  void (*pack_winograd)(const float* from, int channels, int vectors, BFloat16* to);
};

// Gradients of filters, from maps of pairs of images.
template <>
struct Kernels<Bf16Pair> {
  int lanes;
  int tile_pixels;
  // Rows of two images, rounded.
  void (*pair)(const float* first, const float* second, int64_t n, Bf16Pair* to);
  void (*outer_products)(const OuterCall<Bf16Pair>&);
  // As those of float32; there is no strip.
  void (*winograd_input)(const WinogradCall<Bf16Pair>&, int64_t panel, int64_t point, Bf16Pair* strip, Bf16Pair* out);
  void (*winograd_gradient)(const WinogradCall<Bf16Pair>&, int64_t panel, int64_t point, Bf16Pair* out);
  void (*winograd_filter_gradient)(const float* sums, int64_t point, int columns, float* out);
};

extern const Kernels<BFloat16> kBf16Portable, kBf16Avx512;
extern const Kernels<Bf16Pair> kBf16PairPortable, kBf16PairAvx512;

}  // namespace resnet_fast
