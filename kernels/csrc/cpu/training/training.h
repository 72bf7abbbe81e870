// What the operators of training share: dense images, their way into maps with a halo, sums over pixels.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"
#include "cpu/conv/padded_layout.h"
#include "cpu/kept_memory.h"
#include "cpu/thread_team.h"

namespace resnet_fast {

// Sums of so many elements at once: they stay in L1, and short sums err less.
constexpr int64_t kSumElements = 4096;
// Maps of the images that a team has at hand: they should stay in the last-level cache. Those of one member alone: in
// L2.
constexpr int64_t kTeamMapBytes = 4 << 20;
constexpr int64_t kMemberMapBytes = 256 << 10;
// Sums of a filter's gradient that each member may have for itself.
constexpr int64_t kMemberSumBytes = 1 << 20;
// Output tiles of Winograd that a member alone needs at once, or filters would pass by too often.
constexpr int64_t kMinMemberTiles = 16;

// [N, C, H, W], channels last, without a gap.
struct Image {
  int64_t images, channels, height, width;

  explicit Image(const Tensor& t) : images(t.size(0)), channels(t.size(1)), height(t.size(2)), width(t.size(3)) {}
  Image(int64_t n, int64_t c, int64_t h, int64_t w) : images(n), channels(c), height(h), width(w) {}
  int64_t row() const { return width * channels; }
  int64_t image() const { return height * row(); }
  int64_t pixels() const { return images * height * width; }
};

// A 1x1 convolution does not ask where images end: with rows for images, those at hand stay in L2, if its filter is
// small enough to pass by for each few of them.
constexpr int64_t kRowsFilterBytes = 512 << 10;

inline Image rows_of(const Image& i) { return Image(i.images * i.height, i.channels, 1, i.width); }

inline bool goes_by_rows(const Layer& l, int64_t channels, int64_t element_size) {
  return l.kernel_h == 1 && l.kernel_w == 1 && l.stride_h == 1 && l.stride_w == 1 && l.pad_h == 0 && l.pad_w == 0 &&
         l.out_channels * channels * element_size <= kRowsFilterBytes;
}

inline void check_image(const char* op, const char* name, const Tensor& t) {
  check_rank(op, name, t, 4, "[batch, channels, height, width]");
  check_dtype(op, name, t);
  RESNET_FAST_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU");
  const Image i(t);
  const bool dense = (i.channels == 1 || t.stride(1) == 1) && (i.width == 1 || t.stride(3) == i.channels) &&
                     (i.height == 1 || t.stride(2) == i.row()) && (i.images == 1 || t.stride(0) == i.image());
  RESNET_FAST_CHECK(dense || t.numel() == 0, op, ": ", name, " of shape ", shape(t),
                    " is not contiguous in channels_last");
}

inline ScalarType arithmetic_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A matrix [rows, channels] of the type of the arithmetic, or null.
template <typename T>
const T* check_rows(const char* op, const char* name, const std::optional<Tensor>& t, int64_t rows, int64_t channels) {
  if (!t) return nullptr;
  check_defined(op, name, *t);
  const bool fits = t->dim() == 2 && t->size(0) == rows && t->size(1) == channels && t->is_cpu() &&
                    t->scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double) &&
                    t->stride(1) == 1 && t->stride(0) == channels;
  RESNET_FAST_CHECK(fits, op, ": ", name, " has shape ", shape(*t), " and dtype ", dtype_name(t->scalar_type()),
                    ", want a contiguous [", rows, ", ", channels, "] of ", sizeof(T) == 4 ? "float32" : "float64");
  return static_cast<const T*>(t->data_ptr());
}

inline Tensor empty_image(const Image& i, const Tensor& like) {
  return empty_tensor({i.images, i.channels, i.height, i.width}, like.scalar_type());
}

inline Tensor empty_rows(int64_t rows, int64_t channels, const Tensor& like) {
  return empty_tensor({rows, channels}, arithmetic_type(like));
}

// `n` elements as the arithmetic wants them: where they are, or copied to `buffer`.
template <typename T>
const T* as_arithmetic(const T* from, int64_t, T*) {
  return from;
}
template <typename T>
const T* as_arithmetic(const BFloat16* from, int64_t n, T* buffer) {
  kernels_in_use<BFloat16>().widen(from, n, buffer);
  return buffer;
}
template <typename T>
void store_as(const T* from, int64_t n, T* to) {
  if (from != to) std::copy_n(from, n, to);
}
template <typename T>
void store_as(const T* from, int64_t n, BFloat16* to) {
  kernels_in_use<BFloat16>().narrow(from, n, to);
}

// Where results of a call go: in place, or to a buffer that store_as empties.
template <typename T>
T* target(T* to, T*) {
  return to;
}
template <typename T>
T* target(BFloat16*, T* buffer) {
  return buffer;
}

