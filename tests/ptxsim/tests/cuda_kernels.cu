// CUDA kernels the simulator is tested with. Each is complete and right; test_faults.py breaks copies.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

extern "C" {

__global__ void scale(const float* x, float* y, int n, float a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i];
}

struct Affine {
  float scale[4];
  double shift;
  short kind;
};
__global__ void by_value(const float* x, float* y, int n, Affine p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i] * p.scale[i % 4];
  switch (p.kind + i % 7) {
    case 0: v += 1; break;
    case 1: v *= 3; break;
    case 2: v = -v; break;
    case 3: v = fmaxf(v, 0.f); break;
    case 4: v -= 7; break;
    case 5: v = v * v; break;
    default: v = 0.5f * v;
  }
  y[i] = v + (float)p.shift;
}

__global__ void half2_relu(const __half2* x, const __half2* y, __half2* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __hfma2_relu(x[i], y[i], __float2half2_rn(0.25f));
}
__global__ void bfloat2_norm(const __nv_bfloat162* x, const __nv_bfloat162* y, __nv_bfloat162* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __hmax2(__hfma2(x[i], y[i], __float2bfloat162_rn(0.5f)), __hsub2(x[i], y[i]));
}

// Sum over the block by shuffles, then through shared memory.
__global__ void block_sum(const float* x, float* out, int n) {
  __shared__ float part[32];
  float v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[blockIdx.x * n + i];
  for (int o = 16; o; o /= 2) v += __shfl_down_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
  }
}

// Exclusive prefix count of positive elements, by ballot; and lanes that agree, by match.
__global__ void ballots(const int* x, int* before, unsigned* same, int* total) {
  const unsigned lane = threadIdx.x % 32;
  const int v = x[threadIdx.x];
  const unsigned positive = __ballot_sync(~0u, v > 0);
  before[threadIdx.x] = __popc(positive & ((1u << lane) - 1));
  same[threadIdx.x] = __match_any_sync(~0u, v);
  const int sum = __reduce_add_sync(~0u, v);
  if (__any_sync(~0u, v > 100) && lane == 0) atomicAdd(total, sum);
  if (lane < 7) {  // a collective of some lanes, in divergent code
    const int w = __shfl_sync(0x7fu, v, 6 - lane);
    __syncwarp(0x7fu);
    if (w == v) atomicMax(total + 1, w);
  }
}

// out = in^T, through a padded tile.
__global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += blockDim.y)
    if (x < columns && y + j < rows) tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * columns + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += blockDim.y)
    if (x < rows && y + j < columns) out[(y + j) * rows + x] = tile[threadIdx.x][threadIdx.y + j];
}

__device__ __noinline__ double series(double x, int n) {
  double s = 0, t = 1;
  for (int k = 1; k <= n; ++k) s += t, t *= x / k;
  return s;
}
__global__ void doubles(const double* x, double* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = series(x[i], 20) + sqrt(fabs(x[i])) / (1 + x[i] * x[i]);
}

__global__ void divide128(const unsigned long long* a, unsigned long long* q) {
  const unsigned __int128 x = (unsigned __int128)a[0] << 64 | a[1], y = (unsigned __int128)a[2] << 64 | a[3];
  const unsigned __int128 d = x / y;
  q[0] = d >> 64, q[1] = d;
}

// Tables in constant and global memory; sinf of large arguments reads one of the compiler's own.
__constant__ float weights[5] = {1, -2, 3, -4, 5};
__device__ int uses = 7;
__global__ void tables(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = weights[i % 5] * sinf(x[i]);
  if (i == 0) y[0] += atomicAdd(&uses, 1);
}

// Every kind of atomic, on global and shared memory.
__global__ void atomics(const int* x, int* out, unsigned long long* wide, __half2* halves, double* sum) {
  __shared__ unsigned s[4];
  if (threadIdx.x < 4) s[threadIdx.x] = threadIdx.x == 3 ? ~0u : 0;
  __syncthreads();
  const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(s, v), atomicMax(s + 1, v), atomicInc(s + 2, 100), atomicAnd(s + 3, ~(1u << v % 32));
  atomicAdd(wide, (unsigned long long)v << 20), atomicMax(wide + 1, (unsigned long long)v * v), atomicXor(wide + 2, 1ull << v % 64);
  atomicAdd(halves, __floats2half2_rn(1, 0.5f)), atomicAdd(sum, v / 8.0);
  atomicMin(out + 4, v), atomicDec((unsigned*)out + 5, 9);
  __syncthreads();
  if (threadIdx.x < 4) atomicExch(out + blockIdx.x * 6 + threadIdx.x, s[threadIdx.x]);
}

