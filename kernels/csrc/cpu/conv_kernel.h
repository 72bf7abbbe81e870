// The convolution micro-kernels, one source for every instruction set.
//
// A file conv_<isa>.cpp selects its instruction set, defines RESNET_FAST_VECTOR_BYTES and includes this header once.
// Everything sits in an unnamed namespace, so that no code of one instruction set is linked into another's place.
//
// A tile is P output pixels x V vectors of output channels, held in registers. Each step loads V vectors of the filter
// panel, and for each pixel broadcasts one input element and issues V fused multiply-adds: P * V FMAs against P + V
// loads. The panel block stays in L1 while all pixels of the call pass by; where the channels need several blocks, the
// sums of a panel wait in `partial`.
#pragma once

#include "conv.h"

namespace resnet_fast {
namespace {

template <typename T>
struct Simd {
  static constexpr int lanes = RESNET_FAST_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(RESNET_FAST_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(RESNET_FAST_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static inline __attribute__((always_inline)) Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static inline __attribute__((always_inline)) void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

// Keeps NaN and the sign of zero, as torch.relu does: max(x, 0) would return 0 for NaN.
template <typename T>
inline __attribute__((always_inline)) typename Simd<T>::Vec relu(typename Simd<T>::Vec v) {
  typename Simd<T>::Vec zero = {};
  return v < zero ? zero : v;
}

// Index lists: GCC keeps an array in registers only if every index is a constant from the start.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

template <typename T, int... L>
inline __attribute__((always_inline)) typename Simd<T>::Vec splat(T value, Indices<L...>) {
  return typename Simd<T>::Vec{((void)L, value)...};
}

template <typename T, int P, int V>
struct Tile {
  typedef typename Simd<T>::Vec Vec;
  static constexpr int lanes = Simd<T>::lanes;
  Vec sum[P * V];

  template <int... I>
  inline __attribute__((always_inline)) void start(Indices<I...>) {
    ((sum[I] = Vec{}), ...);
  }

  template <int... I, int... F>
  inline __attribute__((always_inline)) void step(const T* x, const int64_t (&offset)[P], const T* filter,
                                                  Indices<I...>, Indices<F...>) {
    const Vec panel[V] = {Simd<T>::load(filter + F * lanes)...};
    ((pixel<I>(splat(x[offset[I]], typename MakeIndices<lanes>::type()), panel, Indices<F...>())), ...);
  }

  template <int I, int... F>
  inline __attribute__((always_inline)) void pixel(Vec x, const Vec (&panel)[V], Indices<F...>) {
    ((sum[I * V + F] += x * panel[F]), ...);
  }

  // The same V vectors for every pixel (pixel_stride 0) or those of each.
  template <int... I>
  inline __attribute__((always_inline)) void add(const T* from, int64_t pixel_stride, Indices<I...>) {
    ((sum[I] += Simd<T>::load(from + (I / V) * pixel_stride + (I % V) * lanes)), ...);
  }

  template <int... I>
  inline __attribute__((always_inline)) void add_at(const T* from, const int64_t* offset, Indices<I...>) {
    ((sum[I] += Simd<T>::load(from + offset[I / V] + (I % V) * lanes)), ...);
  }

  template <int... I>
  inline __attribute__((always_inline)) void rectify(Indices<I...>) {
    ((sum[I] = relu<T>(sum[I])), ...);
  }

  template <int... I>
  inline __attribute__((always_inline)) void finish(T* to, const int64_t* offset, Indices<I...>) const {
    (Simd<T>::store(to + offset[I / V] + (I % V) * lanes, sum[I]), ...);
  }

  template <int... I>
  inline __attribute__((always_inline)) void spill(T* to, Indices<I...>) const {
    (Simd<T>::store(to + I * lanes, sum[I]), ...);
  }
};

// One tile, one block of channels.
template <typename T, int P, int V>
void run_tile(const ConvCall<T>& call, const T* filter, const T* bias, int first_pixel, int64_t out_channel,
              int block_begin, int block_length, bool first_block, bool last_block, T* partial) {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename MakeIndices<P>::type Pixels;
  typedef typename MakeIndices<V>::type Vectors;
  Tile<T, P, V> tile;
  tile.start(All());
  int64_t offset[P];
  for (int p = 0; p < P; ++p) offset[p] = call.input_offset[first_pixel + p];
  for (int run = 0; run < call.runs; ++run) {
    const T* x = call.input + call.run_offset[run] + block_begin;
    for (const T* end = x + block_length; x != end; ++x) {
      tile.step(x, offset, filter, Pixels(), Vectors());
      filter += V * Simd<T>::lanes;
    }
  }
  // Blocks are summed apart and then added, and the bias comes last: errors grow with the length of a block, not with
  // all channels, and small products are not lost beside a large bias.
  if (!first_block) tile.add(partial, V * Simd<T>::lanes, All());
  if (!last_block) {
    tile.spill(partial, All());
    return;
  }
  tile.add(bias, 0, All());
  if (call.residual) tile.add_at(call.residual + out_channel, call.residual_offset + first_pixel, All());
  if (call.relu) tile.rectify(All());
  tile.finish(call.output + out_channel, call.output_offset + first_pixel, All());
}

template <typename T>
using RunTile = void (*)(const ConvCall<T>&, const T*, const T*, int, int64_t, int, int, bool, bool, T*);

// run_tile<T, 1..P, V>, for the pixels that remain after the full tiles.
template <typename T, int V, int... P>
inline RunTile<T> select_tile(int pixels, Indices<P...>) {
  static constexpr RunTile<T> tiles[] = {run_tile<T, P + 1, V>...};
  return tiles[pixels - 1];
}

template <typename T, int P, int V>
void conv_panel(const ConvCall<T>& call, const T* filter, const T* bias, int64_t out_channel) {
  alignas(64) T partial[kMaxPixels * V * Simd<T>::lanes];
  typedef typename MakeIndices<P>::type Pixels;
  for (int begin = 0; begin < call.channels; begin += call.block) {
    const int length = begin + call.block < call.channels ? call.block : call.channels - begin;
    const bool first = begin == 0, last = begin + length == call.channels;
    for (int pixel = 0; pixel < call.pixels; pixel += P) {
      const int count = call.pixels - pixel < P ? call.pixels - pixel : P;
      select_tile<T, V>(count, Pixels())(call, filter, bias, pixel, out_channel, begin, length, first, last,
                                         partial + pixel * V * Simd<T>::lanes);
    }
    filter += static_cast<int64_t>(call.runs) * length * V * Simd<T>::lanes;
  }
}

// P: pixels of a tile where the panel is full (two vectors), PH: where it is half full (one vector).
template <typename T, int P, int PH>
void conv(const ConvCall<T>& call) {
  constexpr int panel = 2 * Simd<T>::lanes;
  for (int k = call.panel_begin; k < call.panel_end; ++k) {
    const T* filter = call.filter + k * call.panel_stride;
    const T* bias = call.bias + static_cast<int64_t>(k) * panel;
    if (2 * k + 1 < call.out_vectors) {
      conv_panel<T, P, 2>(call, filter, bias, static_cast<int64_t>(k) * panel);
    } else {
      conv_panel<T, PH, 1>(call, filter, bias, static_cast<int64_t>(k) * panel);
    }
  }
}

template <typename T>
void add_relu(const T* a, const T* b, T* out, int64_t n) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Simd<T>::store(out + i, relu<T>(Simd<T>::load(a + i) + Simd<T>::load(b + i)));
  }
  for (; i < n; ++i) {
    const T sum = a[i] + b[i];
    out[i] = sum < T(0) ? T(0) : sum;
  }
}

template <typename T, int P, int PH>
constexpr ConvKernels<T> kernels(const char* isa) {
  return {isa, Simd<T>::lanes, 2, P, conv<T, P, PH>, add_relu<T>};
}

}  // namespace
}  // namespace resnet_fast
