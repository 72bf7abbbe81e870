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

#include "cuda/conv/conv_epilogue.cuh"
#include "cuda/stem/conv_bn_relu_pool_math.cuh"

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

extern __shared__ __align__(128) char shared[];

// From the lane of the pixel on the left.
__device__ inline float2 from_left(float2 v) { return {__shfl_up_sync(~0u, v.x, 4), __shfl_up_sync(~0u, v.y, 4)}; }
template <typename Two>
__device__ Two from_left(Two v) {
  const uint32_t bits = __shfl_up_sync(~0u, reinterpret_cast<const uint32_t&>(v), 4);
  return reinterpret_cast<const Two&>(bits);
}

// What a pixel's right neighbour needs of it: the right pixels of its 2x2.
template <typename T>
struct alignas(2 * sizeof(Two<T>)) Edge {
  Two<T> right[2];
};

// 16 bits: of four tiles of channels a lane gets one whole, 16 bytes, if it is `there`. y: the pixel's channels of this
// warp, of which there are `channels`.
template <typename T, int kTiles>
__device__ void store(T* y, bool there, int channels, const Two<T> (&v)[kTiles]) {
  const int quad = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles == 4);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = reinterpret_cast<const uint32_t&>(v[j]);
    transpose4(words);
    ptx::store_if(there, y + 8 * quad, {words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (there && 8 * j < channels) *reinterpret_cast<float2*>(y + 8 * j + 2 * quad) = v[j];
  }
}

