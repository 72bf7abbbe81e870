// The stem's products. A warp computes eight pooled pixels of a row: the 2x2 pixels of the convolution that pooled
// pixel p takes all lie in the lanes 4p to 4p + 3, so that pooling needs no other lane, or, where windows overlap, its
// left neighbour alone.
//
// acc[dy][j][2 dx + e] is the pixel dx to the right and dy down of the 2x2, and channel 8 j + 2 (lane % 4) + e of the
// warp's: as mma leaves it where the rows 0 to 7 of its matrix are the left pixels and the rows 8 to 15 the right ones.
//
// The sum over a filter's elements may come in any order that both operands share. Elements are taken in pairs, and a
// "slot" is what the four lanes of a row of mma's matrix load at once, a pair each. Slots are chosen so that lanes read
// from different banks (pixels are 12 elements apart): 2x2 pairs, of two filter rows; what an odd number of rows and
// pairs leaves over: the last pair of each row, and the bottom row.
#pragma once

#include "conv_bn_relu_pool_load.cuh"

namespace resnet_fast::cuda::stem {

template <int kFilter>
struct Slots {
  static constexpr int kPairs = stem_pairs(kFilter);
  static_assert(kFilter % 2 == 1 && kPairs % 2 == 1 && kPairs >= 5, "the order below");
  static constexpr int kColumns = kPairs / 2, kRows = kFilter / 2;  // of 2x2 pairs
  static constexpr int kSquares = kColumns * kRows;  // slot column * kRows + row
  static constexpr int kEnds = (kFilter + 3) / 4;  // the last pairs of four rows each
  static constexpr int kBottoms = (kPairs + 2) / 4;  // four pairs of the bottom row each, but its last
  static constexpr int kCount = kSquares + kEnds + kBottoms;

  // Where a group of four begins: the last one overlaps the one before, and its lanes that do so take no part.
  static constexpr int end_row(int i) { return kFilter < 4 ? 0 : 4 * i < kFilter - 4 ? 4 * i : kFilter - 4; }
  static constexpr int bottom_pair(int i) { return 4 * i < kPairs - 5 ? 4 * i : kPairs - 5; }

  // Filter row and pair of a slot in a lane, and whether the lane takes part.
  struct Tap {
    int row, pair;
    bool there;
  };
  __device__ static Tap tap(int slot, int quad) {
    if (slot < kSquares) return {slot % kRows * 2 + quad / 2, slot / kRows * 2 + quad % 2, true};
    if (slot < kSquares + kEnds) {
      const int i = slot - kSquares, row = end_row(i) + quad;
      return {min(row, kFilter - 1), kPairs - 1, row >= 4 * i && row < kFilter};
    }
    const int i = slot - kSquares - kEnds, pair = bottom_pair(i) + quad;
    return {kFilter - 1, pair, pair >= 4 * i};
  }
};

// Two elements in sequence, as the registers of mma want them.
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
  // All bits of the elements that are wanted.
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

// Products on tensor cores, from filters that stay in registers.
template <typename T, int kFilter>
class TensorStem {
  using S = Slots<kFilter>;
  using Pair = PairBits<T>;
  static constexpr int kSlots = S::kCount, kPairBytes = 2 * sizeof(T), kPixel = 6 * sizeof(T);
  // 16 bits: two slots to a product. TF32: one.
  static constexpr bool kTwo = sizeof(T) == 2;
  static_assert(!kTwo || kSlots % 2 == 0, "slots come in twos");

 public:
  static constexpr int kTiles = stem_warp_filters(Math::kTensor, sizeof(T)) / 8;
  static constexpr bool kResident = false;  // filters leave shared memory

  // filters: those of this warp, as load_filters has them.
  __device__ TensorStem(const char* filters, const StemArgs& a) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    pitch_ = a.pitch;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const auto tap = S::tap(s, quad);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int row = (8 * j + lane / 4) * kFilter + tap.row;
        filters_[s][j] = Pair::load(filters + (row * S::kPairs + tap.pair) * kPairBytes);
        filters_[s][j] &= Pair::mask(tap.there, tap.there);
      }
    }
    squares_ = quad / 2 * pitch_ + quad % 2 * kPairBytes;
    ends_ = min(quad, kFilter - 1) * pitch_ + (S::kPairs - 1) * kPairBytes;
    bottoms_ = (kFilter - 1) * pitch_ + quad * kPairBytes;
    // A neighbour's element counts for nothing, infinite or not a number as it may be.
    first_square_ = Pair::mask(quad % 2 != 0 || a.odd == 0, true);
