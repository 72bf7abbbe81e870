#include "cpu/conv/filters.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/conv/bf16_filters.h"
#include "cpu/dtype.h"
#include "cpu/huge_pages.h"

namespace resnet_fast {
namespace {

std::vector<double> to_doubles(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  const int64_t stride = t.stride(0);
  dispatch_dtype(t.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const S* data = static_cast<const S*>(t.data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i)
      values[static_cast<size_t>(i)] = static_cast<double>(widen(data[i * stride]));
  });
  return values;
}

// batch_norm(z) = scale * z + shift, with z = conv + bias: the bias moves into the shift.
struct Affine {
  std::vector<double> scale, shift;
};

Affine fold(int64_t out_channels, const OptionalTensor& bias, const BatchNorm& bn) {
  const size_t n = static_cast<size_t>(out_channels);
  Affine a{std::vector<double>(n, 1.0), bias ? to_doubles(*bias) : std::vector<double>(n, 0.0)};
  if (!bn.running_mean) return a;
  const std::vector<double> mean = to_doubles(*bn.running_mean), var = to_doubles(*bn.running_var);
  const std::vector<double> gamma = bn.weight ? to_doubles(*bn.weight) : std::vector<double>(n, 1.0);
  const std::vector<double> beta = bn.bias ? to_doubles(*bn.bias) : std::vector<double>(n, 0.0);
  for (size_t k = 0; k < n; ++k) {
    a.scale[k] = gamma[k] / std::sqrt(var[k] + bn.eps);
    a.shift[k] = (a.shift[k] - mean[k]) * a.scale[k] + beta[k];
  }
  return a;
}

template <typename S, typename T>
void pack_panel(const Tensor& weight, const FilterLayout<T>& layout, const Affine& affine, int64_t k0, T* to) {
  const S* from = static_cast<const S*>(weight.data_ptr());
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0);
  for (int64_t begin = 0; begin < layout.channels; begin += layout.block()) {
    const int64_t length = std::min(layout.block(), layout.channels - begin);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t k = k0 + j;
      const bool real = k < layout.out_channels;
      const double scale = real ? affine.scale[static_cast<size_t>(k)] : 0.0;
      const S* row = from + (real ? k : 0) * sk + begin * sc;
      for (int64_t c = 0; c < length; ++c) {
        for (int64_t r = 0; r < layout.kernel_h; ++r) {
          for (int64_t s = 0; s < layout.kernel_w; ++s) {
            const double value = real ? static_cast<double>(widen(row[c * sc + r * sr + s * ss])) * scale : 0.0;
            to[((r * layout.kernel_w + s) * length + c) * width + j] = static_cast<T>(value);
          }
        }
      }
    }
    to += layout.taps() * length * width;
  }
}

template <typename S, typename T>
void pack_compact_panel(const Tensor& weight, const FilterLayout<T>& layout, const Affine& affine, int64_t k0, T* to) {
  const S* from = static_cast<const S*>(weight.data_ptr());
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0);
  for (int64_t j = 0; j < width; ++j) {
    const int64_t k = k0 + j;
    const bool real = k < layout.out_channels;
    for (int64_t c = 0; c < layout.channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const double value = real ? static_cast<double>(widen(from[k * sk + c * sc + tap / 3 * sr + tap % 3 * ss])) *
                                        affine.scale[static_cast<size_t>(k)]
                                  : 0.0;
        to[(c * 9 + tap) * width + j] = static_cast<T>(value);
      }
    }
  }
}

// G of y = A^T [(G g G^T) . (B^T d B)] A: the powers of each point over the product of its distances to the others.
constexpr double kFilterTransform[kTileIn][3] = {
    {1, 0, 0},
    {1 / kDistanceA, kPointA / kDistanceA, kSquareA / kDistanceA},
    {1 / kDistanceA, -kPointA / kDistanceA, kSquareA / kDistanceA},
    {1 / kDistanceB, kPointB / kDistanceB, kSquareB / kDistanceB},
    {1 / kDistanceB, -kPointB / kDistanceB, kSquareB / kDistanceB},
    {0, 0, 1},
};

// G g G^T in float64, rounded once.
template <typename S, typename T>
void pack_winograd_panel(const Tensor& weight, const FilterLayout<T>& layout, const Affine& affine, int64_t k0, T* to) {
  const S* from = static_cast<const S*>(weight.data_ptr());
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const int64_t width = std::min(layout.panel, layout.padded_out() - k0);
  for (int64_t c = 0; c < layout.channels; ++c) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t k = k0 + j;
      double g[3][3] = {}, half[kTileIn][3];
      if (k < layout.out_channels) {
        for (int64_t r = 0; r < 3; ++r) {
          for (int64_t s = 0; s < 3; ++s) {
            g[r][s] = static_cast<double>(widen(from[k * sk + c * sc + r * sr + s * ss])) *
                      affine.scale[static_cast<size_t>(k)];
          }
        }
      }
      for (int i = 0; i < kTileIn; ++i) {
        for (int s = 0; s < 3; ++s) {
          const double* t = kFilterTransform[i];
          half[i][s] = t[0] * g[0][s] + t[1] * g[1][s] + t[2] * g[2][s];
        }
      }
      for (int i = 0; i < kTileIn; ++i) {
        for (int l = 0; l < kTileIn; ++l) {
          const double* t = kFilterTransform[l];
          const double u = t[0] * half[i][0] + t[1] * half[i][1] + t[2] * half[i][2];
          to[((i * kTileIn + l) * layout.channels + c) * width + j] = static_cast<T>(u);
        }
      }
    }
  }
}

