// The operator add_relu: y = relu(a + b), a single pass over memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace resnet_fast {
namespace {

// Elements a thread takes at least: below that, waking it costs more than it saves.
constexpr int64_t kGrain = 32768;
// Elements of bfloat16 converted to float32 at a time: they stay in L1.
constexpr int64_t kBlock = 1024;

void add_relu_range(const float* a, const float* b, float* out, int64_t n) {
  kernels_in_use<float>().add_relu(a, b, out, n);
}
void add_relu_range(const double* a, const double* b, double* out, int64_t n) {
  kernels_in_use<double>().add_relu(a, b, out, n);
}
void add_relu_range(const BFloat16* a, const BFloat16* b, BFloat16* out, int64_t n) {
  float wide_a[kBlock], wide_b[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    for (int64_t i = 0; i < count; ++i) wide_a[i] = widen(a[begin + i]), wide_b[i] = widen(b[begin + i]);
    add_relu_range(wide_a, wide_b, wide_a, count);
    for (int64_t i = 0; i < count; ++i) out[begin + i] = narrow_to<BFloat16>(wide_a[i]);
  }
}

// Whether b is dense in the layout of a.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  int64_t span = 1;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.stride(i) != b.stride(i) && a.size(i) != 1) return false;
    span += (a.size(i) - 1) * a.stride(i);
  }
  return span == a.numel();
}

Tensor add_relu(const Tensor& a, const Tensor& b) {
  check_dtype("add_relu", "a", a);
  check_same_dtype("add_relu", "b", b, "a", a);
  check_same_shape("add_relu", "b", b, "a", a);
  RESNET_FAST_CHECK(b.is_cpu(), "add_relu: b is not on the CPU, as a is");
  // empty_like keeps the layout of a dense tensor and makes another one dense, in the order of its strides.
  Tensor out = torch::stable::empty_like(a);
  const int64_t n = a.numel();
  if (n == 0) return out;
  const auto laid_out_as_out = [&](const Tensor& t) {
    if (same_dense_layout(out, t)) return t;
    Tensor copy = torch::stable::empty_like(out);
    return torch::stable::copy_(copy, t);
  };
  const Tensor dense_a = laid_out_as_out(a), dense_b = laid_out_as_out(b);
  dispatch_dtype(a.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const S* pa = static_cast<const S*>(dense_a.data_ptr());
    const S* pb = static_cast<const S*>(dense_b.data_ptr());
    S* po = static_cast<S*>(out.data_ptr());
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      add_relu_range(pa + begin, pb + begin, po + begin, end - begin);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("add_relu", TORCH_BOX(&add_relu)); }

}  // namespace resnet_fast
