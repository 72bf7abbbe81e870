// Conversion between float32 and bfloat16: rows of activations, and filters that training packs.
#pragma once

#include "cpu/kernels/bf16/simd.h"

namespace resnet_fast {
namespace {

constexpr int64_t kWidenPrefetch = 1024;

inline void widen_bf16(const BFloat16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kBf16Lanes <= n; i += kBf16Lanes) {
    __builtin_prefetch(from + i + kWidenPrefetch);  // rows of several tensors in turn: no stream for the hardware
    store_floats(to + i, load_widened(from + i));
  }
  if (i == n) return;
  BFloat16 rest[kBf16Lanes] = {};
  float wide[kBf16Lanes];
  for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
  store_floats(wide, load_widened(rest));
  for (int64_t j = i; j < n; ++j) to[j] = wide[j - i];
}

inline void narrow_bf16(const float* from, int64_t n, BFloat16* to) {
  int64_t i = 0;
  for (; i + kBf16Lanes <= n; i += kBf16Lanes) store_rounded(to + i, load_floats(from + i));
  if (i == n) return;
  float rest[kBf16Lanes] = {};
  BFloat16 narrow[kBf16Lanes];
  for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
  store_rounded(narrow, load_floats(rest));
  for (int64_t j = i; j < n; ++j) to[j] = narrow[j - i];
}

// G g of F(2x2).
RESNET_FAST_INLINE void transform_bf16_filter(Floats a, Floats b, Floats c, Floats (&u)[kBf16TileIn]) {
  const Floats outer = 0.5f * (a + c), inner = 0.5f * b;
  u[0] = a, u[1] = outer + inner, u[2] = outer - inner, u[3] = c;
}

// A panel of the filter in float32, [channel][tap][output channel] with channels up to whole vectors, transformed and
// rounded once: see conv/bf16_filters.h. `channels`: of the filter, even; those beyond are zeros in `from`.
inline void pack_bf16_winograd(const float* from, int channels, int vectors, BFloat16* to) {
  const int depth = (channels + kBf16Lanes - 1) / kBf16Lanes * kBf16Lanes, width = vectors * kBf16Lanes;
  const int64_t point = static_cast<int64_t>(depth) * width;
  for (int place = 0; place < depth; place += 2) {
    const int panel = place / kBf16Panel * kBf16Panel;
    const bool whole = panel + kBf16Panel <= channels;
    const int c[2] = {whole ? panel + bf16_channel_at(place % kBf16Panel) : place,
                      whole ? panel + bf16_channel_at(place % kBf16Panel + 1) : place + 1};
    for (int v = 0; v < vectors; ++v) {
      Floats half[2][3][kBf16TileIn];
      for (int side = 0; side < 2; ++side) {
        const float* g = from + static_cast<int64_t>(c[side]) * 9 * width + v * kBf16Lanes;
        for (int s = 0; s < 3; ++s) {
          transform_bf16_filter(load_floats(g + s * width), load_floats(g + (3 + s) * width),
                                load_floats(g + (6 + s) * width), half[side][s]);
        }
      }
      BFloat16* out = to + static_cast<int64_t>(place) * width + 2 * v * kBf16Lanes;
      for (int i = 0; i < kBf16TileIn; ++i) {
        Floats u[2][kBf16TileIn];
        for (int side = 0; side < 2; ++side) {
          transform_bf16_filter(half[side][0][i], half[side][1][i], half[side][2][i], u[side]);
        }
        for (int j = 0; j < kBf16TileIn; ++j) {
          store_pairs(out + (i * kBf16TileIn + j) * point, paired(u[0][j], u[1][j]));
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnet_fast
