// Kernels and launch geometry of the stem: pure functions of shapes, for the launcher and the tests. No CUDA, no
// PyTorch.
#pragma once

#include <cstdint>

#include "cuda/conv/conv_plan.h"

namespace resnet_fast::cuda {

// A convolution of filter x filter over three channels with stride 2, and max pooling with stride 2: windows of 2x2
// without padding or, overlapping, of 3x3 with padding 1.
struct StemKernel {
  int filter;
  bool overlap;
  Math math;
};
constexpr StemKernel kStemKernels[] = {
    {7, false, Math::kTensor}, {7, true, Math::kTensor}, {3, false, Math::kTensor}, {3, true, Math::kTensor},
    {7, false, Math::kSimt},   {7, true, Math::kSimt},   {3, false, Math::kSimt},   {3, true, Math::kSimt},
};
constexpr int kStemKernelCount = sizeof(kStemKernels) / sizeof(kStemKernels[0]);

constexpr int kStemChannels = 3;
constexpr int kStemFilters = 64;  // output channels of a block
constexpr int kStemWarps = 4;
constexpr int kStemThreads = 32 * kStemWarps;
constexpr int kStemTile = 8;  // pooled pixels of a row that a warp computes at a time, from 2x2 of the convolution each

// Filters of a warp: as many as fit its registers; with SIMT, which reads them from shared memory, all. The `workers`
// warps that have the same filters divide the rows of a block.
constexpr int stem_warp_filters(Math math, int element_size) {
  return math == Math::kSimt ? 64 : element_size == 2 ? 32 : 16;
}
constexpr int stem_workers(Math math, int element_size) {
  return kStemWarps * stem_warp_filters(math, element_size) / kStemFilters;
}

// Pairs of elements of a filter row: its 3 * filter elements are contiguous, in the input too, preceded by one element
// of a neighbour.
constexpr int stem_pairs(int filter) { return (kStemChannels * filter + 1) / 2; }

enum StemLoad : int32_t { kStemElements, kStemPlanes, kStemPixels };

// Arguments of the kernel. The caller gives the shape, rows and tiles; plan_stem completes the rest.
struct StemArgs {
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of x, in elements
  int32_t batch, height, width, out_channels, pad_h, pad_w, relu;
  int32_t rows, tiles;  // of a warp: pooled rows, and tiles of kStemTile pixels across; 0: plan_stem chooses
  int32_t load;  // StemLoad: elements, or 16-byte packs of planes (NCHW) or of pixels (channels_last)
  int32_t out_height, out_width, pooled_height, pooled_width;
  int32_t strips, across;  // patches of an image, down and across
  int32_t patch_rows, packs, pitch;  // of the input patch: rows, packs of a row per channel, bytes of a row
  int32_t packs_inverse;  // 2^31 / packs + 1: divides by packs
};
constexpr int kStemStrides = 4, kStemFields = 20;
static_assert(sizeof(StemArgs) == 8 * kStemStrides + 4 * kStemFields);

// Shift of a patch by 0 or 1 elements, so that the pairs of a filter row begin at an even element.
constexpr int stem_shift(const StemArgs& a) { return 1 - a.pad_w % 2; }

struct StemPlan {
  StemArgs args;
  int64_t patches;  // of the batch; a block takes every blocks-th
  int64_t blocks;  // grid x; y is for every 64 output channels
  int shared;
};

constexpr int64_t floor_to(int64_t a, int64_t b) { return (a >= 0 ? a / b : -((-a + b - 1) / b)) * b; }

// First pooled pixel of the patch `across` from the left. Where windows overlap, all patches but the first begin with
// the last pixel of the patch before: it is computed again for its right half, and not stored.
constexpr int64_t stem_first_pixel(bool overlap, int tiles, int64_t across) {
  return across * (kStemTile * tiles - (overlap ? 1 : 0));
}
constexpr int64_t stem_patches(bool overlap, int tiles, int64_t pooled_width) {
  const int64_t pixels = int64_t{kStemTile} * tiles;
  return pooled_width <= pixels ? 1 : 1 + ceil_div(pooled_width - pixels, pixels - (overlap ? 1 : 0));
}

// Shared memory: scale and shift, padded to keep the rest aligned; where windows overlap, what a pixel's right
// neighbour needs of it, for each row of each warp; the filters of the last step; filters and patch, in the same place
// if filters move to registers.
constexpr int kStemScaleShiftBytes = 1024;
constexpr int stem_edge_bytes(int filters, int element_size) { return 2 * 2 * filters * element_size; }
constexpr int64_t stem_edges(StemKernel k, const StemArgs& a, int size) {
  return k.overlap ? int64_t{kStemWarps} * (a.rows + 1) * stem_edge_bytes(stem_warp_filters(k.math, size), size) : 0;
}
constexpr int kStemSimtPitch = kStemFilters + 2;  // floats from an element of the filters to the next, 2 banks apart
constexpr int64_t stem_filter_bytes(StemKernel k, int size) {
  const int64_t row = k.filter * kStemChannels;
  return k.math == Math::kSimt ? ceil_div(row * k.filter * kStemSimtPitch * 4, 128) * 128
                               : row * k.filter * kStemFilters * size;
}
// Filters of the last step of conv_bn_relu_pool_mma.cuh, 32 elements each, which stay in shared memory.
constexpr int stem_last_step_bytes(StemKernel k, int size) {
  return k.math == Math::kSimt ? 0 : 32 * kStemFilters * size;
}
constexpr int64_t stem_shared(StemKernel k, const StemArgs& a, int size) {
  const int64_t patch = int64_t{a.patch_rows} * a.pitch, filters = stem_filter_bytes(k, size);
  return kStemScaleShiftBytes + stem_edges(k, a, size) + stem_last_step_bytes(k, size) +
         (k.math == Math::kSimt ? filters + patch : (filters > patch ? filters : patch));
}

// Completes `a`, which holds the shape, rows and tiles.
constexpr StemPlan stem_geometry(StemKernel k, StemArgs a, int size, int multiprocessors, int shared) {
  const int pack = 16 / size, group = kStemChannels * pack, workers = stem_workers(k.math, size);
  a.out_height = (a.height + 2 * a.pad_h - k.filter) / 2 + 1;
  a.out_width = (a.width + 2 * a.pad_w - k.filter) / 2 + 1;
  a.pooled_height = k.overlap ? (a.out_height + 1) / 2 : a.out_height / 2;
  a.pooled_width = k.overlap ? (a.out_width + 1) / 2 : a.out_width / 2;
  a.strips = static_cast<int32_t>(ceil_div(a.pooled_height, int64_t{workers} * a.rows));
  a.across = static_cast<int32_t>(stem_patches(k.overlap, a.tiles, a.pooled_width));
  a.patch_rows = 2 * (2 * workers * a.rows + (k.overlap ? 1 : 0) - 1) + k.filter;
  // Most elements from the patch's first, a multiple of `group`, to a warp's first pair.
  const int64_t begin = -int64_t{kStemChannels} * a.pad_w - 1 + stem_shift(a);
  const int64_t lead = a.across == 1 ? begin - floor_to(begin, group) : group - 2;
  const int64_t last = 2 * kStemTile * a.tiles - 1;
  a.packs = static_cast<int32_t>(ceil_div(lead + 2 * kStemChannels * last + 2 * stem_pairs(k.filter), group));
  a.packs_inverse = static_cast<int32_t>((int64_t{1} << 31) / a.packs + 1);
  // 16 words off a multiple of 32: two rows of pairs of eight pixels, 6 words apart, fall into different banks.
  a.pitch = static_cast<int32_t>(ceil_div(int64_t{a.packs} * 48 - 64, 128) * 128 + 64);
  const int64_t patches = int64_t{a.batch} * a.strips * a.across;
  const int64_t bytes = stem_shared(k, a, size);
  const int64_t fit = (shared + 1024) / (bytes + 1024), limit = k.math == Math::kSimt ? 2 : 3;
  const int64_t resident = fit < limit ? fit : limit, slots = multiprocessors * (resident > 0 ? resident : 1);
  return {a, patches, patches < slots ? patches : slots, static_cast<int>(bytes)};
}

// Estimated clocks of the busiest multiprocessor, for ranking only. After the first patches arrive, computation
// overlaps with the copies of later patches, as far as a multiprocessor has other blocks while one waits.
constexpr double stem_clocks(StemKernel k, const StemPlan& plan, int size, int multiprocessors) {
  const StemArgs& a = plan.args;
  const double tiles = a.tiles * (a.rows + (k.overlap ? 0.5 : 0.0));  // of a warp
  const double slots = k.filter == 7 ? 20 : 4;  // conv_bn_relu_pool_mma.cuh
  // Clocks of a tile with many warps on the four schedulers, and with a single warp on one.
  const double busy = k.math == Math::kSimt ? 20.0 * k.filter * k.filter * kStemChannels : slots * (size == 2 ? 7 : 10);
  const double alone = k.math == Math::kSimt ? 5 * busy : slots * (size == 2 ? 40 : 50);
  // 24 bytes a clock: a multiprocessor's share of L2. 1500 clocks: latency.
  const double bytes = a.patch_rows * a.packs * 48.0, load = 1500 + bytes / 24;
  const int64_t most = ceil_div(plan.patches, multiprocessors), resident = ceil_div(plan.blocks, multiprocessors);
  const int64_t rounds = ceil_div(plan.patches, plan.blocks > 0 ? plan.blocks : 1);
  const double work = most * (kStemWarps * tiles * busy + 150.0) + (most - resident) * bytes / 48;
  const double chain = rounds * (tiles * alone + 300) + (rounds - 1) * load;
  return 1500 + resident * bytes / 24 + (work > chain ? work : chain);
}

// The plan for rows and tiles of `a` or, if these are 0, for those of the fewest estimated clocks. Empty if nothing
// fits `shared` bytes a block.
constexpr StemPlan plan_stem(StemKernel k, StemArgs a, int size, bool aligned, int multiprocessors, int shared) {
  const int64_t pack = 16 / size;
  // The patch keeps the alignment of the input: only with odd padding do pairs begin at even elements.
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