// A maximum of floats by compare and swap; blocks contend for few addresses.
__global__ void cas_max(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned* at = (unsigned*)out + i % 3;
  unsigned old = *(volatile unsigned*)at;
  while (x[i] > __uint_as_float(old)) {
    const unsigned seen = atomicCAS(at, old, __float_as_uint(x[i]));
    if (seen == old) break;
    old = seen;
  }
}

// Two producers, two consumers: named barriers with counts.
__global__ void named_barriers(const int* x, int* y, int rounds) {
  __shared__ int slot[64];
  const int t = threadIdx.x % 64;
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x < 64) {
      slot[t] = x[r * 64 + t];
      asm volatile("bar.arrive 1, 128;" ::: "memory");
      asm volatile("bar.sync 2, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      y[r * 64 + t] = slot[63 - t];
      asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
}

__device__ inline unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// C[M][N] = A[M][K] B[N][K]^T in bf16, 64x64 tiles, double buffered cp.async, ldmatrix, mma.m16n8k16.
// Four warps, each 32x32. Rows of 32 elements are swizzled in 16-byte pieces.
__global__ void gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  extern __shared__ __align__(128) __nv_bfloat16 smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / 2 * 32, wn = warp % 2 * 32;
  auto at = [&](int stage, int operand, int row, int piece) { return smem + ((stage * 2 + operand) * 64 + row) * 32 + ((piece ^ (row / 2 % 4)) * 8); };
  auto load = [&](int stage, int k0) {
    for (int i = threadIdx.x; i < 256; i += 128) {
      const int row = i / 4, piece = i % 4;
      const int ra = blockIdx.x * 64 + row, rb = blockIdx.y * 64 + row, col = k0 + piece * 8;
      const int sa = ra < m && col < k ? 16 : 0, sb = rb < n && col < k ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(at(stage, 0, row, piece))), "l"(a + (size_t)ra * k + col), "r"(sa) : "memory");
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(at(stage, 1, row, piece))), "l"(b + (size_t)rb * k + col), "r"(sb) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float acc[2][4][4] = {};
  const int steps = (k + 31) / 32;
  load(0, 0);
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) load((s + 1) % 2, (s + 1) * 32);
    else asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    for (int kk = 0; kk < 2; ++kk) {
      unsigned fa[2][4], fb[2][4];
      for (int i = 0; i < 2; ++i) {
        const unsigned pa = address(at(s % 2, 0, wm + i * 16 + lane % 16, kk * 2 + lane / 16));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(fa[i][0]), "=r"(fa[i][1]), "=r"(fa[i][2]), "=r"(fa[i][3]) : "r"(pa) : "memory");
        const unsigned pb = address(at(s % 2, 1, wn + i * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(fb[i][0]), "=r"(fb[i][1]), "=r"(fb[i][2]), "=r"(fb[i][3]) : "r"(pb) : "memory");
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                       : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                       : "r"(fa[i][0]), "r"(fa[i][1]), "r"(fa[i][2]), "r"(fa[i][3]), "r"(fb[j / 2][j % 2 * 2]), "r"(fb[j / 2][j % 2 * 2 + 1]));
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int e = 0; e < 4; ++e) {
        const int row = blockIdx.x * 64 + wm + i * 16 + lane / 4 + e / 2 * 8, col = blockIdx.y * 64 + wn + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && col < n) c[(size_t)row * n + col] = acc[i][j][e];
      }
}

using namespace nvcuda;
__global__ void wmma_f16(const __half* a, const __half* b, float* c, int k) {
  __shared__ __half tile[16 * 16];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 1.f);
  for (int k0 = 0; k0 < k; k0 += 16) {
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = a[i / 16 * k + k0 + i % 16];
    __syncwarp();
    wmma::load_matrix_sync(fa, tile, 16);
    wmma::load_matrix_sync(fb, b + k0, k);
    wmma::mma_sync(fc, fa, fb, fc);
    __syncwarp();
  }
  for (int i = 0; i < fc.num_elements; ++i) fc.x[i] = fmaxf(fc.x[i], 0.f);
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}
__global__ void wmma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  wmma::fragment<wmma::matrix_a, 32, 8, 16, __nv_bfloat16, wmma::col_major> fa;
  wmma::fragment<wmma::matrix_b, 32, 8, 16, __nv_bfloat16, wmma::row_major> fb;
  wmma::fragment<wmma::accumulator, 32, 8, 16, float> fc;
  wmma::fill_fragment(fc, 0.f);
  wmma::load_matrix_sync(fa, a, 32);
  wmma::load_matrix_sync(fb, b, 8);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(c, fc, 32, wmma::mem_col_major);
}

}
