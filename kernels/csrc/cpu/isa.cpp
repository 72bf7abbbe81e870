#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

namespace resnet_fast {
namespace {

// __builtin_cpu_supports reads CPUID and XCR0: the operating system must save the registers, too.
Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    best = Isa::avx512;
  }
#endif
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (cap == nullptr) return best;
  if (std::strcmp(cap, "default") == 0) return Isa::baseline;
  if (std::strcmp(cap, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

template <>
const Kernels<float>& kernels_in_use<float>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kFloatAvx512;
  if (isa() == Isa::avx2) return kFloatAvx2;
#endif
  return kFloatBaseline;
}

template <>
const Kernels<double>& kernels_in_use<double>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kDoubleAvx512;
  if (isa() == Isa::avx2) return kDoubleAvx2;
#endif
  return kDoubleBaseline;
}

template <>
const Kernels<BFloat16>& kernels_in_use<BFloat16>() {
#if defined(__x86_64__)
  static const bool native = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  if (native) return kBf16Avx512;
#endif
  return kBf16Portable;
}

template <>
const Kernels<Bf16Pair>& kernels_in_use<Bf16Pair>() {
#if defined(__x86_64__)
  static const bool native = kernels_in_use<BFloat16>().native;
  if (native) return kBf16PairAvx512;
#endif
  return kBf16PairPortable;
}

namespace {
int64_t cpu_isa() { return static_cast<int64_t>(isa()); }
bool cpu_multiplies_bf16() { return kernels_in_use<BFloat16>().native; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_multiplies_bf16", TORCH_BOX(&cpu_multiplies_bf16));
}

}  // namespace resnet_fast
