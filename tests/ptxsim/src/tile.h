// The arithmetic of one tensor-core tile, on plain arrays: C[M][8] += A[M][K] * B[K][8] in float,
// products exact, summed in order of k. The hardware sums groups of products with truncation
// instead, so results agree to rounding, and exactly where all sums are exact.
#pragma once
#include "types.h"

#ifdef __FMA__
#include <immintrin.h>
#endif

typedef float Row8 __attribute__((vector_size(32)));

// The product is exact, so fusing it with the sum changes nothing but the time.
inline Row8 multiply_add(Row8 x, float y, Row8 sum) {
#ifdef __FMA__
  return _mm256_fmadd_ps(x, _mm256_set1_ps(y), sum);
#else
  return sum + x * y;
#endif
}

template <int M, int K>
inline void multiply_tile(const float (&a)[M][K], const float (&b)[K][8], float (&c)[M][8]) {
  Row8 rows[K];
  for (int k = 0; k < K; ++k) std::memcpy(&rows[k], b[k], 32);
  for (int i = 0; i < M; i += 4) {
    Row8 s[4];
    std::memcpy(s, c[i], sizeof s);
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 4; ++j) s[j] = multiply_add(rows[k], a[i + j][k], s[j]);
    std::memcpy(c[i], s, sizeof s);
  }
}
