// Winograd convolution F(2x2, 3x3) in bfloat16.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A,  Lavin and Gray 2015, section 4.1
//
// The transforms compute in float32; their results are rounded to bfloat16 once, the filter's when it is packed. The
// GEMMs accumulate in float32 over all channels; the output transform adds bias and residual, panel by panel.
#pragma once

#include "cpu/kernels/bf16/simd.h"

namespace resnet_fast {
namespace {

typedef WinogradCall<BFloat16> Bf16WinogradCall;

// The image and the first output pixel of tile `index`.
struct Bf16TilePlace {
  int image, row, column;

  Bf16TilePlace(int index, int tiles_h, int tiles_w)
      : image(index / (tiles_h * tiles_w)), row(index / tiles_w % tiles_h * kBf16TileOut),
        column(index % tiles_w * kBf16TileOut) {}
};

// The channels of a vector: 16 contiguous ones, or the even or the odd ones of 32.
enum class Channels { kAll, kEven, kOdd };

template <Channels C>
RESNET_FAST_INLINE Floats load_channels(const BFloat16* from) {
  if (C == Channels::kAll) return load_widened(from);
  const Pairs pairs = load_pairs(from);
  return C == Channels::kEven ? even(pairs) : odd(pairs);
}

// B^T d of a column of the input.
template <Channels C>
struct Bf16Column {
  Floats d[kBf16TileIn];

  RESNET_FAST_INLINE void load(const BFloat16* from, int64_t row) {
    const Floats a = load_channels<C>(from), b = load_channels<C>(from + row);
    const Floats c = load_channels<C>(from + 2 * row), e = load_channels<C>(from + 3 * row);
    d[0] = a - c, d[1] = b + c, d[2] = c - b, d[3] = b - e;
  }
};

template <int I, Channels C>
RESNET_FAST_INLINE void store_bf16_points(const Bf16Column<C> (&c)[kBf16TileIn], BFloat16* to, int64_t point) {
  to += I * kBf16TileIn * point;
  store_rounded(to, c[0].d[I] - c[2].d[I]);
  store_rounded(to + point, c[1].d[I] + c[2].d[I]);
  store_rounded(to + 2 * point, c[2].d[I] - c[1].d[I]);
  store_rounded(to + 3 * point, c[1].d[I] - c[3].d[I]);
}

// A row of tiles. Two columns that adjacent tiles share stay in registers.
template <Channels C>
void transform_bf16_strip(const BFloat16* input, int64_t row, int64_t pixel, int tiles, BFloat16* out, int64_t out_tile,
                          int64_t point) {
  Bf16Column<C> c[kBf16TileIn];
  c[0].load(input, row), c[1].load(input + pixel, row);
  for (int t = 0; t < tiles; ++t, input += kBf16TileOut * pixel, out += out_tile) {
    c[2].load(input + 2 * pixel, row), c[3].load(input + 3 * pixel, row);
    store_bf16_points<0>(c, out, point), store_bf16_points<1>(c, out, point);
    store_bf16_points<2>(c, out, point), store_bf16_points<3>(c, out, point);
    c[0] = c[2], c[1] = c[3];
  }
}

// Transforms the input to out[point][panel][tile][channel of the panel]: panels of 32 channels, the last ones of 16.
inline void transform_bf16_inputs(const Bf16WinogradCall& call, const Bf16WinogradScratch& sizes, BFloat16* out) {
  const int tiles_h = (call.height + 1) / kBf16TileOut, tiles_w = (call.width + 1) / kBf16TileOut;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const Bf16TilePlace place(tile, tiles_h, tiles_w);
    const int in_row = tiles_w - place.column / kBf16TileOut;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row, first = tile - call.tile_begin;
    const BFloat16* input =
        call.input + place.image * call.input_image + place.row * call.input_row + place.column * call.input_pixel;
    int c = 0;
    for (; c + kBf16Panel <= call.channels; c += kBf16Panel) {
      BFloat16* to = out + static_cast<int64_t>(c) * sizes.tiles + first * kBf16Panel;
      transform_bf16_strip<Channels::kEven>(input + c, call.input_row, call.input_pixel, tiles, to, kBf16Panel,
                                            sizes.input_point);
      transform_bf16_strip<Channels::kOdd>(input + c, call.input_row, call.input_pixel, tiles, to + kBf16Lanes,
                                           kBf16Panel, sizes.input_point);
    }
    for (; c < call.channels; c += kBf16Lanes) {
      transform_bf16_strip<Channels::kAll>(input + c, call.input_row, call.input_pixel, tiles,
                                           out + static_cast<int64_t>(c) * sizes.tiles + first * kBf16Lanes, kBf16Lanes,
                                           sizes.input_point);
    }
    tile += tiles;
  }
}

// P tiles x V vectors of the GEMM at one point: all channels in one go, accumulators in registers.
template <int P, int V>
struct Bf16GemmMicrokernel {
  typedef typename MakeIndices<P * V>::type All;
  typedef PairRegisterTile<P, V> Acc;

