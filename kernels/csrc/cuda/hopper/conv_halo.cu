// Launcher of conv_halo, the 3x3 convolution for Hopper; its tiles and geometry for the tuner.
#include <torch/csrc/stable/library.h>

#include "cuda/hopper/conv_halo_plan.h"
#include "cuda/hopper/launcher.h"
#include "cuda/kernel_names.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* halo_kernel(int instance);
}  // namespace cuda

namespace {

using cuda::HaloArgs;
using cuda::HaloPlan;
using cuda::HaloTile;
using cuda::kHaloChunks;
using cuda::kHaloKernels;

const HaloTile& tile_of(int64_t tile) {
  RESNET_FAST_CHECK(tile >= 0 && tile < cuda::kHaloTileCount, "conv_halo: tile is ", tile, ", want 0 to ",
                    cuda::kHaloTileCount - 1);
  return cuda::kHaloTiles[tile];
}

// Empty if no code for sm_90a was compiled: the kernels of other architectures trap.
std::vector<int64_t> conv_halo_tiles() {
  std::vector<int64_t> rows;
#ifdef RESNET_FAST_SM90A
  for (const HaloTile& t : cuda::kHaloTiles)
    for (const int field : {t.positions, t.warpgroups, t.stages}) rows.push_back(field);
#endif
  return rows;
}

// [blocks, threads, shared, partial_floats, counters, completed args]; empty if the tile cannot compute it.
std::vector<int64_t> conv_halo_plan(int64_t tile, const std::vector<int64_t>& args) {
  const HaloTile& t = tile_of(tile);
  const HaloArgs a = unpack_args<HaloArgs>("conv_halo", args);
  RESNET_FAST_CHECK(a.splits >= 1, "conv_halo: splits is ", a.splits, ", want at least 1");
  if (!cuda::supports(t, a)) return {};
  const HaloPlan plan = cuda::plan_halo(t, a);
  if (plan.args.splits != a.splits || plan.shared > cuda::kMaxShared || plan.blocks > INT32_MAX) return {};
  return pack_plan(plan);
}

// Launches `tile` by a plan of the above.
void conv_halo_launch(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& residual, Tensor y, const std::optional<Tensor>& partial,
                      const std::optional<Tensor>& counters, int64_t tile, const std::vector<int64_t>& args) {
  const HaloTile& t = tile_of(tile);
  const HaloArgs given = unpack_args<HaloArgs>("conv_halo", args);
  RESNET_FAST_CHECK(cuda::supports(t, given), "conv_halo: tile ", tile, " cannot compute this convolution");
  const HaloPlan plan = cuda::plan_halo(t, given);
  const HaloArgs& a = plan.args;
  const ConvTensors tensors{"conv_halo", x, weight, scale, shift, residual, y, partial, counters};
  tensors.check(plan, 9);
  const int instance = static_cast<int>(tile) * kHaloKernels + (a.stride - 1) * kHaloChunks +
                       (a.chunk == 64   ? 0
                        : a.chunk == 32 ? 1
                                        : 2);
  const bool half = x.scalar_type() == ScalarType::Half;
  tensors.launch(half ? cuda::halo_kernel<__half>(instance) : cuda::halo_kernel<__nv_bfloat16>(instance), plan);
}

template <typename T>
void name_instances(const std::string& dtype) {
  for (int i = 0; i < cuda::kHaloTileCount * kHaloKernels; ++i)
    name_kernel("conv_halo_fwd_kernel<" + dtype + ", " + std::to_string(i) + ">", cuda::halo_kernel<T>(i));
}

const bool named = (name_instances<__half>("float16"), name_instances<__nv_bfloat16>("bfloat16"), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_halo_tiles", TORCH_BOX(&conv_halo_tiles));
  m.impl("conv_halo_plan", TORCH_BOX(&conv_halo_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("conv_halo_launch", TORCH_BOX(&conv_halo_launch)); }

}  // namespace resnet_fast
