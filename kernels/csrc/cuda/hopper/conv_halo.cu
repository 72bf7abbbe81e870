// Launcher of conv_halo, the 3x3 convolution for Hopper; its tiles and geometry for the tuner.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda/hopper/conv_halo_plan.h"
#include "cuda/kernel_names.h"
#include "cuda/launch.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* halo_kernel(int instance);
}  // namespace cuda

namespace {

using cuda::HaloArgs;
using cuda::HaloPlan;
using cuda::HaloTile;
using cuda::kHaloArgs;
using cuda::kHaloChunks;
using cuda::kHaloKernels;

HaloArgs unpack(const std::vector<int64_t>& args) {
  RESNET_FAST_CHECK(args.size() == kHaloArgs, "conv_halo: args has ", args.size(), " integers, want ", kHaloArgs);
  uint32_t fields[kHaloArgs];
  for (int i = 0; i < kHaloArgs; ++i) {
    fields[i] = static_cast<uint32_t>(args[i]);
    RESNET_FAST_CHECK(fields[i] == args[i], "conv_halo: args has ", args[i], ", want 0 to 4294967295");
  }
  HaloArgs a;
  static_assert(sizeof a == sizeof fields);
  std::memcpy(&a, fields, sizeof a);
  return a;
}

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
  const HaloArgs a = unpack(args);
  RESNET_FAST_CHECK(a.splits >= 1, "conv_halo: splits is ", a.splits, ", want at least 1");
  if (!cuda::supports(t, a)) return {};
  const HaloPlan plan = cuda::plan_halo(t, a);
  if (plan.args.splits != a.splits || plan.shared > cuda::kMaxShared || plan.blocks > INT32_MAX) return {};
  std::vector<int64_t> out = {plan.blocks, plan.threads, plan.shared, plan.partial_floats, plan.counters};
  uint32_t fields[kHaloArgs];
  std::memcpy(fields, &plan.args, sizeof fields);
  out.insert(out.end(), fields, fields + kHaloArgs);
  return out;
}

// Launches `tile` by a plan of the above.
void conv_halo_launch(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& residual, Tensor y, const std::optional<Tensor>& partial,
                      const std::optional<Tensor>& counters, int64_t tile, const std::vector<int64_t>& args) {
  const HaloTile& t = tile_of(tile);
  const HaloArgs given = unpack(args);
  RESNET_FAST_CHECK(cuda::supports(t, given), "conv_halo: tile ", tile, " cannot compute this convolution");
  const HaloPlan plan = cuda::plan_halo(t, given);
  const HaloArgs& a = plan.args;
  const auto holds = [&](const char* name, const Tensor& tensor, int64_t elements) {
    RESNET_FAST_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "conv_halo: ", name,
                      " is not on the device that x is on");
    RESNET_FAST_CHECK(tensor.numel() >= elements, "conv_halo: ", name, " has ", tensor.numel(), " elements, want ",
                      elements);
    RESNET_FAST_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, "conv_halo: ", name,
                      " is not aligned to 16 bytes");
  };
  const int64_t pixels = int64_t{a.batch} * a.out_height * a.out_width;
  holds("x", x, int64_t{a.batch} * a.height * a.width * a.channels);
  holds("weight", weight, int64_t{a.out_channels} * 9 * a.channels);
  holds("scale", scale, a.out_channels);
  holds("shift", shift, a.out_channels);
  holds("y", y, pixels * a.out_channels);
  if (residual) holds("residual", *residual, pixels * a.out_channels);
  if (a.splits > 1) {
    RESNET_FAST_CHECK(partial && counters, "conv_halo: partial and counters are None, want the workspace of split-K");
    holds("partial", *partial, plan.partial_floats);
    holds("counters", *counters, plan.counters);
  }

  const int instance = static_cast<int>(tile) * kHaloKernels + (a.stride - 1) * kHaloChunks +
                       (a.chunk == 64   ? 0
                        : a.chunk == 32 ? 1
                                        : 2);
  const void* kernel = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Half: kernel = cuda::halo_kernel<__half>(instance); break;
    case ScalarType::BFloat16: kernel = cuda::halo_kernel<__nv_bfloat16>(instance); break;
    default: break;
  }
  RESNET_FAST_CHECK(kernel != nullptr, "conv_halo: x has dtype ", dtype_name(x.scalar_type()),
                    ", want float16 or bfloat16");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index());
  RESNET_FAST_CHECK(major == 9 && minor == 0, "conv_halo: the device has compute capability ", major, ".", minor,
                    ", want 9.0");
  const void *px = x.data_ptr(), *pw = weight.data_ptr(), *pscale = scale.data_ptr(), *pshift = shift.data_ptr();
  const void* presidual = residual ? residual->data_ptr() : nullptr;
  void *py = y.data_ptr(), *ppartial = partial ? partial->data_ptr() : nullptr;
  void* pcounters = counters ? counters->data_ptr() : nullptr;
  void* parameters[] = {&px, &pw, &pscale, &pshift, &presidual, &py, &ppartial, &pcounters, const_cast<HaloArgs*>(&a)};
  launch_kernel("conv_halo", kernel, dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(a.splits)),
                plan.threads, parameters, plan.shared, current_stream(x));
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
