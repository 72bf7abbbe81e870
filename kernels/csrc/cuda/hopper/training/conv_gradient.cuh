// dx = conv2d(dy, weight transposed and turned by 180 degrees, padding=1), the data gradient of a 3x3 convolution of
// stride 1, NHWC, 16 bits, for sm_90a. dy = a * grad + b * (y - mean) + constant is the gradient of the convolution's
// output, between two batch norms in training. The epilogue adds the residual's gradient, applies the ReLU of the layer
// before, and takes partial sums for its batch norm.
//
// dy is made of the halos of grad and y once, in shared memory, by the threads that copied them. The filters lie in
// memory with their output channels, M here, adjacent: wgmma reads them M-major.
#pragma once

#include "cuda/hopper/training/prologue.cuh"

namespace resnet_fast::cuda {

// Copies of HaloLoad, with those of the halo of y behind the input, and filters [K, 3, 3, C] of which each step takes
// kChunk rows of K and the block's columns of C.
template <typename T, HaloTile kOwnTile, int kOwnChunk>
struct GradientLoad : HaloLoad<T, kOwnTile, kOwnChunk, 1> {
  using Base = HaloLoad<T, kOwnTile, kOwnChunk, 1>;
  using Base::a, Base::block, Base::filters, Base::first_row, Base::next, Base::vector;
  static constexpr HaloTile kTile = kOwnTile;
  static constexpr int kChunk = kOwnChunk, kAcross = kTile.channels() / 8;  // vectors of a filter's row
  static constexpr int kFilterRows = kTile.threads() / kAcross;  // rows copied at once
  static constexpr int kFilterBytes = gradient_filter_bytes(kTile, kChunk), kFilterStep = 2 * 128;
  static constexpr int kTransposed = 1;
  const T* y;
  uint32_t staged;  // address of the halo of y
  uint32_t bytes;  // 0 if this thread's columns lie beyond the last channel

  __device__ GradientLoad(const T* grad, const T* y_, const T* weight, const HaloArgs& args, const HaloBlock<kTile>& b,
                          uint32_t shared)
      : Base(grad, weight, args, b, shared), y(y_), staged(shared + input_bytes(kTile, args)) {
    filters = staged + staged_bytes(kTile, args);
    const int row = threadIdx.x / kAcross, column = block.channel + threadIdx.x % kAcross * 8;
    bytes = column < a.out_channels ? 16 : 0;
    next = weight + (int64_t{9} * row + 8) * a.out_channels + (bytes > 0 ? column : 0);  // the last tap comes first
  }

  __device__ uint32_t stage(int n) const { return filters + n * kFilterBytes; }

  __device__ uint64_t filter_descriptor() const {
    constexpr int kPlane = gradient_filter_plane_bytes(kChunk);
    return ptx::matrix_descriptor(stage(0) + threadIdx.x / 128 * 8 * kPlane, kPlane, 128);
  }

  __device__ void load_input(int chunk) const {
    Base::load_input(chunk);
    if (y != nullptr) Base::load_halo(y, staged, chunk);
  }

  __device__ void load_filters(int n) {
    const int row = threadIdx.x / kAcross;
    const uint32_t to = stage(n) + threadIdx.x % kAcross * gradient_filter_plane_bytes(kChunk) + row * 16;
#pragma unroll
    for (int i = 0; i < kChunk; i += kFilterRows)
      ptx::cp_async(to + i * 16, next + int64_t{9} * i * a.out_channels, bytes);
    next -= a.out_channels;
    if (++this->tap == 9) this->tap = 0, next += int64_t{9} * (kChunk + 1) * a.out_channels;
  }
};

// a * grad + b * (y - mean) + constant of the copied halo of a chunk, in place of grad. coefficients: [4, channels];
// null: the gradient is grad.
template <typename Load>
__device__ void form_gradient(const Load& load, const float* coefficients, int chunk, int part, int parts) {
  using T = typename Load::Element;
  if (coefficients == nullptr) return;
  const float* own = coefficients + chunk * Load::kChunk + load.vector * 8;
  const Floats8 scale(own), scale_y(own + load.a.channels), constant(own + 2 * load.a.channels);
  const Floats8 mean(own + 3 * load.a.channels);
  const uint32_t plane = load.vector * plane_bytes(Load::kTile.positions, load.a.pitch, 1, Load::kChunk);
  const uint32_t to = load.input_of(chunk) + plane, staged = load.staged + plane;
  for_each_copied(load, part, parts, [&](int position) {
    float4 pack = ptx::load_shared(to + position * 16);
    const float4 other = ptx::load_shared(staged + position * 16);
    vec2_of<T>* g = reinterpret_cast<vec2_of<T>*>(&pack);
    const vec2_of<T>* y = reinterpret_cast<const vec2_of<T>*>(&other);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = widen2(g[i]), v = widen2(y[i]);
      const auto of = [&](int c, float grad, float value) {
        return fmaf(scale.value[c], grad, fmaf(scale_y.value[c], value - mean.value[c], constant.value[c]));
      };
      g[i] = round2(float2{of(2 * i, u.x, v.x), of(2 * i + 1, u.y, v.y)}, T{});
    }
    ptx::store_shared(to + position * 16, pack);
  });
}

