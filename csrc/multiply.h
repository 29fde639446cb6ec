// C (m, n) = A (m, k) B (k, n), or +=, of matrices that fit in the cache.
//
// A has any strides (its transpose costs nothing), B and C contiguous rows, n is a multiple of the vector width.
#pragma once

#include "lanes.h"

namespace mmf {

template <class A, int rows, int vectors>
inline __attribute__((always_inline)) void tile(int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b,
                                                int64_t ldb, A* c, int64_t ldc, bool add) {
  using V = at::vec::Vectorized<A>;
  constexpr int64_t W = V::size();
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[r][j] = add ? V::loadu(c + r * ldc + j * W) : V(0);
  }
  for (int64_t i = 0; i < k; ++i) {
    V right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = V::loadu(b + i * ldb + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V left(a[r * a_row + i * a_column]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[r][j] = at::vec::fmadd(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[r][j].store(c + r * ldc + j * W);
  }
}

constexpr int TILE_ROWS = 6;  // 6 x 4 sums fill the 32 registers of AVX512, 6 x 2 the 16 of AVX2

template <class A, int vectors, int rows = TILE_ROWS>
void strip(int64_t m, int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c,
           int64_t ldc, bool add) {
  for (; m >= rows; m -= rows, a += rows * a_row, c += rows * ldc) {
    tile<A, rows, vectors>(k, a, a_row, a_column, b, ldb, c, ldc, add);
  }
  if constexpr (rows > 1) {
    if (m > 0) strip<A, vectors, rows - 1>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
  }
}

template <class A>
void multiply(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb,
              A* c, int64_t ldc, bool add) {
  constexpr int64_t W = at::vec::Vectorized<A>::size(), most = W * sizeof(A) == 64 ? 4 : 2;
  for (int64_t left = n / W; left > 0;) {
    const int64_t vectors = at::divup(left, at::divup(left, most));  // strips of equal width
    if (vectors == 4) strip<A, 4>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 3) strip<A, 3>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 2) strip<A, 2>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 1) strip<A, 1>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    left -= vectors, b += vectors * W, c += vectors * W;
  }
}

}  // namespace mmf