  template <int Width, int... I>
  static RESNET_FAST_INLINE void panel(Acc& tile, const BFloat16* input, const BFloat16* filter, int pairs,
                                       Indices<I...>) {
    constexpr int64_t rows[P] = {I * Width...};
    for (int i = 0; i < pairs; ++i) {
      tile.multiply_add(input + 2 * i, rows, filter + 2 * i * Acc::width, typename MakeIndices<P>::type(),
                        typename MakeIndices<V>::type());
    }
  }

  // `first`: of the tiles in the panels, each `tiles` long.
  static __attribute__((noinline)) void run(const BFloat16* input, int first, int tiles, const BFloat16* filter,
                                            int channels, float* acc) {
    typedef typename MakeIndices<P>::type Rows;
    Acc tile;
    tile.zero(All());
    int c = 0;
    for (; c + kBf16Panel <= channels; c += kBf16Panel) {
      panel<kBf16Panel>(tile, input + static_cast<int64_t>(c) * tiles + first * kBf16Panel, filter, kBf16Panel / 2,
                        Rows());
      filter += kBf16Panel * Acc::width;
    }
    for (; c < channels; c += kBf16Lanes) {
      const int pairs = (channels - c < kBf16Lanes ? channels - c : kBf16Lanes) / 2;
      panel<kBf16Lanes>(tile, input + static_cast<int64_t>(c) * tiles + first * kBf16Lanes, filter, pairs, Rows());
      filter += kBf16Lanes * Acc::width;
    }
    tile.store_packed(acc, All());
  }
};

using Bf16Microkernel = void (*)(const BFloat16*, int, int, const BFloat16*, int, float*);

template <int V, int... P>
inline Bf16Microkernel select_bf16_microkernel(int rows, Indices<P...>) {
  static constexpr Bf16Microkernel kernels[] = {Bf16GemmMicrokernel<P + 1, V>::run...};
  return kernels[rows - 1];
}

template <int P, int V>
void gemm_bf16(const BFloat16* input, const Bf16WinogradScratch& sizes, int channels, const BFloat16* filter,
               float* acc) {
  // Equal parts rather than full ones and a short remainder.
  const int parts = (sizes.tiles + P - 1) / P;
  for (int part = 0; part < parts; ++part) {
    const int first = sizes.tiles * part / parts, last = sizes.tiles * (part + 1) / parts;
    select_bf16_microkernel<V>(last - first, typename MakeIndices<P>::type())(
        input, first, sizes.tiles, filter, channels, acc + static_cast<int64_t>(first) * V * kBf16Lanes);
  }
}

// The output transform and the epilogue of a tile. `to` and `residual`: its first pixel.
struct Bf16Output {
  Floats bias;
  bool relu;
  int64_t to_row, to_pixel, residual_row, residual_pixel;

  RESNET_FAST_INLINE void finish(Floats y, BFloat16* to, const BFloat16* residual, int row, int column) const {
    y += bias;
    if (residual) y += load_widened(residual + row * residual_row + column * residual_pixel);
    if (relu) y = resnet_fast::relu(y);
    store_rounded(to + row * to_row + column * to_pixel, y);
  }

