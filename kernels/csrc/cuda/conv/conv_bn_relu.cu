// Launcher of conv_bn_relu on CUDA devices; its tiles and geometry for the tuner.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda/conv/conv_plan.h"
#include "cuda/kernel_names.h"
#include "cuda/launch.h"

namespace resnet_fast {
namespace cuda {
template <typename T>
const void* conv_kernel(int tile);
}  // namespace cuda

namespace {

using cuda::ConvArgs;
using cuda::ConvTile;
using cuda::kConvArgs;

ConvArgs unpack(const std::vector<int64_t>& args) {
  RESNET_FAST_CHECK(args.size() == kConvArgs, "conv_bn_relu: args has ", args.size(), " integers, want ", kConvArgs);
  int32_t fields[kConvArgs];
  for (int i = 0; i < kConvArgs; ++i) {
    fields[i] = static_cast<int32_t>(args[i]);
    RESNET_FAST_CHECK(fields[i] == args[i] && args[i] >= 0, "conv_bn_relu: args has ", args[i],
                      ", want 0 to 2147483647");
  }
  ConvArgs a;
  static_assert(sizeof a == sizeof fields);
  std::memcpy(&a, fields, sizeof a);
  return a;
}

const ConvTile& tile_of(int64_t tile) {
  RESNET_FAST_CHECK(tile >= 0 && tile < cuda::kConvTileCount, "conv_bn_relu: tile is ", tile, ", want 0 to ",
                    cuda::kConvTileCount - 1);
  return cuda::kConvTiles[tile];
}

// One row per tile: load, math, most and fewest pixels that a block computes, channels, threads, bytes of a k step, and
// warps along pixels, channels and k.
std::vector<int64_t> conv_bn_relu_tiles() {
  std::vector<int64_t> rows;
  for (const ConvTile& t : cuda::kConvTiles) {
    for (const int64_t field : {static_cast<int>(t.load), static_cast<int>(t.math), t.m(), 16 * t.min_mt * t.warps_m,
                                t.n(), t.threads(), t.row_bytes, t.warps_m, t.warps_n, t.warps_k})
      rows.push_back(field);
  }
  return rows;
}

// [blocks, threads, shared, partial_floats, counters, completed args]; empty if the tile cannot compute it.
std::vector<int64_t> conv_bn_relu_plan(int64_t tile, const std::vector<int64_t>& args, int64_t element_size,
                                       bool aligned) {
  RESNET_FAST_CHECK(element_size == 2 || element_size == 4, "conv_bn_relu: element_size is ", element_size,
                    ", want 2 or 4");
  const ConvTile& t = tile_of(tile);
  const ConvArgs a = unpack(args);
  RESNET_FAST_CHECK(a.tile_pixels >= 1 && a.tile_pixels <= t.m(), "conv_bn_relu: tile_pixels is ", a.tile_pixels,
                    ", want 1 to ", t.m());
  RESNET_FAST_CHECK(a.splits >= 1, "conv_bn_relu: splits is ", a.splits, ", want at least 1");
  if (!cuda::has_instance(t, static_cast<int>(element_size)) ||
      !cuda::supports(t, a, static_cast<int>(element_size), aligned))
    return {};
  const cuda::ConvPlan plan = cuda::plan_conv(t, a, static_cast<int>(element_size));
  if ((a.splits > 1 && plan.args.k_blocks < a.splits) || plan.blocks > INT32_MAX) return {};
  std::vector<int64_t> out = {plan.blocks, plan.threads, plan.shared, plan.partial_floats, plan.counters};
  int32_t fields[kConvArgs];
  std::memcpy(fields, &plan.args, sizeof fields);
  out.insert(out.end(), fields, fields + kConvArgs);
  return out;
}

// Launches `tile` by a plan of the above.
void conv_bn_relu_launch(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                         const std::optional<Tensor>& residual, Tensor y, const std::optional<Tensor>& partial,
                         const std::optional<Tensor>& counters, int64_t tile, const std::vector<int64_t>& args) {
  const ConvTile& t = tile_of(tile);
  const ConvArgs given = unpack(args);
  const auto size = static_cast<int>(x.element_size());
  const cuda::ConvPlan plan = cuda::plan_conv(t, given, size);
  const ConvArgs& a = plan.args;
  const auto holds = [&](const char* name, const Tensor& tensor, int64_t elements) {
    RESNET_FAST_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "conv_bn_relu: ", name,
                      " is not on the device that x is on");
    RESNET_FAST_CHECK(tensor.numel() >= elements, "conv_bn_relu: ", name, " has ", tensor.numel(), " elements, want ",
                      elements);
  };
  holds("x", x, int64_t{a.batch} * a.height * a.width * a.channels);
  holds("weight", weight, int64_t{a.out_channels} * a.kernel_h * a.kernel_w * a.channels);
  holds("scale", scale, a.out_channels);
  holds("shift", shift, a.out_channels);
  holds("y", y, int64_t{a.pixels} * a.out_channels);
  if (residual) holds("residual", *residual, int64_t{a.pixels} * a.out_channels);
  if (a.splits > 1) {
    RESNET_FAST_CHECK(partial && counters,
                      "conv_bn_relu: partial and counters are None, want the workspace of split-K");
    holds("partial", *partial, plan.partial_floats);
    holds("counters", *counters, plan.counters);
  }
  if (plan.blocks == 0) return;

  const void* kernel = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Half: kernel = cuda::conv_kernel<__half>(static_cast<int>(tile)); break;
    case ScalarType::BFloat16: kernel = cuda::conv_kernel<__nv_bfloat16>(static_cast<int>(tile)); break;
    case ScalarType::Float: kernel = cuda::conv_kernel<float>(static_cast<int>(tile)); break;
    default: break;
  }
  RESNET_FAST_CHECK(kernel != nullptr, "conv_bn_relu: x has dtype ", dtype_name(x.scalar_type()), ", which tile ", tile,
                    " does not compute");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const void *px = x.data_ptr(), *pw = weight.data_ptr(), *pscale = scale.data_ptr(), *pshift = shift.data_ptr();
  const void* presidual = residual ? residual->data_ptr() : nullptr;
  void *py = y.data_ptr(), *ppartial = partial ? partial->data_ptr() : nullptr;
  void* pcounters = counters ? counters->data_ptr() : nullptr;
  void* parameters[] = {&px, &pw, &pscale, &pshift, &presidual, &py, &ppartial, &pcounters, const_cast<ConvArgs*>(&a)};
  launch_kernel("conv_bn_relu", kernel, dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(a.splits)),
                plan.threads, parameters, plan.shared, current_stream(x));
}

template <typename T>
void name_tiles(const std::string& dtype) {
  for (int i = 0; i < cuda::kConvTileCount; ++i)
    if (const void* kernel = cuda::conv_kernel<T>(i))
      name_kernel("conv_bn_relu_fwd_kernel<" + dtype + ", " + std::to_string(i) + ">", kernel);
}

const bool named =
    (name_tiles<__half>("float16"), name_tiles<__nv_bfloat16>("bfloat16"), name_tiles<float>("float32"), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_bn_relu_tiles", TORCH_BOX(&conv_bn_relu_tiles));
  m.impl("conv_bn_relu_plan", TORCH_BOX(&conv_bn_relu_plan));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("conv_bn_relu_launch", TORCH_BOX(&conv_bn_relu_launch)); }

}  // namespace resnet_fast
