// Batch norm in training, one source for every instruction set: pixels in a row, their channels next to each other.
//
// Sums go over one call in the type of the arithmetic; who calls adds the calls up in double.
#pragma once

#include "simd.h"

namespace resnet_fast {
namespace {

// V is a vector or, for the channels that fill none, a single element.
template <typename V, typename T>
RESNET_FAST_INLINE V get(const T* p) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return *p;
  } else {
    return Simd<T>::load(p);
  }
}

template <typename V, typename T>
RESNET_FAST_INLINE void put(T* p, V v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    *p = v;
  } else {
    Simd<T>::store(p, v);
  }
}

template <typename T, typename Body>
RESNET_FAST_INLINE void over_channels(int channels, const Body& body) {
  int c = 0;
  for (; c + Simd<T>::lanes <= channels; c += Simd<T>::lanes) body(c, typename Simd<T>::Vec{});
  for (; c < channels; ++c) body(c, T{});
}

// The sign of this decides what a ReLU let through, in the backward too: both must round alike, so both call it.
template <typename V>
RESNET_FAST_INLINE V affine(V x, V scale, V shift) {
  return x * scale + shift;
}

template <typename T>
void normalize(const NormalizeCall<T>& call) {
  const auto row = [&](const T* x, const T* residual, T* out) __attribute__((always_inline)) {
    over_channels<T>(call.channels, [&](int c, auto zero) __attribute__((always_inline)) {
      typedef decltype(zero) V;
      V v = get<V>(x + c);
      if (call.scale) v = affine<V>(v, get<V>(call.scale + c), get<V>(call.shift + c));
      if (residual) {
        V r = get<V>(residual + c);
        if (call.residual_scale) r = affine<V>(r, get<V>(call.residual_scale + c), get<V>(call.residual_shift + c));
        v += r;
      }
      if (call.relu) v = v < zero ? zero : v;
      put<V>(out + c, v);
    });
  };
  for (int64_t p = 0; p < call.pixels; ++p) {
    const int64_t at = p * call.channels;
    row(call.x + at, call.residual ? call.residual + at : nullptr, call.out + at);
  }
}

template <typename T>
void input_gradient(const InputGradientCall<T>& call) {
  const T *a = call.coefficients, *b = a + call.channels, *constant = b + call.channels,
          *mean = constant + call.channels;
  for (int64_t p = 0; p < call.pixels; ++p) {
    const int64_t at = p * call.channels;
    over_channels<T>(call.channels, [&](int c, auto zero) __attribute__((always_inline)) {
      typedef decltype(zero) V;
      put<V>(call.out + at + c,
             get<V>(a + c) * get<V>(call.grad + at + c) +
                 (get<V>(b + c) * (get<V>(call.y + at + c) - get<V>(mean + c)) + get<V>(constant + c)));
    });
  }
}

template <typename T>
void masked_sums(const MaskedSumsCall<T>& call) {
  over_channels<T>(call.channels, [&](int c, auto zero) __attribute__((always_inline)) {
    typedef decltype(zero) V;
    V sum = zero, product = zero, second = zero;
    const V mean = call.y ? get<V>(call.mean + c) : zero,
            second_mean = call.second ? get<V>(call.second_mean + c) : zero;
    const V scale = call.scale ? get<V>(call.scale + c) : zero, shift = call.scale ? get<V>(call.shift + c) : zero;
    for (int64_t p = 0, at = c; p < call.pixels; ++p, at += call.channels) {
      V g = get<V>(call.grad + at);
      if (call.positive) {
        V x = get<V>(call.positive + at);
        if (call.scale) x = affine<V>(x, scale, shift);
        g = x <= zero ? zero : g;  // a NaN lets gradients through, as in PyTorch
      }
      put<V>(call.out + at, g);
      sum += g;
      if (call.y) product += g * (get<V>(call.y + at) - mean);
      if (call.second) second += g * (get<V>(call.second + at) - second_mean);
    }
    put<V>(call.sums + c, sum);
    put<V>(call.sums + call.channels + c, product);
    put<V>(call.sums + 2 * call.channels + c, second);
  });
}

// Two passes over pixels that are in L1: the variance does not cancel, however large the mean.
template <typename T>
void moments(const T* x, int64_t pixels, int channels, T* mean, T* square_sum) {
  const T share = T(1) / static_cast<T>(pixels);
  over_channels<T>(channels, [&](int c, auto zero) __attribute__((always_inline)) {
    typedef decltype(zero) V;
    V sum = zero, squares = zero;
    for (int64_t p = 0, at = c; p < pixels; ++p, at += channels) sum += get<V>(x + at);
    const V center = sum * share;
    for (int64_t p = 0, at = c; p < pixels; ++p, at += channels) {
      const V d = get<V>(x + at) - center;
      squares += d * d;
    }
    put<V>(mean + c, center);
    put<V>(square_sum + c, squares);
  });
}

}  // namespace
}  // namespace resnet_fast
