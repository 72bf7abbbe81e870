// A chain of convolutions, run as one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace resnet_fast {

// One convolution of a chain. Values are numbered: the inputs first, then the output of each layer.
struct Layer {
  int64_t input;  // value it reads
  int64_t residual;  // value it adds, or -1
  int64_t relu;  // 0 or 1
  int64_t out_channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
constexpr int64_t kLayerFields = 10;
static_assert(sizeof(Layer) == kLayerFields * sizeof(int64_t), "a layer is read from a list of integers");

// Max pooling; padding does not count.
struct Pool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
constexpr int64_t kPoolFields = 6;
static_assert(sizeof(Pool) == kPoolFields * sizeof(int64_t), "a pooling is read from a list of integers");

// The output of the last layer, pooled where `pool` is given, channels_last, in the dtype of the inputs. Checks all
// arguments before it touches memory.
torch::stable::Tensor run_chain(const char* op, const std::vector<torch::stable::Tensor>& inputs,
                                const std::vector<torch::stable::Tensor>& filters, const std::vector<Layer>& layers,
                                const Pool* pool = nullptr);

// Whether Winograd tiles of this thread's last run read Inf or NaN, which they spread beyond the windows that contain
// it. Resets the answer to false.
bool take_spread();

}  // namespace resnet_fast
