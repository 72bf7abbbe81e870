// Launcher of conv1x1, the 1x1 convolution for Hopper; its tiles and geometry for the tuner.
#include <torch/csrc/stable/library.h>

#include "cuda/hopper/conv1x1_plan.h"
#include "cuda/hopper/launcher.h"
#include "cuda/kernel_names.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* conv1x1_kernel(int tile);
}  // namespace cuda

namespace {

using cuda::Conv1x1Args;
using cuda::Conv1x1Plan;
using cuda::Conv1x1Tile;

const Conv1x1Tile& tile_of(int64_t tile) {
  RESNET_FAST_CHECK(tile >= 0 && tile < cuda::kConv1x1TileCount, "conv1x1: tile is ", tile, ", want 0 to ",
                    cuda::kConv1x1TileCount - 1);
  return cuda::kConv1x1Tiles[tile];
}

// Whether the plan is the one asked for, and a launch can have it.
bool fits(const Conv1x1Plan& plan, const Conv1x1Args& given) {
  return plan.args.splits == given.splits && plan.shared <= cuda::kMaxShared && plan.blocks <= INT32_MAX;
}

// Empty if no code for sm_90a was compiled: the kernels of other architectures trap.
std::vector<int64_t> conv1x1_tiles() {
  std::vector<int64_t> rows;
#ifdef RESNET_FAST_SM90A
  for (const Conv1x1Tile& t : cuda::kConv1x1Tiles)
    for (const int field : {t.pixels, t.warpgroups, t.blocks}) rows.push_back(field);
#endif
  return rows;
}

// [blocks, threads, shared, partial_floats, counters, completed args]; empty if the tile cannot compute it.
std::vector<int64_t> conv1x1_plan(int64_t tile, const std::vector<int64_t>& args) {
  const Conv1x1Tile& t = tile_of(tile);
  const Conv1x1Args a = unpack_args<Conv1x1Args>("conv1x1", args);
  RESNET_FAST_CHECK(a.splits >= 1, "conv1x1: splits is ", a.splits, ", want at least 1");
  if (!cuda::supports(t, a)) return {};
  const Conv1x1Plan plan = cuda::plan_conv1x1(t, a);
  return fits(plan, a) ? pack_plan(plan) : std::vector<int64_t>{};
}

// Launches `tile` by a plan of the above.
void conv1x1_launch(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                    const std::optional<Tensor>& residual, Tensor y, const std::optional<Tensor>& partial,
                    const std::optional<Tensor>& counters, int64_t tile, const std::vector<int64_t>& args) {
  const Conv1x1Tile& t = tile_of(tile);
  const Conv1x1Args given = unpack_args<Conv1x1Args>("conv1x1", args);
  RESNET_FAST_CHECK(cuda::supports(t, given), "conv1x1: tile ", tile, " cannot compute this convolution");
  const Conv1x1Plan plan = cuda::plan_conv1x1(t, given);
  RESNET_FAST_CHECK(fits(plan, given), "conv1x1: tile ", tile, " cannot compute this convolution");
  RESNET_FAST_CHECK((given.residual != 0) == residual.has_value(), "conv1x1: residual is ",
                    residual ? "a tensor" : "None", ", want what the plan was made for");
  const ConvTensors tensors{"conv1x1", x, weight, scale, shift, residual, y, partial, counters};
  tensors.check(plan, 1);
  const int index = static_cast<int>(tile);
  const bool half = x.scalar_type() == ScalarType::Half;
  tensors.launch(half ? cuda::conv1x1_kernel<__half>(index) : cuda::conv1x1_kernel<__nv_bfloat16>(index), plan);
}

template <typename T>
void name_instances(const std::string& dtype) {
  for (int i = 0; i < cuda::kConv1x1TileCount; ++i)
    name_kernel("conv1x1_fwd_kernel<" + dtype + ", " + std::to_string(i) + ">", cuda::conv1x1_kernel<T>(i));
}

const bool named = (name_instances<__half>("float16"), name_instances<__nv_bfloat16>("bfloat16"), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv1x1_tiles", TORCH_BOX(&conv1x1_tiles));
  m.impl("conv1x1_plan", TORCH_BOX(&conv1x1_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("conv1x1_launch", TORCH_BOX(&conv1x1_launch)); }

}  // namespace resnet_fast
