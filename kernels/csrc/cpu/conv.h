// The interface between the scheduler of a stage and the convolution kernels.
//
// Plain structs and function pointers only: the kernel files behind it are compiled for instruction sets that
// the rest of the library may not use, so they share no inline function with anyone (no STL, no torch header).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace resnet_fast {

// Pixels that one call of a convolution kernel handles: 42 tiles of 6 or 21 of 12, and partial sums that stay in L1/L2.
constexpr int kMaxPixels = 252;
// Filter bytes that stay in L1 while the pixels of a call pass by; the rest of L1 is for the input rows.
constexpr int kFilterBlockBytes = 18 * 1024;
constexpr int kMaxRuns = 1024;

// One convolution over a list of output pixels and a range of output channels:
//
//   output[p][k] = act(bias[k] + sum_{run, i} input[p][run_offset[run] + i] * filter[run][i][k] (+ residual[p][k]))
//
// A run is a stretch of input that is contiguous in memory: all channels of a filter row where the pixels of the input
// follow each other without a gap, else a block of the channels of one tap.
template <typename T>
struct ConvCall {
  const T* input;  // pixel (0, 0) of the first image; a halo of zeros surrounds every image
  const T* residual;  // or nullptr
  T* output;
  const int64_t* input_offset;  // of each output pixel's top-left tap, in elements
  const int64_t* residual_offset;
  const int64_t* output_offset;
  int pixels;  // <= kMaxPixels

  const T* filter;  // panels [panel_begin, panel_end) are read
  const T* bias;
  int panel_begin, panel_end;
  int out_vectors;  // output channels in vectors; the last panel may be half full
  int64_t panel_stride;  // elements of a full panel

  const int64_t* run_offset;  // of a run from the top-left tap, without its channel block
  int runs;
  int channels;  // length of a run if it is one block, else channels of a tap
  int block;  // channels of one block
  bool relu;
};

// What one instruction set offers for one type of arithmetic.
template <typename T>
struct ConvKernels {
  const char* isa;
  int lanes;  // elements of a vector
  int panel_vectors;  // vectors of output channels that a tile covers
  int tile_pixels;  // output pixels that a tile covers
  void (*conv)(const ConvCall<T>&);
  void (*add_relu)(const T* a, const T* b, T* out, int64_t n);

  int panel() const { return lanes * panel_vectors; }
};

extern const ConvKernels<float> kConvFloatBaseline, kConvFloatAvx2, kConvFloatAvx512;
extern const ConvKernels<double> kConvDoubleBaseline, kConvDoubleAvx2, kConvDoubleAvx512;

}  // namespace resnet_fast
