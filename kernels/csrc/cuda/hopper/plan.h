// What the plans of the convolutions for Hopper share. No CUDA, no PyTorch.
#pragma once

#include <cstdint>

namespace resnet_fast::cuda {

// Bytes of shared memory of a multiprocessor, and what each of its blocks takes beside its own.
constexpr int kMultiprocessorShared = 228 * 1024, kReservedShared = 1024;
constexpr int kMaxShared = kMultiprocessorShared - kReservedShared;

// n / d is the upper half of n * inverse_of(d), for 1 < d and n * d < 2^32.
constexpr uint32_t inverse_of(uint32_t d) { return static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d); }

}  // namespace resnet_fast::cuda
