// wgmma of Hopper: accumulators of 64 x kColumns; a and b in shared memory by descriptor, both K-major without swizzle.
// An asm statement takes one operand per accumulator register, hence the lists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// wgmma exists on sm_90a only; elsewhere wgmma() traps.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RESNET_FAST_WGMMA 1
#endif

namespace resnet_fast::cuda::ptx {

// Describes a matrix of core matrices (8 rows x 16 bytes, that is 8 values of k): bytes from one to the next along the
// rows (the PTX manual's stride offset) and along k (its leading offset). The address is a multiple of 16.
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t stride_bytes, uint32_t leading_bytes) {
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32;
}

// Moves a descriptor by `bytes`, a multiple of 16. Shared-memory addresses fit their field: no carry.
__device__ inline uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return descriptor & 0xffffffff00000000 | low;
}

// Orders accesses to the accumulator registers before the wgmmas that follow.
__device__ inline void wgmma_fence() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void wgmma_commit() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all wgmmas except the newest kPending groups.
template <int kPending>
__device__ void wgmma_wait() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from reading accumulators before the wait that covers them: it takes them for ready when the wgmma
// is issued.
template <int kCount>
__device__ void fence_accumulators(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// Makes shared memory that this thread wrote, by stores or cp.async, visible to wgmma.
__device__ inline void fence_async_proxy() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define RESNET_FAST_OPERANDS_1 "%0, %1, %2, %3"
#define RESNET_FAST_OPERANDS_2 RESNET_FAST_OPERANDS_1 ", %4, %5, %6, %7"
#define RESNET_FAST_OPERANDS_3 RESNET_FAST_OPERANDS_2 ", %8, %9, %10, %11"
#define RESNET_FAST_OPERANDS_4 RESNET_FAST_OPERANDS_3 ", %12, %13, %14, %15"
#define RESNET_FAST_OPERANDS_5 RESNET_FAST_OPERANDS_4 ", %16, %17, %18, %19"
#define RESNET_FAST_OPERANDS_6 RESNET_FAST_OPERANDS_5 ", %20, %21, %22, %23"
#define RESNET_FAST_OPERANDS_7 RESNET_FAST_OPERANDS_6 ", %24, %25, %26, %27"
#define RESNET_FAST_OPERANDS_8 RESNET_FAST_OPERANDS_7 ", %28, %29, %30, %31"
#define RESNET_FAST_OPERANDS_9 RESNET_FAST_OPERANDS_8 ", %32, %33, %34, %35"
#define RESNET_FAST_OPERANDS_10 RESNET_FAST_OPERANDS_9 ", %36, %37, %38, %39"
#define RESNET_FAST_OPERANDS_11 RESNET_FAST_OPERANDS_10 ", %40, %41, %42, %43"
#define RESNET_FAST_OPERANDS_12 RESNET_FAST_OPERANDS_11 ", %44, %45, %46, %47"
#define RESNET_FAST_OPERANDS_13 RESNET_FAST_OPERANDS_12 ", %48, %49, %50, %51"
#define RESNET_FAST_OPERANDS_14 RESNET_FAST_OPERANDS_13 ", %52, %53, %54, %55"
#define RESNET_FAST_OPERANDS_15 RESNET_FAST_OPERANDS_14 ", %56, %57, %58, %59"
#define RESNET_FAST_OPERANDS_16 RESNET_FAST_OPERANDS_15 ", %60, %61, %62, %63"
#define RESNET_FAST_OPERANDS_17 RESNET_FAST_OPERANDS_16 ", %64, %65, %66, %67"
#define RESNET_FAST_OPERANDS_18 RESNET_FAST_OPERANDS_17 ", %68, %69, %70, %71"
#define RESNET_FAST_OPERANDS_19 RESNET_FAST_OPERANDS_18 ", %72, %73, %74, %75"
#define RESNET_FAST_OPERANDS_20 RESNET_FAST_OPERANDS_19 ", %76, %77, %78, %79"
#define RESNET_FAST_OPERANDS_21 RESNET_FAST_OPERANDS_20 ", %80, %81, %82, %83"
#define RESNET_FAST_OPERANDS_22 RESNET_FAST_OPERANDS_21 ", %84, %85, %86, %87"
#define RESNET_FAST_OPERANDS_23 RESNET_FAST_OPERANDS_22 ", %88, %89, %90, %91"
#define RESNET_FAST_OPERANDS_24 RESNET_FAST_OPERANDS_23 ", %92, %93, %94, %95"
#define RESNET_FAST_OPERANDS_25 RESNET_FAST_OPERANDS_24 ", %96, %97, %98, %99"
#define RESNET_FAST_OPERANDS_26 RESNET_FAST_OPERANDS_25 ", %100, %101, %102, %103"
#define RESNET_FAST_OPERANDS_27 RESNET_FAST_OPERANDS_26 ", %104, %105, %106, %107"
#define RESNET_FAST_OPERANDS_28 RESNET_FAST_OPERANDS_27 ", %108, %109, %110, %111"
#define RESNET_FAST_OPERANDS_29 RESNET_FAST_OPERANDS_28 ", %112, %113, %114, %115"
#define RESNET_FAST_OPERANDS_30 RESNET_FAST_OPERANDS_29 ", %116, %117, %118, %119"
#define RESNET_FAST_OPERANDS_31 RESNET_FAST_OPERANDS_30 ", %120, %121, %122, %123"
#define RESNET_FAST_OPERANDS_32 RESNET_FAST_OPERANDS_31 ", %124, %125, %126, %127"

#define RESNET_FAST_ACC_1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define RESNET_FAST_ACC_2 RESNET_FAST_ACC_1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define RESNET_FAST_ACC_3 RESNET_FAST_ACC_2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define RESNET_FAST_ACC_4 RESNET_FAST_ACC_3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define RESNET_FAST_ACC_5 RESNET_FAST_ACC_4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define RESNET_FAST_ACC_6 RESNET_FAST_ACC_5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define RESNET_FAST_ACC_7 RESNET_FAST_ACC_6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define RESNET_FAST_ACC_8 RESNET_FAST_ACC_7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define RESNET_FAST_ACC_9 RESNET_FAST_ACC_8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define RESNET_FAST_ACC_10 RESNET_FAST_ACC_9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define RESNET_FAST_ACC_11 RESNET_FAST_ACC_10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define RESNET_FAST_ACC_12 RESNET_FAST_ACC_11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define RESNET_FAST_ACC_13 RESNET_FAST_ACC_12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define RESNET_FAST_ACC_14 RESNET_FAST_ACC_13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define RESNET_FAST_ACC_15 RESNET_FAST_ACC_14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define RESNET_FAST_ACC_16 RESNET_FAST_ACC_15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define RESNET_FAST_ACC_17 RESNET_FAST_ACC_16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define RESNET_FAST_ACC_18 RESNET_FAST_ACC_17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define RESNET_FAST_ACC_19 RESNET_FAST_ACC_18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define RESNET_FAST_ACC_20 RESNET_FAST_ACC_19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define RESNET_FAST_ACC_21 RESNET_FAST_ACC_20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define RESNET_FAST_ACC_22 RESNET_FAST_ACC_21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define RESNET_FAST_ACC_23 RESNET_FAST_ACC_22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define RESNET_FAST_ACC_24 RESNET_FAST_ACC_23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define RESNET_FAST_ACC_25 RESNET_FAST_ACC_24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define RESNET_FAST_ACC_26 RESNET_FAST_ACC_25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define RESNET_FAST_ACC_27 RESNET_FAST_ACC_26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define RESNET_FAST_ACC_28 RESNET_FAST_ACC_27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define RESNET_FAST_ACC_29 RESNET_FAST_ACC_28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define RESNET_FAST_ACC_30 RESNET_FAST_ACC_29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define RESNET_FAST_ACC_31 RESNET_FAST_ACC_30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define RESNET_FAST_ACC_32 RESNET_FAST_ACC_31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// acc = a b [+ acc] over 16 values of k; `accumulate` 0 starts from zero. kTransposedA: a is M-major, a core matrix 8
// values of k x 16 bytes of rows. Arguments: columns, columns / 8, then the numbers of the operands behind the
// accumulators.
#ifdef RESNET_FAST_WGMMA
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, t, T, type)                                                 \
  template <int kTransposedA = 0>                                                                                     \
  __device__ void wgmma(float (&d)[kColumns / 2], uint64_t a_desc, uint64_t b_desc, int accumulate, T) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kColumns            \
                 "k16.f32." type "." type " {" RESNET_FAST_OPERANDS_##groups "}, " a ", " b ", p, 1, 1, " t ", 0;\n}" \
                 : RESNET_FAST_ACC_##groups                                                                           \
                 : "l"(a_desc), "l"(b_desc), "r"(accumulate), "n"(kTransposedA)                                       \
                 : "memory");                                                                                         \
  }
