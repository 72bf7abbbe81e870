// Moves activations between global memory (NHWC, or an image of three channels) and shared memory (planes).
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/stage/residual_stage_shape.h"

namespace resnet_fast::cuda::stage {

template <class S>
__device__ char* plane_of(char* activation, int plane) {
  return activation + plane / 2 * S::kPairBytes + plane % 2 * S::kPlaneBytes;
}
template <class S>
__device__ const char* plane_of(const char* activation, int plane) {
  return activation + plane / 2 * S::kPairBytes + plane % 2 * S::kPlaneBytes;
}

// The input of a strided block: planes of the even columns, then of the odd ones.
template <class S>
__device__ char* in_plane_of(char* activation, int plane) {
  return activation + plane / 2 * S::kInPairBytes + plane % 2 * S::kInPlaneBytes;
}

// Zeros kCount cells, kStride apart, in each of kPlanes planes. Eight lanes that store together stay in one plane.
template <class S, int kCount, int kStride, int kPlanes, int kPlaneBytes, int kPairBytes>
__device__ void zero_cells(char* first) {
  constexpr int kRounded = (kCount + 7) / 8 * 8;
  for (int i = threadIdx.x; i < kRounded * kPlanes; i += S::kThreads) {
    const int at = i % kRounded, plane = i / kRounded;
    if (at < kCount)
      *reinterpret_cast<uint4*>(first + plane / 2 * kPairBytes + plane % 2 * kPlaneBytes + 16 * kStride * at) =
          make_uint4(0, 0, 0, 0);
  }
}

// Zeros the padding of an activation: the row above, the row below, the column between rows.
template <class S>
__device__ void zero_border(char* activation) {
  zero_cells<S, S::kPitch, 1, S::kPlanes, S::kPlaneBytes, S::kPairBytes>(activation);
  zero_cells<S, S::kPitch + 1, 1, S::kPlanes, S::kPlaneBytes, S::kPairBytes>(activation +
                                                                             16 * (S::kSize + 1) * S::kPitch);
  zero_cells<S, S::kSize, S::kPitch, S::kPlanes, S::kPlaneBytes, S::kPairBytes>(activation + 16 * S::kPitch);
}

// Zeros the padding of the input of a strided block: above and on the left.
template <class S>
__device__ void zero_strided_border(char* activation) {
  zero_cells<S, S::kPitch, 1, 2 * S::kInPlanes, S::kInPlaneBytes, S::kInPairBytes>(activation);
  zero_cells<S, 2 * S::kSize, S::kPitch, 2 * S::kInPlanes, S::kInPlaneBytes, S::kInPairBytes>(activation +
                                                                                              16 * S::kPitch);
}

// Zeros all cells of an image.
template <class S>
__device__ void zero_image(char* activation) {
  zero_cells<S, S::kStemCellsBytes / 16, 1, 1, 0, 0>(activation);
}

// Starts copying an image's activation into planes. If not `present`, zeros; `from` must be readable all the same.
template <class S, typename T>
__device__ void load_activation(char* activation, const T* from, bool present) {
  for (int i = threadIdx.x; i < S::kSize * S::kSize * S::kPlanes; i += S::kThreads) {
    const int plane = i % S::kPlanes, pixel = i / S::kPlanes;
    const int cell = (pixel / S::kSize + 1) * S::kPitch + pixel % S::kSize + 1;
    ptx::cp_async(ptx::smem_address(plane_of<S>(activation, plane) + 16 * cell),
                  from + (present ? 16 / sizeof(T) * i : 0), present ? 16 : 0);
  }
}

// The same for the input of a strided block.
template <class S, typename T>
__device__ void load_strided_activation(char* activation, const T* from, bool present) {
  constexpr int kSize = 2 * S::kSize;
  for (int i = threadIdx.x; i < kSize * kSize * S::kInPlanes; i += S::kThreads) {
    const int plane = i % S::kInPlanes, x = i / S::kInPlanes % kSize, y = i / S::kInPlanes / kSize;
    const int cell = (y + 1) * S::kPitch + x / 2 + 1;
    ptx::cp_async(ptx::smem_address(in_plane_of<S>(activation, x % 2 * S::kInPlanes + plane) + 16 * cell),
                  from + (present ? 16 / sizeof(T) * i : 0), present ? 16 : 0);
  }
}

// Stores an image's activation from its planes.
template <class S, typename T>
__device__ void store_activation(T* to, const char* activation) {
  for (int i = threadIdx.x; i < S::kSize * S::kSize * S::kPlanes; i += S::kThreads) {
    const int plane = i % S::kPlanes, pixel = i / S::kPlanes;
    const int cell = (pixel / S::kSize + 1) * S::kPitch + pixel % S::kSize + 1;
    *reinterpret_cast<uint4*>(to + 16 / sizeof(T) * i) =
        *reinterpret_cast<const uint4*>(plane_of<S>(activation, plane) + 16 * cell);
  }
}

// Starts copying an image of three channels as it lies in global memory, to behind its cells.
template <class S, typename T>
__device__ void load_image(char* activation, const T* from, bool present) {
  for (int i = threadIdx.x; i < S::kStemRawBytes / 16; i += S::kThreads) {
    ptx::cp_async(ptx::smem_address(activation + S::kStemCellsBytes + 16 * i),
                  from + (present ? 16 / sizeof(T) * i : 0), present ? 16 : 0);
  }
}

// Unpacks the copied image into cells of four channels: pixel (y, x) goes to cell (y + 1, x + 2).
template <class S>
__device__ void unpack_image(char* activation, bool channels_last) {
  constexpr int kSize = S::kSize, kPixels = 16 / S::kStemCellBytes, kItems = kSize * kSize / kPixels;
  const uint32_t* raw = reinterpret_cast<const uint32_t*>(activation + S::kStemCellsBytes);
  for (int i = threadIdx.x; i < kItems; i += S::kThreads) {
    // Three words: a pixel, or two adjacent pixels of 16-bit channels.
    const uint32_t a = raw[channels_last ? 3 * i : i];
    const uint32_t b = raw[channels_last ? 3 * i + 1 : i + kItems];
    const uint32_t c = raw[channels_last ? 3 * i + 2 : i + 2 * kItems];
    uint4 cells;
    if (kPixels == 1) {
      cells = make_uint4(a, b, c, 0);
    } else if (channels_last) {
      cells = make_uint4(a, b & 0xffff, __byte_perm(b, c, 0x5432), c >> 16);
    } else {
      cells = make_uint4(__byte_perm(a, b, 0x5410), c & 0xffff, __byte_perm(a, b, 0x7632), c >> 16);
    }
    const int y = kPixels * i / kSize, x = kPixels * i % kSize;
    *reinterpret_cast<uint4*>(activation + S::kStemCellBytes * ((y + 1) * S::kStemPitch + x + 2)) = cells;
  }
}

}  // namespace resnet_fast::cuda::stage
