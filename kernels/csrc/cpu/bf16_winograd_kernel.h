// Winograd convolution F(2x2, 3x3) in bfloat16.
//
//   y = A^T [ (G g G^T) . (B^T d B) ] A,  Lavin and Gray 2015, section 4.1
//
// The transforms compute in float32; their results are rounded to bfloat16 once, the filter's when it is packed. Products
// are added up in float32, over all channels, and transformed back, with bias and residual added, panel by panel.
#pragma once

#include "bf16_simd.h"

namespace resnet_fast {
namespace {

typedef WinogradCall<BFloat16> Bf16WinogradCall;

// Where tile `index` lies: image and first output pixel.
struct Bf16TilePlace {
  int image, row, column;

  Bf16TilePlace(int index, int tiles_h, int tiles_w)
      : image(index / (tiles_h * tiles_w)), row(index / tiles_w % tiles_h * kBf16TileOut),
        column(index % tiles_w * kBf16TileOut) {}
};

// B^T d for V vectors of channels, every `step` apart, to memory row by row.
template <int V>
struct Bf16Column {
  Floats d[kBf16TileIn][V];

  RESNET_FAST_INLINE void load(const BFloat16* from, int64_t row) {
    for (int i = 0; i < kBf16TileIn; ++i) {
      if (V == 2) {
        const Pairs pairs = load_pairs(from + i * row);
        d[i][0] = even(pairs), d[i][V - 1] = odd(pairs);
      } else {
        d[i][0] = load_widened(from + i * row);
      }
    }
  }
};

template <int V>
void transform_bf16_strip(const BFloat16* input, int64_t row, int64_t pixel, int tiles, float* strip, BFloat16* out,
                          int64_t out_tile, int64_t out_point) {
  constexpr int width = V * kBf16Lanes;
  const int columns = kBf16TileOut * tiles + 2;
  const int64_t plane = static_cast<int64_t>(columns) * width;
  for (int x = 0; x < columns; ++x) {
    Bf16Column<V> c;
    c.load(input + x * pixel, row);
    float* to = strip + x * width;
    for (int v = 0; v < V; ++v, to += kBf16Lanes) {
      store_floats(to, c.d[0][v] - c.d[2][v]);
      store_floats(to + plane, c.d[1][v] + c.d[2][v]);
      store_floats(to + 2 * plane, c.d[2][v] - c.d[1][v]);
      store_floats(to + 3 * plane, c.d[1][v] - c.d[3][v]);
    }
  }
  for (int t = 0; t < tiles; ++t) {
    for (int i = 0; i < kBf16TileIn; ++i) {
      const float* from = strip + i * plane + static_cast<int64_t>(kBf16TileOut) * t * width;
      Floats d[kBf16TileIn][V];
      for (int j = 0; j < kBf16TileIn; ++j) {
        for (int v = 0; v < V; ++v) d[j][v] = load_floats(from + j * width + v * kBf16Lanes);
      }
      BFloat16* to = out + t * out_tile + kBf16TileIn * i * out_point;
      if (V == 2) {
        store_rounded(to, d[0][0] - d[2][0], d[0][V - 1] - d[2][V - 1]);
        store_rounded(to + out_point, d[1][0] + d[2][0], d[1][V - 1] + d[2][V - 1]);
        store_rounded(to + 2 * out_point, d[2][0] - d[1][0], d[2][V - 1] - d[1][V - 1]);
        store_rounded(to + 3 * out_point, d[1][0] - d[3][0], d[1][V - 1] - d[3][V - 1]);
      } else {
        store_rounded(to, d[0][0] - d[2][0]);
        store_rounded(to + out_point, d[1][0] + d[2][0]);
        store_rounded(to + 2 * out_point, d[2][0] - d[1][0]);
        store_rounded(to + 3 * out_point, d[1][0] - d[3][0]);
      }
    }
  }
}

// To out[point][panel][tile][channel of the panel]: panels of 32 channels while there are as many, then of 16.
inline void transform_bf16_inputs(const Bf16WinogradCall& call, const Bf16Scratch& sizes, float* strip, BFloat16* out) {
  const int tiles_h = (call.height + 1) / kBf16TileOut, tiles_w = (call.width + 1) / kBf16TileOut;
  for (int tile = call.tile_begin; tile < call.tile_end;) {
    const Bf16TilePlace place(tile, tiles_h, tiles_w);
    const int in_row = tiles_w - place.column / kBf16TileOut;
    const int tiles = call.tile_end - tile < in_row ? call.tile_end - tile : in_row, first = tile - call.tile_begin;
    const BFloat16* input =
        call.input + place.image * call.input_image + place.row * call.input_row + place.column * call.input_pixel;
    int c = 0;
    for (; c + kBf16Panel <= call.channels; c += kBf16Panel) {
      transform_bf16_strip<2>(input + c, call.input_row, call.input_pixel, tiles, strip,
                              out + static_cast<int64_t>(c) * sizes.tiles + first * kBf16Panel, kBf16Panel,
                              sizes.input_point);
    }
    for (; c < call.channels; c += kBf16Lanes) {
      transform_bf16_strip<1>(input + c, call.input_row, call.input_pixel, tiles, strip,
                              out + static_cast<int64_t>(c) * sizes.tiles + first * kBf16Lanes, kBf16Lanes,
                              sizes.input_point);
    }
    tile += tiles;
  }
}

// P tiles x V vectors of the product at one point: all channels in one go, sums in registers.
template <int P, int V>
struct Bf16Product {
  typedef typename MakeIndices<P * V>::type All;
  typedef PairTile<P, V> Sums;

