// Accumulated outer products: the weight gradient, one source for every instruction set and type.
//
//   dW[k][run][i] = sum over output pixels of dy[p][k] * x[p][run offset + i]
#pragma once

#include "cpu/kernels/simd.h"

namespace resnet_fast {
namespace {

// The register tile of outer products of elements of T.
template <typename T>
struct OuterRegisterTile {
  template <int P, int V>
  using Of = RegisterTile<T, P, V>;
};

// One register tile: P output channels x V vectors of input channels, accumulated over all pixels (or tiles) of a call.
template <typename T, int P, int V>
void accumulate_outer_tile(const OuterCall<T>& call, int row, int column) {
  typedef typename MakeIndices<P * V>::type All;
  typedef typename OuterRegisterTile<T>::template Of<P, V> Acc;
  Acc tile;
  tile.zero(All());
  const T *d = call.d + row, *x = call.x + column;
  constexpr int line = 64 / sizeof(T);
  for (int t = 0; t < call.count; ++t) {
    const T *next_d = d + call.d_offset[t + kOuterPrefetch], *next_x = x + call.x_offset[t + kOuterPrefetch];
    __builtin_prefetch(next_d);
    if (P > line / 2) __builtin_prefetch(next_d + P - 1);
    for (int i = 0; i < V * Acc::lanes; i += line) __builtin_prefetch(next_x + i);
    tile.outer_product(d + call.d_offset[t], x + call.x_offset[t], typename MakeIndices<P>::type(),
                       typename MakeIndices<V>::type());
  }
  auto* const to = call.acc + static_cast<int64_t>(row) * call.acc_row + column;
  if (call.accumulate) tile.add(to, call.acc_row, All());
  tile.store(to, call.acc_row, All());
}

template <typename T>
using AccumulateOuterTile = void (*)(const OuterCall<T>&, int, int);

template <typename T, int V, int... P>
inline AccumulateOuterTile<T> select_outer(int rows, Indices<P...>) {
  static constexpr AccumulateOuterTile<T> tiles[] = {accumulate_outer_tile<T, P + 1, V>...};
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
  constexpr int lanes = OuterRegisterTile<T>::template Of<1, 1>::lanes;
  int column = 0;
  for (; column + 2 * lanes <= call.columns; column += 2 * lanes) {
    outer_columns<T, P, 2>(call, column);
  }
  for (; column < call.columns; column += lanes) outer_columns<T, PH, 1>(call, column);
}

}  // namespace
}  // namespace resnet_fast
