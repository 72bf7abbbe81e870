// Convolutions of the stage kernel: operands and results in shared memory, accumulators in registers.
//
// A warp computes 16 output channels and kRows tiles of 16 pixels, one below the other. For each of the three columns
// of taps it loads every input row once, from the top down, and multiplies it with the three taps of the column, for
// the three output rows that they contribute to. Nine taps cost 3 (kRows + 2) / kRows loads instead of 9.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stage/residual_stage_activations.cuh"

namespace resnet_fast::cuda::stage {

// The part of a layer that a warp computes.
template <class S>
struct WarpTile {
  int image, column, strip, row;  // the first row of its tiles
  __device__ WarpTile() {
    int warp = threadIdx.x / 32;
    column = warp % S::kColumns, warp /= S::kColumns;
    row = warp % S::kRowGroups * S::kRows, warp /= S::kRowGroups;
    strip = warp % S::kStrips, image = warp / S::kStrips;
  }
  // A tile is two runs of 8 pixels: adjacent or, if rows have 8 pixels, half an image apart.
  __device__ int y(int run) const { return S::kSize >= 16 ? row : row + run * S::kStripRows; }
  __device__ int x(int run) const { return S::kSize >= 16 ? strip * 16 + run * 8 : 0; }
};

// Accumulators of a warp: [tile][8 output channels][as mma leaves them].
template <class S>
using Acc = float[S::kRows][2][4];

template <class S>
__device__ void zero_acc(Acc<S>& acc) {
#pragma unroll
  for (int i = 0; i < S::kRows; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[i][j / 4][j % 4] = 0;
}

// Loads a fragment of 16 pixels. Activations stay float32 in shared memory and are rounded to TF32 here; filters are
// rounded when packed.
template <typename T>
__device__ void read_pixels(uint32_t (&pixels)[4], uint32_t address) {
  ptx::ldmatrix_x4(pixels, address);
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& word : pixels) word = ptx::to_tf32(word);
  }
}

// The filter fragment of `tap` of a slice, for the 16 output channels of the warp.
template <class S>
__device__ uint4 filters_of(const char* slice, int tap, const WarpTile<S>& warp) {
  return reinterpret_cast<const uint4*>(slice)[(tap * S::kColumns + warp.column) * 32 + threadIdx.x % 32];
}

template <class S, typename T>
__device__ void mma(Acc<S>& acc, int tile, const uint32_t (&pixels)[4], const uint4& filters) {
  if constexpr (sizeof(T) == 2) {
    ptx::mma_m16n8k16(acc[tile][0], pixels, filters.x, filters.y, T());
    ptx::mma_m16n8k16(acc[tile][1], pixels, filters.z, filters.w, T());
  } else {
    ptx::mma_m16n8k8_tf32(acc[tile][0], pixels, filters.x, filters.y);
    ptx::mma_m16n8k8_tf32(acc[tile][1], pixels, filters.z, filters.w);
  }
}

// Offset of the row of 16 bytes that this lane passes to ldmatrix: the cell above and left of its pixel, in the first
// or second plane of a pair.
template <class S>
__device__ uint32_t lane_offset(const WarpTile<S>& warp) {
  const int lane = threadIdx.x % 32, run = lane / 8 % 2;
  return lane / 16 * S::kPlaneBytes + 16 * (warp.y(run) * S::kPitch + warp.x(run) + lane % 8);
}

template <class S>
__device__ uint32_t strided_lane_offset(const WarpTile<S>& warp) {
  const int lane = threadIdx.x % 32, run = lane / 8 % 2;
  return lane / 16 * S::kInPlaneBytes + 16 * (2 * warp.y(run) * S::kPitch + warp.x(run) + lane % 8);
}

// One slice of a 3x3 convolution. activation: the lane's address in the slice's pair of planes.
template <class S, typename T, int kStride>
__device__ void mma_slice(Acc<S>& acc, uint32_t activation, const char* slice, const WarpTile<S>& warp) {
  constexpr int kInputRows = (S::kRows - 1) * kStride + 3, kRowBytes = 16 * S::kPitch;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    uint4 filters[3];
#pragma unroll
    for (int r = 0; r < 3; ++r) filters[r] = filters_of<S>(slice, 3 * s + r, warp);
    // Taps left, middle, right. With stride 2 these read an odd column, the even one, the next odd one.
    constexpr int kOdd = S::kInSteps * S::kInPairBytes;
    const int shift = kStride == 1 ? 16 * s : s == 0 ? kOdd : s == 1 ? 16 : kOdd + 16;
#pragma unroll
    for (int row = 0; row < kInputRows; ++row) {
      uint32_t pixels[4];
      read_pixels<T>(pixels, activation + (row * kRowBytes + shift));
#pragma unroll
      for (int r = 2; r >= 0; --r) {
        const int tile = (row - r) / kStride;
        if (row >= r && tile * kStride == row - r && tile < S::kRows) mma<S, T>(acc, tile, pixels, filters[r]);
      }
    }
  }
}

