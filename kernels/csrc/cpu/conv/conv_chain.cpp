// The operator residual_stage: a chain of convolutions with packed filters, and max pooling of its output.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "checks.h"
#include "cpu/conv/chain.h"

namespace resnet_fast {
namespace {

Tensor conv_chain(const Tensor& x, const std::vector<Tensor>& filters, const std::vector<int64_t>& layers,
                  const std::vector<int64_t>& pool) {
  RESNET_FAST_CHECK(layers.size() % kLayerFields == 0, "residual_stage: layers has ", layers.size(), " integers, want ",
                    kLayerFields, " for each layer");
  std::vector<Layer> parsed(layers.size() / kLayerFields);
  std::memcpy(parsed.data(), layers.data(), layers.size() * sizeof(int64_t));
  RESNET_FAST_CHECK(pool.empty() || pool.size() == kPoolFields, "residual_stage: pool has ", pool.size(),
                    " integers, want none or ", kPoolFields, ": window, stride and padding");
  Pool window{};
  if (!pool.empty()) std::memcpy(&window, pool.data(), sizeof window);
  return run_chain("residual_stage", {x}, filters, parsed, pool.empty() ? nullptr : &window);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) { m.impl("residual_stage", TORCH_BOX(&conv_chain)); }

}  // namespace resnet_fast