// Stores the accumulators to a float32 tile [positions, channels] in shared memory.
template <HaloTile kTile>
__device__ void store_accumulators(const float (&acc)[kTile.positions / 2], uint32_t tile) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const uint32_t to = tile + lane % 4 * 2 * gradient_pitch(kTile) + row * 4;
#pragma unroll
  for (int j = 0; j < kTile.positions / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        ptx::store_shared(to + (8 * j + e) * gradient_pitch(kTile) + i * 32, acc[4 * j + 2 * i + e]);
}

// Eight consecutive floats of shared memory. Every other four lanes take the upper half first: eight lanes then fall
// into different banks.
__device__ inline void load_shared8(float (&v)[8], uint32_t address) {
  const int upper = threadIdx.x / 4 % 2;
  const float4 first = ptx::load_shared(address + 16 * upper), second = ptx::load_shared(address + 16 * (1 - upper));
  *reinterpret_cast<float4*>(v) = upper ? second : first;
  *reinterpret_cast<float4*>(v + 4) = upper ? first : second;
}

// Eight consecutive elements of global memory, widened.
template <typename T>
__device__ void load_widened(float (&v)[8], const T* p) {
  const float4 pack = __ldg(reinterpret_cast<const float4*>(p));
  const vec2_of<T>* w = reinterpret_cast<const vec2_of<T>*>(&pack);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = widen2(w[i]);
    v[2 * i] = u.x, v[2 * i + 1] = u.y;
  }
}

// Sums over the block's threads that hold the same vector of channels, in fixed order, to to[row * stride + channel].
// scratch: shared memory for kRows floats a channel and warp, which nothing else uses.
template <HaloTile kTile, int kRows>
__device__ void store_sums(float (&sums)[kRows][8], float* scratch, float* to, int rows, int stride, int channels) {
  constexpr int kVectors = kTile.channels() / 8, kWarps = kTile.threads() / 32;
  const int vector = threadIdx.x % kVectors, warp = threadIdx.x / 32;
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int other = kVectors; other < 32; other *= 2) sums[row][c] += __shfl_xor_sync(~0u, sums[row][c], other);
      if (threadIdx.x % 32 < kVectors)
        scratch[(warp * kRows + row) * kTile.channels() + c * kVectors + vector] = sums[row][c];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kTile.channels(); i += kTile.threads()) {
    const int row = i / kTile.channels(), at = i % kTile.channels(), channel = at % kVectors * 8 + at / kVectors;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[(w * kRows + row) * kTile.channels() + at];
    if (channel < channels) to[int64_t{row} * stride + channel] = sum;
  }
}

// What the epilogue reads and writes, of [batch, height, width, out_channels]; null where there is nothing.
template <typename T>
struct GradientEpilogue {
  const T* residual;  // added
  const T* x;  // with a.relu: the gradient passes where scale * x + shift > 0
  const float* scale_shift;  // [2, out_channels]
  const T *y1, *y2;  // partial sums of dx * (y - mean) are taken
  const float *stats1, *stats2;  // mean first
  T* dx;
  float* partial;  // [tiles of the batch, 1 to 3, out_channels]: sums of dx, and with y1 and y2
};

