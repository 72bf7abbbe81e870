// Convolutions of the stage kernel: operands and results in shared memory, sums in registers.
//
// A warp owns 16 output channels and kRows tiles of 16 pixels, one below the other. For each of the three columns of
// taps it reads the input rows from the top down, once each, and multiplies a row with the three taps above one another
// for the three output rows that it touches: nine taps cost (kRows + 2) / kRows x 3 reads instead of 9.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stage/residual_stage_maps.cuh"

namespace resnet_fast::cuda::stage {

// Which part of a layer a warp computes.
template <class S>
struct Part {
  int image, column, strip, row;  // the first row of its tiles
  __device__ Part() {
    int warp = threadIdx.x / 32;
    column = warp % S::kColumns, warp /= S::kColumns;
    row = warp % S::kRowGroups * S::kRows, warp /= S::kRowGroups;
    strip = warp % S::kStrips, image = warp / S::kStrips;
  }
  // Pixels of a tile come in two runs of 8: neighbours, or, where rows have 8 pixels, half a map apart.
  __device__ int y(int run) const { return S::kSize >= 16 ? row : row + run * S::kStripRows; }
  __device__ int x(int run) const { return S::kSize >= 16 ? strip * 16 + run * 8 : 0; }
};

// Sums of a warp: by tile, 8 output channels, and as mma has them.
template <class S>
using Sums = float[S::kRows][2][4];

template <class S>
__device__ void clear(Sums<S>& sums) {
#pragma unroll
  for (int i = 0; i < S::kRows; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[i][j / 4][j % 4] = 0;
}

// A row of pixels as ldmatrix finds it. float32 is kept in full in the maps and rounded to TF32 here; filters are when
// they are packed.
template <typename T>
__device__ void read_pixels(uint32_t (&pixels)[4], uint32_t address) {
  ptx::ldmatrix_x4(pixels, address);
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& word : pixels) word = ptx::to_tf32(word);
  }
}

// Fragments of filters for a pair of planes of input and 16 output channels, `tap` of a slice.
template <class S>
__device__ uint4 filters_of(const char* slice, int tap, const Part<S>& part) {
  return reinterpret_cast<const uint4*>(slice)[(tap * S::kColumns + part.column) * 32 + threadIdx.x % 32];
}

template <class S, typename T>
__device__ void multiply(Sums<S>& sums, int tile, const uint32_t (&pixels)[4], const uint4& filters) {
  if constexpr (sizeof(T) == 2) {
    ptx::mma_m16n8k16(sums[tile][0], pixels, filters.x, filters.y, T());
    ptx::mma_m16n8k16(sums[tile][1], pixels, filters.z, filters.w, T());
  } else {
    ptx::mma_m16n8k8_tf32(sums[tile][0], pixels, filters.x, filters.y);
    ptx::mma_m16n8k8_tf32(sums[tile][1], pixels, filters.z, filters.w);
  }
}

// Where the lane finds its row of ldmatrix: the cell above and to the left of its pixel in a map of the stage's shape,
// in the first or second plane of a step.
template <class S>
__device__ uint32_t lane_offset(const Part<S>& part) {
  const int lane = threadIdx.x % 32, run = lane / 8 % 2;
  return lane / 16 * S::kPlaneBytes + 16 * (part.y(run) * S::kPitch + part.x(run) + lane % 8);
}

template <class S>
__device__ uint32_t strided_lane_offset(const Part<S>& part) {
  const int lane = threadIdx.x % 32, run = lane / 8 % 2;
  return lane / 16 * S::kInPlaneBytes + 16 * (2 * part.y(run) * S::kPitch + part.x(run) + lane % 8);
}

// One slice of a 3x3 convolution. `map` is the lane's address in the step's planes.
template <class S, typename T, int kStride>
__device__ void multiply_slice(Sums<S>& sums, uint32_t map, const char* slice, const Part<S>& part) {
  constexpr int kInputRows = (S::kRows - 1) * kStride + 3, kRowBytes = 16 * S::kPitch;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    uint4 filters[3];
#pragma unroll
    for (int r = 0; r < 3; ++r) filters[r] = filters_of<S>(slice, 3 * s + r, part);
    // Left, middle, right: with stride 2 an odd column, the even one, the next odd one.
    constexpr int kOdd = S::kInSteps * S::kInPairBytes;
    const int shift = kStride == 1 ? 16 * s : s == 0 ? kOdd : s == 1 ? 16 : kOdd + 16;
#pragma unroll
    for (int row = 0; row < kInputRows; ++row) {
      uint32_t pixels[4];
      read_pixels<T>(pixels, map + (row * kRowBytes + shift));
#pragma unroll
      for (int r = 2; r >= 0; --r) {
        const int tile = (row - r) / kStride;
        if (row >= r && tile * kStride == row - r && tile < S::kRows) multiply<S, T>(sums, tile, pixels, filters[r]);
      }
    }
  }
}