template <typename T>
Tensor pack(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& bn, Algorithm algorithm) {
  const FilterLayout<T> layout{weight.size(0), weight.size(1), weight.size(2), weight.size(3), algorithm};
  const Affine affine = fold(layout.out_channels, bias, bn);
  const int64_t size[] = {layout.numel()};
  Tensor packed = torch::stable::empty({size, 1}, sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double, std::nullopt,
                                       weight.device());
  T* data = static_cast<T*>(packed.data_ptr());
  T* panels = data + layout.panels_begin();
  prefer_huge_pages(data, static_cast<size_t>(size[0]) * sizeof(T));
  std::fill(data, panels, T(0));
  data[0] = static_cast<T>(algorithm);
  for (int64_t k = 0; k < layout.out_channels; ++k) {
    data[layout.bias_begin() + k] = static_cast<T>(affine.shift[static_cast<size_t>(k)]);
  }
  const int64_t used = layout.points() * layout.channels * layout.padded_out();
  std::fill(panels + used, data + layout.numel(), T(0));  // the same bits at every call
  dispatch_dtype(weight.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* to = panels + i * layout.panel_stride();
        if (algorithm == Algorithm::kWinograd) {
          pack_winograd_panel<S, T>(weight, layout, affine, i * layout.panel, to);
        } else if (algorithm == Algorithm::kCompactWinograd) {
          pack_compact_panel<S, T>(weight, layout, affine, i * layout.panel, to);
        } else {
          pack_panel<S, T>(weight, layout, affine, i * layout.panel, to);
        }
      }
    });
  });
  return packed;
}

Tensor pack_conv_bn(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
                    const OptionalTensor& bn_bias, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, double eps, int64_t algorithm) {
  const BatchNorm bn{bn_weight, bn_bias, running_mean, running_var, eps};
  check_conv_bn("pack_conv_bn", weight, bias, bn);
  const bool winograd = weight.size(2) == 3 && weight.size(3) == 3;
  const bool direct = algorithm == 0 || algorithm == 3;
  RESNET_FAST_CHECK(direct || (winograd && algorithm >= 0 && algorithm <= 4), "pack_conv_bn: algorithm is ", algorithm,
                    ", want 0 or 3, or for a 3x3 filter up to 4; weight has shape ", shape(weight));
  RESNET_FAST_CHECK(algorithm < 3 || weight.scalar_type() != ScalarType::Double, "pack_conv_bn: algorithm ", algorithm,
                    " computes in bfloat16, weight has dtype float64");
  return pack_filters(weight, bias, bn, static_cast<Algorithm>(algorithm));
}

}  // namespace

void check_conv_bn(const char* op, const Tensor& weight, const OptionalTensor& bias, const BatchNorm& bn) {
  check_rank(op, "weight", weight, 4, "[out_channels, in_channels, kernel_h, kernel_w]");
  check_dtype(op, "weight", weight);
  RESNET_FAST_CHECK(weight.numel() > 0 && weight.size(2) * weight.size(3) <= kMaxRuns, op, ": weight has shape ",
                    shape(weight), ", want sizes of at least 1 and at most ", kMaxRuns, " taps");
  const auto check_vector = [&](const char* name, const OptionalTensor& t) {
    if (!t) return;
    RESNET_FAST_CHECK(t->dim() == 1 && t->size(0) == weight.size(0), op, ": ", name, " has shape ", shape(*t),
                      ", want [", weight.size(0), "], the out_channels of weight");
    RESNET_FAST_CHECK(t->is_cpu(), op, ": ", name, " is not on the CPU, as weight is");
    check_dtype(op, name, *t);
  };
  check_vector("bias", bias);
  check_vector("bn_weight", bn.weight);
  check_vector("bn_bias", bn.bias);
  check_vector("running_mean", bn.running_mean);
  check_vector("running_var", bn.running_var);
  RESNET_FAST_CHECK(bn.running_mean.has_value() == bn.running_var.has_value(), op,
                    ": running_mean and running_var must be given together");
  RESNET_FAST_CHECK(bn.running_mean || (!bn.weight && !bn.bias), op,
                    ": bn_weight and bn_bias need running_mean and running_var");
  RESNET_FAST_CHECK(!bn.running_mean || bn.eps >= 0, op, ": eps is ", bn.eps, ", want at least 0");
}

Tensor pack_filters(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& bn, Algorithm algorithm) {
  if (in_bf16(algorithm)) {
    const Affine affine = fold(weight.size(0), bias, bn);
    return pack_bf16_filters(weight, affine.scale, affine.shift, algorithm);
  }
  return weight.scalar_type() == ScalarType::Double ? pack<double>(weight, bias, bn, algorithm)
                                                    : pack<float>(weight, bias, bn, algorithm);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("pack_conv_bn", TORCH_BOX(&pack_conv_bn)); }

}  // namespace resnet_fast
