#if defined(__x86_64__)
// 32 registers: 12 pixels or 14 tiles x 2 accumulators, 2 vectors of the panel, broadcasts.
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#define RESNET_FAST_VECTOR_BYTES 64
#define RESNET_FAST_AVX512_BF16
#include "cpu/kernels/bf16/convert.h"
#include "cpu/kernels/bf16/direct_conv.h"
#include "cpu/kernels/bf16/weight_gradient.h"
#include "cpu/kernels/bf16/winograd.h"

namespace resnet_fast {
extern const Kernels<BFloat16> kBf16Avx512 = {
    "avx512_bf16", true,        kBf16Lanes,        2, 12, conv_bf16<12, 24>, winograd_bf16<14, 28>,
    widen_bf16,    narrow_bf16, pack_bf16_winograd};
extern const Kernels<Bf16Pair> kBf16PairAvx512 = bf16_pair_kernels<14, 28>();
}  // namespace resnet_fast
#endif  // __x86_64__
