// What the bf16 kernels share: vectors of 16 floats and one matrix product.
//
// There is one kind of matrix product, `multiply`: C (rows x N, float) = A (rows x K, bf16) times
// B (K x N, bf16, "paired": element [k/2][n] is the dword {B[k][n], B[k+1][n]}). It is what the
// tile instruction TDPBF16PS takes. Three builds share all else:
//   FAVOR_AMX    16 x 16 tiles (and AVX512-BF16, which every CPU with AMX has)
//   AVX512-BF16  the same product in vectors of 16 pairs, VDPBF16PS
//   neither      AVX-512 F, BW, VL and DQ: bf16 is widened by shifts, sums are fused multiply-adds
// Sums are float everywhere; what is multiplied is rounded to bf16.
#pragma once
#include <immintrin.h>

#include <cmath>

#include "native_threads.h"

using bf16 = uint16_t;

namespace {

constexpr int STRIP = 32;  // rows at a time
constexpr float LOG2E = 1.44269504089f;

// ---- vectors ----------------------------------------------------------------------------------

__m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
__m512 load(const float* p) { return _mm512_loadu_ps(p); }
__m512 all(float x) { return _mm512_set1_ps(x); }
__m512 load_bf16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

__m512i narrow(__m512 low, __m512 high) {  // 32 bf16, rounded to nearest even
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  auto half = [](__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
#endif
}

// Dwords {first[i], second[i]}, each rounded to bf16: the paired form of two rows.
__m512i pair(__m512 first, __m512 second) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), narrow(first, second));
}

// 2^t of finite t by a polynomial of degree 4 (relative error 3e-6, a thousandth of a bf16's
// rounding).
__m512 exp2(__m512 t) {
  __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(t, whole);
  __m512 p = all(9.5701006e-3f);
  p = _mm512_fmadd_ps(p, f, all(5.5917860e-2f));
  p = _mm512_fmadd_ps(p, f, all(2.4024745e-1f));
  p = _mm512_fmadd_ps(p, f, all(6.9312181e-1f));
  p = _mm512_fmadd_ps(p, f, all(9.9999926e-1f));
  return _mm512_scalef_ps(p, whole);
}

// Transpose 16 x 16 dwords in registers.
void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // r[i], r[4+i], ..: column i of each 128-bit lane's four
    __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  std::copy(t, t + 16, r);
}

// ---- the product ------------------------------------------------------------------------------

#ifdef FAVOR_AMX
struct Tiles {  // the tile registers of one thread: eight of 16 rows of 64 bytes
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, zero[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.bytes, 8, 64);
    std::fill_n(config.rows, 8, 16);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

template <bool WIDE>  // 32 columns, or 16
void multiply_columns(float* c, i64 ldc, const bf16* a, i64 lda, const uint32_t* b, i64 ldb, i64 k,
                      bool add) {
  const i64 cs = ldc * 4, as = lda * 2, bs = ldb * 4;
  if (add) {
    _tile_loadd(0, c, cs);
    _tile_loadd(2, c + 16 * ldc, cs);
    if (WIDE) { _tile_loadd(1, c + 16, cs); _tile_loadd(3, c + 16 * ldc + 16, cs); }
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (i64 i = 0; i < k; i += 32) {
    _tile_loadd(6, b + i / 2 * ldb, bs);
    _tile_loadd(4, a + i, as);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 16 * lda + i, as);
    _tile_dpbf16ps(2, 5, 6);
    if (WIDE) {
      _tile_loadd(7, b + i / 2 * ldb + 16, bs);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, cs);
  _tile_stored(2, c + 16 * ldc, cs);
  if (WIDE) { _tile_stored(1, c + 16, cs); _tile_stored(3, c + 16 * ldc + 16, cs); }
}
#else
struct Tiles {};

__m512 dot(__m512 sum, __m512i a, __m512i b) {  // sum + a[even] b[even] + a[odd] b[odd]
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
#endif
}

template <bool WIDE>
void multiply_columns(float* c, i64 ldc, const bf16* a, i64 lda, const uint32_t* b, i64 ldb, i64 k,
                      bool add) {
  constexpr int ROWS = 8, COLUMNS = WIDE ? 2 : 1;
  for (int row = 0; row < STRIP; row += ROWS, c += ROWS * ldc, a += ROWS * lda) {
    __m512 sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < COLUMNS; ++j)
        sum[r][j] = add ? load(c + r * ldc + 16 * j) : _mm512_setzero_ps();
    for (i64 i = 0; i < k; i += 2) {
      __m512i right[COLUMNS];
      for (int j = 0; j < COLUMNS; ++j) right[j] = _mm512_loadu_si512(b + i / 2 * ldb + 16 * j);
      for (int r = 0; r < ROWS; ++r) {
        int32_t two;
        std::memcpy(&two, a + r * lda + i, 4);
        for (int j = 0; j < COLUMNS; ++j)
          sum[r][j] = dot(sum[r][j], _mm512_set1_epi32(two), right[j]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sum[r][j]);
  }
}
#endif

// C (rows x n) = or += A (rows x k) B; rows and k are multiples of 32, n of 16 and C's and B's row
// length. Two columns of tiles of B, once in the first cache, meet all rows.
void multiply(float* c, const bf16* a, i64 lda, const uint32_t* b, i64 n, i64 k, bool add = false,
              i64 rows = STRIP) {
  for (i64 j = 0; j < n; j += 32)
    for (i64 r = 0; r < rows; r += STRIP) {
      float* to = c + r * n + j;
      if (j + 32 <= n)
        multiply_columns<true>(to, n, a + r * lda, lda, b + j, n, k, add);
      else
        multiply_columns<false>(to, n, a + r * lda, lda, b + j, n, k, add);
    }
}

}  // namespace
