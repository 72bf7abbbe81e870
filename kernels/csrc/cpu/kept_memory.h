// A caching allocator for activations and scratch memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace resnet_fast {

// As torch::stable::empty on the CPU: dense, four sizes in channels_last.
torch::stable::Tensor empty_tensor(std::initializer_list<int64_t> size, torch::headeronly::ScalarType type);

// As torch::stable::empty_like.
torch::stable::Tensor empty_tensor_like(const torch::stable::Tensor& t);

}  // namespace resnet_fast