// Finalises the gradient of a tile that lies in shared memory in float32.
template <typename T, HaloTile kTile>
__device__ void finalize_gradient(const HaloArgs& a, const HaloBlock<kTile>& block, const GradientEpilogue<T>& out,
                                  uint32_t tile, float* scratch) {
  constexpr int kVectors = kTile.channels() / 8, kAtOnce = kTile.threads() / kVectors;
  const int channel = block.channel + threadIdx.x % kVectors * 8;
  const bool own = channel < a.out_channels;
  const float* affine = own && a.relu ? out.scale_shift : nullptr;
  const Floats8 scale = affine == nullptr ? Floats8(1.0f) : Floats8(affine + channel);
  const Floats8 shift = affine == nullptr ? Floats8(0.0f) : Floats8(affine + a.out_channels + channel);
  const Floats8 mean1 = own && out.y1 != nullptr ? Floats8(out.stats1 + channel) : Floats8(0.0f);
  const Floats8 mean2 = own && out.y2 != nullptr ? Floats8(out.stats2 + channel) : Floats8(0.0f);
  float sums[3][8] = {};
  const int positions = own ? (block.last - block.first) * a.pitch : 0;
#pragma unroll 2
  for (int p = threadIdx.x / kVectors; p < positions; p += kAtOnce) {
    const Coord at = coord_at(a, block.first, p);
    if (at.image < 0) continue;
    const int64_t offset =
        int64_t{(at.image * a.out_height + at.row) * a.out_width + at.column} * a.out_channels + channel;
    float v[8], u[8];
    load_shared8(v, tile + p * gradient_pitch(kTile) + threadIdx.x % kVectors * 32);
    if (out.residual != nullptr) {
      load_widened(u, out.residual + offset);
#pragma unroll
      for (int c = 0; c < 8; ++c) v[c] += u[c];
    }
    if (a.relu) {
      load_widened(u, out.x + offset);
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (fmaf(u[c], scale.value[c], shift.value[c]) <= 0) v[c] = 0;  // NaN passes
    }
    float4 pack;
    vec2_of<T>* stored = reinterpret_cast<vec2_of<T>*>(&pack);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stored[i] = round2(float2{v[2 * i], v[2 * i + 1]}, T{});
      const float2 w = widen2(stored[i]);
      v[2 * i] = w.x, v[2 * i + 1] = w.y;
    }
    *reinterpret_cast<float4*>(out.dx + offset) = pack;
    if (out.partial == nullptr) continue;
    // Sums of the gradient as it was stored.
#pragma unroll
    for (int c = 0; c < 8; ++c) sums[0][c] += v[c];
    const auto centred_sum = [&](float (&sum)[8], const T* y, const Floats8& mean) {
      if (y == nullptr) return;
      const bool loaded = a.relu && y == out.x;
      float w[8];
      if (!loaded) load_widened(w, y + offset);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = fmaf(v[c], (loaded ? u[c] : w[c]) - mean.value[c], sum[c]);
    };
    centred_sum(sums[1], out.y1, mean1);
    centred_sum(sums[2], out.y2, mean2);
  }
  if (out.partial == nullptr) return;
  __syncthreads();  // the tile has been read: its place is the scratch memory
  const int rows = 1 + (out.y1 != nullptr) + (out.y2 != nullptr);
  const int64_t part = blockIdx.x / a.channel_blocks;
  store_sums<kTile>(sums, scratch, out.partial + part * rows * a.out_channels + block.channel, rows, a.out_channels,
                    a.out_channels - block.channel);
}

// grad, y: [batch, height, width, channels]; coefficients: [4, channels]; y and coefficients may be null; weight:
// [channels, 3, 3, out_channels]. channels are those of the convolution's output, out_channels of its input.
template <typename T, int kIndex, int kChunk>
__global__ void __launch_bounds__(kHaloTrainingTiles[kIndex].threads(), 1)
    conv_halo_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ y,
                              const float* __restrict__ coefficients, const T* __restrict__ weight,
                              const T* __restrict__ residual, const T* __restrict__ x,
                              const float* __restrict__ scale_shift, const T* __restrict__ y1, const T* __restrict__ y2,
                              const float* __restrict__ stats1, const float* __restrict__ stats2, T* __restrict__ dx,
                              float* __restrict__ partial, const __grid_constant__ HaloArgs a) {
#ifdef RESNET_FAST_WGMMA
  constexpr HaloTile kTile = kHaloTrainingTiles[kIndex];
  constexpr int kFirst = first_prologue_tap(kTile);
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::smem_address(shared);
  const HaloBlock<kTile> block(a);
  GradientLoad<T, kTile, kChunk> load(grad, y, weight, a, block, memory);

  halo_start(load);
  ptx::cp_async_wait<halo_ahead(kTile) - 1>();
  form_gradient(load, coefficients, block.begin, 0, 1);

  float acc[kTile.positions / 2];
  halo_mainloop(acc, load, [&](int chunk, int tap) {
    if (tap >= kFirst && chunk + 1 < block.end) form_gradient(load, coefficients, chunk + 1, tap - kFirst, 9 - kFirst);
  });
  __syncthreads();  // wgmma has read the operands, whose place the tile takes
  store_accumulators<kTile>(acc, memory);
  __syncthreads();
  const GradientEpilogue<T> epilogue = {residual, x, scale_shift, y1, y2, stats1, stats2, dx, partial};
  finalize_gradient(a, block, epilogue, memory, reinterpret_cast<float*>(shared));
#else
  __trap();  // not sm_90a: the launcher checks the architecture
#endif
}

}  // namespace resnet_fast::cuda
