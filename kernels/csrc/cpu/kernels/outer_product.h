// Sums of outer products, which a filter's gradient is made of: one source for every instruction set and type.
//
//   dW[k][run][i] = sum over output pixels of dy[p][k] * x[p][run offset + i]
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// The register tile that sums products of elements of T.
template <typename T>
struct OuterTile {
  template <int P, int V>
  using Of = Tile<T, P, V>;
};

// One tile of registers: P output channels x V vectors of input channels, summed over all pixels (or tiles) of a call.
template <typename T, int P, int V>
void sum_outer_tile(const OuterCall<T>& call, int row, int column) {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename OuterTile<T>::template Of<P, V> Sums;
  Sums tile;
  tile.start(All());
  const T *d = call.d + row, *x = call.x + column;
  constexpr int line = 64 / sizeof(T);
  for (int t = 0; t < call.count; ++t) {
    const T *next_d = d + call.d_offset[t + kOuterAhead], *next_x = x + call.x_offset[t + kOuterAhead];
    __builtin_prefetch(next_d);
    if (P > line / 2) __builtin_prefetch(next_d + P - 1);
    for (int i = 0; i < V * Sums::lanes; i += line) __builtin_prefetch(next_x + i);
    tile.outer(d + call.d_offset[t], x + call.x_offset[t], typename MakeIndices<P>::type(),
               typename MakeIndices<V>::type());
  }
  auto* const to = call.sums + static_cast<int64_t>(row) * call.sums_row + column;
  if (call.accumulate) tile.add(to, call.sums_row, All());
  tile.put(to, call.sums_row, All());
}

template <typename T>
using SumOuterTile = void (*)(const OuterCall<T>&, int, int);

template <typename T, int V, int... P>
inline SumOuterTile<T> select_outer(int rows, Indices<P...>) {
  static constexpr SumOuterTile<T> tiles[] = {sum_outer_tile<T, P + 1, V>...};
  return tiles[rows - 1];
}

template <typename T, int P, int V>
void outer_columns(const OuterCall<T>& call, int column) {
  const int parts = (call.row_end - call.row_begin + P - 1) / P, rows = call.row_end - call.row_begin;
  for (int part = 0; part < parts; ++part) {
    const int begin = call.row_begin + rows * part / parts, end = call.row_begin + rows * (part + 1) / parts;
    select_outer<T, V>(end - begin, typename MakeIndices<P>::type())(call, begin, column);
  }
}

template <typename T, int P, int PH>
void outer_products(const OuterCall<T>& call) {
  constexpr int lanes = OuterTile<T>::template Of<1, 1>::lanes;
  int column = 0;
  for (; column + 2 * lanes <= call.columns; column += 2 * lanes) {
    outer_columns<T, P, 2>(call, column);
  }
  for (; column < call.columns; column += lanes) outer_columns<T, PH, 1>(call, column);
}

}  // namespace
}  // namespace resnet_fast
