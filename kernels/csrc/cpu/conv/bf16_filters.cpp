#include "cpu/conv/bf16_filters.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/dtype.h"

namespace resnet_fast {
namespace {

using torch::stable::Tensor;

// The filter in float64, rounded when it is stored.
class Filter {
 public:
  Filter(const Tensor& weight, const std::vector<double>& scale)
      : weight_(weight), scale_(scale), k_(weight.size(0)), c_(weight.size(1)) {
    for (int64_t i = 0; i < 4; ++i) stride_[i] = weight.stride(i);
  }

  template <typename S>
  double at(int64_t k, int64_t c, int64_t r, int64_t s) const {
    if (k >= k_ || c >= c_) return 0.0;
    const S* from = static_cast<const S*>(weight_.data_ptr());
    return static_cast<double>(widen(from[k * stride_[0] + c * stride_[1] + r * stride_[2] + s * stride_[3]])) *
           scale_[static_cast<size_t>(k)];
  }

 private:
  const Tensor& weight_;
  const std::vector<double>& scale_;
  int64_t k_, c_, stride_[4];
};

template <typename S>
void pack_direct_panel(const Filter& filter, const FilterLayout<BFloat16>& layout, int64_t k0, BFloat16* to) {
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0);
  for (int64_t begin = 0; begin < layout.channels; begin += layout.block()) {
    const int64_t length = std::min(layout.block(), layout.channels - begin);
    for (int64_t tap = 0; tap < layout.taps(); ++tap) {
      const int64_t r = tap / layout.kernel_w, s = tap % layout.kernel_w;
      for (int64_t c = begin; c < begin + length; c += 2) {
        for (int64_t j = 0; j < width; ++j, to += 2) {
          to[0] = narrow_to<BFloat16>(filter.at<S>(k0 + j, c, r, s));
          to[1] = narrow_to<BFloat16>(filter.at<S>(k0 + j, c + 1, r, s));
        }
      }
    }
  }
}

// Channels in the order of the kernel's input transform.
template <typename S>
void pack_winograd_panel(const Filter& filter, const FilterLayout<BFloat16>& layout, int64_t k0, BFloat16* to) {
  static constexpr double kTransform[kBf16TileIn][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0), point = layout.depth() * width;
  for (int64_t place = 0; place < layout.depth(); ++place) {
    const int64_t panel = place / kBf16Panel * kBf16Panel, in_panel = place % kBf16Panel;
    const bool whole = panel + kBf16Panel <= layout.channels;
    const int64_t c = whole ? panel + bf16_channel_at(static_cast<int>(in_panel)) : place;
    for (int64_t j = 0; j < width; ++j) {
      double half[kBf16TileIn][3];
      for (int s = 0; s < 3; ++s) {
        const double g[3] = {filter.at<S>(k0 + j, c, 0, s), filter.at<S>(k0 + j, c, 1, s),
                             filter.at<S>(k0 + j, c, 2, s)};
        for (int i = 0; i < kBf16TileIn; ++i) {
          half[i][s] = kTransform[i][0] * g[0] + kTransform[i][1] * g[1] + kTransform[i][2] * g[2];
        }
      }
      for (int i = 0; i < kBf16TileIn; ++i) {
        for (int l = 0; l < kBf16TileIn; ++l) {
          const double u =
              kTransform[l][0] * half[i][0] + kTransform[l][1] * half[i][1] + kTransform[l][2] * half[i][2];
          to[(i * kBf16TileIn + l) * point + place / 2 * 2 * width + 2 * j + place % 2] = narrow_to<BFloat16>(u);
        }
      }
    }
  }
}

}  // namespace

Tensor pack_bf16_filters(const Tensor& weight, const std::vector<double>& scale, const std::vector<double>& shift,
                         Algorithm algorithm) {
  const FilterLayout<BFloat16> layout =
      filter_layout<BFloat16>(weight.size(0), weight.size(1), weight.size(2), weight.size(3), algorithm);
  const int64_t size[] = {layout.numel()};
  Tensor packed =
      torch::stable::empty({size, 1}, torch::headeronly::ScalarType::BFloat16, std::nullopt, weight.device());
  BFloat16* const data = static_cast<BFloat16*>(packed.data_ptr());
  BFloat16* const panels = data + layout.panels_begin();
  std::fill(data, panels, BFloat16{});
  data->bits = static_cast<uint16_t>(algorithm);
  for (int64_t k = 0; k < layout.out_channels; ++k) {
    const float bias = static_cast<float>(shift[static_cast<size_t>(k)]);
    std::memcpy(data + layout.bias_begin() + 2 * k, &bias, sizeof bias);
  }
  const Filter filter(weight, scale);
  dispatch_dtype(weight.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        BFloat16* const to = panels + i * layout.panel_stride();
        if (layout.winograd()) {
          pack_winograd_panel<S>(filter, layout, i * layout.panel, to);
        } else {
          pack_direct_panel<S>(filter, layout, i * layout.panel, to);
        }
      }
    });
  });
  return packed;
}

}  // namespace resnet_fast
