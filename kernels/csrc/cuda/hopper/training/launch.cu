// Launchers of the 3x3 convolutions of training for Hopper; their tiles and geometry for the tuner.
#include <torch/csrc/stable/library.h>

#include "cuda/hopper/launcher.h"
#include "cuda/hopper/training/plan.h"
#include "cuda/kernel_names.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* halo_stats_kernel(int instance);
template <typename T>
const void* halo_gradient_kernel(int instance);
}  // namespace cuda

namespace {

using cuda::HaloArgs;
using cuda::HaloPlan;
using cuda::HaloTile;
using cuda::kHaloChunks;
using cuda::kHaloKernels;

const HaloTile& tile_of(const char* op, int64_t tile) {
  RESNET_FAST_CHECK(tile >= 0 && tile < cuda::kHaloTrainingTileCount, op, ": tile is ", tile, ", want 0 to ",
                    cuda::kHaloTrainingTileCount - 1);
  return cuda::kHaloTrainingTiles[tile];
}

// Empty if no code for sm_90a was compiled: the kernels of other architectures trap.
std::vector<int64_t> conv_halo_training_tiles() {
  std::vector<int64_t> rows;
#ifdef RESNET_FAST_SM90A
  for (const HaloTile& t : cuda::kHaloTrainingTiles)
    for (const int field : {t.positions, t.warpgroups, t.stages}) rows.push_back(field);
#endif
  return rows;
}

// [blocks, threads, shared, 0, 0, completed args]; empty if the tile cannot compute it.
std::vector<int64_t> conv_halo_training_plan(int64_t tile, const std::vector<int64_t>& args, bool gradient) {
  const char* op = "conv_halo_training_plan";
  const HaloTile& t = tile_of(op, tile);
  HaloArgs a = unpack_args<HaloArgs>(op, args);
  a.splits = 1;
  if (!cuda::supports_training(t, a, gradient)) return {};
  const HaloPlan plan = cuda::plan_halo_training(t, a, gradient);
  if (plan.shared > cuda::kMaxShared || plan.blocks > INT32_MAX) return {};
  return pack_plan(plan);
}

// The plan of a launch, checked.
HaloPlan checked_plan(const char* op, const HaloTile& t, const std::vector<int64_t>& args, bool gradient) {
  HaloArgs a = unpack_args<HaloArgs>(op, args);
  a.splits = 1;
  RESNET_FAST_CHECK(cuda::supports_training(t, a, gradient), op, ": the tile cannot compute this convolution");
  const HaloPlan plan = cuda::plan_halo_training(t, a, gradient);
  RESNET_FAST_CHECK(plan.shared <= cuda::kMaxShared && plan.blocks <= INT32_MAX, op,
                    ": the tile cannot compute this convolution");
  return plan;
}

int instance_of(int64_t tile, const HaloArgs& a) {
  const int slice = a.chunk == 64 ? 0 : a.chunk == 32 ? 1 : 2;
  return static_cast<int>(tile) * kHaloKernels + (a.stride - 1) * kHaloChunks + slice;
}

const void* address(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// Launches the kernel for the dtype and on the device of x.
void launch(const char* op, const Tensor& x, const void* half, const void* bfloat16, const HaloPlan& plan,
            void** parameters) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_device(op, x);
  launch_kernel(op, x.scalar_type() == ScalarType::Half ? half : bfloat16, dim3(static_cast<unsigned>(plan.blocks)),
                plan.threads, parameters, plan.shared, current_stream(x));
}

void check_dtype(const char* op, const char* name, const Tensor& t) {
  RESNET_FAST_CHECK(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16, op, ": ", name,
                    " has dtype ", dtype_name(t.scalar_type()), ", want float16 or bfloat16");
}

// Launches `tile` by a plan of the above.
void conv_halo_stats_launch(const Tensor& x, const std::optional<Tensor>& scale_shift, const Tensor& weight,
                            const std::optional<Tensor>& bias, Tensor y, const std::optional<Tensor>& partial,
                            int64_t tile, const std::vector<int64_t>& args) {
  const char* op = "conv_halo_stats";
  HaloPlan plan = checked_plan(op, tile_of(op, tile), args, false);
  HaloArgs& a = plan.args;
  const int64_t channels = a.channels, out_channels = a.out_channels;
  const ScalarType type = x.scalar_type();
  check_dtype(op, "x", x);
  check_operand(op, x, "x", x, int64_t{a.batch} * a.height * a.width * channels, type);
  check_operand(op, x, "weight", weight, out_channels * 9 * channels, type);
  check_operand(op, x, "y", y, int64_t{a.batch} * a.out_height * a.out_width * out_channels, type);
  if (scale_shift) check_operand(op, x, "scale_shift", *scale_shift, 2 * channels, ScalarType::Float);
  if (bias) check_operand(op, x, "bias", *bias, out_channels, ScalarType::Float);
  if (partial)
    check_operand(op, x, "partial", *partial, plan.blocks / a.channel_blocks * 2 * out_channels, ScalarType::Float);
  const void *px = x.data_ptr(), *pscale = address(scale_shift), *pw = weight.data_ptr(), *pbias = address(bias);
  const void *py = y.data_ptr(), *ppartial = address(partial);
  void* parameters[] = {&px, &pscale, &pw, &pbias, &py, &ppartial, &a};
  const int instance = instance_of(tile, a);
  launch(op, x, cuda::halo_stats_kernel<__half>(instance), cuda::halo_stats_kernel<__nv_bfloat16>(instance), plan,
         parameters);
}

// The same for the data gradient. channels of args are those of grad, out_channels those of dx.
void conv_halo_gradient_launch(const Tensor& grad, const std::optional<Tensor>& y,
                               const std::optional<Tensor>& coefficients, const Tensor& weight,
                               const std::optional<Tensor>& residual, const std::optional<Tensor>& x,
                               const std::optional<Tensor>& scale_shift, const std::optional<Tensor>& y1,
                               const std::optional<Tensor>& y2, const std::optional<Tensor>& stats1,
                               const std::optional<Tensor>& stats2, Tensor dx, const std::optional<Tensor>& partial,
                               int64_t tile, const std::vector<int64_t>& args) {
  const char* op = "conv_halo_gradient";
  HaloPlan plan = checked_plan(op, tile_of(op, tile), args, true);
  HaloArgs& a = plan.args;
  const int64_t pixels = int64_t{a.batch} * a.height * a.width, channels = a.channels, out_channels = a.out_channels;
  check_dtype(op, "grad", grad);
  const auto holds = [&](const char* name, const std::optional<Tensor>& tensor, int64_t elements, ScalarType type) {
    if (tensor) check_operand(op, grad, name, *tensor, elements, type);
  };
  const ScalarType type = grad.scalar_type();
  holds("grad", grad, pixels * channels, type);
  holds("weight", weight, channels * 9 * out_channels, type);
  holds("dx", dx, pixels * out_channels, type);
  holds("y", y, pixels * channels, type);
  holds("coefficients", coefficients, 4 * channels, ScalarType::Float);
  for (const auto& [name, tensor] : {std::pair{"residual", &residual}, {"x", &x}, {"y1", &y1}, {"y2", &y2}})
    holds(name, *tensor, pixels * out_channels, type);
  for (const auto& [name, tensor] : {std::pair{"scale_shift", &scale_shift}, {"stats1", &stats1}, {"stats2", &stats2}})
    holds(name, *tensor, 2 * out_channels, ScalarType::Float);
  RESNET_FAST_CHECK(y.has_value() == coefficients.has_value(), op, ": y and coefficients come together");
  RESNET_FAST_CHECK(y1.has_value() == stats1.has_value() && y2.has_value() == stats2.has_value(), op,
                    ": y1 and stats1, y2 and stats2 come together");
  RESNET_FAST_CHECK(y1 || !y2, op, ": y2 comes after y1");
  RESNET_FAST_CHECK(x || a.relu == 0, op, ": x is None, want the input of the ReLU");
  const int rows = 1 + y1.has_value() + y2.has_value();
  holds("partial", partial, plan.blocks / a.channel_blocks * rows * out_channels, ScalarType::Float);
  const void *pgrad = grad.data_ptr(), *py = address(y), *pcoefficients = address(coefficients);
  const void *pw = weight.data_ptr(), *presidual = address(residual), *px = address(x), *pscale = address(scale_shift);
  const void *py1 = address(y1), *py2 = address(y2), *pstats1 = address(stats1), *pstats2 = address(stats2);
  const void *pdx = dx.data_ptr(), *ppartial = address(partial);
  void* parameters[] = {&pgrad, &py,  &pcoefficients, &pw,      &presidual, &px,       &pscale,
                        &py1,   &py2, &pstats1,       &pstats2, &pdx,       &ppartial, &a};
  const int instance = instance_of(tile, a);
  launch(op, grad, cuda::halo_gradient_kernel<__half>(instance), cuda::halo_gradient_kernel<__nv_bfloat16>(instance),
         plan, parameters);
}

template <typename T>
void name_instances(const std::string& dtype) {
  for (int i = 0; i < cuda::kHaloTrainingKernels; ++i) {
    const std::string of = "<" + dtype + ", " + std::to_string(i) + ">";
    if (cuda::halo_stats_kernel<T>(i) != nullptr)
      name_kernel("conv_halo_stats_kernel" + of, cuda::halo_stats_kernel<T>(i));
    if (cuda::halo_gradient_kernel<T>(i) != nullptr)
      name_kernel("conv_halo_gradient_kernel" + of, cuda::halo_gradient_kernel<T>(i));
  }
}

const bool named = (name_instances<__half>("float16"), name_instances<__nv_bfloat16>("bfloat16"), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_halo_training_tiles", TORCH_BOX(&conv_halo_training_tiles));
  m.impl("conv_halo_training_plan", TORCH_BOX(&conv_halo_training_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("conv_halo_stats_launch", TORCH_BOX(&conv_halo_stats_launch));
  m.impl("conv_halo_gradient_launch", TORCH_BOX(&conv_halo_gradient_launch));
}

}  // namespace resnet_fast
