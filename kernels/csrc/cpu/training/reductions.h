// Reductions over pixels: in blocks that stay in L1, each thread's results combined in float64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resnet_fast {

// Elements that are reduced at once: they stay in L1, and short sums err less.
constexpr int64_t kBlockElements = 4096;

// Most elements of a block of whole pixels.
inline int64_t block_numel(int64_t channels) { return kBlockElements + 16 * channels; }

// Calls body(pixel, count) for blocks of the pixels [begin, end).
template <typename Body>
void for_pixel_blocks(int64_t begin, int64_t end, int64_t channels, const Body& body) {
  const int64_t step = std::max<int64_t>(kBlockElements / std::max<int64_t>(channels, 1), 16);
  for (; begin < end; begin += step) body(begin, std::min(step, end - begin));
}

// Mean and sum of squared differences from it, of the pixels of one thread. Combined by the rule of Chan, Golub and
// LeVeque.
struct ChannelStats {
  double count = 0;
  std::vector<double> mean, squares;

  explicit ChannelStats(int64_t channels)
      : mean(static_cast<size_t>(channels)), squares(static_cast<size_t>(channels)) {}

  template <typename V>
  void add(double n, const V* other_mean, const V* other_squares) {
    if (n == 0) return;
    const double total = count + n;
    for (size_t c = 0; c < mean.size(); ++c) {
      const double delta = static_cast<double>(other_mean[c]) - mean[c];
      mean[c] += delta * (n / total);
      squares[c] += static_cast<double>(other_squares[c]) + delta * delta * (count * n / total);
    }
    count = total;
  }
};

// The partial sums of all threads, added in order.
template <typename T>
void add_partial_sums(const std::vector<std::vector<double>>& partial, T* to) {
  for (size_t i = 0; i < partial[0].size(); ++i) {
    double sum = 0;
    for (const auto& part : partial) sum += part[i];
    to[i] = static_cast<T>(sum);
  }
}

}  // namespace resnet_fast