// One pair of planes of the 1x1 projection with stride 2, which reads the pixels under the middle tap of a 3x3.
template <class S, typename T>
__device__ void mma_projection(Acc<S>& acc, uint32_t activation, const char* slice, int step, const WarpTile<S>& warp) {
  const uint4 filters = filters_of<S>(slice, step, warp);
#pragma unroll
  for (int tile = 0; tile < S::kRows; ++tile) {
    uint32_t pixels[4];
    read_pixels<T>(pixels, activation + 16 * ((2 * tile + 1) * S::kPitch + 1));
    mma<S, T>(acc, tile, pixels, filters);
  }
}

// The stem. K runs over four rows of taps x four channels. With 16 bits lane 4g + t supplies two channels of rows t / 2
// and t / 2 + 2; in float32, in two mma of 8, channel t of rows 0 and 1, then of rows 2 and 3. The fourth row does not
// exist: its pixels are zeroed, because a zero filter times an infinity is NaN.
template <class S, typename T>
__device__ void mma_stem(Acc<S>& acc, const char* cells, const char* slice, const WarpTile<S>& warp) {
  constexpr int kCell = S::kStemCellBytes, kHalves = sizeof(T) / 2;
  const int lane = threadIdx.x % 32, t = lane % 4, low = kHalves == 1 ? t / 2 : 0;
  const char* lane_address =
      cells + kCell * ((warp.y(0) + low) * S::kStemPitch + warp.x(0) + lane / 4 + 1) + (kHalves == 1 ? t % 2 : t) * 4;
  const uint32_t third = t < 2 ? 0xffffffff : 0;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4 filters = filters_of<S>(slice, kHalves * s + half, warp);
#pragma unroll
      for (int tile = 0; tile < S::kRows; ++tile) {
        const auto word = [&](int row, int run) {
          const uint32_t v =
              *reinterpret_cast<const uint32_t*>(lane_address + kCell * ((tile + row) * S::kStemPitch + s + 8 * run));
          return kHalves == 1 ? v : ptx::to_tf32(v);
        };
        uint32_t pixels[4] = {word(2 * half, 0), word(2 * half, 1), 0, 0};
        if (kHalves == 1) {
          pixels[2] = word(2, 0) & third, pixels[3] = word(2, 1) & third;
        } else if (half == 0) {
          pixels[2] = word(1, 0), pixels[3] = word(1, 1);
        }
        mma<S, T>(acc, tile, pixels, filters);
      }
    }
  }
}

// activation = [relu](acc * scale + shift [+ activation]). A thread reads only the elements that it writes.
template <class S, typename T, bool kAdd, bool kRelu>
__device__ void finalize(const Acc<S>& acc, char* activation, const float* scale_shift, const WarpTile<S>& warp) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int channel = 16 * warp.column + 8 * n + lane % 4 * 2, byte = channel * static_cast<int>(sizeof(T));
    const float2 scale = *reinterpret_cast<const float2*>(scale_shift + channel);
    const float2 shift = *reinterpret_cast<const float2*>(scale_shift + S::kChannels + channel);
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      char* lane_address = plane_of<S>(activation, byte / 16) + byte % 16 +
                           16 * ((warp.y(run) + 1) * S::kPitch + warp.x(run) + lane / 4 + 1);
#pragma unroll
      for (int tile = 0; tile < S::kRows; ++tile) {
        auto* pair = reinterpret_cast<vec2_of<T>*>(lane_address + tile * 16 * S::kPitch);
        float2 v = {acc[tile][n][2 * run] * scale.x + shift.x, acc[tile][n][2 * run + 1] * scale.y + shift.y};
        if (kAdd) {
          const float2 before = widen2(*pair);
          v.x += before.x, v.y += before.y;
        }
        const vec2_of<T> rounded = round2(v, T());
        *pair = kRelu ? relu2(rounded) : rounded;
      }
    }
  }
}

}  // namespace resnet_fast::cuda::stage