// A lazy activation: act(scale * y + shift), y a convolution's output; or y itself, where scale is null.
template <typename T>
struct Activation {
  const T *scale = nullptr, *shift = nullptr;
  bool relu = false;
};

// Rows [begin, end) of images x height, normalised, into a map; its pixels have no gap.
template <typename S, typename T>
void fill_activation(const S* x, const Image& image, const Activation<T>& act, int64_t first, const Map<T>& to,
                     int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* out = to.at(i / image.height, i % image.height, 0);
    const T* in = as_arithmetic(x + first * image.image() + i * image.row(), image.row(), out);
    if (act.scale || act.relu) {
      kernels_in_use<T>().normalize({in, act.scale, act.shift, nullptr, nullptr, nullptr, act.relu, out, image.width,
                                     static_cast<int>(image.channels)});
    } else if (in != out) {
      std::copy_n(in, image.row(), out);
    }
  }
}

// The same for the gradient of a convolution's output: a * grad + b * (y - mean) + constant, or grad itself.
template <typename S, typename T>
void fill_gradient(const S* grad, const S* y, const T* coefficients, const Image& image, int64_t first,
                   const Map<T>& to, int64_t begin, int64_t end) {
  std::vector<T> buffer(sizeof(S) == sizeof(T) ? 0 : static_cast<size_t>(image.row()));
  for (int64_t i = begin; i < end; ++i) {
    T* out = to.at(i / image.height, i % image.height, 0);
    const int64_t at = first * image.image() + i * image.row();
    const T* in = as_arithmetic(grad + at, image.row(), out);
    if (coefficients) {
      kernels_in_use<T>().input_gradient({in, as_arithmetic(y + at, image.row(), buffer.data()), coefficients, out,
                                          image.width, static_cast<int>(image.channels)});
    } else if (in != out) {
      std::copy_n(in, image.row(), out);
    }
  }
}

// Adds images [first, first + count) of `data` that are there to what is asked for; of a crew, this member's share.
template <typename S>
void ask_for(Ahead& ahead, const S* data, const Image& image, int64_t first, int64_t count, int64_t last,
             const Crew& crew) {
  const int64_t n = std::min(count, last - first) * image.image() * static_cast<int64_t>(sizeof(S));
  if (n <= 0 || data == nullptr || ahead.count == Ahead::kMost) return;
  const char* from = reinterpret_cast<const char*>(data + first * image.image());
  ahead.from[ahead.count] = from + n * crew.rank / crew.size;
  ahead.bytes[ahead.count++] = n * (crew.rank + 1) / crew.size - n * crew.rank / crew.size;
}

// Pixels [begin, end) in pieces whose sums are taken at once.
template <typename Body>
void in_pieces(int64_t begin, int64_t end, int64_t channels, const Body& body) {
  const int64_t step = std::max<int64_t>(kSumElements / std::max<int64_t>(channels, 1), 16);
  for (; begin < end; begin += step) body(begin, std::min(step, end - begin));
}

// Mean and sum of squared distances of one thread's pixels, by Chan, Golub and LeVeque's rule for pieces.
struct Moments {
  double count = 0;
  std::vector<double> mean, squares;

  explicit Moments(int64_t channels) : mean(static_cast<size_t>(channels)), squares(static_cast<size_t>(channels)) {}

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

// Who works on which images, and how many at once: each member on its own, in maps of its own and without barriers, or
// all of them side by side on the same, where there are too few images or they are too large.
struct ImageSplit {
  bool apart;
  int64_t images, chunk;

  // tiles: of an image, or a number that is large enough where nothing is gained by more.
  ImageSplit(int64_t images, int64_t image_bytes, int64_t tiles, int64_t threads, bool may_part) : images(images) {
    const int64_t least = ceil_div(kMinMemberTiles, tiles), own = std::max(kMemberMapBytes / image_bytes, least);
    const int64_t most = ceil_div(images, threads);  // what the busiest member has to do
    apart = may_part && least <= most && 8 * (most * threads - images) <= images;
    chunk =
        std::clamp<int64_t>(apart ? own : kTeamMapBytes / image_bytes, 1, std::max<int64_t>(apart ? most : images, 1));
  }
  int64_t slots(int64_t threads) const { return apart ? threads : 1; }
  // Behind the last image of a crew.
  int64_t end(int64_t rank, int64_t size) const { return apart ? images * (rank + 1) / size : images; }

  // Calls body(first, count) for the chunks of images of this crew.
  template <typename Body>
  void for_chunks(int64_t rank, int64_t size, const Body& body) const {
    const int64_t begin = apart ? images * rank / size : 0, end = apart ? images * (rank + 1) / size : images;
    const int64_t chunks = ceil_div(end - begin, chunk);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = begin + (end - begin) * i / chunks;
      body(first, begin + (end - begin) * (i + 1) / chunks - first);
    }
  }
};

}  // namespace resnet_fast
