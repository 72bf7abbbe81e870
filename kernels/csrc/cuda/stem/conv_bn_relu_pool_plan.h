// Geometry of the stem's launches: pure functions of shapes, for the launcher and for whoever tests it. No CUDA, no
// PyTorch.
#pragma once

#include <cstdint>

#include "cuda/conv/conv_plan.h"

namespace resnet_fast::cuda {

// kFilter x kFilter filters over three channels with stride 2, and max pooling with stride 2: of 2x2 without padding,
// or, overlapping, of 3x3 with padding 1.
struct StemKernel {
  int filter;
  bool overlap;
  Math math;
};
constexpr StemKernel kStemKernels[] = {
    {7, false, Math::kTensor}, {7, true, Math::kTensor}, {3, false, Math::kTensor}, {3, true, Math::kTensor},
    {7, false, Math::kPlain},  {7, true, Math::kPlain},  {3, false, Math::kPlain},  {3, true, Math::kPlain},
};
constexpr int kStemKernelCount = sizeof(kStemKernels) / sizeof(kStemKernels[0]);

constexpr int kStemChannels = 3;
constexpr int kStemFilters = 64;  // output channels of a block
constexpr int kStemWarps = 4;
constexpr int kStemThreads = 32 * kStemWarps;
constexpr int kStemTile = 8;  // pooled pixels of a row that a warp computes at a time, each from 2x2 of the convolution

// A warp's share of the filters: those that fit its registers; for plain products, which read them from shared memory,
// all. Warps that have the same filters, `workers` of them, share the rows of a block.
constexpr int stem_warp_filters(Math math, int element_size) {
  return math == Math::kPlain ? 64 : element_size == 2 ? 32 : 16;
}
constexpr int stem_workers(Math math, int element_size) {
  return kStemWarps * stem_warp_filters(math, element_size) / kStemFilters;
}

// A filter row over three channels is 3 * filter elements in sequence, of the input as of the filter, and one of a
// neighbour before them: these pairs.
constexpr int stem_pairs(int filter) { return (kStemChannels * filter + 1) / 2; }

enum StemLoad : int32_t { kStemElements, kStemPlanes, kStemPixels };

// What the kernel needs to know. The first fields are the caller's; what follows from them is plan_stem's.
struct StemArgs {
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of x, in elements
  int32_t batch, height, width, out_channels, pad_h, pad_w, relu;
  int32_t rows, tiles;  // of a warp: pooled rows, and tiles of kStemTile pixels across; 0 for plan_stem to choose
  int32_t load;  // how x is read: by elements, or in 16-byte packs of planes (NCHW) or of pixels (channels_last)
  int32_t out_height, out_width, pooled_height, pooled_width;
  int32_t strips, across;  // blocks of an image: down and across
  int32_t patch_rows, packs, pitch;  // patch of a block's input: rows, packs of a row by each channel, bytes of a row
  int32_t packs_inverse;  // 2^31 / packs + 1: i / packs without a division
};
constexpr int kStemStrides = 4, kStemFields = 20;
static_assert(sizeof(StemArgs) == 8 * kStemStrides + 4 * kStemFields);

// Elements by which a patch is shifted, 0 or 1, so that the pairs of a filter row begin at an even one.
constexpr int stem_shift(const StemArgs& a) { return 1 - a.pad_w % 2; }

struct StemPlan {
  StemArgs args;
  int64_t units;  // patches; blocks take one after the other
  int64_t blocks;  // grid x; y is for every 64 output channels
  int shared;
};

constexpr int64_t floor_to(int64_t a, int64_t b) { return (a >= 0 ? a / b : -((-a + b - 1) / b)) * b; }

// First pooled pixel of the patch `across` from the left. Where windows overlap, a patch but the first begins with a
// pixel of the one before, which is computed again for its right half and not written.
constexpr int64_t stem_first_pixel(bool overlap, int tiles, int64_t across) {
  return across * (kStemTile * tiles - (overlap ? 1 : 0));
}
constexpr int64_t stem_patches(bool overlap, int tiles, int64_t pooled_width) {
  const int64_t pixels = int64_t{kStemTile} * tiles;
  return pooled_width <= pixels ? 1 : 1 + ceil_div(pooled_width - pixels, pixels - (overlap ? 1 : 0));
}

// Bytes of shared memory: scale and shift, in as many as keep the rest aligned; what a pixel's right neighbour needs of
// it, for each row of each warp, where windows overlap; the filters; the patch. Filters that go into registers lie
// where the patch comes afterwards.
constexpr int kStemConstantBytes = 1024;
constexpr int stem_edge_bytes(int filters, int element_size) { return 2 * 2 * filters * element_size; }
constexpr int64_t stem_edges(StemKernel k, const StemArgs& a, int size) {
  return k.overlap ? int64_t{kStemWarps} * (a.rows + 1) * stem_edge_bytes(stem_warp_filters(k.math, size), size) : 0;
}
constexpr int kStemPlainPitch = kStemFilters + 2;  // floats: the filters' elements, 2 banks apart
constexpr int64_t stem_filter_bytes(StemKernel k, int size) {
  const int64_t row = k.filter * kStemChannels;
  return k.math == Math::kPlain ? ceil_div(row * k.filter * kStemPlainPitch * 4, 128) * 128
                                : row * k.filter * kStemFilters * size;
}
// What registers do not hold of the filters: the last step of conv_bn_relu_pool_math.cuh, 32 elements of each.
constexpr int stem_last_bytes(StemKernel k, int size) { return k.math == Math::kPlain ? 0 : 32 * kStemFilters * size; }
constexpr int64_t stem_shared(StemKernel k, const StemArgs& a, int size) {
  const int64_t patch = int64_t{a.patch_rows} * a.pitch, filters = stem_filter_bytes(k, size);
  return kStemConstantBytes + stem_edges(k, a, size) + stem_last_bytes(k, size) +
         (k.math == Math::kPlain ? filters + patch : (filters > patch ? filters : patch));
}

// Fills in what follows from the shape and from rows and tiles, already in `a`.
constexpr StemPlan stem_geometry(StemKernel k, StemArgs a, int size, int multiprocessors, int shared) {
  const int pack = 16 / size, group = kStemChannels * pack, workers = stem_workers(k.math, size);
  a.out_height = (a.height + 2 * a.pad_h - k.filter) / 2 + 1;
  a.out_width = (a.width + 2 * a.pad_w - k.filter) / 2 + 1;
  a.pooled_height = k.overlap ? (a.out_height + 1) / 2 : a.out_height / 2;
  a.pooled_width = k.overlap ? (a.out_width + 1) / 2 : a.out_width / 2;
  a.strips = static_cast<int32_t>(ceil_div(a.pooled_height, int64_t{workers} * a.rows));
  a.across = static_cast<int32_t>(stem_patches(k.overlap, a.tiles, a.pooled_width));
  a.patch_rows = 2 * (2 * workers * a.rows + (k.overlap ? 1 : 0) - 1) + k.filter;
  // The farthest that a warp's first pair lies behind the patch's first element, a multiple of `group`.
  const int64_t begin = -int64_t{kStemChannels} * a.pad_w - 1 + stem_shift(a);
  const int64_t lead = a.across == 1 ? begin - floor_to(begin, group) : group - 2;
  const int64_t last = 2 * kStemTile * a.tiles - 1;
  a.packs = static_cast<int32_t>(ceil_div(lead + 2 * kStemChannels * last + 2 * stem_pairs(k.filter), group));
  a.packs_inverse = static_cast<int32_t>((int64_t{1} << 31) / a.packs + 1);
  // 16 words from a multiple of 32: a pair of rows of pairs lies in different banks for eight pixels, 6 words apart.
  a.pitch = static_cast<int32_t>(ceil_div(int64_t{a.packs} * 48 - 64, 128) * 128 + 64);
  const int64_t units = int64_t{a.batch} * a.strips * a.across;
  const int64_t bytes = stem_shared(k, a, size);
  const int64_t fit = (shared + 1024) / (bytes + 1024), limit = k.math == Math::kPlain ? 2 : 3;
  const int64_t resident = fit < limit ? fit : limit, slots = multiprocessors * (resident > 0 ? resident : 1);
  return {a, units, units < slots ? units : slots, static_cast<int>(bytes)};
}

// Clocks of the busiest multiprocessor, for ranking alone: the first patches arrive; then products and later patches go
// on side by side, as far as a multiprocessor has other blocks while one waits for its patch.
constexpr double stem_clocks(StemKernel k, const StemPlan& plan, int size, int multiprocessors) {
  const StemArgs& a = plan.args;
  const double tiles = a.tiles * (a.rows + (k.overlap ? 0.5 : 0.0));  // of a warp
  const double slots = k.filter == 7 ? 20 : 4;  // conv_bn_relu_pool_math.cuh
  // A tile's products where four schedulers have many warps, and where one has a single warp.
  const double busy =
      k.math == Math::kPlain ? 20.0 * k.filter * k.filter * kStemChannels : slots * (size == 2 ? 7 : 10);
  const double alone = k.math == Math::kPlain ? 5 * busy : slots * (size == 2 ? 40 : 50);
  // 24 bytes a clock is a multiprocessor's share of the cache that all have; 1500 clocks until the first are there.
  const double bytes = a.patch_rows * a.packs * 48.0, load = 1500 + bytes / 24;
  const int64_t most = ceil_div(plan.units, multiprocessors), resident = ceil_div(plan.blocks, multiprocessors);
  const int64_t rounds = ceil_div(plan.units, plan.blocks > 0 ? plan.blocks : 1);
  const double work = most * (kStemWarps * tiles * busy + 150.0) + (most - resident) * bytes / 48;
  const double chain = rounds * (tiles * alone + 300) + (rounds - 1) * load;
  return 1500 + resident * bytes / 24 + (work > chain ? work : chain);
}

// The plan for rows and tiles of `a`, or, where these are 0, for those that the clocks above want. No blocks where no
// choice fits `shared` bytes a block.
constexpr StemPlan plan_stem(StemKernel k, StemArgs a, int size, bool aligned, int multiprocessors, int shared) {
  const int64_t pack = 16 / size;
  // Packs lie in the patch as they lie in the input: no padding but an odd one lets pairs begin at even elements.
  const bool packs =
      aligned && a.pad_w % 2 == 1 && a.width % pack == 0 && a.row_stride % pack == 0 && a.image_stride % pack == 0;
  a.load = packs && a.column_stride == 1 && a.channel_stride % pack == 0        ? kStemPlanes
           : packs && a.channel_stride == 1 && a.column_stride == kStemChannels ? kStemPixels
                                                                                : kStemElements;
  if (a.rows > 0 && a.tiles > 0) {
    const StemPlan plan = stem_geometry(k, a, size, multiprocessors, shared);
    return plan.shared <= shared ? plan : StemPlan{};
  }
  StemPlan best = {};
  double least = 0;
  for (a.tiles = 1; a.tiles <= 8; ++a.tiles) {
    for (a.rows = 1; a.rows <= 16; ++a.rows) {
      const StemPlan plan = stem_geometry(k, a, size, multiprocessors, shared);
      if (plan.shared > shared) continue;
      const double clocks = stem_clocks(k, plan, size, multiprocessors);
      if (best.shared == 0 || clocks < least) best = plan, least = clocks;
    }
  }
  return best;
}

}  // namespace resnet_fast::cuda
