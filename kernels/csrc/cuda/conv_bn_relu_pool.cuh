// y = max_pool2d([relu](conv2d(x, weight) * scale + shift)), the stem of a residual network in one launch: x of three
// channels in any layout, y in channels_last.
//
// The least of it, for 64 images of 224x224 in 16 bits, 7x7 filters and 2x2 windows: 19 MB read and 26 MB written, 15
// us at 3 TB/s; 64 * 112 * 112 * 64 * 147 * 2 = 15 GFLOP, 27 us at the 620 TFLOP/s that mma.sync reaches on an H200,
// with a filter's 147 elements in 160. Windows of 3x3 that overlap cost half a row of the convolution again for each
// `rows` of a warp.
//
// Blocks stay: a block loads filters once, into registers where tensor cores multiply, and takes patches of the input
// one after the other. A warp walks down a column of eight pooled pixels, and then the next column. The convolution's
// output is never stored: it is pooled in registers. Where windows overlap, a pixel's right neighbour needs its right
// half; it gets it from the lane beside, across columns through shared memory. The row below needs its lower half: that
// stays with its lane.
//
// Source: implicit GEMM as in Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
#pragma once

#include <type_traits>

#include "conv_bn_relu_pool_math.cuh"
#include "conv_epilogue.cuh"

namespace resnet_fast::cuda {
namespace stem {

// Two neighbours in channels, rounded to the output's type.
template <typename T>
using Two = pair_of<T>;

// The greater, or what is not a number, as torch pools.
__device__ inline __half2 max2(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ inline __nv_bfloat162 max2(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ inline float2 max2(float2 a, float2 b) { return {ptx::max_nan(a.x, b.x), ptx::max_nan(a.y, b.y)}; }

template <typename T>
__device__ Two<T> lowest() {
  return round2(float2{-INFINITY, -INFINITY}, T{});
}

// From the lane of the pixel on the left.
__device__ inline float2 from_left(float2 v) { return {__shfl_up_sync(~0u, v.x, 4), __shfl_up_sync(~0u, v.y, 4)}; }
template <typename Two>
__device__ Two from_left(Two v) {
  const uint32_t bits = __shfl_up_sync(~0u, reinterpret_cast<const uint32_t&>(v), 4);
  return reinterpret_cast<const Two&>(bits);
}

// What a pixel's right neighbour needs of it: the right pixels of its 2x2.
template <typename T, int kTiles>
struct alignas(16) Edge {
  Two<T> right[2][kTiles];
};

// 16 bits: of four tiles of channels a lane gets one whole, 16 bytes.
template <typename T, int kTiles>
__device__ void store(T* y, int64_t at, int channel, const StemArgs& a, bool there, const Two<T> (&v)[kTiles]) {
  const int quad = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles == 4);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = reinterpret_cast<const uint32_t&>(v[j]);
    transpose4(words);
    const int mine = channel + 8 * quad;
    ptx::store_if(there && mine < a.out_channels, y + at + mine, {words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int mine = channel + 8 * j + 2 * quad;
      if (there && mine < a.out_channels) *reinterpret_cast<float2*>(y + at + mine) = v[j];
    }
  }
}

// A warp's part of a patch. in: what the lane's left upper pixel reads first for the patch's first pooled row and
// pixel; edges: of this lane's pixel column, one for each row; constants: scale and shift of the warp's channels.
template <typename T, int kIndex, typename Math>
__device__ void pool_columns(const Math& math, const char* in, Edge<T, Math::kTiles>* edges, const float* constants,
                             T* y, const StemArgs& a, const Patch& p, int begin, int end, int channel) {
  constexpr bool kOverlap = kStemKernels[kIndex].overlap;
  constexpr int kTiles = Math::kTiles;
  const int lane = threadIdx.x % 32, pixel = lane / 4, quad = lane % 4;
  // Where windows overlap, the lower half of the row above is computed first.
  const int first = kOverlap && begin > 0 ? begin - 1 : begin;
#pragma unroll 1
  for (int tile = 0; tile < a.tiles; ++tile) {
    const int column = p.pixel + tile * kStemTile + pixel;
    if (column - pixel >= a.pooled_width) break;
    const bool there = column < a.pooled_width && !(kOverlap && p.pixel > 0 && column == p.pixel);
    Two<T> up[kTiles];
    if constexpr (kOverlap)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) up[j] = lowest<T>();
#pragma unroll 1
    for (int row = first; row < end; ++row) {
      float acc[2][kTiles][4];
      const char* at = in + 4 * (row - p.row) * a.pitch + tile * kStemTile * 12 * static_cast<int>(sizeof(T));
      if (kOverlap && row < begin) {
        math.template multiply<1>(acc, at);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][j][e] = 0;
      } else {
        math.template multiply<0>(acc, at);
      }

      Edge<T, kTiles> left;
      if constexpr (kOverlap) {
        if (pixel == 0) {
          if (tile > 0) {
            left = edges[(row - first) * 4 + quad];
          } else {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) left.right[0][j] = left.right[1][j] = lowest<T>();
          }
        }
        __syncwarp();
      }
      Edge<T, kTiles> mine;
      Two<T> pooled[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(constants + 8 * j + 2 * quad);
        const float2 shift = *reinterpret_cast<const float2*>(constants + kStemFilters + 8 * j + 2 * quad);
        Two<T> v[2][2];
#pragma unroll
        for (int dy = 0; dy < 2; ++dy)
#pragma unroll
          for (int dx = 0; dx < 2; ++dx) {
            const float* z = &acc[dy][j][2 * dx];
            // Rounding keeps order: it may come before pooling.
            v[dy][dx] = round2(float2{fmaf(z[0], scale.x, shift.x), fmaf(z[1], scale.y, shift.y)}, T{});
          }
        if constexpr (!kOverlap) {
          pooled[j] = max2(max2(v[0][0], v[0][1]), max2(v[1][0], v[1][1]));
        } else {
          // Of windows beyond the last pixel or row of an odd size.
          const bool beyond = 2 * column + 1 >= a.out_width, below = 2 * row + 1 >= a.out_height;
          if (beyond) v[0][1] = v[1][1] = lowest<T>();
          if (below) v[1][0] = v[1][1] = lowest<T>();
          Two<T> half[2];
#pragma unroll
          for (int dy = 0; dy < 2; ++dy) {
            mine.right[dy][j] = v[dy][1];
            const Two<T> beside = from_left(v[dy][1]);
            half[dy] = max2(max2(v[dy][0], v[dy][1]), pixel == 0 ? left.right[dy][j] : beside);
          }
          pooled[j] = max2(max2(half[0], half[1]), up[j]);
          up[j] = half[1];
        }
        if (a.relu) pooled[j] = relu2(pooled[j]);
      }
      if constexpr (kOverlap) {
        if (pixel == kStemTile - 1) edges[(row - first) * 4 + quad] = mine;
        __syncwarp();
        if (row < begin) continue;
      }
      const int64_t at_pixel = (int64_t{p.image} * a.pooled_height + row) * a.pooled_width + column;
      store<T, kTiles>(y, at_pixel * a.out_channels, channel, a, there, pooled);
    }
  }
}

