// The shapes of the activations of a chain, and their slots of scratch memory.
#pragma once

#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/conv/bf16_filters.h"
#include "cpu/conv/chain.h"
#include "cpu/conv/filters.h"
#include "cpu/conv/padded_layout.h"

namespace resnet_fast {

struct Value {
  int64_t channels, height, width;
  Halo halo;
  bool is_residual = false;
  int64_t last_use = 0;  // index of the layer that reads it last
  int64_t slot = -1;  // of scratch memory, or -1: the value is a tensor
};

struct ChainLayout {
  std::vector<Value> values;
  std::vector<PaddedLayout> slots;
  std::vector<int64_t> slot_begin;  // in elements, for one image
  int64_t image_numel = 0;
};

// The halo that a layer reads.
inline Halo input_halo(const Layer& l, const Value& x, const Value& y, Algorithm algorithm) {
  if (algorithm == Algorithm::kDirect || algorithm == Algorithm::kBf16Direct) {
    return {l.pad_h, l.pad_h, l.pad_w, l.pad_w};
  }
  const int64_t tile = algorithm == Algorithm::kBf16Winograd ? kBf16TileOut : kTileOut;
  return {l.pad_h, far_halo(x.height, y.height, l.pad_h, l.kernel_h, l.stride_h, tile), l.pad_w,
          far_halo(x.width, y.width, l.pad_w, l.kernel_w, l.stride_w, tile)};
}

// The algorithm that a filter is packed for: its first element.
inline double packed_algorithm(const BFloat16* filter) { return filter->bits; }
template <typename T>
double packed_algorithm(const T* filter) {
  return static_cast<double>(*filter);
}

// The layout of a layer's packed filter.
template <typename T>
FilterLayout<T> read_layout(const char* op, size_t index, const Layer& l, int64_t channels, const Tensor& filter) {
  constexpr bool bf16 = std::is_same_v<T, BFloat16>;
  FilterLayout<T> layout = filter_layout<T>(l.out_channels, channels, l.kernel_h, l.kernel_w, Algorithm::kDirect);
  bool packed = filter.defined() && filter.scalar_type() == kScalarType<T> && filter.dim() == 1 &&
                filter.stride(0) == 1 && filter.is_cpu() && filter.numel() > 0;
  if (packed) {
    const double algorithm = packed_algorithm(static_cast<const T*>(filter.data_ptr()));
    const bool winograd = l.kernel_h == 3 && l.kernel_w == 3 && l.stride_h == 1 && l.stride_w == 1;
    const auto is = [&](Algorithm a) { return algorithm == static_cast<double>(a); };
    packed =
        bf16 ? is(Algorithm::kBf16Direct) || (winograd && is(Algorithm::kBf16Winograd))
             : is(Algorithm::kDirect) || (winograd && (is(Algorithm::kWinograd) || is(Algorithm::kCompactWinograd)));
    if (packed) layout.algorithm = static_cast<Algorithm>(static_cast<int>(algorithm));
  }
  RESNET_FAST_CHECK(packed && filter.numel() == layout.numel(), op, ": filters[", index,
                    "] is not what pack_conv_bn gives ", bf16 ? "in bfloat16 " : "", "for a weight of [",
                    l.out_channels, ", ", channels, ", ", l.kernel_h, ", ", l.kernel_w, "], stride ", l.stride_h, " x ",
                    l.stride_w, bf16 ? "" : " and inputs of ", bf16 ? "" : dtype_name(kScalarType<T>));
  return layout;
}

template <typename T>
std::vector<Value> infer_values(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& filters,
                                const std::vector<Layer>& layers) {
  std::vector<Value> values;
  for (const Tensor& x : inputs) values.push_back({x.size(1), x.size(2), x.size(3), {}});
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& l = layers[i];
    const int64_t known = static_cast<int64_t>(values.size());
    RESNET_FAST_CHECK(l.input >= 0 && l.input < known && l.residual >= -1 && l.residual < known, op, ": layer ", i,
                      " reads values ", l.input, " and ", l.residual, ", want values below ", known);
    RESNET_FAST_CHECK(l.out_channels > 0 && l.out_channels <= kMaxSize && l.kernel_h > 0 && l.kernel_w > 0 &&
                          l.kernel_h <= kMaxRuns && l.kernel_w <= kMaxRuns && l.kernel_h * l.kernel_w <= kMaxRuns,
                      op, ": layer ", i, " has a filter of ", l.out_channels, " x ", l.kernel_h, " x ", l.kernel_w,
                      ", want sizes of at least 1 and at most ", kMaxRuns, " taps");
    check_strides(op, {l.stride_h, l.stride_w}, {l.pad_h, l.pad_w});
    Value& x = values[static_cast<size_t>(l.input)];
    RESNET_FAST_CHECK(x.height + 2 * l.pad_h >= l.kernel_h && x.width + 2 * l.pad_w >= l.kernel_w, op, ": x is ",
                      x.height, " x ", x.width, " with padding ", l.pad_h, " x ", l.pad_w,
                      ", smaller than the filter, ", l.kernel_h, " x ", l.kernel_w);
    x.last_use = static_cast<int64_t>(i);
    Value y{l.out_channels,
            output_size(x.height, l.pad_h, l.kernel_h, l.stride_h),
            output_size(x.width, l.pad_w, l.kernel_w, l.stride_w),
            {}};
    x.halo.cover(input_halo(l, x, y, read_layout<T>(op, i, l, x.channels, filters[i]).algorithm));
    if (l.residual >= 0) {
      Value& r = values[static_cast<size_t>(l.residual)];
      RESNET_FAST_CHECK(r.channels == y.channels && r.height == y.height && r.width == y.width, op, ": residual is [",
                        r.channels, ", ", r.height, ", ", r.width, "] per image, want [", y.channels, ", ", y.height,
                        ", ", y.width, "] as the convolution gives");
      r.is_residual = true;
      r.last_use = static_cast<int64_t>(i);
    }
    values.push_back(y);
  }
  values.back().last_use = static_cast<int64_t>(layers.size());
  return values;
}