// One step of the 1x1 convolution with stride 2, which reads the pixels under the middle tap of a 3x3 one.
template <class S, typename T>
__device__ void multiply_projection(Sums<S>& sums, uint32_t map, const char* slice, int step, const Part<S>& part) {
  const uint4 filters = filters_of<S>(slice, step, part);
#pragma unroll
  for (int tile = 0; tile < S::kRows; ++tile) {
    uint32_t pixels[4];
    read_pixels<T>(pixels, map + 16 * ((2 * tile + 1) * S::kPitch + 1));
    multiply<S, T>(sums, tile, pixels, filters);
  }
}

// The stem. In a step of 16 products lane 4g + t gives two channels of rows t / 2 and t / 2 + 2 of the taps' four; in
// float32, with two steps of 8, channel t of rows 0 and 1, then 2 and 3. The fourth row does not exist: zeros in its
// place, for a zero filter does not undo an infinity below.
template <class S, typename T>
__device__ void multiply_stem(Sums<S>& sums, const char* cells, const char* slice, const Part<S>& part) {
  constexpr int kCell = S::kStemCellBytes, kHalves = sizeof(T) / 2;
  const int lane = threadIdx.x % 32, t = lane % 4, low = kHalves == 1 ? t / 2 : 0;
  const char* mine =
      cells + kCell * ((part.y(0) + low) * S::kStemPitch + part.x(0) + lane / 4 + 1) + (kHalves == 1 ? t % 2 : t) * 4;
  const uint32_t third = t < 2 ? 0xffffffff : 0;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4 filters = filters_of<S>(slice, kHalves * s + half, part);
#pragma unroll
      for (int tile = 0; tile < S::kRows; ++tile) {
        const auto word = [&](int row, int run) {
          const uint32_t v =
              *reinterpret_cast<const uint32_t*>(mine + kCell * ((tile + row) * S::kStemPitch + s + 8 * run));
          return kHalves == 1 ? v : ptx::to_tf32(v);
        };
        uint32_t pixels[4] = {word(2 * half, 0), word(2 * half, 1), 0, 0};
        if (kHalves == 1) {
          pixels[2] = word(2, 0) & third, pixels[3] = word(2, 1) & third;
        } else if (half == 0) {
          pixels[2] = word(1, 0), pixels[3] = word(1, 1);
        }
        multiply<S, T>(sums, tile, pixels, filters);
      }
    }
  }
}

// map = [relu](sums * scale + shift [+ map]); a thread reads only what it writes itself.
template <class S, typename T, bool kAdd, bool kRelu>
__device__ void write_sums(const Sums<S>& sums, char* map, const float* vectors, const Part<S>& part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int channel = 16 * part.column + 8 * n + lane % 4 * 2, byte = channel * static_cast<int>(sizeof(T));
    const float2 scale = *reinterpret_cast<const float2*>(vectors + channel);
    const float2 shift = *reinterpret_cast<const float2*>(vectors + S::kChannels + channel);
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      char* mine =
          plane_of<S>(map, byte / 16) + byte % 16 + 16 * ((part.y(run) + 1) * S::kPitch + part.x(run) + lane / 4 + 1);
#pragma unroll
      for (int tile = 0; tile < S::kRows; ++tile) {
        auto* pair = reinterpret_cast<pair_of<T>*>(mine + tile * 16 * S::kPitch);
        float2 v = {sums[tile][n][2 * run] * scale.x + shift.x, sums[tile][n][2 * run + 1] * scale.y + shift.y};
        if (kAdd) {
          const float2 before = widen2(*pair);
          v.x += before.x, v.y += before.y;
        }
        const pair_of<T> rounded = round2(v, T());
        *pair = kRelu ? relu2(rounded) : rounded;
      }
    }
  }
}

}  // namespace resnet_fast::cuda::stage
