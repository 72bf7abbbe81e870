// y = max_pool2d([relu](conv2d(x, weight) * scale + shift)), the stem of a residual network in one launch: x of three
// channels in any layout, y in channels_last.
//
// Lower bounds for 64 images of 224x224 in 16 bits, 7x7 filters and 2x2 windows: 19 MB read and 26 MB written take 15
// us at 3 TB/s; 64 * 112 * 112 * 64 * 147 * 2 = 15 GFLOP take 27 us at the 620 TFLOP/s that mma.sync reaches on an
// H200, a filter's 147 elements padded to 160. Overlapping windows of 3x3 recompute half a row of the convolution for
// every `rows` of a warp.
//
// Blocks are persistent: a block loads its filters once, into registers for tensor cores, and loops over input patches.
// A warp walks down a column of eight pooled pixels, then the next column. The convolution's output is pooled in
// registers and never stored. Where windows overlap, a pixel's right neighbour needs its right half: it comes from the
// adjacent lane or, across columns, through shared memory. The row below needs its lower half: it stays in its lane.
//
// Source: implicit GEMM as in Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
#pragma once

#include <type_traits>

#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/stem/conv_bn_relu_pool_mma.cuh"

namespace resnet_fast::cuda {
namespace stem {

// The maximum, NaN if either is NaN, as torch pools.
__device__ inline __half2 max2(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ inline __nv_bfloat162 max2(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ inline float2 max2(float2 a, float2 b) { return {ptx::max_nan(a.x, b.x), ptx::max_nan(a.y, b.y)}; }

template <typename T>
__device__ vec2_of<T> lowest() {
  return round2(float2{-INFINITY, -INFINITY}, T{});
}

extern __shared__ __align__(128) char shared[];

// The value of the lane of the left pixel.
__device__ inline float2 from_left(float2 v) { return {__shfl_up_sync(~0u, v.x, 4), __shfl_up_sync(~0u, v.y, 4)}; }
template <typename Vec2>
__device__ Vec2 from_left(Vec2 v) {
  const uint32_t bits = __shfl_up_sync(~0u, reinterpret_cast<const uint32_t&>(v), 4);
  return reinterpret_cast<const Vec2&>(bits);
}

// The right half of a pooled pixel's 2x2, for its right neighbour.
template <typename T>
struct alignas(2 * sizeof(vec2_of<T>)) Edge {
  vec2_of<T> right[2];
};

// Stores a pooled pixel's channels if `valid`. 16 bits: each of four lanes gets one of four tiles of channels whole, 16
// bytes. y: the pixel's first channel of this warp; `channels`: how many it has from there on.
template <typename T, int kTiles>
__device__ void store(T* y, bool valid, int channels, const vec2_of<T> (&v)[kTiles]) {
  const int quad = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles == 4);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = reinterpret_cast<const uint32_t&>(v[j]);
    transpose4(words);
    ptx::store_predicated(valid, y + 8 * quad, {words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (valid && 8 * j < channels) *reinterpret_cast<float2*>(y + 8 * j + 2 * quad) = v[j];
  }
}

// Computes a warp's share of a patch: pooled rows begin .. end - 1, channels from `channel` on. in: first input element
// of the lane's upper left pixel for the patch's first pooled row and pixel. edges: offset in shared memory of the
// edges of two columns for each row, a multiple of their size. scale_shift: of the warp's channels.
template <typename T, int kIndex, typename Mma>
__device__ void pool_columns(const Mma& mma, const char* in, int edges, const float* scale_shift, T* y,
                             const StemArgs& a, const Patch& p, int begin, int end, int channel) {
  const int channels = a.out_channels - channel;
  constexpr bool kOverlap = kStemKernels[kIndex].overlap;
  constexpr int kTiles = Mma::kTiles, kEdges = 4 * kTiles * sizeof(Edge<T>);  // bytes of a column's edges in one row
  const int lane = threadIdx.x % 32, pixel = lane / 4, quad = lane % 4;
  // Where windows overlap, the lower half of the row above is computed first.
  const int first = kOverlap && begin > 0 ? begin - 1 : begin;
  if constexpr (kOverlap) {
    // The first column has no left neighbour: it reads the lowest values from the second buffer.
    for (int i = lane; i < (end - first) * 4 * kTiles; i += 32)
      *reinterpret_cast<Edge<T>*>(shared + edges + i / (4 * kTiles) * 2 * kEdges + kEdges +
                                  i % (4 * kTiles) * sizeof(Edge<T>)) = {lowest<T>(), lowest<T>()};
    __syncwarp();
  }
  in += 4 * (first - p.row) * a.pitch;
  y += ((int64_t{p.image} * a.pooled_height + first) * a.pooled_width + p.pixel + pixel) * a.out_channels + channel;
  int left = p.pixel;
#pragma unroll 1
  for (int tile = 0; tile < a.tiles && left < a.pooled_width; ++tile, left += kStemTile) {
    const int column = left + pixel;
    // A later patch recomputes the last pixel of the patch before, and does not store it.
    const bool valid = column < a.pooled_width && !(kOverlap && tile == 0 && left > 0 && pixel == 0) &&
                       (sizeof(T) == 4 || 8 * quad < channels);
    // Edges of the column before; this column writes its own to the other buffer.
    int before = edges + (tile % 2 == 0 ? kEdges : 0) + quad * static_cast<int>(sizeof(Edge<T>));
    const char* at = in;
    T* to = y;
    in += kStemTile * 12 * static_cast<int>(sizeof(T)), y += kStemTile * a.out_channels;
    vec2_of<T> up[kTiles];
    if constexpr (kOverlap)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) up[j] = lowest<T>();
#pragma unroll 1
    for (int row = first; row < end;
         ++row, at += 4 * a.pitch, before += 2 * kEdges, to += int64_t{a.pooled_width} * a.out_channels) {
      float acc[2][kTiles][4];
      if (kOverlap && row < begin) {
        mma.template accumulate<1>(acc, at);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][j][e] = 0;
      } else {
        mma.template accumulate<0>(acc, at);
      }

      const float* channel_scale = scale_shift + ptx::opaque(threadIdx.x) % 4 * 2;
      vec2_of<T> v[2][2][kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(channel_scale + 8 * j);
        const float2 shift = *reinterpret_cast<const float2*>(channel_scale + kStemFilters + 8 * j);
#pragma unroll
        for (int dy = 0; dy < 2; ++dy)
#pragma unroll
          for (int dx = 0; dx < 2; ++dx) {
            const float* z = &acc[dy][j][2 * dx];
            // Rounding keeps order, so it may precede pooling.
            v[dy][dx][j] = round2(float2{fmaf(z[0], scale.x, shift.x), fmaf(z[1], scale.y, shift.y)}, T{});
          }
      }
      // If the convolution's output has an odd size, the last windows reach beyond it.
      if (kOverlap && (2 * (left + kStemTile) > a.out_width || 2 * row + 1 >= a.out_height)) {
        const bool beyond = 2 * column + 1 >= a.out_width, below = 2 * row + 1 >= a.out_height;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (beyond) v[0][1][j] = lowest<T>();
          if (below) v[1][0][j] = lowest<T>();
          if (beyond || below) v[1][1][j] = lowest<T>();
        }
      }
      // ReLU is a maximum with 0, which keeps NaN; without ReLU, a maximum with the lowest value changes nothing.
      const vec2_of<T> least = ptx::opaque(a.relu) ? round2(float2{0, 0}, T{}) : lowest<T>();
      vec2_of<T> pooled[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if constexpr (kOverlap) {
          Edge<T> edge;
          constexpr int kNext = 4 * sizeof(Edge<T>);
          if (pixel == 0) edge = *reinterpret_cast<const Edge<T>*>(shared + before + j * kNext);
          if (pixel == kStemTile - 1)
            *reinterpret_cast<Edge<T>*>(shared + (before ^ kEdges) + j * kNext) = {v[0][1][j], v[1][1][j]};
          vec2_of<T> half[2];
#pragma unroll
          for (int dy = 0; dy < 2; ++dy) {
            const vec2_of<T> beside = from_left(v[dy][1][j]);
            half[dy] = max2(max2(v[dy][0][j], v[dy][1][j]), pixel == 0 ? edge.right[dy] : beside);
          }
          pooled[j] = max2(max2(half[0], half[1]), max2(up[j], least));
          up[j] = half[1];
        } else {
          pooled[j] = max2(max2(max2(v[0][0][j], v[0][1][j]), max2(v[1][0][j], v[1][1][j])), least);
        }
      }
      if constexpr (kOverlap) {
        __syncwarp();  // the next column reads this one's edges
      }
      if (!kOverlap || row >= begin) store<T, kTiles>(to, valid, channels, pooled);
    }
  }
}

template <typename T, int kIndex>
struct StemMmaOf {
  using type = TensorStemMma<T, kStemKernels[kIndex].filter>;
};
template <int kIndex>
  requires(kStemKernels[kIndex].math == Math::kSimt)
struct StemMmaOf<float, kIndex> {
  using type = SimtStemMma<kStemKernels[kIndex].filter>;
};

}  // namespace stem

