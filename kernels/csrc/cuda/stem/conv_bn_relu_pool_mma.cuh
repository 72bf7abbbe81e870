// The stem's implicit GEMM. A warp computes eight pooled pixels of a row. Lanes 4p to 4p + 3 hold the 2x2 convolution
// pixels of pooled pixel p, so pooling needs no other lane or, where windows overlap, the left neighbour's alone.
//
// acc[dy][j][2 dx + e] is the pixel dx right and dy down of the 2x2, channel 8 j + 2 (lane % 4) + e of the warp, as mma
// leaves it: rows 0 to 7 of its matrix are the left pixels, rows 8 to 15 the right ones.
//
// K may run over a filter's elements in any order that both operands share. Elements are taken in pairs; a "slot" is
// one pair for each of the four lanes of a row of mma's matrix. Slots are chosen so that lanes read different banks
// (pixels are 12 elements apart): squares of 2x2 pairs over two filter rows, then what odd counts leave over, the last
// pair of each row and the bottom row. Two slots make a step.
#pragma once

#include "cuda/stem/conv_bn_relu_pool_load.cuh"

namespace resnet_fast::cuda::stem {

template <int kFilter>
struct Slots {
  static constexpr int kPairs = stem_pairs(kFilter);
  static_assert(kFilter % 2 == 1 && kPairs % 2 == 1 && kPairs >= 5, "the order below");
  static constexpr int kColumns = kPairs / 2, kRows = kFilter / 2;  // of squares
  // Steps of two adjacent squares come first: the pixel rows above and below share what they load.
  static constexpr int kTwins = kColumns / 2 * kRows * 2;
  static constexpr int kSingles = kColumns % 2 * kRows;
  static constexpr int kEnds = (kFilter + 3) / 4;  // slots of the last pairs of four rows
  static constexpr int kBottoms = (kPairs + 2) / 4;  // slots of four pairs of the bottom row, without its last
  static constexpr int kRest = kSingles + kEnds + kBottoms, kCount = kTwins + kRest;
  static_assert(kCount % 2 == 0, "slots come in twos");

  // Where a group of four begins. The last group overlaps the one before; its overlapping lanes are not valid.
  static constexpr int end_row(int i) { return kFilter < 4 ? 0 : 4 * i < kFilter - 4 ? 4 * i : kFilter - 4; }
  static constexpr int bottom_pair(int i) { return 4 * i < kPairs - 5 ? 4 * i : kPairs - 5; }

  // Filter row and pair of a lane in a slot, and whether the lane contributes.
  struct Tap {
    int row, pair;
    bool valid;
  };
  __device__ static Tap square(int column, int row, int quad) {
    return {2 * row + quad / 2, 2 * column + quad % 2, true};
  }
  __device__ static Tap end(int i, int quad) {
    const int row = end_row(i) + quad;
    return {min(row, kFilter - 1), kPairs - 1, row >= 4 * i && row < kFilter};
  }
  __device__ static Tap bottom(int i, int quad) {
    const int pair = bottom_pair(i) + quad;
    return {kFilter - 1, pair, pair >= 4 * i};
  }
  __device__ static Tap tap(int slot, int quad) {
    if (slot < kTwins) return square(slot / 2 / kRows * 2 + slot % 2, slot / 2 % kRows, quad);
    slot -= kTwins;
    if (slot < kSingles) return square(kColumns - 1, slot, quad);
    slot -= kSingles;
    return slot < kEnds ? end(slot, quad) : bottom(slot - kEnds, quad);
  }
};

// Two adjacent elements as registers of mma.
template <typename T>
struct PairBits {
  static constexpr int kWords = sizeof(T) / 2;
  uint32_t word[kWords];

  __device__ static PairBits load(const char* from) {
    PairBits v;
    if constexpr (kWords == 1) {
      v.word[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      v.word[0] = both.x, v.word[1] = both.y;
    }
    return v;
  }
  __device__ static PairBits of(T first, T second) {
    PairBits v;
    if constexpr (kWords == 1) {
      const T both[2] = {first, second};
      v.word[0] = reinterpret_cast<const uint32_t&>(both);
    } else {
      v.word[0] = __float_as_uint(first), v.word[1] = __float_as_uint(second);
    }
    return v;
  }
  // All bits of the selected elements.
  __device__ static PairBits mask(bool first, bool second) {
    PairBits v;
    if constexpr (kWords == 1)
      v.word[0] = (first ? 0xffffu : 0) | (second ? 0xffff0000u : 0);
    else
      v.word[0] = first ? ~0u : 0, v.word[1] = second ? ~0u : 0;
    return v;
  }
  __device__ void operator&=(const PairBits& m) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] &= m.word[i];
  }
  __device__ void round() {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if constexpr (kWords == 2) word[i] = ptx::to_tf32(word[i]);
  }
};

