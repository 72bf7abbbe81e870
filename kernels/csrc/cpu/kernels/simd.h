// Vectors of the instruction set that the including file has selected, and the register tile that all kernels share.
//
// A file <isa>.cpp selects its instruction set, defines RESNET_FAST_VECTOR_BYTES and includes the kernels once.
// Everything sits in an unnamed namespace, or the linker could put code of one instruction set in another's place.
#pragma once

#include "cpu/kernels/kernels.h"

#define RESNET_FAST_INLINE inline __attribute__((always_inline))

namespace resnet_fast {
namespace {

template <typename T>
struct Simd {
  static constexpr int lanes = RESNET_FAST_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(RESNET_FAST_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(RESNET_FAST_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static RESNET_FAST_INLINE Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static RESNET_FAST_INLINE void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

// Keeps NaN and the sign of zero, as torch.relu does: max(x, 0) would return 0 for NaN.
template <typename T>
RESNET_FAST_INLINE typename Simd<T>::Vec relu(typename Simd<T>::Vec v) {
  typename Simd<T>::Vec zero = {};
  return v < zero ? zero : v;
}

// Index lists: GCC keeps an array in registers only if every index is a constant from the start.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

template <typename T, int... L>
RESNET_FAST_INLINE typename Simd<T>::Vec splat(T value, Indices<L...>) {
  return typename Simd<T>::Vec{((void)L, value)...};
}

// Accumulators of P rows (output pixels or tiles) x V vectors of output channels, in registers. Each step loads V
// vectors of the filter panel, and for each row broadcasts one input element and issues V fused multiply-adds: P * V
// FMAs against P + V loads.
template <typename T, int P, int V>
struct RegisterTile {
  typedef typename Simd<T>::Vec Vec;
  static constexpr int lanes = Simd<T>::lanes;
  Vec acc[P * V];

  template <int... I>
  RESNET_FAST_INLINE void zero(Indices<I...>) {
    ((acc[I] = Vec{}), ...);
  }

  template <int... I, int... F>
  RESNET_FAST_INLINE void multiply_add(const T* x, const int64_t (&offset)[P], const T* filter, Indices<I...>,
                                       Indices<F...>) {
    const Vec panel[V] = {Simd<T>::load(filter + F * lanes)...};
    ((multiply_add_row<I>(splat(x[offset[I]], typename MakeIndices<lanes>::type()), panel, Indices<F...>())), ...);
  }

  // The same where the rows of x are contiguous: one step of an outer product.
  template <int... I, int... F>
  RESNET_FAST_INLINE void outer_product(const T* x, const T* columns, Indices<I...>, Indices<F...>) {
    const Vec panel[V] = {Simd<T>::load(columns + F * lanes)...};
    ((multiply_add_row<I>(splat(x[I], typename MakeIndices<lanes>::type()), panel, Indices<F...>())), ...);
  }

  template <int I, int... F>
  RESNET_FAST_INLINE void multiply_add_row(Vec x, const Vec (&panel)[V], Indices<F...>) {
    ((acc[I * V + F] += x * panel[F]), ...);
  }

  // The same V vectors for every row (pixel_stride 0), or those of each.
  template <int... I>
  RESNET_FAST_INLINE void add(const T* from, int64_t pixel_stride, Indices<I...>) {
    ((acc[I] += Simd<T>::load(from + (I / V) * pixel_stride + (I % V) * lanes)), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void add(const RegisterTile& other, Indices<I...>) {
    ((acc[I] += other.acc[I]), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void add_at(const T* from, const int64_t* offset, Indices<I...>) {
    ((acc[I] += Simd<T>::load(from + offset[I / V] + (I % V) * lanes)), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void relu(Indices<I...>) {
    ((acc[I] = resnet_fast::relu<T>(acc[I])), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store_at(T* to, const int64_t* offset, Indices<I...>) const {
    (Simd<T>::store(to + offset[I / V] + (I % V) * lanes, acc[I]), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store(T* to, int64_t row, Indices<I...>) const {
    (Simd<T>::store(to + (I / V) * row + (I % V) * lanes, acc[I]), ...);
  }

  template <int... I>
  RESNET_FAST_INLINE void store_packed(T* to, Indices<I...>) const {
    (Simd<T>::store(to + I * lanes, acc[I]), ...);
  }
};

}  // namespace
}  // namespace resnet_fast