  template <int Width, int... I>
  static RESNET_FAST_INLINE void panel(Sums& sums, const BFloat16* input, const BFloat16* filter, int pairs,
                                       Indices<I...>) {
    constexpr int64_t rows[P] = {I * Width...};
    for (int i = 0; i < pairs; ++i) {
      sums.step(input + 2 * i, rows, filter + 2 * i * Sums::width, typename MakeIndices<P>::type(),
                typename MakeIndices<V>::type());
    }
  }

  // `first`: of the tiles in the panels, each `tiles` long.
  static __attribute__((noinline)) void run(const BFloat16* input, int first, int tiles, const BFloat16* filter,
                                            int channels, float* product) {
    typedef typename MakeIndices<P>::type Rows;
    Sums sums;
    sums.start(All());
    int c = 0;
    for (; c + kBf16Panel <= channels; c += kBf16Panel) {
      panel<kBf16Panel>(sums, input + static_cast<int64_t>(c) * tiles + first * kBf16Panel, filter, kBf16Panel / 2,
                        Rows());
      filter += kBf16Panel * Sums::width;
    }
    for (; c < channels; c += kBf16Lanes) {
      const int pairs = (channels - c < kBf16Lanes ? channels - c : kBf16Lanes) / 2;
      panel<kBf16Lanes>(sums, input + static_cast<int64_t>(c) * tiles + first * kBf16Lanes, filter, pairs, Rows());
      filter += kBf16Lanes * Sums::width;
    }
    sums.spill(product, All());
  }
};

using MultiplyBf16 = void (*)(const BFloat16*, int, int, const BFloat16*, int, float*);

template <int V, int... P>
inline MultiplyBf16 select_bf16_product(int rows, Indices<P...>) {
  static constexpr MultiplyBf16 products[] = {Bf16Product<P + 1, V>::run...};
  return products[rows - 1];
}

template <int P, int V>
void multiply_bf16(const BFloat16* input, const Bf16Scratch& sizes, int channels, const BFloat16* filter,
                   float* product) {
  // Parts of equal size rather than full ones and a short rest.
  const int parts = (sizes.tiles + P - 1) / P;
  for (int part = 0; part < parts; ++part) {
    const int first = sizes.tiles * part / parts, last = sizes.tiles * (part + 1) / parts;
    select_bf16_product<V>(last - first, typename MakeIndices<P>::type())(
        input, first, sizes.tiles, filter, channels, product + static_cast<int64_t>(first) * V * kBf16Lanes);
  }
}

inline void transform_bf16_output(const Bf16WinogradCall& call, const Bf16TilePlace& place, const float* product,
                                  int64_t point, int64_t channel) {
  Floats half[kBf16TileOut][kBf16TileIn];
  for (int j = 0; j < kBf16TileIn; ++j) {
    const float* from = product + j * point;
    const int64_t down = kBf16TileIn * point;
    const Floats a = load_floats(from + down), b = load_floats(from + 2 * down);
    half[0][j] = load_floats(from) + a + b;
    half[1][j] = a - b - load_floats(from + 3 * down);
  }
  const Floats bias = load_floats(reinterpret_cast<const float*>(call.bias) + channel);
  const int rows = call.height - place.row < kBf16TileOut ? 1 : kBf16TileOut;
  const int columns = call.width - place.column < kBf16TileOut ? 1 : kBf16TileOut;
  for (int i = 0; i < rows; ++i) {
    const Floats y[kBf16TileOut] = {half[i][0] + half[i][1] + half[i][2], half[i][1] - half[i][2] - half[i][3]};
    BFloat16* to = call.output + place.image * call.output_image + (place.row + i) * call.output_row +
                   place.column * call.output_pixel + channel;
    const BFloat16* residual = call.residual + place.image * call.residual_image +
                               (place.row + i) * call.residual_row + place.column * call.residual_pixel + channel;
    for (int j = 0; j < columns; ++j) {
      Floats sum = y[j] + bias;
      if (call.residual) sum += load_widened(residual + j * call.residual_pixel);
      if (call.relu) sum = sum < 0 ? Floats{} : sum;
      store_rounded(to + j * call.output_pixel, sum);
    }
  }
}

// P tiles and two vectors make a register tile of products, or PH tiles and one.
template <int P, int PH>
void winograd_bf16(const Bf16WinogradCall& call) {
  constexpr int64_t panel = 2 * kBf16Lanes;
  const int tiles_h = (call.height + 1) / kBf16TileOut, tiles_w = (call.width + 1) / kBf16TileOut;
  const int tiles = call.tile_end - call.tile_begin;
  const Bf16Scratch sizes(call.channels, tiles, tiles_w);
  BFloat16* input = call.scratch;
  float* products = reinterpret_cast<float*>(input + sizes.input);
  float* strip = products + sizes.products / 2;
  transform_bf16_inputs(call, sizes, strip, input);
  for (int k = call.panel_begin; k < call.panel_end; ++k) {
    const int vectors = 2 * k + 1 < call.out_vectors ? 2 : 1;
    const BFloat16* filter = call.filter + k * call.panel_stride;
    for (int point = 0; point < kBf16Points; ++point) {
      const BFloat16* in = input + point * sizes.input_point;
      float* product = products + point * sizes.product_point;
      if (vectors == 2) {
        multiply_bf16<P, 2>(in, sizes, call.channels, filter, product);
      } else {
        multiply_bf16<PH, 1>(in, sizes, call.channels, filter, product);
      }
      filter += static_cast<int64_t>(sizes.channels) * vectors * kBf16Lanes;
    }
    for (int t = 0; t < tiles; ++t) {
      const Bf16TilePlace place(call.tile_begin + t, tiles_h, tiles_w);
      for (int v = 0; v < vectors; ++v) {
        transform_bf16_output(call, place, products + static_cast<int64_t>(t * vectors + v) * kBf16Lanes,
                              sizes.product_point, k * panel + v * kBf16Lanes);
      }
    }
  }
}

}  // namespace
}  // namespace resnet_fast
