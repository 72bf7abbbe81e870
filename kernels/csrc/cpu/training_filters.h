// Filters for training: packed anew at every step, as they are or turned around for the data gradient.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "filters.h"
#include "maps.h"

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

template <typename S, typename T>
void pack_training_panel(const FilterView& v, const FilterLayout<T>& layout, int64_t k0, T* to, T* compact) {
  const S* from = static_cast<const S*>(v.data) + v.origin;
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0);
  const int64_t real = std::min(width, layout.out_channels - k0);
  const auto line = [&](int64_t c, int64_t r, int64_t s, T* out) {
    const S* at = from + k0 * v.k_step + c * v.c_step + r * v.r_step + s * v.s_step;
    for (int64_t j = 0; j < real; ++j) out[j] = static_cast<T>(widen(at[j * v.k_step]));
    for (int64_t j = real; j < width; ++j) out[j] = T(0);
  };
  if (!layout.winograd()) {
    for (int64_t begin = 0; begin < layout.channels; begin += layout.block()) {
      const int64_t length = std::min(layout.block(), layout.channels - begin);
      for (int64_t r = 0; r < layout.kernel_h; ++r) {
        for (int64_t s = 0; s < layout.kernel_w; ++s) {
          for (int64_t c = 0; c < length; ++c, to += width) line(begin + c, r, s, to);
        }
      }
    }
    return;
  }
  T* out = layout.algorithm == Algorithm::kCompactWinograd ? to : compact;
  for (int64_t c = 0; c < layout.channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap, out += width) line(c, tap / 3, tap % 3, out);
  }
  if (layout.algorithm != Algorithm::kWinograd) return;
  const Kernels<T>& kernels = kernels_in_use<T>();
  const auto expand = width == layout.panel ? kernels.expand_panel : kernels.expand_half_panel;
  expand(compact, static_cast<int>(layout.channels), layout.channels * width, to);
}

// In the layout that the kernels read, with this bias (null: zeros).
template <typename T>
torch::stable::Tensor pack_training_filter(const FilterView& v, const FilterLayout<T>& layout, const T* bias,
                                           const torch::stable::Tensor& like) {
  const int64_t size[] = {layout.numel()};
  const auto type = sizeof(T) == 4 ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Double;
  torch::stable::Tensor packed = torch::stable::empty({size, 1}, type, std::nullopt, like.device());
  T* data = static_cast<T*>(packed.data_ptr());
  T* panels = data + layout.panels_begin();
  std::fill(data, panels, T(0));
  if (bias) std::copy_n(bias, layout.out_channels, data + layout.bias_begin());
  visit(v.type, [&](auto tag) {
    using S = decltype(tag);
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> compact(
          layout.algorithm == Algorithm::kWinograd ? static_cast<size_t>(9 * layout.channels * layout.panel) : 0);
      for (int64_t i = begin; i < end; ++i) {
        pack_training_panel<S, T>(v, layout, i * layout.panel, panels + i * layout.panel_stride(), compact.data());
      }
    });
  });
  return packed;
}

}  // namespace resnet_fast
