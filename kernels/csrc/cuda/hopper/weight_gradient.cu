// Launcher of weight_gradient, of 3x3 convolutions on Hopper; its tiles and geometry for the tuner.
#include <torch/csrc/stable/library.h>

#include "cuda/hopper/launcher.h"
#include "cuda/hopper/weight_gradient_plan.h"
#include "cuda/kernel_names.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* gradient_kernel(int tile);
}  // namespace cuda

namespace {

using cuda::GradientArgs;
using cuda::GradientPlan;
using cuda::GradientTile;
using cuda::kGradientArgs;

constexpr const char* kOp = "weight_gradient";

const GradientTile& tile_of(int64_t tile) {
  RESNET_FAST_CHECK(tile >= 0 && tile < cuda::kGradientTileCount, "weight_gradient: tile is ", tile, ", want 0 to ",
                    cuda::kGradientTileCount - 1);
  return cuda::kGradientTiles[tile];
}

// Empty if no code for sm_90a was compiled: the kernels of other architectures trap.
std::vector<int64_t> weight_gradient_tiles() {
  std::vector<int64_t> rows;
#ifdef RESNET_FAST_SM90A
  for (const GradientTile& t : cuda::kGradientTiles)
    for (const int field : {t.rows, t.columns, t.steps, t.stages}) rows.push_back(field);
#endif
  return rows;
}

// [blocks, threads, shared, partial_floats, 0, completed args]; empty if the tile cannot compute it.
std::vector<int64_t> weight_gradient_plan(int64_t tile, const std::vector<int64_t>& args) {
  const GradientTile& t = tile_of(tile);
  const GradientArgs a = unpack_args<GradientArgs>(kOp, args);
  RESNET_FAST_CHECK(a.splits >= 1, "weight_gradient: splits is ", a.splits, ", want at least 1");
  RESNET_FAST_CHECK(a.positions >= 1, "weight_gradient: positions is ", a.positions, ", want at least 1");
  if (!cuda::supports(t, a)) return {};
  const GradientPlan plan = cuda::plan_gradient(t, a);
  if (!plan.fits || plan.args.splits != a.splits || a.splits > 65535 || plan.blocks > INT32_MAX) return {};
  std::vector<int64_t> out = {plan.blocks, cuda::kGradientThreads, plan.shared, plan.partial_floats, 0};
  uint32_t fields[kGradientArgs];
  std::memcpy(fields, &plan.args, sizeof fields);
  out.insert(out.end(), fields, fields + kGradientArgs);
  return out;
}

// Launches `tile` by a plan of the above.
void weight_gradient_launch(const Tensor& grad, const std::optional<Tensor>& y,
                            const std::optional<Tensor>& coefficients, const Tensor& x,
                            const std::optional<Tensor>& scale_shift, Tensor partial, int64_t tile,
                            const std::vector<int64_t>& args) {
  const GradientTile& t = tile_of(tile);
  const GradientArgs given = unpack_args<GradientArgs>(kOp, args);
  RESNET_FAST_CHECK(cuda::supports(t, given), "weight_gradient: tile ", tile, " cannot compute this convolution");
  const GradientPlan plan = cuda::plan_gradient(t, given);
  const GradientArgs& a = plan.args;
  RESNET_FAST_CHECK(plan.fits, "weight_gradient: tile ", tile, " does not hold ", a.positions, " positions");
  RESNET_FAST_CHECK(a.splits <= 65535 && plan.blocks <= INT32_MAX, "weight_gradient: splits is ", a.splits, " for ",
                    plan.blocks, " blocks, want at most 65535 and 2147483647");
  const auto holds = [&](const char* name, const Tensor& tensor, ScalarType dtype, int64_t elements) {
    check_operand(kOp, x, name, tensor, elements, dtype);
  };
  const void* kernel = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Half: kernel = cuda::gradient_kernel<__half>(static_cast<int>(tile)); break;
    case ScalarType::BFloat16: kernel = cuda::gradient_kernel<__nv_bfloat16>(static_cast<int>(tile)); break;
    default: break;
  }
  RESNET_FAST_CHECK(kernel != nullptr, "weight_gradient: x has dtype ", dtype_name(x.scalar_type()),
                    ", want float16 or bfloat16");
  const int64_t results = int64_t{a.batch} * a.out_height * a.out_width * a.out_channels;
  holds("x", x, x.scalar_type(), int64_t{a.batch} * a.height * a.width * a.channels);
  holds("grad", grad, x.scalar_type(), results);
  holds("partial", partial, ScalarType::Float, plan.partial_floats);
  RESNET_FAST_CHECK(!a.batch_norm || (y && coefficients),
                    "weight_gradient: y or coefficients is None, want both for the gradient of batch norm");
  RESNET_FAST_CHECK(!a.affine || scale_shift, "weight_gradient: scale_shift is None, want it for an affine input");
  if (a.batch_norm) {
    holds("y", *y, x.scalar_type(), results);
    holds("coefficients", *coefficients, ScalarType::Float, int64_t{4} * a.out_channels);
  }
  if (a.affine) holds("scale_shift", *scale_shift, ScalarType::Float, int64_t{2} * a.channels);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_device(kOp, x);
  const void *pgrad = grad.data_ptr(), *py = a.batch_norm ? y->data_ptr() : nullptr, *px = x.data_ptr();
  const void* pcoefficients = a.batch_norm ? coefficients->data_ptr() : nullptr;
  const void* pscale_shift = a.affine ? scale_shift->data_ptr() : nullptr;
  void* ppartial = partial.data_ptr();
  void* parameters[] = {&pgrad, &py, &pcoefficients, &px, &pscale_shift, &ppartial, const_cast<GradientArgs*>(&a)};
  launch_kernel(kOp, kernel, dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(a.splits)),
                cuda::kGradientThreads, parameters, plan.shared, current_stream(x));
}

template <typename T>
void name_instances(const std::string& dtype) {
  for (int i = 0; i < cuda::kGradientTileCount; ++i)
    name_kernel("weight_gradient_kernel<" + dtype + ", " + std::to_string(i) + ">", cuda::gradient_kernel<T>(i));
}

const bool named = (name_instances<__half>("float16"), name_instances<__nv_bfloat16>("bfloat16"), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("weight_gradient_tiles", TORCH_BOX(&weight_gradient_tiles));
  m.impl("weight_gradient_plan", TORCH_BOX(&weight_gradient_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("weight_gradient_launch", TORCH_BOX(&weight_gradient_launch));
}

}  // namespace resnet_fast
