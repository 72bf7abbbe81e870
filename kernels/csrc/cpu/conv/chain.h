// A chain of convolutions, run as one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace resnet_fast {

// One convolution of a chain. Values are numbered: the inputs first, then each layer's output in turn.
struct Layer {
  int64_t input;  // value it reads
  int64_t residual;  // value it adds, or -1
  int64_t relu;  // 0 or 1
  int64_t out_channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
constexpr int64_t kLayerFields = 10;
static_assert(sizeof(Layer) == kLayerFields * sizeof(int64_t), "a layer is read from a list of integers");

// Max pooling; what lies in the padding does not count.
struct Pool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
constexpr int64_t kPoolFields = 6;
static_assert(sizeof(Pool) == kPoolFields * sizeof(int64_t), "a pooling is read from a list of integers");

// The last layer's output, pooled if `pool` says so, channels_last, in the dtype of the inputs. Checks everything
// before it touches memory.
torch::stable::Tensor run_stage(const char* op, const std::vector<torch::stable::Tensor>& inputs,
                                const std::vector<torch::stable::Tensor>& filters, const std::vector<Layer>& layers,
                                const Pool* pool = nullptr);

// Whether this thread's last run met numbers that are not finite in tiles of Winograd, which spread them further than
// the windows that meet them. Asked once: the answer is false afterwards.
bool take_spread();

}  // namespace resnet_fast