// Tensor cores. Filters stay in registers, except those of the last step: that leaves the compiler spare registers.
template <typename T, int kFilter>
class TensorStemMma {
  using S = Slots<kFilter>;
  using Pair = PairBits<T>;
  static constexpr int kPairBytes = 2 * sizeof(T), kPixel = 6 * sizeof(T), kHeld = S::kCount - 2;
  struct alignas(2 * sizeof(Pair)) LastStep {
    Pair pair[2];
  };

 public:
  static constexpr int kTiles = stem_warp_filters(Math::kTensor, sizeof(T)) / 8;
  static constexpr bool kResident = false;  // filters do not stay in shared memory
  static constexpr int kLastStepBytes = kTiles * 32 * sizeof(LastStep);

  // filters: this warp's, [filter][row][element], in shared memory; last: where to keep those of the last step.
  __device__ TensorStemMma(const char* filters, char* last, const StemArgs& a)
      : last_step_(reinterpret_cast<LastStep*>(last)), pitch_(a.pitch) {
    constexpr int kRow = kStemChannels * kFilter;
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const T* lane_filters = reinterpret_cast<const T*>(filters) + lane / 4 * kFilter * kRow;
    T zero;
    narrow(0.f, zero);
#pragma unroll
    for (int s = 0; s < S::kCount; ++s) {
      const auto tap = S::tap(s, quad);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        // A row's first pair begins with a neighbour's element.
        const T* pair = lane_filters + (8 * j * kFilter + tap.row) * kRow + 2 * tap.pair - 1;
        Pair both = Pair::of(tap.valid && tap.pair > 0 ? pair[0] : zero, tap.valid ? pair[1] : zero);
        both.round();
        if (s < kHeld)
          filters_[s][j] = both;
        else
          last_step_[j * 32 + lane].pair[s - kHeld] = both;
      }
    }
  }

  // Computes acc[dy] for dy from kFrom to 1. at: first input element of the lane's upper left pixel.
  template <int kFrom>
  __device__ void accumulate(float (&acc)[2][kTiles][4], const char* at) const {
    const Lane lane(at, pitch_);
#pragma unroll
    for (int dy = kFrom; dy < 2; ++dy)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[dy][j][e] = 0;
#pragma unroll
    for (int c = 0; c < S::kColumns / 2; ++c) {
      // Row dy = 1 lies two input rows, one row of squares, below.
#pragma unroll
      for (int r = kFrom; r <= S::kRows; ++r) {
        Step step;
        square(step.pair[0], lane, 2 * c, r);
        square(step.pair[1], lane, 2 * c + 1, r);
        const int slot = 2 * (c * S::kRows + r);
        if (kFrom == 0 && r < S::kRows) mma_step(acc[0], step, slot, lane.thread);
        if (r > 0) mma_step(acc[1], step, slot - 2, lane.thread);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kRest; i += 2) {
#pragma unroll
      for (int dy = kFrom; dy < 2; ++dy) {
        Step step;
        rest(step.pair[0], lane, i, dy);
        rest(step.pair[1], lane, i + 1, dy);
        mma_step(acc[dy], step, S::kTwins + i, lane.thread);
      }
    }
  }

 private:
  // pair[slot][dx]: two slots for a lane's left and right pixel.
  struct Step {
    Pair pair[2][2];
  };

  // Where a lane reads its pairs of each kind of slot. Masks drop the neighbour's element from the first pair of a
  // filter row: times zero, infinities and NaN would still count.
  struct Lane {
    const char *square, *end, *bottom;
    int thread, quad;  // lane of the warp, and of the four that share a pixel
    Pair first_square, first_bottom;

    __device__ Lane(const char* at, int pitch) : thread(ptx::opaque(threadIdx.x % 32)), quad(thread % 4) {
      square = at + quad / 2 * pitch + quad % 2 * kPairBytes;
      end = at + min(quad, kFilter - 1) * pitch + (S::kPairs - 1) * kPairBytes;
      bottom = at + (kFilter - 1) * pitch + quad * kPairBytes;
      first_square = Pair::mask(quad % 2 != 0, true);
      first_bottom = Pair::mask(quad != 0, true);
    }
  };

  // valid: whether this lane contributes.
  __device__ static void load(Pair (&pairs)[2], const char* from, bool masked, const Pair& mask, bool valid = true) {
#pragma unroll
    for (int dx = 0; dx < 2; ++dx) {
      pairs[dx] = Pair::load(from + dx * kPixel);
      if (masked) pairs[dx] &= mask;
      pairs[dx].round();
#pragma unroll
      for (uint32_t& word : pairs[dx].word) word = valid ? word : 0;
    }
  }
  __device__ void square(Pair (&pairs)[2], const Lane& lane, int column, int row) const {
    load(pairs, lane.square + 2 * row * pitch_ + 2 * column * kPairBytes, column == 0, lane.first_square);
  }
  // The i-th slot after the twins.
  __device__ void rest(Pair (&pairs)[2], const Lane& lane, int i, int dy) const {
    if (i < S::kSingles) return square(pairs, lane, S::kColumns - 1, i + dy);
    const int below = 2 * dy * pitch_;
    i -= S::kSingles;
    if (i < S::kEnds) {
      const char* from = lane.end + below + S::end_row(i) * pitch_;
      return load(pairs, from, false, lane.first_square, S::end(i, lane.quad).valid);
    }
    i -= S::kEnds;
    const char* from = lane.bottom + below + S::bottom_pair(i) * kPairBytes;
    load(pairs, from, i == 0, lane.first_bottom, S::bottom(i, lane.quad).valid);
  }

  // 16 bits: one mma for both slots. TF32: one each.
  __device__ void mma_step(float (&acc)[kTiles][4], const Step& step, int slot, int thread) const {
    const Pair(&pair)[2][2] = step.pair;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      LastStep filters;
      if (slot < kHeld)
        filters = {filters_[slot][j], filters_[slot + 1][j]};
      else
        filters = last_step_[j * 32 + thread];
      if constexpr (sizeof(T) == 2) {
        const uint32_t a[4] = {pair[0][0].word[0], pair[0][1].word[0], pair[1][0].word[0], pair[1][1].word[0]};
        ptx::mma_m16n8k16(acc[j], a, filters.pair[0].word[0], filters.pair[1].word[0], T{});
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint32_t a[4] = {pair[s][0].word[0], pair[s][1].word[0], pair[s][0].word[1], pair[s][1].word[1]};
          ptx::mma_m16n8k8_tf32(acc[j], a, filters.pair[s].word[0], filters.pair[s].word[1]);
        }
      }
    }
  }

  Pair filters_[kHeld][kTiles];
  LastStep* last_step_;
  int pitch_;
};

