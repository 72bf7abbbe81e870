// Packs filters for training: anew at every step, as they are or transposed for the data gradient.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/conv/bf16_filters.h"
#include "cpu/conv/filters.h"
#include "cpu/dtype.h"
#include "cpu/kept_memory.h"

namespace resnet_fast {

// Element (k, c, r, s) of a filter is at origin + k * k_step + ...; steps may be negative.
struct FilterView {
  torch::headeronly::ScalarType type;
  const void* data;
  int64_t origin, k_step, c_step, r_step, s_step;
};

inline FilterView view_filter(const torch::stable::Tensor& w) {
  return {w.scalar_type(), w.data_ptr(), 0, w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

// [k][c][r][s] of the result is [c][k][r_last - step_h * r][s_last - step_w * s] of `v`.
inline FilterView transposed(const FilterView& v, int64_t r_last, int64_t s_last, int64_t step_h, int64_t step_w) {
  return {v.type,
          v.data,
          v.origin + r_last * v.r_step + s_last * v.s_step,
          v.c_step,
          v.k_step,
          -step_h * v.r_step,
          -step_w * v.s_step};
}

// Input channels of a filter that are transposed at once: their output stays in L1.
constexpr int64_t kFilterChannels = 64;
// Lines of a filter are too far apart for hardware prefetching: so many are prefetched.
constexpr int64_t kPrefetchLines = 16;

// Inlined: GCC drops calls of functions that only prefetch.
template <typename S>
inline __attribute__((always_inline)) void prefetch(const S* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + i, 0, 2);
}

// Channels [begin, begin + count) of all taps, `real` output channels from `from` on: to[c * c_to + tap * tap_to + k].
// Reads the filter along its dense dimension.
template <typename S, typename T>
void copy_filter(const S* from, const FilterView& v, int64_t taps_h, int64_t taps_w, int64_t begin, int64_t count,
                 int64_t real, T* to, int64_t c_to, int64_t tap_to) {
  const int64_t taps = taps_h * taps_w;
  const auto at_tap = [&](int64_t tap, int64_t c) {
    return from + (begin + c) * v.c_step + tap / taps_w * v.r_step + tap % taps_w * v.s_step;
  };
  for (int64_t first = 0; first < count; first += kFilterChannels) {
    const int64_t last = std::min(first + kFilterChannels, count);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const S* const at = at_tap(tap, 0);
      T* const out = to + tap * tap_to;
      if (v.k_step == 1) {
        for (int64_t c = first; c < last; ++c) {
          prefetch(at + (c + kPrefetchLines) * v.c_step, real);
          for (int64_t k = 0; k < real; ++k) out[c * c_to + k] = static_cast<T>(widen(at[c * v.c_step + k]));
        }
        continue;
      }
      const S* const next = tap + 1 < taps ? at_tap(tap + 1, first) : at_tap(0, last);
      for (int64_t k = 0; k < real; ++k) {
        if (v.c_step == 1) prefetch(next + k * v.k_step, last - first);
        for (int64_t c = first; c < last; ++c) {
          out[c * c_to + k] = static_cast<T>(widen(at[c * v.c_step + k * v.k_step]));
        }
      }
    }
  }
}

// A panel of output channels from k0 on. `buffer`: panel_buffer_numel elements.
template <typename S, typename T>
void pack_training_panel(const FilterView& v, const FilterLayout<T>& layout, int64_t, int64_t k0, T* to, T* buffer) {
  const S* from = static_cast<const S*>(v.data) + v.origin + k0 * v.k_step;
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0), taps = layout.taps();
  const int64_t real = std::min(width, layout.out_channels - k0);
  T* const packed = layout.algorithm == Algorithm::kWinograd ? buffer : to;
  if (real < width) std::fill(packed, packed + taps * layout.channels * width, T(0));
  if (!layout.winograd()) {
    for (int64_t begin = 0; begin < layout.channels; begin += layout.block()) {
      const int64_t length = std::min(layout.block(), layout.channels - begin);
      copy_filter(from, v, layout.kernel_h, layout.kernel_w, begin, length, real, to, width, length * width);
      to += taps * length * width;
    }
    return;
  }
  copy_filter(from, v, layout.kernel_h, layout.kernel_w, 0, layout.channels, real, packed, taps * width, width);
  if (layout.algorithm != Algorithm::kWinograd) return;
  const Kernels<T>& kernels = kernels_in_use<T>();
  const auto expand = width == layout.panel ? kernels.expand_panel : kernels.expand_half_panel;
  expand(buffer, static_cast<int>(layout.channels), layout.channels * width, to);
}

// bfloat16: from [channel][tap][output channel] in float32. `channels`: of the weight; the layout may have one more.
template <typename S>
void pack_training_panel(const FilterView& v, const FilterLayout<BFloat16>& layout, int64_t channels, int64_t k0,
                         BFloat16* to, float* buffer) {
  const S* const from = static_cast<const S*>(v.data) + v.origin + k0 * v.k_step;
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0), taps = layout.taps();
  const int64_t real = std::min(width, layout.out_channels - k0);
  if (real < width || channels < layout.depth()) std::fill_n(buffer, taps * layout.depth() * width, 0.0f);
  copy_filter(from, v, layout.kernel_h, layout.kernel_w, 0, channels, real, buffer, taps * width, width);
  if (layout.winograd()) {
    kernels_in_use<BFloat16>().pack_winograd(buffer, static_cast<int>(layout.channels),
                                             static_cast<int>(width / layout.lanes), to);
    return;
  }
  for (int64_t first = 0; first < layout.channels; first += layout.block()) {
    const int64_t last = std::min(first + layout.block(), layout.channels);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = first; c < last; c += 2) {
        const float* const a = buffer + (c * taps + tap) * width;
        const float* const b = a + taps * width;
        for (int64_t k = 0; k < width; ++k, to += 2) {
          to[0] = narrow_to<BFloat16>(a[k]), to[1] = narrow_to<BFloat16>(b[k]);
        }
      }
    }
  }
}

template <typename T>
int64_t panel_buffer_numel(const FilterLayout<T>& layout) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return layout.taps() * layout.depth() * layout.panel;
  } else {
    return layout.algorithm == Algorithm::kWinograd ? layout.taps() * layout.channels * layout.panel : 0;
  }
}

// The filter in the layout that the kernels read, from weights as they are (training applies batch norm later), with
// this bias (null: zeros).
template <typename T>
torch::stable::Tensor pack_training_filter(const FilterView& v, const FilterLayout<T>& layout, int64_t channels,
                                           const typename AccumulatorOf<T>::type* bias) {
  torch::stable::Tensor packed = empty_tensor({layout.numel()}, kScalarType<T>);
  T* const data = static_cast<T*>(packed.data_ptr());
  T* const panels = data + layout.panels_begin();
  std::fill(data, panels, T{});
  if (bias) std::memcpy(data + layout.bias_begin(), bias, static_cast<size_t>(layout.out_channels) * sizeof(*bias));
  dispatch_dtype(v.type, [&](auto tag) {
    using S = decltype(tag);
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<typename AccumulatorOf<T>::type> buffer(static_cast<size_t>(panel_buffer_numel(layout)));
      for (int64_t i = begin; i < end; ++i) {
        pack_training_panel<S>(v, layout, channels, i * layout.panel, panels + i * layout.panel_stride(),
                               buffer.data());
      }
    });
  });
  return packed;
}

}  // namespace resnet_fast
