// bfloat16: the interface between the drivers and the kernels that multiply pairs of channels in bfloat16 and
// accumulate in float32. Plain structs only, as in kernels/kernels.h.
//
// Activations are bfloat16, with an even number of channels a pixel. A filter interleaves the two channels of a pair
// for every output channel: 32 bits of an activation by 16 x 32 bits of a filter, two products for each of 16
// accumulators.
#pragma once

#include "cpu/kernels/kernels.h"

namespace resnet_fast {

struct BFloat16 {
  uint16_t bits;
};

// The same element of two images: the weight gradient accumulates both products at a time.
struct Bf16Pair {
  BFloat16 first, second;
};
template <>
struct AccumulatorOf<BFloat16> {
  typedef float type;
};
template <>
struct AccumulatorOf<Bf16Pair> {
  typedef float type;
};

// The same for every instruction set.
constexpr int kBf16Lanes = 16;  // output channels of a vector

// Winograd's F(2x2, 3x3) at the points 0, +-1 and infinity: 16 multiplications a channel for 4 outputs. Its transforms
// only add and subtract: rounding their results to bfloat16 raises the error of the products by a factor of 1.7. Larger
// tiles raise it by 3.5 and more, beyond what a convolution in bfloat16 may err.
constexpr int kBf16TileOut = 2;
constexpr int kBf16TileIn = 4;
constexpr int kBf16Points = kBf16TileIn * kBf16TileIn;
template <>
struct GradientTile<Bf16Pair> {
  static constexpr int out = kBf16TileOut, in = kBf16TileIn, points = kBf16Points;
};
// Channels of a tile of the transformed input that are contiguous: a cache line, or half of one for the last 16
// channels.
constexpr int kBf16Panel = 32;

// Unnamed: every file has its own copy, see kernels/kernels.h.
namespace {
// Scratch memory of a call, in elements of bfloat16: the transformed input, and the accumulators of one panel of output
// channels in float32.
struct Bf16WinogradScratch {
  int tiles, channels;  // channels: of the transformed input, in whole vectors
  int64_t input_point, acc_point;  // stride of points; no multiple of a page, or lines evict each other
  int64_t input, accumulators;

  Bf16WinogradScratch(int channels, int tiles)
      : tiles(tiles), channels((channels + 15) / 16 * 16),
        input_point(static_cast<int64_t>(this->channels) * tiles + 32),
        acc_point(static_cast<int64_t>(tiles) * 2 * kBf16Lanes + 16), input(kBf16Points * input_point),
        accumulators(2 * kBf16Points * acc_point) {}
  int64_t numel() const { return input + accumulators; }
};

// The channel at a place of a full panel of the transformed input: the even ones come first, because the transform
// splits pairs of channels into vectors of even and of odd ones.
constexpr int bf16_channel_at(int place) { return place < 16 ? 2 * place : 2 * (place - 16) + 1; }
}  // namespace

// `bias` alone is float32: its pointer is a float* cast to the type of the others.
template <>
struct Kernels<BFloat16> {
  const char* isa;
  bool native;  // the instruction set multiplies bfloat16
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

// The weight gradient, from activations of pairs of images.
template <>
struct Kernels<Bf16Pair> {
  int lanes;
  int tile_pixels;
  // Interleaves rows of two images, rounded.
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
