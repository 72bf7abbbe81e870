// Geometry of the batch norm kernels' launches: pure functions of shapes, for the launcher and for whoever tests it.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

constexpr int kBnThreads = 256;
// A thread owns eight channels, a byte of the bit mask, and in passes that only map this many of its rows.
constexpr int kBnRows = 4;
// The second step of the sums: channels a block, and threads that share each.
constexpr int kBnFinalChannels = 16, kBnFinalLanes = kBnThreads / kBnFinalChannels;

// What a kernel must know, by value. `across`: of a block's threads, how many lie side by side in a row.
struct BnArgs {
  int64_t rows, part_rows;
  int32_t channels, parts, across;
  float eps;
};

struct BnPlan {
  int across;
  int64_t row_blocks, channel_blocks;  // grid of the passes that map; the sums have parts x channel_blocks
  int64_t parts, part_rows;
};

// For rows >= 1 of channels >= 1. No machine's size enters, so a sum is added in the same order on every GPU. 64
// channels a block: whole 128-byte lines of 16-bit numbers. A part has two rows a thread at least, so that its sums are
// a small share of the traffic, and there are at most 512 blocks, for more would only lengthen the second step.
constexpr BnPlan plan_batch_norm(int64_t rows, int64_t channels) {
  const int64_t bytes = (channels + 7) / 8;
  int across = 1;
  while (across < 8 && across < bytes) across *= 2;
  const int64_t down = kBnThreads / across, channel_blocks = (bytes + across - 1) / across;
  const int64_t fit = (rows + 2 * down - 1) / (2 * down), most = 512 / channel_blocks > 1 ? 512 / channel_blocks : 1;
  const int64_t wanted = fit < most ? fit : most, share = (rows + wanted - 1) / wanted;
  const int64_t part_rows = (share + down - 1) / down * down;
  return {across, (rows + down * kBnRows - 1) / (down * kBnRows), channel_blocks, (rows + part_rows - 1) / part_rows,
          part_rows};
}

}  // namespace resnet_fast::cuda
