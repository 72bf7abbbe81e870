// Batch norm in training on dense pixels of dense channels, one source for every instruction set.
//
// A call accumulates in its own type; the caller adds the calls up in float64.
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// N vectors of channels, or a single channel (N = 0) of those that fill no vector. Constants of a channel are loaded
// once for all pixels.
template <typename T, int N>
struct Lane {
  typedef typename Simd<T>::Vec V;
  static constexpr int vectors = N, channels = N * Simd<T>::lanes;
  static RESNET_FAST_INLINE V load(const T* p) { return Simd<T>::load(p); }
  static RESNET_FAST_INLINE void store(T* p, V v) { Simd<T>::store(p, v); }
};
template <typename T>
struct Lane<T, 0> {
  typedef T V;
  static constexpr int vectors = 1, channels = 1;
  static RESNET_FAST_INLINE V load(const T* p) { return *p; }
  static RESNET_FAST_INLINE void store(T* p, V v) { *p = v; }
};

// Calls body(channel, lane) until the lanes cover all channels, up to four vectors at a time.
template <typename T, typename Body>
RESNET_FAST_INLINE void over_channels(int channels, const Body& body) {
  constexpr int lanes = Simd<T>::lanes;
  int c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) body(c, Lane<T, 4>());
  for (; c + 2 * lanes <= channels; c += 2 * lanes) body(c, Lane<T, 2>());
  for (; c + lanes <= channels; c += lanes) body(c, Lane<T, 1>());
  for (; c < channels; ++c) body(c, Lane<T, 0>());
}

// A constant in each lane of a group, or zeros.
template <typename L, typename T>
struct Row {
  typename L::V v[L::vectors];
  RESNET_FAST_INLINE Row(const T* p, int c) {
    for (int i = 0; i < L::vectors; ++i) v[i] = p ? L::load(p + c + i * Simd<T>::lanes) : typename L::V{};
  }
};

// The sign of the result is ReLU's mask, in forward and backward: both must round alike, so both call this.
template <typename V>
RESNET_FAST_INLINE V affine(V x, V scale, V shift) {
  return x * scale + shift;
}

template <typename T, bool Scale, bool Relu, bool Residual>
void normalize_as(const NormalizeCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes;
  over_channels<T>(call.channels, [&](int c, auto lane) __attribute__((always_inline)) {
    typedef decltype(lane) L;
    typedef typename L::V V;
    const Row<L, T> scale(call.scale, c), shift(call.shift, c);
    const Row<L, T> other_scale(call.residual_scale, c), other_shift(call.residual_shift, c);
    const bool scaled = call.residual_scale;
    const int64_t step = call.channels;
    const T *x = call.x + c, *residual = Residual ? call.residual + c : nullptr;
    T* out = call.out + c;
    for (int64_t p = 0; p < call.pixels; ++p, x += step, out += step) {
      for (int i = 0; i < L::vectors; ++i) {
        V v = L::load(x + i * lanes);
        if (Scale) v = affine<V>(v, scale.v[i], shift.v[i]);
        if (Residual) {
          V r = L::load(residual + i * lanes);
          if (scaled) r = affine<V>(r, other_scale.v[i], other_shift.v[i]);
          v += r;
        }
        if (Relu) v = v < V{} ? V{} : v;
        L::store(out + i * lanes, v);
      }
      if (Residual) residual += step;
    }
  });
}

template <typename T>
void normalize(const NormalizeCall<T>& call) {
  static constexpr void (*all[])(const NormalizeCall<T>&) = {
      normalize_as<T, false, false, false>, normalize_as<T, false, false, true>, normalize_as<T, false, true, false>,
      normalize_as<T, false, true, true>,   normalize_as<T, true, false, false>, normalize_as<T, true, false, true>,
      normalize_as<T, true, true, false>,   normalize_as<T, true, true, true>};
  all[(call.scale ? 4 : 0) + (call.relu ? 2 : 0) + (call.residual ? 1 : 0)](call);
}

template <typename T>
void input_gradient(const InputGradientCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes;
  const T* rows = call.coefficients;
  over_channels<T>(call.channels, [&](int c, auto lane) __attribute__((always_inline)) {
    typedef decltype(lane) L;
    const int64_t step = call.channels;
    const Row<L, T> a(rows, c), b(rows + step, c), constant(rows + 2 * step, c), mean(rows + 3 * step, c);
    const T *grad = call.grad + c, *y = call.y + c;
    T* out = call.out + c;
    for (int64_t p = 0; p < call.pixels; ++p, grad += step, y += step, out += step) {
      for (int i = 0; i < L::vectors; ++i) {
        L::store(out + i * lanes,
                 a.v[i] * L::load(grad + i * lanes) + (b.v[i] * (L::load(y + i * lanes) - mean.v[i]) + constant.v[i]));
      }
    }
  });
}

// Pixels accumulated side by side: enough to hide the latency of an addition.
template <typename L>
constexpr int kWays = L::vectors >= 4 ? 1 : 4 / L::vectors;