#pragma unroll
    for (int i = 0; i < S::kEnds; ++i) {
      const auto tap = S::tap(S::kSquares + i, quad);
      end_[i] = Pair::mask(tap.there, tap.there && a.odd != 0);
    }
    first_bottom_ = Pair::mask(quad != 0 || a.odd == 0, true);
    const bool there = S::tap(kSlots - 1, quad).there;
    last_bottom_ = Pair::mask(there, there);
  }

  // acc = the sums of the rows dy = kFrom and 1. at: what the lane's left upper pixel reads first.
  template <int kFrom>
  __device__ void multiply(float (&acc)[2][kTiles][4], const char* at) const {
#pragma unroll
    for (int dy = kFrom; dy < 2; ++dy)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[dy][j][e] = 0;
    uint32_t fragments[2][4];
    // The row dy = 1 takes the rows of pairs that dy = 0 takes, but the first, and one more.
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c) {
      Pair pairs[S::kRows + 1][2];
#pragma unroll
      for (int r = kFrom; r <= S::kRows; ++r)
        load(pairs[r], at + squares_ + 2 * r * pitch_ + 2 * c * kPairBytes, c == 0, first_square_);
#pragma unroll
      for (int r = 0; r < S::kRows; ++r) product<kFrom>(acc, fragments, c * S::kRows + r, pairs[r], pairs[r + 1]);
    }
#pragma unroll
    for (int i = 0; i < S::kEnds; ++i) {
      Pair pairs[2][2];
#pragma unroll
      for (int dy = kFrom; dy < 2; ++dy) load(pairs[dy], at + ends_ + (S::end_row(i) + 2 * dy) * pitch_, true, end_[i]);
      product<kFrom>(acc, fragments, S::kSquares + i, pairs[0], pairs[1]);
    }
#pragma unroll
    for (int i = 0; i < S::kBottoms; ++i) {
      Pair pairs[2][2];
      const bool last = i > 0 && i == S::kBottoms - 1;
#pragma unroll
      for (int dy = kFrom; dy < 2; ++dy)
        load(pairs[dy], at + bottoms_ + 2 * dy * pitch_ + S::bottom_pair(i) * kPairBytes, i == 0 || last,
             last ? last_bottom_ : first_bottom_);
      product<kFrom>(acc, fragments, S::kSquares + S::kEnds + i, pairs[0], pairs[1]);
    }
  }

 private:
  // A lane's pair for its left and its right pixel.
  __device__ static void load(Pair (&pairs)[2], const char* from, bool masked, const Pair& mask) {
#pragma unroll
    for (int dx = 0; dx < 2; ++dx) {
      pairs[dx] = Pair::load(from + dx * kPixel);
      if (masked) pairs[dx] &= mask;
      pairs[dx].round();
    }
  }

  template <int kFrom>
  __device__ void product(float (&acc)[2][kTiles][4], uint32_t (&fragments)[2][4], int slot, const Pair (&above)[2],
                          const Pair (&below)[2]) const {
#pragma unroll
    for (int dy = kFrom; dy < 2; ++dy) {
      const Pair(&pairs)[2] = dy == 0 ? above : below;
      if constexpr (kTwo) {
        fragments[dy][slot % 2 * 2] = pairs[0].word[0], fragments[dy][slot % 2 * 2 + 1] = pairs[1].word[0];
        if (slot % 2 == 0) continue;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          ptx::mma_m16n8k16(acc[dy][j], fragments[dy], filters_[slot - 1][j].word[0], filters_[slot][j].word[0], T{});
      } else {
        const uint32_t a[4] = {pairs[0].word[0], pairs[1].word[0], pairs[0].word[1], pairs[1].word[1]};
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          ptx::mma_m16n8k8_tf32(acc[dy][j], a, filters_[slot][j].word[0], filters_[slot][j].word[1]);
      }
    }
  }

  Pair filters_[kSlots][kTiles], first_square_, end_[S::kEnds], first_bottom_, last_bottom_;
  int pitch_, squares_, ends_, bottoms_;
};

// The same in exact float32, from filters in shared memory.
template <int kFilter>
class PlainStem {
 public:
  static constexpr int kTiles = kStemFilters / 8;
  static constexpr bool kResident = true;

  __device__ PlainStem(const char* filters, const StemArgs& a)
      : filters_(reinterpret_cast<const float*>(filters) + threadIdx.x % 4 * 2), pitch_(a.pitch), odd_(a.odd) {}

  template <int kFrom>
  __device__ void multiply(float (&acc)[2][kTiles][4], const char* at) const {
#pragma unroll
    for (int dy = kFrom; dy < 2; ++dy)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[dy][j][e] = 0;
    const float* filter = filters_;
#pragma unroll 1
    for (int row = 0; row < kFilter; ++row) {
      const float* pixels = reinterpret_cast<const float*>(at + row * pitch_) + odd_;
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
              float (&sums)[4] = acc[dy][j];
              sums[2 * dx] = fmaf(v, f[j].x, sums[2 * dx]);
              sums[2 * dx + 1] = fmaf(v, f[j].y, sums[2 * dx + 1]);
            }
          }
        ++pixels, filter += kStemPlainPitch;
      }
    }
  }

 private:
  const float* filters_;
  int pitch_, odd_;
};

}  // namespace resnet_fast::cuda::stem
