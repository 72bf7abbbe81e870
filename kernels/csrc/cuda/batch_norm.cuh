// Batch norm by batch statistics with ReLU, and with residual add before it, for training: forward and backward.
//
//   y = relu((x - mean) * invstd * gamma + beta [+ residual])
//   dz = dy where the ReLU passes,  dbeta = sum dz,  dgamma = sum dz * (x - mean) * invstd
//   dx = A * (dz + B * (x - mean) + D),  A = gamma * invstd,  B = -invstd * dgamma / M,  D = -dbeta / M
//
// Images are rows [M, C] of channels, one row a pixel. Sums over rows come in two steps of fixed order. x - mean is
// formed first, so that large means do not cancel. Sources: Ioffe and Szegedy 2015, section 3; Welford 1962; Chan,
// Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
#pragma once

#include "batch_norm_plan.h"
#include "elements.cuh"

namespace resnet_fast::cuda {

// Eight channels of one row: in whole 16-byte pieces, or one by one where channels or alignment are odd.
template <bool kVector, typename T>
__device__ void load8(float (&v)[8], const T* from, int count) {
  constexpr int kSize = Pack<T>::kSize;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < 8; i += kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[i + e] = widen(pack.value[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = e < count ? widen(from[e]) : 0.f;
  }
}

template <bool kVector, typename T>
__device__ void store8(T* to, const float (&v)[8], int count) {
  constexpr int kSize = Pack<T>::kSize;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < 8; i += kSize) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < kSize; ++e) narrow(v[i + e], pack.value[e]);
      *reinterpret_cast<Pack<T>*>(to + i) = pack;
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) narrow(v[e], to[e]);
    }
  }
}

// False where ReLU gives 0; NaN passes, and its gradient with it.
__device__ inline bool relu_keeps(float z) { return !(z <= 0); }

// Where a thread works: its eight channels (`count` of them there), its row within a step of `down` rows.
struct BnThread {
  int channel, count, row, down;
};

__device__ inline BnThread bn_thread(const BnArgs& a) {
  const int channel = (blockIdx.y * a.across + threadIdx.x % a.across) * 8;
  return {channel, min(8, a.channels - channel), static_cast<int>(threadIdx.x) / a.across, kBnThreads / a.across};
}

// gamma * invstd, beta and the mean of a thread's channels.
struct BnAffine {
  float scale[8], shift[8], mean[8];

  __device__ BnAffine(const float* mean_, const float* invstd, const float* gamma, const float* beta,
                      const BnThread& t) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = t.channel + e;
      const bool there = e < t.count;
      mean[e] = there ? mean_[c] : 0;
      scale[e] = there ? invstd[c] : 0;
      if (there && gamma != nullptr) scale[e] *= gamma[c];
      shift[e] = there && beta != nullptr ? beta[c] : 0;
    }
  }
};

// Brings two numbers of each thread's eight channels together: each(channel, number of row i, its two numbers) is
// called by one thread for each channel, over the rows of the block in order.
template <typename Each>
__device__ void over_rows(const float (&first)[8], const float (&second)[8], const BnArgs& a, Each each) {
  // Eight channels by 256 threads, four floats apart from a multiple of the banks: readers take eight channels of four
  // threads at once.
  constexpr int kPitch = kBnThreads + 4;
  __shared__ float numbers[2][8 * kPitch];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    numbers[0][e * kPitch + threadIdx.x] = first[e];
    numbers[1][e * kPitch + threadIdx.x] = second[e];
  }
  __syncthreads();
  const int byte = threadIdx.x / 8, channel = (blockIdx.y * a.across + byte) * 8 + threadIdx.x % 8;
  if (byte >= a.across || channel >= a.channels) return;
  const float* own = &numbers[0][threadIdx.x % 8 * kPitch + byte];
  each(channel, [&](int row, int which) { return own[which * 8 * kPitch + row * a.across]; });
}

