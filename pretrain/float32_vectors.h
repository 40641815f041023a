// What the float32 kernels share: vectors and one matrix product, for AVX2 and for AVX-512.
//
// Vectors are the compiler's own, of 8 or 16 floats. Rows are taken in strips of 64, whose
// exponents or hidden units stay in the second cache and are never written to memory. A row's
// result does not depend on the strip it falls into, nor on the number of threads.
#pragma once
#include <cmath>

#include "native_threads.h"

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16, ROWS = 8;  // floats of a vector; rows that a step of the product takes
#else
constexpr int WIDTH = 8, ROWS = 4;
#endif
constexpr int STRIP = 64;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Whole __attribute__((vector_size(WIDTH * 4)));

Vector load(const float* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }
Vector all(float x) { return x - Vector{}; }
Vector larger(Vector a, Vector b) { return a < b ? b : a; }  // a, if that is not a number

template <class Join> float fold(Vector x, Join join) {  // halves of the vector, again and again
  for (int n = WIDTH / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = join(x[i], x[i + n]);
  return x[0];
}
float total(Vector x) { return fold(x, [](float a, float b) { return a + b; }); }
float largest(Vector x) { return fold(x, [](float a, float b) { return a > b ? a : b; }); }

// e^x for x <= 0, by 2^whole and a polynomial for the rest (relative error 1e-7).
Vector exponential(Vector x) {
  constexpr float ROUND = 1.5f * (1 << 23);  // added, leaves no binary digits after the point
  constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  x = larger(x, all(-87));
  const Vector whole = (x * 1.44269504f + ROUND) - ROUND;
  const Vector f = (x - whole * LN2_HIGH) - whole * LN2_LOW;
  Vector p = f * 1.383684604e-3f + 8.374815861e-3f;
  p = p * f + 4.166822557e-2f;
  p = p * f + 1.666642017e-1f;
  p = p * f + 4.999999208e-1f;
  p = p * f + 1.000000036f;
  p = p * f + 1;
  const Whole bits = __builtin_convertvector(whole, Whole);
  return (Vector)((Whole)p + (bits << 23));
}

// ---- the product ------------------------------------------------------------------------------

struct Left {  // the left factor: element (r, i) lies at data[r * row + i * step]
  const float* data;
  i64 row, step;
};

// ROWS rows and C vectors of columns of A B.
template <int C> void product(float* c, i64 ldc, Left a, const float* b, i64 ldb, i64 k, bool add) {
  Vector sum[ROWS][C] = {};
  for (i64 i = 0; i < k; ++i, b += ldb) {
    Vector right[C];
    for (int j = 0; j < C; ++j) right[j] = load(b + j * WIDTH);
    for (int r = 0; r < ROWS; ++r) {
      const Vector left = all(a.data[r * a.row + i * a.step]);
      for (int j = 0; j < C; ++j) sum[r][j] += left * right[j];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < C; ++j) {
      float* to = c + r * ldc + j * WIDTH;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
}

// C (rows x n) = or += A (rows x k) B (k x n); rows are a multiple of ROWS, n of WIDTH.
void multiply(float* c, Left a, const float* b, i64 rows, i64 n, i64 k, bool add = false) {
  for (i64 j = 0; j < n;) {
    const i64 left = (n - j) / WIDTH;
    const i64 take = left == 4 ? 2 : std::min<i64>(left, 3);  // one vector alone is slow
    for (i64 r = 0; r < rows; r += ROWS) {
      const Left part{a.data + r * a.row, a.row, a.step};
      float* to = c + r * n + j;
      if (take == 3) product<3>(to, n, part, b + j, n, k, add);
      else if (take == 2) product<2>(to, n, part, b + j, n, k, add);
      else product<1>(to, n, part, b + j, n, k, add);
    }
    j += take * WIDTH;
  }
}

}  // namespace