#else
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, t, T, type)          \
  template <int kTransposedA = 0>                                              \
  __device__ void wgmma(float (&)[kColumns / 2], uint64_t, uint64_t, int, T) { \
    __trap();                                                                  \
  }
#endif
#define RESNET_FAST_WGMMA_COLUMNS(kColumns, groups, a, b, p, t)       \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, t, __half, "f16") \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, t, __nv_bfloat16, "bf16")

RESNET_FAST_WGMMA_COLUMNS(56, 7, "%28", "%29", "%30", "%31")
RESNET_FAST_WGMMA_COLUMNS(64, 8, "%32", "%33", "%34", "%35")
RESNET_FAST_WGMMA_COLUMNS(72, 9, "%36", "%37", "%38", "%39")
RESNET_FAST_WGMMA_COLUMNS(112, 14, "%56", "%57", "%58", "%59")
RESNET_FAST_WGMMA_COLUMNS(120, 15, "%60", "%61", "%62", "%63")
RESNET_FAST_WGMMA_COLUMNS(128, 16, "%64", "%65", "%66", "%67")
RESNET_FAST_WGMMA_COLUMNS(136, 17, "%68", "%69", "%70", "%71")
RESNET_FAST_WGMMA_COLUMNS(216, 27, "%108", "%109", "%110", "%111")
RESNET_FAST_WGMMA_COLUMNS(232, 29, "%116", "%117", "%118", "%119")
RESNET_FAST_WGMMA_COLUMNS(256, 32, "%128", "%129", "%130", "%131")

#undef RESNET_FAST_WGMMA_COLUMNS
#undef RESNET_FAST_WGMMA_TYPE

}  // namespace resnet_fast::cuda::ptx
