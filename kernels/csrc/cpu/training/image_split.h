// Which thread works on which images of a batch, and how many images at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv/chain.h"
#include "cpu/nhwc.h"
#include "cpu/round.h"
#include "cpu/thread_team.h"

namespace resnet_fast {

// Activations of the images that a team works on at a time: they should stay in the last-level cache. Those of a single
// thread: in L2.
constexpr int64_t kTeamActivationBytes = 4 << 20;
constexpr int64_t kThreadActivationBytes = 256 << 10;
// Winograd tiles that a thread with images of its own has at least, or it would read filters too often.
constexpr int64_t kMinThreadTiles = 16;
// A 1x1 convolution does not care where images end. Split by rows, its activations stay in L2, if the filter is small
// enough to be read for every few rows.
constexpr int64_t kRowsFilterBytes = 512 << 10;

inline bool goes_by_rows(const Layer& l, int64_t channels, int64_t element_size) {
  return l.kernel_h == 1 && l.kernel_w == 1 && l.stride_h == 1 && l.stride_w == 1 && l.pad_h == 0 && l.pad_w == 0 &&
         l.out_channels * channels * element_size <= kRowsFilterBytes;
}

// Rows as images.
inline NhwcShape rows_of(const NhwcShape& s) { return NhwcShape(s.images * s.height, s.channels, 1, s.width); }

// Each thread on images of its own, in memory of its own and without barriers; or the whole team on the same images,
// where these are too few or too large.
struct ImageSplit {
  bool per_thread;
  int64_t images, chunk;

  // tiles: of an image, or kMinThreadTiles where more are of no use.
  ImageSplit(int64_t images, int64_t image_bytes, int64_t tiles, int64_t threads, bool may_split) : images(images) {
    const int64_t least = ceil_div(kMinThreadTiles, tiles), own = std::max(kThreadActivationBytes / image_bytes, least);
    const int64_t most = ceil_div(images, threads);  // of the busiest thread
    per_thread = may_split && least <= most && 8 * (most * threads - images) <= images;
    chunk = std::clamp<int64_t>(per_thread ? own : kTeamActivationBytes / image_bytes, 1,
                                std::max<int64_t>(per_thread ? most : images, 1));
  }

  // Slots of memory for a chunk of images, and that of a thread.
  int64_t slots(int64_t threads) const { return per_thread ? threads : 1; }
  int64_t slot(int64_t rank) const { return per_thread ? rank : 0; }
  // Those who work on the images of a thread.
  ThreadGroup group(int64_t rank, ThreadTeam& team) const {
    return per_thread ? ThreadGroup{0, 1, team} : ThreadGroup{rank, team.size(), team};
  }
  // Behind the last image of a thread.
  int64_t end(int64_t rank, int64_t size) const { return per_thread ? images * (rank + 1) / size : images; }

  // Calls body(first, count) for the chunks of images of a thread.
  template <typename Body>
  void for_chunks(int64_t rank, int64_t size, const Body& body) const {
    const int64_t begin = per_thread ? images * rank / size : 0;
    const int64_t count = end(rank, size) - begin, chunks = ceil_div(count, chunk);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = begin + count * i / chunks;
      body(first, begin + count * (i + 1) / chunks - first);
    }
  }
};

// Appends this thread's share of images [first, first + count) below `end` of `data`.
template <typename S>
void append_prefetch(PrefetchList& list, const S* data, const NhwcShape& shape, int64_t first, int64_t count,
                     int64_t end, const ThreadGroup& group) {
  const int64_t n = std::min(count, end - first) * shape.image() * static_cast<int64_t>(sizeof(S));
  if (n <= 0 || data == nullptr || list.count == PrefetchList::kMax) return;
  const char* from = reinterpret_cast<const char*>(data + first * shape.image());
  list.from[list.count] = from + n * group.rank / group.size;
  list.bytes[list.count++] = n * (group.rank + 1) / group.size - n * group.rank / group.size;
}

}  // namespace resnet_fast