// Block p: mean, less row 0 of x, and sum of squared deviations of rows p * part_rows ..., to partial[p, 0 and 1, C].
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_stats_partial_kernel(const T* __restrict__ x, double* __restrict__ partial, const __grid_constant__ BnArgs a) {
  const BnThread t = bn_thread(a);
  const int64_t first = blockIdx.x * a.part_rows;
  const int rows = static_cast<int>(min(a.part_rows, a.rows - first));
  // Deviations from the first row, so that a large mean is in no sum, by Welford's recurrence: should that row be an
  // outlier, nothing cancels either.
  float origin[8] = {}, mean[8] = {}, m2[8] = {};
  if (t.count > 0) {
    load8<kVector>(origin, x + t.channel, t.count);
    const T* from = x + (first + t.row) * a.channels + t.channel;
    float seen = 0;
#pragma unroll 4
    for (int row = t.row; row < rows; row += t.down) {
      float v[8];
      load8<kVector>(v, from, t.count);
      from += int64_t{t.down} * a.channels;
      seen += 1;
      const float weight = 1 / seen;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float value = v[e] - origin[e], delta = value - mean[e];
        mean[e] += delta * weight;
        m2[e] += delta * (value - mean[e]);
      }
    }
  }
  over_rows(mean, m2, a, [&](int channel, auto number) {
    // Chan's rule, in float64: its rounding would be of the size of the deviations, not of the result.
    double joint = 0, squares = 0;
    const auto count = [&](int row) { return row < rows ? (rows - row + t.down - 1) / t.down : 0; };
    for (int row = 0; row < t.down; ++row) joint += static_cast<double>(number(row, 0)) * count(row);
    joint /= rows;
    for (int row = 0; row < t.down && row < rows; ++row) {
      const double delta = number(row, 0) - joint;
      squares += number(row, 1) + delta * delta * count(row);
    }
    double* to = partial + int64_t{blockIdx.x} * 2 * a.channels + channel;
    to[0] = joint;
    to[a.channels] = squares;
  });
}

// The second step of a sum: each(p) over the parts, in float64; `kBnFinalLanes` threads share a channel. All threads of
// the block call it, each gets the sum.
template <typename Each>
__device__ double over_parts(int parts, Each each) {
  __shared__ double sums[kBnThreads];
  double sum = 0;
  for (int p = threadIdx.x / kBnFinalChannels; p < parts; p += kBnFinalLanes) sum += each(p);
  __syncthreads();
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < kBnFinalLanes; ++i) sum += sums[i * kBnFinalChannels + threadIdx.x % kBnFinalChannels];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kBnThreads)
    bn_stats_final_kernel(const T* __restrict__ x, const double* __restrict__ partial, float* __restrict__ mean,
                          float* __restrict__ var, float* __restrict__ invstd, const __grid_constant__ BnArgs a) {
  const int channel = blockIdx.x * kBnFinalChannels + threadIdx.x % kBnFinalChannels;
  const bool there = channel < a.channels;
  const double* from = partial + (there ? channel : 0);
  const auto part = [&](int p, int which) { return from[(int64_t{p} * 2 + which) * a.channels]; };
  const auto count = [&](int p) { return static_cast<double>(min(a.part_rows, a.rows - p * a.part_rows)); };
  const double m = over_parts(a.parts, [&](int p) { return part(p, 0) * count(p); }) / a.rows;
  const double squares = over_parts(a.parts, [&](int p) {
    const double delta = part(p, 0) - m;
    return part(p, 1) + delta * delta * count(p);
  });
  if (!there || threadIdx.x >= kBnFinalChannels) return;
  const double v = squares / a.rows;
  mean[channel] = static_cast<float>(m + widen(x[channel]));
  var[channel] = static_cast<float>(v);
  invstd[channel] = static_cast<float>(1 / sqrt(v + a.eps));
}

// y, and with a residual the mask: bit c % 8 of byte [m, c / 8] tells whether the ReLU passes.
template <typename T, bool kVector, bool kAdd>
__global__ void __launch_bounds__(kBnThreads)
    bn_apply_kernel(const T* __restrict__ x, const T* __restrict__ residual, const float* __restrict__ mean,
                    const float* __restrict__ invstd, const float* __restrict__ gamma, const float* __restrict__ beta,
                    T* __restrict__ y, uint8_t* __restrict__ mask, const __grid_constant__ BnArgs a) {
  const BnThread t = bn_thread(a);
  if (t.count <= 0) return;
  const BnAffine affine(mean, invstd, gamma, beta, t);
  // The last rows first: the pass over x before this one has left them in the cache.
  const int64_t first = int64_t{gridDim.x - 1 - blockIdx.x} * (t.down * kBnRows) + t.row;
#pragma unroll
  for (int i = 0; i < kBnRows; ++i) {
    const int64_t row = first + i * t.down;
    if (row >= a.rows) return;
    const int64_t at = row * a.channels + t.channel;
    float v[8], r[8] = {};
    load8<kVector>(v, x + at, t.count);
    if (kAdd) load8<kVector>(r, residual + at, t.count);
    unsigned bits = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float z = fmaf(v[e] - affine.mean[e], affine.scale[e], affine.shift[e]) + r[e];
      const bool passes = relu_keeps(z);
      v[e] = passes ? z : 0;
      if (passes && e < t.count) bits |= 1u << e;
    }
    store8<kVector>(y + at, v, t.count);
    if (kAdd) mask[row * ((a.channels + 7) / 8) + t.channel / 8] = static_cast<uint8_t>(bits);
  }
}

