// wgmma of Hopper: sums of 64 rows x kColumns, a and b in shared memory as descriptors name them, both K-major without
// swizzle. A wrapper needs one operand for each of its registers, hence the lists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// wgmma exists for sm_90a alone; elsewhere the wrappers stop the kernel.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RESNET_FAST_WGMMA 1
#endif

namespace resnet_fast::cuda::ptx {

// A matrix of 8-row groups of 16-byte pieces (8 values of k): bytes from a group of rows to the next, and from a piece
// to the next 8 values of k. The address is that of the first piece, a multiple of 16.
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t rows_apart, uint32_t pieces_apart) {
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(pieces_apart >> 4) << 16 |
         static_cast<uint64_t>(rows_apart >> 4) << 32;
}

// The same, `bytes` further on: a multiple of 16. Addresses of shared memory fit their field, so there is no carry.
__device__ inline uint64_t further(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return descriptor & 0xffffffff00000000 | low;
}

// Before the first product, and before those that follow other accesses to the same registers.
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

// Waits for all products but those of the newest kPending groups.
template <int kPending>
__device__ void wgmma_wait() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from reading sums before the wait that covers them: to it they are ready when the product is
// issued.
template <int kCount>
__device__ void hold(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What ordinary stores and cp.async of this thread, or of others before a barrier, have written to shared memory
// becomes visible to wgmma.
__device__ inline void fence_async_proxy() {
#ifdef RESNET_FAST_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define RESNET_FAST_PLACES_1 "%0, %1, %2, %3"
#define RESNET_FAST_PLACES_2 RESNET_FAST_PLACES_1 ", %4, %5, %6, %7"
#define RESNET_FAST_PLACES_3 RESNET_FAST_PLACES_2 ", %8, %9, %10, %11"
#define RESNET_FAST_PLACES_4 RESNET_FAST_PLACES_3 ", %12, %13, %14, %15"
#define RESNET_FAST_PLACES_5 RESNET_FAST_PLACES_4 ", %16, %17, %18, %19"
#define RESNET_FAST_PLACES_6 RESNET_FAST_PLACES_5 ", %20, %21, %22, %23"
#define RESNET_FAST_PLACES_7 RESNET_FAST_PLACES_6 ", %24, %25, %26, %27"
#define RESNET_FAST_PLACES_8 RESNET_FAST_PLACES_7 ", %28, %29, %30, %31"
#define RESNET_FAST_PLACES_9 RESNET_FAST_PLACES_8 ", %32, %33, %34, %35"
#define RESNET_FAST_PLACES_10 RESNET_FAST_PLACES_9 ", %36, %37, %38, %39"
#define RESNET_FAST_PLACES_11 RESNET_FAST_PLACES_10 ", %40, %41, %42, %43"
#define RESNET_FAST_PLACES_12 RESNET_FAST_PLACES_11 ", %44, %45, %46, %47"
#define RESNET_FAST_PLACES_13 RESNET_FAST_PLACES_12 ", %48, %49, %50, %51"
#define RESNET_FAST_PLACES_14 RESNET_FAST_PLACES_13 ", %52, %53, %54, %55"
#define RESNET_FAST_PLACES_15 RESNET_FAST_PLACES_14 ", %56, %57, %58, %59"
#define RESNET_FAST_PLACES_16 RESNET_FAST_PLACES_15 ", %60, %61, %62, %63"
#define RESNET_FAST_PLACES_17 RESNET_FAST_PLACES_16 ", %64, %65, %66, %67"
#define RESNET_FAST_PLACES_18 RESNET_FAST_PLACES_17 ", %68, %69, %70, %71"
#define RESNET_FAST_PLACES_19 RESNET_FAST_PLACES_18 ", %72, %73, %74, %75"
#define RESNET_FAST_PLACES_20 RESNET_FAST_PLACES_19 ", %76, %77, %78, %79"
#define RESNET_FAST_PLACES_21 RESNET_FAST_PLACES_20 ", %80, %81, %82, %83"
#define RESNET_FAST_PLACES_22 RESNET_FAST_PLACES_21 ", %84, %85, %86, %87"
#define RESNET_FAST_PLACES_23 RESNET_FAST_PLACES_22 ", %88, %89, %90, %91"
#define RESNET_FAST_PLACES_24 RESNET_FAST_PLACES_23 ", %92, %93, %94, %95"
#define RESNET_FAST_PLACES_25 RESNET_FAST_PLACES_24 ", %96, %97, %98, %99"
#define RESNET_FAST_PLACES_26 RESNET_FAST_PLACES_25 ", %100, %101, %102, %103"
#define RESNET_FAST_PLACES_27 RESNET_FAST_PLACES_26 ", %104, %105, %106, %107"
#define RESNET_FAST_PLACES_28 RESNET_FAST_PLACES_27 ", %108, %109, %110, %111"
#define RESNET_FAST_PLACES_29 RESNET_FAST_PLACES_28 ", %112, %113, %114, %115"
#define RESNET_FAST_PLACES_30 RESNET_FAST_PLACES_29 ", %116, %117, %118, %119"
#define RESNET_FAST_PLACES_31 RESNET_FAST_PLACES_30 ", %120, %121, %122, %123"
#define RESNET_FAST_PLACES_32 RESNET_FAST_PLACES_31 ", %124, %125, %126, %127"

#define RESNET_FAST_SUMS_1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define RESNET_FAST_SUMS_2 RESNET_FAST_SUMS_1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define RESNET_FAST_SUMS_3 RESNET_FAST_SUMS_2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define RESNET_FAST_SUMS_4 RESNET_FAST_SUMS_3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define RESNET_FAST_SUMS_5 RESNET_FAST_SUMS_4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define RESNET_FAST_SUMS_6 RESNET_FAST_SUMS_5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define RESNET_FAST_SUMS_7 RESNET_FAST_SUMS_6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define RESNET_FAST_SUMS_8 RESNET_FAST_SUMS_7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define RESNET_FAST_SUMS_9 RESNET_FAST_SUMS_8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define RESNET_FAST_SUMS_10 RESNET_FAST_SUMS_9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define RESNET_FAST_SUMS_11 RESNET_FAST_SUMS_10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define RESNET_FAST_SUMS_12 RESNET_FAST_SUMS_11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define RESNET_FAST_SUMS_13 RESNET_FAST_SUMS_12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define RESNET_FAST_SUMS_14 RESNET_FAST_SUMS_13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define RESNET_FAST_SUMS_15 RESNET_FAST_SUMS_14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define RESNET_FAST_SUMS_16 RESNET_FAST_SUMS_15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define RESNET_FAST_SUMS_17 RESNET_FAST_SUMS_16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define RESNET_FAST_SUMS_18 RESNET_FAST_SUMS_17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define RESNET_FAST_SUMS_19 RESNET_FAST_SUMS_18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define RESNET_FAST_SUMS_20 RESNET_FAST_SUMS_19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define RESNET_FAST_SUMS_21 RESNET_FAST_SUMS_20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define RESNET_FAST_SUMS_22 RESNET_FAST_SUMS_21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define RESNET_FAST_SUMS_23 RESNET_FAST_SUMS_22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define RESNET_FAST_SUMS_24 RESNET_FAST_SUMS_23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define RESNET_FAST_SUMS_25 RESNET_FAST_SUMS_24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define RESNET_FAST_SUMS_26 RESNET_FAST_SUMS_25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define RESNET_FAST_SUMS_27 RESNET_FAST_SUMS_26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define RESNET_FAST_SUMS_28 RESNET_FAST_SUMS_27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define RESNET_FAST_SUMS_29 RESNET_FAST_SUMS_28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define RESNET_FAST_SUMS_30 RESNET_FAST_SUMS_29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define RESNET_FAST_SUMS_31 RESNET_FAST_SUMS_30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define RESNET_FAST_SUMS_32 RESNET_FAST_SUMS_31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// sums (+)= a b, 16 values of k; `accumulate` is 0 to start from zero. Columns, columns / 8, then the numbers of the
// operands that follow the sums.
#ifdef RESNET_FAST_WGMMA
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, T, type)                                              \
  __device__ inline void wgmma(float (&d)[kColumns / 2], uint64_t a_desc, uint64_t b_desc, int accumulate, T) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kColumns      \
                 "k16.f32." type "." type " {" RESNET_FAST_PLACES_##groups "}, " a ", " b ", p, 1, 1, 0, 0;\n}" \
                 : RESNET_FAST_SUMS_##groups                                                                    \
                 : "l"(a_desc), "l"(b_desc), "r"(accumulate)                                                    \
                 : "memory");                                                                                   \
  }
#else
#define RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, T, type) \
  __device__ inline void wgmma(float (&)[kColumns / 2], uint64_t, uint64_t, int, T) { __trap(); }
#endif
#define RESNET_FAST_WGMMA_COLUMNS(kColumns, groups, a, b, p)       \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, __half, "f16") \
  RESNET_FAST_WGMMA_TYPE(kColumns, groups, a, b, p, __nv_bfloat16, "bf16")

RESNET_FAST_WGMMA_COLUMNS(56, 7, "%28", "%29", "%30")
RESNET_FAST_WGMMA_COLUMNS(64, 8, "%32", "%33", "%34")
RESNET_FAST_WGMMA_COLUMNS(112, 14, "%56", "%57", "%58")
RESNET_FAST_WGMMA_COLUMNS(120, 15, "%60", "%61", "%62")
RESNET_FAST_WGMMA_COLUMNS(216, 27, "%108", "%109", "%110")
RESNET_FAST_WGMMA_COLUMNS(232, 29, "%116", "%117", "%118")

#undef RESNET_FAST_WGMMA_COLUMNS
#undef RESNET_FAST_WGMMA_TYPE

}  // namespace resnet_fast::cuda::ptx