// x: [batch, 3, height, width] by the strides of `a`; weight: [out_channels, kFilter, kFilter, 3]; scale, shift:
// [out_channels]; y: [batch, pooled_height, pooled_width, out_channels]. A grid of plan.blocks x (every 64 channels).
template <typename T, int kIndex>
__global__ void __launch_bounds__(kStemThreads, kStemKernels[kIndex].math == Math::kSimt ? 2 : 3)
    conv_bn_relu_pool_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                                 const float* __restrict__ shift, T* __restrict__ y,
                                 const __grid_constant__ StemArgs a) {
  using namespace stem;
  using Mma = typename StemMmaOf<T, kIndex>::type;
  constexpr StemKernel kKernel = kStemKernels[kIndex];
  constexpr int kFilters = 8 * Mma::kTiles, kFilterGroups = kStemFilters / kFilters,
                kWorkers = kStemWarps / kFilterGroups;
  static_assert(kFilters == stem_warp_filters(kKernel.math, sizeof(T)));
  constexpr int kEdges = 8 * Mma::kTiles * sizeof(Edge<T>);
  static_assert(stem_edge_bytes(kFilters, sizeof(T)) == kEdges && kStemScaleShiftBytes % kEdges == 0);
  const int first = blockIdx.y * kStemFilters;
  float* scale_shift = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < kStemFilters; i += kStemThreads) {
    scale_shift[i] = first + i < a.out_channels ? scale[first + i] : 0;
    scale_shift[kStemFilters + i] = first + i < a.out_channels ? shift[first + i] : 0;
  }
  char* edges = shared + kStemScaleShiftBytes;
  char* last = edges + stem_edges(kKernel, a, sizeof(T));
  char* filters = last + stem_last_step_bytes(kKernel, sizeof(T));
  char* patch = Mma::kResident ? filters + stem_filter_bytes(kKernel, sizeof(T)) : filters;
  if constexpr (Mma::kResident)
    load_filters<kKernel.filter>(reinterpret_cast<float*>(filters), weight, a, first);
  else
    load_filters<T, kKernel.filter>(filters, weight, a, first);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  constexpr int kGroupBytes = Mma::kResident ? 0 : stem_filter_bytes(kKernel, sizeof(T)) / kFilterGroups;
  const int filter_group = threadIdx.x / 32 % kFilterGroups;
  const Mma mma(filters + filter_group * kGroupBytes, last + filter_group * Mma::kLastStepBytes, a);

  const int patches = a.batch * a.strips * a.across;
#pragma unroll 1
  for (int patch_index = blockIdx.x; patch_index < patches; patch_index += gridDim.x) {
    const Patch p = patch_of<T>(a, patch_index, kKernel.overlap, kWorkers);
    // No warp still reads the filters or the previous patch.
    __syncthreads();
    load_patch(patch, x, a, p);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();

    const int thread = ptx::opaque(threadIdx.x), warp = thread / 32, filter_group = warp % kFilterGroups,
              worker = warp / kFilterGroups;
    const int begin = p.row + worker * a.rows, end = min(begin + a.rows, a.pooled_height);
    // Element of the patch that this lane's first pixel of pooled row p.row begins with.
    const int lead = kStemChannels * (4 * p.pixel - a.pad_w) - 1 + stem_shift(a) - p.element;
    const char* in =
        patch + (kKernel.overlap ? 2 * a.pitch : 0) + (lead + thread % 32 / 4 * 12) * static_cast<int>(sizeof(T));
    pool_columns<T, kIndex>(mma, in, kStemScaleShiftBytes + warp * (a.rows + 1) * kEdges,
                            scale_shift + filter_group * kFilters, y, a, p, begin, end,
                            first + filter_group * kFilters);
  }
}

}  // namespace resnet_fast::cuda