// The same in exact float32, filters in shared memory.
template <int kFilter>
class SimtStemMma {
 public:
  static constexpr int kTiles = kStemFilters / 8;
  static constexpr bool kResident = true;
  static constexpr int kLastStepBytes = 0;

  __device__ SimtStemMma(const char* filters, char*, const StemArgs& a)
      : filters_(reinterpret_cast<const float*>(filters) + threadIdx.x % 4 * 2), pitch_(a.pitch) {}

  template <int kFrom>
  __device__ void accumulate(float (&acc)[2][kTiles][4], const char* at) const {
#pragma unroll
    for (int dy = kFrom; dy < 2; ++dy)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[dy][j][e] = 0;
    const float* filter = filters_;
#pragma unroll 1
    for (int row = 0; row < kFilter; ++row) {
      const float* pixels = reinterpret_cast<const float*>(at + row * pitch_) + 1;
#pragma unroll 3
      for (int k = 0; k < kStemChannels * kFilter; ++k) {
        float2 f[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) f[j] = *reinterpret_cast<const float2*>(filter + 8 * j);
#pragma unroll
        for (int dy = kFrom; dy < 2; ++dy)
#pragma unroll
          for (int dx = 0; dx < 2; ++dx) {
            const float v = pixels[2 * dy * (pitch_ / 4) + 6 * dx];
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              float (&pixel_acc)[4] = acc[dy][j];
              pixel_acc[2 * dx] = fmaf(v, f[j].x, pixel_acc[2 * dx]);
              pixel_acc[2 * dx + 1] = fmaf(v, f[j].y, pixel_acc[2 * dx + 1]);
            }
          }
        ++pixels, filter += kStemSimtPitch;
      }
    }
  }

 private:
  const float* filters_;
  int pitch_;
};

}  // namespace resnet_fast::cuda::stem