// Pixels a multiple of this apart map to one set of L1, which holds fewer of them than a tile has.
constexpr int64_t kSetBytes = 4096;

// Channels of a pixel that one load takes.
template <typename T>
constexpr int64_t kChannelsPerLoad = std::is_same_v<T, BFloat16> ? 2 : 1;

// Whether the kernels can read this tensor in place: dense channels, the right type, no halo, whole vectors if it is
// a residual.
template <typename T>
bool readable_in_place(const Tensor& x, const Value& v, int64_t lanes) {
  const bool apart = x.stride(3) * static_cast<int64_t>(sizeof(T)) % kSetBytes != 0;
  return x.scalar_type() == kScalarType<T> && apart && x.stride(1) == 1 && v.halo.empty() &&
         v.channels % kChannelsPerLoad<T> == 0 && (!v.is_residual || v.channels % lanes == 0);
}

// The stride of pixels in scratch memory. Pixels of an input are dense, so that filter rows become single runs, unless
// it is a residual, which is read in whole vectors.
template <typename T>
int64_t pixel_step(const Value& v, bool input, int64_t lanes) {
  const int64_t dense = round_up(v.channels, input && !v.is_residual ? kChannelsPerLoad<T> : lanes);
  const bool apart = dense * static_cast<int64_t>(sizeof(T)) % (kSetBytes / 2) != 0;
  return apart ? dense : dense + 64 / static_cast<int64_t>(sizeof(T));
}

// Assigns each value a slot of scratch memory; a slot is used again once its value is dead.
template <typename T>
ChainLayout assign_slots(const std::vector<Tensor>& inputs, std::vector<Value> values, bool direct_output) {
  const int64_t lanes = kernels_in_use<T>().lanes;
  ChainLayout g;
  std::vector<int64_t> free_after;  // last use of the value in each slot
  for (size_t i = 0; i < values.size(); ++i) {
    Value& v = values[i];
    const bool input = i < inputs.size();
    if (input ? readable_in_place<T>(inputs[i], v, lanes) : direct_output && i + 1 == values.size()) continue;
    const PaddedLayout shape{v.channels, v.height, v.width, pixel_step<T>(v, input, lanes), v.halo};
    const int64_t born = static_cast<int64_t>(i) - static_cast<int64_t>(inputs.size());
    size_t slot = 0;
    while (slot < g.slots.size() && !(g.slots[slot] == shape && free_after[slot] < born)) ++slot;
    if (slot == g.slots.size()) {
      g.slots.push_back(shape);
      g.slot_begin.push_back(g.image_numel);
      free_after.push_back(0);
      // A vector at the end of the last pixel may reach past it.
      g.image_numel += round_up(shape.image(), 64) + 64;
    }
    free_after[slot] = v.last_use;
    v.slot = static_cast<int64_t>(slot);
  }
  g.values = std::move(values);
  return g;
}

}  // namespace resnet_fast