// A warp's part of a patch, from row `begin` to `end`, and its channels from `channel` on. in: what the lane's left
// upper pixel reads first for the patch's first pooled row and pixel; edges: where in shared memory those of two
// columns lie for each row, a multiple of their bytes; constants: scale and shift of the warp's channels.
template <typename T, int kIndex, typename Math>
__device__ void pool_columns(const Math& math, const char* in, int edges, const float* constants, T* y,
                             const StemArgs& a, const Patch& p, int begin, int end, int channel) {
  const int channels = a.out_channels - channel;
  constexpr bool kOverlap = kStemKernels[kIndex].overlap;
  constexpr int kTiles = Math::kTiles, kEdges = 4 * kTiles * sizeof(Edge<T>);  // bytes of a column's in one row
  const int lane = threadIdx.x % 32, pixel = lane / 4, quad = lane % 4;
  // Where windows overlap, the lower half of the row above is computed first.
  const int first = kOverlap && begin > 0 ? begin - 1 : begin;
  if constexpr (kOverlap) {
    // Left of the first column lies nothing: its neighbours read the second buffer.
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
    // The first pixel of a patch that is not the first belongs to the patch before.
    const bool there = column < a.pooled_width && !(kOverlap && tile == 0 && left > 0 && pixel == 0) &&
                       (sizeof(T) == 4 || 8 * quad < channels);
    // What this column reads of the one before; what it writes lies in the other buffer.
    int before = edges + (tile % 2 == 0 ? kEdges : 0) + quad * static_cast<int>(sizeof(Edge<T>));
    const char* at = in;
    T* to = y;
    in += kStemTile * 12 * static_cast<int>(sizeof(T)), y += kStemTile * a.out_channels;
    Two<T> up[kTiles];
    if constexpr (kOverlap)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) up[j] = lowest<T>();
#pragma unroll 1
    for (int row = first; row < end;
         ++row, at += 4 * a.pitch, before += 2 * kEdges, to += int64_t{a.pooled_width} * a.out_channels) {
      float acc[2][kTiles][4];
      if (kOverlap && row < begin) {
        math.template multiply<1>(acc, at);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[0][j][e] = 0;
      } else {
        math.template multiply<0>(acc, at);
      }

      const float* vectors = constants + ptx::opaque(threadIdx.x) % 4 * 2;
      Two<T> v[2][2][kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(vectors + 8 * j);
        const float2 shift = *reinterpret_cast<const float2*>(vectors + kStemFilters + 8 * j);
#pragma unroll
        for (int dy = 0; dy < 2; ++dy)
#pragma unroll
          for (int dx = 0; dx < 2; ++dx) {
            const float* z = &acc[dy][j][2 * dx];
            // Rounding keeps order: it may come before pooling.
            v[dy][dx][j] = round2(float2{fmaf(z[0], scale.x, shift.x), fmaf(z[1], scale.y, shift.y)}, T{});
          }
      }
      // Where the convolution's output has an odd size, the last windows reach beyond it.
      if (kOverlap && (2 * (left + kStemTile) > a.out_width || 2 * row + 1 >= a.out_height)) {
        const bool beyond = 2 * column + 1 >= a.out_width, below = 2 * row + 1 >= a.out_height;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (beyond) v[0][1][j] = lowest<T>();
          if (below) v[1][0][j] = lowest<T>();
          if (beyond || below) v[1][1][j] = lowest<T>();
        }
      }
      // Harmless without ReLU: what is not a number stays, what is lower than all changes nothing.
      const Two<T> least = ptx::opaque(a.relu) ? round2(float2{0, 0}, T{}) : lowest<T>();
      Two<T> pooled[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if constexpr (kOverlap) {
          Edge<T> edge;
          constexpr int kNext = 4 * sizeof(Edge<T>);
          if (pixel == 0) edge = *reinterpret_cast<const Edge<T>*>(shared + before + j * kNext);
          if (pixel == kStemTile - 1)
            *reinterpret_cast<Edge<T>*>(shared + (before ^ kEdges) + j * kNext) = {v[0][1][j], v[1][1][j]};
          Two<T> half[2];
#pragma unroll
          for (int dy = 0; dy < 2; ++dy) {
            const Two<T> beside = from_left(v[dy][1][j]);
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
      if (!kOverlap || row >= begin) store<T, kTiles>(to, there, channels, pooled);
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
  constexpr int kEdges = 8 * Multiply::kTiles * sizeof(Edge<T>);
  static_assert(stem_edge_bytes(kFilters, sizeof(T)) == kEdges && kStemConstantBytes % kEdges == 0);
  const int first = blockIdx.y * kStemFilters;
  float* constants = reinterpret_cast<float*>(shared);
  for (int i = threadIdx.x; i < kStemFilters; i += kStemThreads) {
    constants[i] = first + i < a.out_channels ? scale[first + i] : 0;
    constants[kStemFilters + i] = first + i < a.out_channels ? shift[first + i] : 0;
  }
  char* edges = shared + kStemConstantBytes;
  char* last = edges + stem_edges(kKernel, a, sizeof(T));
  char* filters = last + stem_last_bytes(kKernel, sizeof(T));
  char* patch = Multiply::kResident ? filters + stem_filter_bytes(kKernel, sizeof(T)) : filters;
  if constexpr (Multiply::kResident)
    load_filters<kKernel.filter>(reinterpret_cast<float*>(filters), weight, a, first);
  else
    load_filters<T, kKernel.filter>(filters, weight, a, first);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  __syncthreads();
  constexpr int kPartBytes = Multiply::kResident ? 0 : stem_filter_bytes(kKernel, sizeof(T)) / kParts;
  const int part_of_filters = threadIdx.x / 32 % kParts;
  const Multiply math(filters + part_of_filters * kPartBytes, last + part_of_filters * Multiply::kLastBytes, a);

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

    const int thread = ptx::opaque(threadIdx.x), warp = thread / 32, part = warp % kParts, worker = warp / kParts;
    const int begin = p.row + worker * a.rows, end = min(begin + a.rows, a.pooled_height);
    // In the patch: of pooled row p.row and this lane's pixel of the first tile.
    const int lead = kStemChannels * (4 * p.pixel - a.pad_w) - 1 + stem_shift(a) - p.element;
    const char* in =
        patch + (kKernel.overlap ? 2 * a.pitch : 0) + (lead + thread % 32 / 4 * 12) * static_cast<int>(sizeof(T));
    pool_columns<T, kIndex>(math, in, kStemConstantBytes + warp * (a.rows + 1) * kEdges, constants + part * kFilters, y,
                            a, p, begin, end, first + part * kFilters);
  }
}

}  // namespace resnet_fast::cuda