template <typename T, int kIndex>
struct StemMathOf {
  using type = TensorStem<T, kStemKernels[kIndex].filter>;
};
template <int kIndex>
  requires(kStemKernels[kIndex].math == Math::kPlain)
struct StemMathOf<float, kIndex> {
  using type = PlainStem<kStemKernels[kIndex].filter>;
};

}  // namespace stem

// x: [batch, 3, height, width] by the strides of `a`; weight: [out_channels, kFilter, kFilter, 3]; scale, shift:
// [out_channels]; y: [batch, pooled_height, pooled_width, out_channels]. A grid of plan.blocks x (every 64 channels).
template <typename T, int kIndex>
__global__ void __launch_bounds__(kStemThreads, kStemKernels[kIndex].math == Math::kPlain ? 2 : 3)
    conv_bn_relu_pool_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ scale,
                                 const float* __restrict__ shift, T* __restrict__ y,
                                 const __grid_constant__ StemArgs a) {
  using namespace stem;
  using Multiply = typename StemMathOf<T, kIndex>::type;
  constexpr StemKernel kKernel = kStemKernels[kIndex];
  constexpr int kFilters = 8 * Multiply::kTiles, kParts = kStemFilters / kFilters, kWorkers = kStemWarps / kParts;
  static_assert(kFilters == stem_warp_filters(kKernel.math, sizeof(T)));
  static_assert(stem_edge_bytes(kFilters, sizeof(T)) == 4 * sizeof(Edge<T, Multiply::kTiles>));
  extern __shared__ __align__(128) char shared[];

  const int warp = threadIdx.x / 32, part = warp % kParts, worker = warp / kParts;
  const int first = blockIdx.y * kStemFilters;
  float* constants = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < kStemFilters; i += kStemThreads) {
    constants[i] = first + i < a.out_channels ? scale[first + i] : 0;
    constants[kStemFilters + i] = first + i < a.out_channels ? shift[first + i] : 0;
  }
  char* edges = shared + kStemConstantBytes;
  char* filters = edges + stem_edges(kKernel, a, sizeof(T));
  char* patch = Multiply::kResident ? filters + stem_filter_bytes(kKernel, sizeof(T)) : filters;
  if constexpr (Multiply::kResident)
    load_filters<kKernel.filter>(reinterpret_cast<float*>(filters), weight, a, first);
  else
    load_filters<T, kKernel.filter>(filters, weight, a, first);
  __syncthreads();
  const Multiply math(Multiply::kResident ? filters : filters + part * (stem_filter_bytes(kKernel, sizeof(T)) / kParts),
                      a);

  const int units = a.batch * a.strips * a.across;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const Patch p = patch_of<T>(a, unit, kKernel.overlap, kWorkers);
    // Nobody reads the filters or the patch before any more.
    __syncthreads();
    load_patch(patch, x, a, p);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();

    const int begin = p.row + worker * a.rows, end = min(begin + a.rows, a.pooled_height);
    // In the patch: of pooled row p.row and this lane's pixel of the first tile.
    const int lead = kStemChannels * (4 * p.pixel - a.pad_w) - a.odd - p.element;
    const char* in =
        patch + (kKernel.overlap ? 2 * a.pitch : 0) + (lead + threadIdx.x % 32 / 4 * 12) * static_cast<int>(sizeof(T));
    auto* mine = reinterpret_cast<Edge<T, Multiply::kTiles>*>(edges) + warp * (a.rows + 1) * 4;
    pool_columns<T, kIndex>(math, in, mine, constants + part * kFilters, y, a, p, begin, end, first + part * kFilters);
  }
}

}  // namespace resnet_fast::cuda