// Block p: sums of dz and dz * (x - mean) of its rows, to partial[p, 0 and 1, C]. With kAdd the mask tells where the
// ReLU passes, and dz, the gradient of the residual, is written.
template <typename T, bool kVector, bool kAdd>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_backward_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                            const float* __restrict__ mean, const float* __restrict__ invstd,
                            const float* __restrict__ gamma, const float* __restrict__ beta, T* __restrict__ dz,
                            float* __restrict__ partial, const __grid_constant__ BnArgs a) {
  const BnThread t = bn_thread(a);
  const int64_t first = blockIdx.x * a.part_rows;
  const int rows = static_cast<int>(min(a.part_rows, a.rows - first));
  float sum[8] = {}, product[8] = {};
  if (t.count > 0) {
    const BnAffine affine(mean, invstd, gamma, beta, t);
#pragma unroll 2
    for (int i = t.row; i < rows; i += t.down) {
      const int64_t row = first + i, at = row * a.channels + t.channel;
      float v[8], g[8];
      load8<kVector>(v, x + at, t.count);
      load8<kVector>(g, dy + at, t.count);
      const unsigned bits = kAdd ? mask[row * ((a.channels + 7) / 8) + t.channel / 8] : 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[e] -= affine.mean[e];
        const bool passes = kAdd ? bits >> e & 1 : relu_keeps(fmaf(v[e], affine.scale[e], affine.shift[e]));
        g[e] = passes ? g[e] : 0;
        sum[e] += g[e];
        product[e] += g[e] * v[e];
      }
      if (kAdd) store8<kVector>(dz + at, g, t.count);
    }
  }
  over_rows(sum, product, a, [&](int channel, auto number) {
    double sums[2] = {};
    for (int row = 0; row < t.down; ++row) sums[0] += number(row, 0), sums[1] += number(row, 1);
    float* to = partial + int64_t{blockIdx.x} * 2 * a.channels + channel;
    to[0] = static_cast<float>(sums[0]);
    to[a.channels] = static_cast<float>(sums[1]);
  });
}

// coefficients: A, B, D, each [C]. T: float.
template <typename T>
__global__ void __launch_bounds__(kBnThreads)
    bn_backward_final_kernel(const T* __restrict__ partial, const T* __restrict__ invstd, const T* __restrict__ gamma,
                             T* __restrict__ coefficients, T* __restrict__ dgamma, T* __restrict__ dbeta,
                             const __grid_constant__ BnArgs a) {
  const int channel = blockIdx.x * kBnFinalChannels + threadIdx.x % kBnFinalChannels;
  const bool there = channel < a.channels;
  const T* from = partial + (there ? channel : 0);
  const double sum = over_parts(a.parts, [&](int p) { return from[int64_t{p} * 2 * a.channels]; });
  const double product = over_parts(a.parts, [&](int p) { return from[(int64_t{p} * 2 + 1) * a.channels]; });
  if (!there || threadIdx.x >= kBnFinalChannels) return;
  const double s = invstd[channel], g = product * s;
  dbeta[channel] = static_cast<float>(sum);
  dgamma[channel] = static_cast<float>(g);
  coefficients[channel] = invstd[channel] * (gamma != nullptr ? gamma[channel] : 1);
  coefficients[a.channels + channel] = static_cast<float>(-s * g / a.rows);
  coefficients[2 * a.channels + channel] = static_cast<float>(-sum / a.rows);
}

// dx from dy where the ReLU is to be undone here (kRelu), else from dy that is dz already.
template <typename T, bool kVector, bool kRelu>
__global__ void __launch_bounds__(kBnThreads)
    bn_backward_apply_kernel(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ mean,
                             const float* __restrict__ coefficients, const float* __restrict__ invstd,
                             const float* __restrict__ gamma, const float* __restrict__ beta, T* __restrict__ dx,
                             const __grid_constant__ BnArgs a) {
  const BnThread t = bn_thread(a);
  if (t.count <= 0) return;
  const BnAffine affine(mean, invstd, gamma, beta, t);
  float b[8], d[8], factor[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float* own = coefficients + t.channel + e;
    const bool there = e < t.count;
    factor[e] = there ? own[0] : 0, b[e] = there ? own[a.channels] : 0, d[e] = there ? own[2 * a.channels] : 0;
  }
  const int64_t first = int64_t{gridDim.x - 1 - blockIdx.x} * (t.down * kBnRows) + t.row;  // last rows first
#pragma unroll
  for (int i = 0; i < kBnRows; ++i) {
    const int64_t row = first + i * t.down;
    if (row >= a.rows) return;
    const int64_t at = row * a.channels + t.channel;
    float v[8], g[8];
    load8<kVector>(v, x + at, t.count);
    load8<kVector>(g, dy + at, t.count);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v[e] -= affine.mean[e];
      const bool passes = !kRelu || relu_keeps(fmaf(v[e], affine.scale[e], affine.shift[e]));
      g[e] = factor[e] * ((passes ? g[e] : 0) + fmaf(b[e], v[e], d[e]));
    }
    store8<kVector>(dx + at, g, t.count);
  }
}

}  // namespace resnet_fast::cuda
