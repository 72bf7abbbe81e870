// Kernels of sm_90a: bulk copies with mbarriers, warps in roles. WGMMA is replaced by the text of wgmma_call().
#include <cuda_fp16.h>
#include <cstdint>
__device__ inline uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline void init(uint64_t* b, unsigned n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(n) : "memory"); }
__device__ inline void arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory"); }
__device__ inline void expect(uint64_t* b, unsigned n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(n) : "memory"); }
__device__ inline void wait(uint64_t* b, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(address(b)), "r"(parity) : "memory");
}
__device__ inline void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void bulk(void* to, const void* from, unsigned n, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)), "l"(from), "r"(n), "r"(address(b)) : "memory");
}
extern "C" {
// One product with operands as the host laid them out: images of shared memory, descriptors without the address.
__global__ void product(const uint4* a, const uint4* b, unsigned a_pieces, unsigned b_pieces, uint64_t a_desc, uint64_t b_desc, unsigned accumulate, float* out, const uint32_t* fragments) {
  extern __shared__ __align__(1024) uint4 memory[];
  uint4* at_b = memory + (a_pieces + 63) / 64 * 64;
  for (unsigned i = threadIdx.x; i < a_pieces; i += 128) memory[i] = a[i];
  for (unsigned i = threadIdx.x; i < b_pieces; i += 128) at_b[i] = b[i];
  fence_proxy();
  __syncthreads();
  a_desc |= address(memory) >> 4;
  b_desc |= address(at_b) >> 4;
  float d[COUNT];
  uint32_t f[4];
  for (int i = 0; i < 4; ++i) f[i] = fragments[4 * threadIdx.x + i];
  for (int i = 0; i < COUNT; ++i) d[i] = out[i * 128 + threadIdx.x];
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < COUNT; ++i) out[i * 128 + threadIdx.x] = d[i];
}
// Warp 0 copies rows of 128 numbers through three buffers, a thread of warps 1 to 4 doubles one number.
__global__ void pipeline(const float* x, float* y, int rows, unsigned promised) {
  __shared__ __align__(16) float buffer[3][128];
  __shared__ uint64_t full[3], empty[3];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) init(full + i, 1), init(empty + i, 128);
    fence_proxy();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0)
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        if (r >= 3) wait(empty + r % 3, (r / 3 - 1) & 1);
        expect(full + r % 3, promised);
        bulk(buffer[r % 3], x + 128 * r, 512, full + r % 3);
      }
  } else {
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      wait(full + r % 3, r / 3 & 1);
      y[128 * r + threadIdx.x - 32] = 2 * buffer[r % 3][threadIdx.x - 32];
      arrive(empty + r % 3);
    }
  }
}
// A bulk copy over what the block has stored needs the proxy fence, too.
__global__ void overwritten(const float* x, float* y) {
  __shared__ __align__(16) float buffer[128];
  __shared__ uint64_t full;
  buffer[threadIdx.x] = 1;
  if (threadIdx.x == 0) init(&full, 1);
  fence_proxy();
  __syncthreads();
  if (threadIdx.x == 0) expect(&full, 512), bulk(buffer, x, 512, &full);
  wait(&full, 0);
  y[threadIdx.x] = buffer[threadIdx.x];
}
// Two warpgroups hand rows over by named barriers; elected lanes count the warps.
__global__ void __launch_bounds__(256, 1) roles(const int* x, int* y, int* warps, int rows) {
  __shared__ int row[128];
  unsigned leads;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(leads));
  if (leads) atomicAdd(warps, 1);
  const int t = threadIdx.x % 128;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    for (int r = 0; r < rows; ++r) {
      if (r) asm volatile("barrier.sync 2, 256;" ::: "memory");
      row[t] = x[128 * r + t];
      asm volatile("barrier.arrive 1, 256;" ::: "memory");
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    for (int r = 0; r < rows; ++r) {
      asm volatile("barrier.sync 1, 256;" ::: "memory");
      y[128 * r + t] = row[127 - t];
      if (r + 1 < rows) asm volatile("barrier.arrive 2, 256;" ::: "memory");
    }
  }
}
}
