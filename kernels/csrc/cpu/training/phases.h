// The convolutions whose results make up the gradient of a convolution's input: the output's gradient by the transposed
// filter, one for each position modulo the stride.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv/chain.h"
#include "cpu/nhwc.h"
#include "cpu/training/pack_filter.h"

namespace resnet_fast {

// Pixels of the input at the same position modulo the stride: a convolution of their own, of stride 1, by every
// stride-th tap in reverse.
template <typename T>
struct Phase {
  int64_t row, column;  // the first pixel
  int64_t height, width;
  Layer layer;
  FilterLayout<T> layout;
  Tensor packed;
};

// Along one side: the taps of a filter that meet a phase, the last of them, the padding, and the pixels.
struct Taps {
  int64_t count, last, pad, size;
};

inline Taps taps_of(int64_t phase, int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
  const int64_t first = (phase + pad) % stride, count = first < kernel ? (kernel - 1 - first) / stride + 1 : 0;
  const int64_t last = first + (count - 1) * stride;
  return {count, last, (last - phase - pad) / stride, (size - phase + stride - 1) / stride};
}

// `complete`: whether every pixel of the input belongs to a phase.
template <typename T>
std::vector<Phase<T>> phases_of(const Layer& l, const NhwcShape& in, int64_t out_channels, const Tensor& weight,
                                Algorithm algorithm, bool& complete) {
  std::vector<Phase<T>> phases;
  complete = true;
  // A stride may exceed the input: positions beyond it have no pixels.
  for (int64_t a = 0; a < std::min(l.stride_h, in.height); ++a) {
    for (int64_t b = 0; b < std::min(l.stride_w, in.width); ++b) {
      const Taps h = taps_of(a, in.height, l.kernel_h, l.stride_h, l.pad_h);
      const Taps w = taps_of(b, in.width, l.kernel_w, l.stride_w, l.pad_w);
      if (h.count == 0 || w.count == 0) {
        complete = false;
        continue;
      }
      const FilterLayout<T> layout = filter_layout<T>(in.channels, out_channels, h.count, w.count, algorithm);
      const FilterView view = transposed(view_filter(weight), h.last, w.last, l.stride_h, l.stride_w);
      phases.push_back({a,
                        b,
                        h.size,
                        w.size,
                        {0, -1, 0, in.channels, h.count, w.count, 1, 1, h.pad, w.pad},
                        layout,
                        pack_training_filter(view, layout, out_channels, nullptr)});
    }
  }
  return phases;
}

}  // namespace resnet_fast
