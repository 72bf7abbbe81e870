// Any CPU: a program exported on a CPU with bfloat16 instructions must run elsewhere, too. Nothing else uses these
// kernels: there is one set of them, and it is slow.
#define RESNET_FAST_VECTOR_BYTES 16
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed within this file only
#include "cpu/kernels/bf16/convert.h"
#include "cpu/kernels/bf16/direct_conv.h"
#include "cpu/kernels/bf16/weight_gradient.h"
#include "cpu/kernels/bf16/winograd.h"

namespace resnet_fast {
extern const Kernels<BFloat16> kBf16Portable = {
    "portable", false,       kBf16Lanes,        2, 2, conv_bf16<2, 4>, winograd_bf16<2, 4>,
    widen_bf16, narrow_bf16, pack_bf16_winograd};
extern const Kernels<Bf16Pair> kBf16PairPortable = bf16_pair_kernels<2, 4>();
}  // namespace resnet_fast