  // A^T m A of one tile.
  RESNET_FAST_INLINE void tile(const float* acc, int64_t point, BFloat16* to, const BFloat16* residual, bool lower,
                               bool right) const {
    Floats top[kBf16TileIn], bottom[kBf16TileIn];
    for (int j = 0; j < kBf16TileIn; ++j) {
      const float* from = acc + j * point;
      const int64_t down = kBf16TileIn * point;
      const Floats a = load_floats(from + down), b = load_floats(from + 2 * down);
      top[j] = load_floats(from) + (a + b);
      bottom[j] = (a - b) - load_floats(from + 3 * down);
    }
    finish(top[0] + (top[1] + top[2]), to, residual, 0, 0);
    if (right) finish((top[1] - top[2]) - top[3], to, residual, 0, 1);
    if (!lower) return;
    finish(bottom[0] + (bottom[1] + bottom[2]), to, residual, 1, 0);
    if (right) finish((bottom[1] - bottom[2]) - bottom[3], to, residual, 1, 1);
  }
};

// All tiles of one vector of output channels; `acc_tile` is the stride of tiles.
inline void transform_bf16_outputs(const Bf16WinogradCall& call, int tiles_h, int tiles_w, const float* acc,
                                   int64_t acc_tile, int64_t point, int64_t channel) {
  const Bf16Output out{load_floats(reinterpret_cast<const float*>(call.bias) + channel),
                       call.relu,
                       call.output_row,
                       call.output_pixel,
                       call.residual_row,
                       call.residual_pixel};
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const Bf16TilePlace place(tile, tiles_h, tiles_w);
    const int in_row = tiles_w - place.column / kBf16TileOut;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row;
    const bool lower = place.row + 1 < call.height;
    BFloat16* to = call.output + place.image * call.output_image + place.row * call.output_row +
                   place.column * call.output_pixel + channel;
    const BFloat16* residual = call.residual;
    if (residual) {
      residual += place.image * call.residual_image + place.row * call.residual_row +
                  place.column * call.residual_pixel + channel;
    }
    const int cut = place.column + kBf16TileOut * tiles > call.width ? 1 : 0;  // the last tile is half a tile
    for (int t = 0; t < tiles - cut; ++t, acc += acc_tile, to += kBf16TileOut * call.output_pixel) {
      if (lower) {
        out.tile(acc, point, to, residual, true, true);
      } else {
        out.tile(acc, point, to, residual, false, true);
      }
      if (residual) residual += kBf16TileOut * call.residual_pixel;
    }
    if (cut) {
      out.tile(acc, point, to, residual, lower, false);
      acc += acc_tile;
    }
    tile += tiles;
  }
}

// A register tile is P tiles x two vectors, or PH tiles x one.
template <int P, int PH>
void winograd_bf16(const Bf16WinogradCall& call) {
  constexpr int64_t panel = 2 * kBf16Lanes;
  const int tiles_h = (call.height + 1) / kBf16TileOut, tiles_w = (call.width + 1) / kBf16TileOut;
  const int tiles = call.tile_end - call.tile_begin;
  const Bf16WinogradScratch sizes(call.channels, tiles);
  BFloat16* input = call.scratch;
  float* accumulators = reinterpret_cast<float*>(input + sizes.input);
  transform_bf16_inputs(call, sizes, input);
  for (int k = call.panel_begin; k < call.panel_end; ++k) {
    const int vectors = 2 * k + 1 < call.out_vectors ? 2 : 1;
    const BFloat16* filter = call.filter + k * call.panel_stride;
    for (int point = 0; point < kBf16Points; ++point) {
      const BFloat16* in = input + point * sizes.input_point;
      float* acc = accumulators + point * sizes.acc_point;
      if (vectors == 2) {
        gemm_bf16<P, 2>(in, sizes, call.channels, filter, acc);
      } else {
        gemm_bf16<PH, 1>(in, sizes, call.channels, filter, acc);
      }
      filter += static_cast<int64_t>(sizes.channels) * vectors * kBf16Lanes;
    }
    for (int v = 0; v < vectors; ++v) {
      transform_bf16_outputs(call, tiles_h, tiles_w, accumulators + v * kBf16Lanes, vectors * kBf16Lanes,
                             sizes.acc_point, k * panel + v * kBf16Lanes);
    }
  }
}

}  // namespace
}  // namespace resnet_fast