template <typename T, bool Masked, bool Scaled, int Ys>
void masked_sums_as(const MaskedSumsCall<T>& call) {
  constexpr int lanes = Simd<T>::lanes;
  over_channels<T>(call.channels, [&](int c, auto lane) __attribute__((always_inline)) {
    typedef decltype(lane) L;
    typedef typename L::V V;
    constexpr int vectors = L::vectors, ways = kWays<L>;
    const int64_t step = call.channels;
    const Row<L, T> scale(call.scale, c), shift(call.shift, c);
    const Row<L, T> mean(Ys > 0 ? call.mean : nullptr, c), second_mean(Ys > 1 ? call.second_mean : nullptr, c);
    const T *grad = call.grad + c, *relu_source = Masked ? call.relu_source + c : nullptr;
    const T *y = Ys > 0 ? call.y + c : nullptr, *other = Ys > 1 ? call.second + c : nullptr;
    T* const out = call.out + c;
    V sum[ways * vectors] = {}, product[ways * vectors] = {}, second[ways * vectors] = {};
    const auto pixel = [&](int64_t p, int way) __attribute__((always_inline)) {
      const int64_t at = p * step;
      for (int i = 0; i < vectors; ++i) {
        V g = L::load(grad + at + i * lanes);
        if (Masked) {
          V x = L::load(relu_source + at + i * lanes);
          if (Scaled) x = affine<V>(x, scale.v[i], shift.v[i]);
          g = x <= V{} ? V{} : g;  // NaN passes the gradient on, as in PyTorch
        }
        L::store(out + at + i * lanes, g);
        const int k = way * vectors + i;
        sum[k] += g;
        if (Ys > 0) product[k] += g * (L::load(y + at + i * lanes) - mean.v[i]);
        if (Ys > 1) second[k] += g * (L::load(other + at + i * lanes) - second_mean.v[i]);
      }
    };
    int64_t p = 0;
    const int64_t pixels = call.pixels;
    for (; p + ways <= pixels; p += ways) {
      for (int way = 0; way < ways; ++way) pixel(p + way, way);
    }
    for (; p < pixels; ++p) pixel(p, 0);
    for (int i = 0; i < vectors; ++i) {
      for (int way = 1; way < ways; ++way) {
        sum[i] += sum[way * vectors + i], product[i] += product[way * vectors + i];
        second[i] += second[way * vectors + i];
      }
      T* to = call.sums + c + i * lanes;
      L::store(to, sum[i]), L::store(to + step, product[i]), L::store(to + 2 * step, second[i]);
    }
  });
}

template <typename T>
void masked_sums(const MaskedSumsCall<T>& call) {
  static constexpr void (*all[])(const MaskedSumsCall<T>&) = {
      masked_sums_as<T, false, false, 0>, masked_sums_as<T, false, false, 1>, masked_sums_as<T, false, false, 2>,
      masked_sums_as<T, true, false, 0>,  masked_sums_as<T, true, false, 1>,  masked_sums_as<T, true, false, 2>,
      masked_sums_as<T, true, true, 0>,   masked_sums_as<T, true, true, 1>,   masked_sums_as<T, true, true, 2>};
  all[(call.relu_source ? (call.scale ? 6 : 3) : 0) + (call.second ? 2 : call.y ? 1 : 0)](call);
}

// Two passes over pixels in L1: a large mean cancels nothing in the variance.
template <typename T>
void channel_stats(const T* x, int64_t pixels, int channels, T* mean, T* square_sum) {
  constexpr int lanes = Simd<T>::lanes;
  const T share = T(1) / static_cast<T>(pixels);
  over_channels<T>(channels, [&](int c, auto lane) __attribute__((always_inline)) {
    typedef decltype(lane) L;
    typedef typename L::V V;
    constexpr int vectors = L::vectors, ways = kWays<L>;
    V total[ways * vectors] = {}, center[vectors];
    const auto over_pixels = [&](const auto& body) __attribute__((always_inline)) {
      int64_t p = 0;
      const T* at = x + c;
      for (; p + ways <= pixels; p += ways) {
        for (int way = 0; way < ways; ++way, at += channels) {
          for (int i = 0; i < vectors; ++i) body(total[way * vectors + i], L::load(at + i * lanes), i);
        }
      }
      for (; p < pixels; ++p, at += channels) {
        for (int i = 0; i < vectors; ++i) body(total[i], L::load(at + i * lanes), i);
      }
      for (int way = 1; way < ways; ++way) {
        for (int i = 0; i < vectors; ++i) total[i] += total[way * vectors + i];
      }
    };
    over_pixels([&](V& to, V value, int) __attribute__((always_inline)) { to += value; });
    for (int i = 0; i < vectors; ++i) center[i] = total[i] * share, L::store(mean + c + i * lanes, center[i]);
    for (V& t : total) t = V{};
    over_pixels([&](V& to, V value, int i) __attribute__((always_inline)) {
      const V d = value - center[i];
      to += d * d;
    });
    for (int i = 0; i < vectors; ++i) L::store(square_sum + c + i * lanes, total[i]);
  });
}

}  // namespace
}  // namespace resnet_fast
