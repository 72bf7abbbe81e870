// Kernels with one fault each, named after it; test_faults.py says what must be reported.
#include <cuda_bf16.h>
extern "C" {
__global__ void shared_overrun(float* y) {  // one past the end of a, before b
  __shared__ float a[32], b[32];
  b[threadIdx.x] = 0;
  a[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x + 1] + b[0];
}
__global__ void misaligned(const float* x, float4* y) { y[threadIdx.x] = *(const float4*)(x + threadIdx.x); }
__global__ void misaligned_shared(float* y) {
  __shared__ __align__(16) float a[64];
  a[threadIdx.x] = a[threadIdx.x + 32] = 1;
  __syncthreads();
  const float2 v = *(float2*)(a + threadIdx.x);
  y[threadIdx.x] = v.x + v.y;
}
__global__ void uninitialised(float* y) {
  __shared__ float a[64];
  a[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x + (threadIdx.x == 31)];
}
__global__ void reads_output(float* y) { y[threadIdx.x] += 1; }
__global__ void half_written(float* y) { if (threadIdx.x != 5) y[threadIdx.x] = 1; }
__global__ void warp_race(float* y) {  // neighbours exchange without __syncwarp
  __shared__ float a[32];
  a[threadIdx.x] = threadIdx.x;
  asm volatile("" ::: "memory");
  y[threadIdx.x] = a[(threadIdx.x + 1) % 32];
}
__global__ void block_race(float* y) {
  __shared__ float a[64];
  a[threadIdx.x] = 0;
  __syncthreads();
  a[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = a[(threadIdx.x + 32) % 64];
}
__global__ void write_after_read(float* y) {
  __shared__ float a[64];
  a[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float v = a[(threadIdx.x + 32) % 64];
  y[threadIdx.x] = v;
  asm volatile("" ::: "memory");
  a[threadIdx.x] = v + 1;
  __syncthreads();
  y[threadIdx.x] += a[threadIdx.x];
}
__global__ void half_warp_sync(float* y) {  // __syncwarp of halves does not order across them
  __shared__ float a[32];
  a[threadIdx.x] = threadIdx.x;
  __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
  y[threadIdx.x] = a[threadIdx.x ^ 16];
}
__global__ void async_too_early(const float4* x, float4* y) {
  __shared__ float4 a[32];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(a + threadIdx.x)), "l"(x + threadIdx.x) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  y[threadIdx.x] = a[threadIdx.x];
}
__global__ void async_wrong_group(const float4* x, float4* y) {
  __shared__ float4 a[32];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(a + threadIdx.x)), "l"(x + threadIdx.x) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  y[threadIdx.x] = a[threadIdx.x];
}
__global__ void async_uncommitted(const float4* x, float4* y) {
  __shared__ float4 a[32];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(a + threadIdx.x)), "l"(x + threadIdx.x) : "memory");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  y[threadIdx.x] = a[threadIdx.x];
}
__global__ void async_not_shared_with_others(const float4* x, float4* y) {  // the wait is the issuing thread's own
  __shared__ float4 a[32];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(a + threadIdx.x)), "l"(x + threadIdx.x) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  y[threadIdx.x] = a[threadIdx.x ^ 1];
}
__global__ void global_race(float* x, float* y) {  // the other warp's element
  x[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = x[threadIdx.x ^ 32];
}
__global__ void global_write_after_read(float* x, float* y) {  // all warps read what the first then overwrites
  const float v = x[threadIdx.x % 32];
  y[threadIdx.x] = v;
  if (threadIdx.x < 32) x[threadIdx.x] = v + 1;
}
__global__ void global_overwrite(float* y) { y[threadIdx.x % 32] = threadIdx.x; }
__global__ void global_barrier_of_some(float* x, float* y) {  // the third warp is not among those that meet
  x[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 64) asm volatile("bar.sync 1, 64;" ::: "memory");
  y[threadIdx.x] = x[(threadIdx.x + 32) % 96];
}
__global__ void global_atomic_after_store(int* x) {
  x[threadIdx.x % 32] = 1;
  if (threadIdx.x >= 32) atomicAdd(x + threadIdx.x % 32, 1);
}
__global__ void unfenced_flag_of_a_warp(float* data, int* flag, float* y) {
  const int t = threadIdx.x % 32;
  if (threadIdx.x < 32) { data[t] = 1; __syncwarp(); if (t == 0) atomicExch(flag, 1); }
  else { while (atomicAdd(flag, 0) == 0) {} __threadfence_block(); y[t] = data[t]; }
}
__global__ void fenced_flag_of_a_warp(float* data, int* flag, float* y) {
  const int t = threadIdx.x % 32;
  if (threadIdx.x < 32) { data[t] = 1; __threadfence_block(); __syncwarp(); if (t == 0) atomicExch(flag, 1); }
  else { while (atomicAdd(flag, 0) == 0) {} __threadfence_block(); y[t] = data[t]; }
}
__global__ void global_exchange(float* x, float* y, int rounds) {  // ordered: what the races above lack
  #pragma unroll 1
  for (int k = 0; k < rounds; ++k) {
    x[threadIdx.x] = k + threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x ^ 32];
    __syncthreads();
  }
}
__global__ void reads_other_block(float* x, float* y) {
  x[blockIdx.x * 32 + threadIdx.x] = 1;
  y[blockIdx.x * 32 + threadIdx.x] = x[(blockIdx.x ^ 1) * 32 + threadIdx.x];
}
__global__ void overwrites_other_block(float* y) { y[threadIdx.x] = blockIdx.x; }
__global__ void overwrites_what_was_read(float* x, float* y) {
  y[blockIdx.x * 32 + threadIdx.x] = x[0];
  if (blockIdx.x == 1 && threadIdx.x == 0) x[0] = 2;
}
__global__ void read_only_cache(float* x, float* y) {
  x[threadIdx.x] = 1;
  y[threadIdx.x] = __ldg(x + threadIdx.x);
}
__global__ void missed_barrier(float* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void divergent_barrier(float* y) {
  if (threadIdx.x % 2) asm volatile("bar.sync 0;");
  else asm volatile("bar.sync 1;");
  y[threadIdx.x] = 1;
}
__global__ void crossed_barriers(float* y) {  // two warps, each waiting where the other is not
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  else asm volatile("bar.sync 2, 64;");
  y[threadIdx.x] = 1;
}
__global__ void absent_lane(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(~0u, v, 1);
  else asm volatile("barrier.sync 3, 32;");
  y[threadIdx.x] = v;
}
__global__ void endless(volatile int* x) { while (*x == 0) {} }
__global__ void trapped(int* x) { if (threadIdx.x == 7) __trap(); x[threadIdx.x] = 0; }
__global__ void atomic_then_plain(int* x, int* y) {
  atomicAdd(x, 1);
  y[blockIdx.x * 32 + threadIdx.x] = x[0];
}
__global__ void unfenced_flag(float* data, int* flag, float* y) {  // publishes without a fence
  if (blockIdx.x == 0) { data[threadIdx.x] = 1; __syncwarp(); if (threadIdx.x == 0) atomicExch(flag, 1); }
  else { while (atomicAdd(flag, 0) == 0) {} __threadfence(); y[threadIdx.x] = data[threadIdx.x]; }
}
__global__ void fenced_flag(float* data, int* flag, float* y) {
  if (blockIdx.x == 0) { data[threadIdx.x] = 1; __threadfence(); __syncwarp(); if (threadIdx.x == 0) atomicExch(flag, 1); }
  else { while (atomicAdd(flag, 0) == 0) {} __threadfence(); y[threadIdx.x] = data[threadIdx.x]; }
}
}
