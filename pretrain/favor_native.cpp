// FAVOR+ attention, forward and backward, for bf16 inputs on x86-64 CPUs with AVX-512.
//
// pretrain/favor_tiled.py tells the formulas; the names here are the same (S, z, dS, dz, e). A
// worker takes some heads of a cell and walks along its tokens in strips of 32 rows, so that a
// strip's exponents (32 x m), the features made of them and all matrices they meet stay in the
// second cache. Nothing as long as the cell and as wide as m is ever written. Every 256 tokens it
// goes on to the next head: heads lie side by side in memory, and passing along the whole cell for
// each of them takes a tenth longer. One worker does the whole of a
// head, in one order: the result does not depend on the number of threads.
//
// There is one kind of matrix product, `multiply`: C (32 x N, float) = A (32 x K, bf16, rows) times
// B (K x N, bf16, "paired": element [k/2][n] is the dword {B[k][n], B[k+1][n]}). It is what the
// tile instruction TDPBF16PS takes. Two builds share all else:
//   FAVOR_AMX  16 x 16 tiles (and AVX512-BF16, which every CPU with AMX has)
//   without    AVX-512 F, BW, VL and DQ: bf16 is widened by shifts, sums are fused multiply-adds
// Sums are float everywhere; features and what they are multiplied with are rounded to bf16.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

using bf16 = uint16_t;
using i64 = int64_t;

struct Rows {  // a (tokens, heads, dim) tensor whose last dimension is dense; strides in elements
  bf16* data;
  i64 token, head;
  bf16* at(i64 t, i64 h) const { return data + t * token + h * head; }
};

struct Call {  // mirrored by ctypes in pretrain/favor_native.py
  Rows q, k, v, out, grad, grad_q, grad_k, grad_v;
  const float* directions;             // (m, d), scaled by d^-1/4
  const i64 *offsets, *query_offsets;  // (cells + 1)
  float* divisors;                     // (queries, heads): what each attended value was divided by
  float* sums;                         // (cells, heads, d + 1, M): S transposed, then z
  float* maxima;                       // (cells, heads): largest exponent of the keys
  i64 cells, heads, dim, features, threads;
  double epsilon, scale;  // scale = d^-1/4
};

namespace {

constexpr int STRIP = 32;  // rows at a time
constexpr int BLOCK = 256;  // rows whose features are kept until they are summed
constexpr i64 MOST_HEADS = 16;  // of a worker: what is kept for each, 150 KB, has to stay in cache
constexpr float LOG2E = 1.44269504089f;

i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// ---- vectors ----------------------------------------------------------------------------------

__m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
__m512 load(const float* p) { return _mm512_loadu_ps(p); }
__m512 all(float x) { return _mm512_set1_ps(x); }
__m512 load_bf16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

__m512i narrow(__m512 low, __m512 high) {  // 32 bf16, rounded to nearest even
#ifdef FAVOR_AMX
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

// 2^t by a polynomial of degree 4 (relative error 3e-6, a thousandth of a bf16's rounding).
__m512 exp2(__m512 t) {
  t = _mm512_max_ps(t, all(-140.f));  // -inf would become nan below
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
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
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

// C (32 x n) = or += A (32 x k) B; n is a multiple of 16 and C's and B's row length, k of 32.
void multiply(float* c, const bf16* a, i64 lda, const uint32_t* b, i64 n, i64 k, bool add = false) {
  i64 j = 0;
  for (; j + 32 <= n; j += 32) multiply_columns<true>(c + j, n, a, lda, b + j, n, k, add);
  if (j < n) multiply_columns<false>(c + j, n, a, lda, b + j, n, k, add);
}

// ---- one worker's memory and steps ------------------------------------------------------------

struct Worker {
  const Call& call;
  const i64 d, m;       // as given
  const i64 D, M, MK;   // d and m rounded up to 32; m to 16 (columns) and to 32 (when summed over)
  const float eps;
  std::vector<void*> held;
  Tiles tiles;

  float *x, *dphi;                       // a strip's exponents, then features; their gradients
  float *small, *row_a, *row_b;          // a strip's product (32 x D); one number per row
  bf16 *strip, *other, *third, *e_rows;  // a strip of q, k, v or grad (32 x D); features as A
  uint32_t* e_pairs;                     // a block's features, paired along the tokens (256 x M)
  bf16* columns;                         // a block of v or grad, transposed (D x 256)
  uint32_t *forth, *back;                // directions as B: (D x M), and transposed (MK x D)
  i64 filled = 0;                        // rows of the block

  struct Head {  // what is kept for each head; the names below are the current one's
    float *sum, *count, *floor;       // S or dS, transposed (D x M); z or dz (M); Σ of v or grad
    uint32_t *by_feature, *by_width;  // S or dS as B: summed over m, (MK x D), or d, (D x M)
    float maximum, base;              // largest exponent of keys; what ε adds to divisors, to dz
  };
  std::vector<Head> heads;
  i64 head = 0;  // the current one, of the call's
  float *sum, *count, *floor;
  uint32_t *by_feature, *by_width;

  Worker(const Call& c, i64 num_heads)
      : call(c), d(c.dim), m(c.features), D(round_up(d, 32)), M(round_up(m, 16)),
        MK(round_up(m, 32)), eps(float(c.epsilon)) {
    x = make<float>(STRIP * M), dphi = make<float>(STRIP * M);
    small = make<float>(STRIP * D), row_a = make<float>(STRIP), row_b = make<float>(STRIP);
    strip = make<bf16>(STRIP * D), other = make<bf16>(STRIP * D), third = make<bf16>(STRIP * D);
    e_rows = make<bf16>(STRIP * MK);
    e_pairs = make<uint32_t>(BLOCK / 2 * M), columns = make<bf16>(D * BLOCK);
    for (i64 h = 0; h < num_heads; ++h)
      heads.push_back({make<float>(D * M), make<float>(M), make<float>(D),
                       make<uint32_t>(MK / 2 * D), make<uint32_t>(D / 2 * M), 0, 0});
    sum = heads[0].sum;
    forth = make<uint32_t>(D / 2 * M), back = make<uint32_t>(MK / 2 * D);
    // The directions, transposed, lie in `sum` for a moment: (D x M) as S does.
    for (i64 j = 0; j < m; ++j)
      for (i64 i = 0; i < d; ++i) sum[i * M + j] = c.directions[j * d + i];
    pack_by_width(forth);
    pack_by_feature(back);
  }
  ~Worker() { for (void* p : held) std::free(p); }
  Worker(const Worker&) = delete;

  Head& turn_to(i64 first_head, i64 h) {
    Head& own = heads[h];
    head = first_head + h;
    sum = own.sum, count = own.count, floor = own.floor;
    by_feature = own.by_feature, by_width = own.by_width;
    return own;
  }

  // Call `strip_of(own, t, n)` for the tokens [first, last) of all heads, in strips of n rows.
  template <class Step> void walk(i64 first_head, i64 num, i64 first, i64 last, Step strip_of) {
    for (i64 from = first; from < last; from += BLOCK)
      for (i64 h = 0; h < num; ++h) {
        Head& own = turn_to(first_head, h);
        const i64 to = std::min(from + BLOCK, last);
        for (i64 t = from; t < to; t += STRIP) strip_of(own, t, std::min<i64>(STRIP, to - t));
        flush();
      }
  }

  template <class T> T* make(i64 n) {  // zeroed, aligned, and padded for the loads of whole vectors
    size_t bytes = round_up(n * sizeof(T), 64) + 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    held.push_back(p);
    return (T*)std::memset(p, 0, bytes);
  }

  __mmask16 lanes(i64 j) const { return m - j >= 16 ? 0xffff : (1u << (m - j)) - 1; }

  // `sum` (D x M) as B of products over the width (K = D).
  void pack_by_width(uint32_t* to) {
    for (i64 i = 0; i < D; i += 2)
      for (i64 j = 0; j < M; j += 16)
        _mm512_storeu_si512(to + i / 2 * M + j,
                            pair(load(sum + i * M + j), load(sum + (i + 1) * M + j)));
  }

  // `sum` as B of products over the features (K = MK): pairs lie along its rows.
  void pack_by_feature(uint32_t* to) {
    for (i64 j = 0; j < MK; j += 32)
      for (i64 i = 0; i < D; i += 16) {
        __m512i r[16];
        for (int a = 0; a < 16; ++a) {
          const float* row = sum + (i + a) * M + j;
          r[a] = narrow(load(row), j + 16 < M ? load(row + 16) : _mm512_setzero_ps());
        }
        transpose(r);
        for (int a = 0; a < 16; ++a) _mm512_storeu_si512(to + (j / 2 + a) * D + i, r[a]);
      }
  }

  // Copy rows [t, t + n) of a head; rows and columns beyond are zero.
  void fetch(bf16* to, const Rows& from, i64 t, i64 n) {
    for (i64 r = 0; r < n; ++r) {
      const bf16* row = from.at(t + r, head);
      const bf16* ahead = row + STRIP * from.token;  // the next strip's
      for (i64 i = 0; i < d; i += 32) _mm_prefetch((const char*)(ahead + i), _MM_HINT_T0);
      std::memcpy(to + r * D, row, d * 2);
    }
    std::memset(to + n * D, 0, (STRIP - n) * D * 2);
  }

  // Round the strip in `small` (32 x D) into rows [t, t + n).
  void store(const Rows& to, i64 t, i64 n) {
    alignas(64) bf16 line[512];
    for (i64 r = 0; r < n; ++r) {
      for (i64 i = 0; i < D; i += 32)
        _mm512_store_si512(line + i, narrow(load(small + r * D + i), load(small + r * D + i + 16)));
      std::memcpy(to.at(t + r, head), line, d * 2);
    }
  }

  // Put a strip's rows, as columns, behind those the block has, and add them up in `floor`.
  void append_columns(const bf16* rows) {
    for (i64 i = 0; i < D; i += 16) {
      __m512i r[16];
      __m512 total = load(floor + i);
      for (int a = 0; a < 16; ++a) {
        __m256i even = _mm256_loadu_si256((const __m256i*)(rows + 2 * a * D + i));
        __m256i odd = _mm256_loadu_si256((const __m256i*)(rows + (2 * a + 1) * D + i));
        total = _mm512_add_ps(total, _mm512_add_ps(widen(even), widen(odd)));
        r[a] = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      _mm512_storeu_ps(floor + i, total);
      transpose(r);
      for (int a = 0; a < 16; ++a) _mm512_storeu_si512(columns + (i + a) * BLOCK + filled, r[a]);
    }
  }

  // sum += columns x features of the block, and begin the next one.
  void flush() {
    if (filled)
      for (i64 i = 0; i < D; i += STRIP)
        multiply(sum + i * M, columns + i * BLOCK, BLOCK, e_pairs, M, filled, true);
    filled = 0;
  }

  void clear_sums() {
    std::fill_n(sum, D * M, 0.f), std::fill_n(count, M, 0.f), std::fill_n(floor, D, 0.f);
  }

  // row_a = what to subtract from the exponents of each key, |k|²/2; infinite beyond the cell.
  void half_squares(const bf16* keys, i64 n) {
    const float half = float(call.scale * call.scale / 2);
    for (i64 r = 0; r < STRIP; ++r) {
      __m512 total = _mm512_setzero_ps();
      for (i64 i = 0; i < D; i += 16) {
        __m512 k = load_bf16(keys + r * D + i);
        total = _mm512_fmadd_ps(k, k, total);
      }
      row_a[r] = r < n ? half * _mm512_reduce_add_ps(total) : INFINITY;
    }
  }

  // row_a = the largest exponent of each query.
  void row_maxima() {
    for (i64 r = 0; r < STRIP; ++r) {
      __m512 top = all(-INFINITY);
      for (i64 j = 0; j < M; j += 16)
        top = _mm512_mask_max_ps(top, lanes(j), top, load(x + r * M + j));
      row_a[r] = _mm512_reduce_max_ps(top);
    }
  }

  __m512 feature(i64 r, i64 j) const {  // exp(x - row_a)
    __m512 t = _mm512_fmsub_ps(load(x + r * M + j), all(LOG2E), all(row_a[r] * LOG2E));
    return _mm512_maskz_mov_ps(lanes(j), exp2(t));
  }

  // Features of a strip's exponents, two rows at a time, in the forms asked for.
  //   ROWS: as A in e_rows. PAIRS: as B in e_pairs. KEEP: as floats in x.
  //   `weights`: count += Σ weight of the row x features; `z`: row_b = features . z.
  template <bool ROWS, bool PAIRS, bool KEEP>
  void features(const float* weights, const float* z) {
    for (i64 r = 0; r < STRIP; r += 2) {
      __m512 dot_0 = _mm512_setzero_ps(), dot_1 = _mm512_setzero_ps();
      const __m512 w_0 = all(weights ? weights[r] : 0);
      const __m512 w_1 = all(weights ? weights[r + 1] : 0);
      for (i64 j = 0; j < MK; j += 32) {
        __m512 e[2][2] = {};
        for (i64 h = 0; h < 2 && j + 16 * h < M; ++h) {
          const i64 at = j + 16 * h;
          e[0][h] = feature(r, at);
          e[1][h] = feature(r + 1, at);
          if (KEEP) {
            _mm512_storeu_ps(x + r * M + at, e[0][h]);
            _mm512_storeu_ps(x + (r + 1) * M + at, e[1][h]);
          }
          if (PAIRS)
            _mm512_storeu_si512(e_pairs + (filled + r) / 2 * M + at, pair(e[0][h], e[1][h]));
          if (weights) {
            __m512 total = _mm512_fmadd_ps(w_0, e[0][h], load(count + at));
            _mm512_storeu_ps(count + at, _mm512_fmadd_ps(w_1, e[1][h], total));
          }
          if (z) {
            dot_0 = _mm512_fmadd_ps(e[0][h], load(z + at), dot_0);
            dot_1 = _mm512_fmadd_ps(e[1][h], load(z + at), dot_1);
          }
        }
        if (ROWS) {
          _mm512_storeu_si512(e_rows + r * MK + j, narrow(e[0][0], e[0][1]));
          _mm512_storeu_si512(e_rows + (r + 1) * MK + j, narrow(e[1][0], e[1][1]));
        }
      }
      if (z) row_b[r] = _mm512_reduce_add_ps(dot_0), row_b[r + 1] = _mm512_reduce_add_ps(dot_1);
    }
  }

  // e_rows = x (features) times their gradient, dphi + weight of the row x z; row_b = sum of each.
  void feature_gradients(const float* weights, const float* z) {
    for (i64 r = 0; r < STRIP; ++r) {
      const __m512 w = all(weights ? weights[r] : 1);
      __m512 total = _mm512_setzero_ps();
      for (i64 j = 0; j < MK; j += 32) {
        __m512 g[2] = {};
        for (i64 h = 0; h < 2 && j + 16 * h < M; ++h) {
          const i64 at = j + 16 * h;
          g[h] = _mm512_fmadd_ps(w, load(z + at), load(dphi + r * M + at));
          g[h] = _mm512_mul_ps(g[h], load(x + r * M + at));
          total = _mm512_add_ps(total, g[h]);
        }
        _mm512_storeu_si512(e_rows + r * MK + j, narrow(g[0], g[1]));
      }
      row_b[r] = _mm512_reduce_add_ps(total);
    }
  }

  // The ε of every feature: add its share to S (or dS), and make `floor` what it adds to a read.
  void add_epsilon() {
    for (i64 i = 0; i < D; ++i) {
      const float share = eps * floor[i];
      float total = 0;
      for (i64 j = 0; j < m; ++j) total += sum[i * M + j] += share;
      floor[i] = eps * total;
    }
  }

  // Exponents of the strip; for keys, with what to subtract from them in row_a.
  void exponents() { multiply(x, strip, D, forth, M, D); }

  // Raise the running maximum to the largest exponent of the strip; what was summed shrinks.
  float raise(float maximum) {
    __m512 top = all(-INFINITY);
    for (i64 r = 0; r < STRIP; ++r)
      for (i64 j = 0; j < M; j += 16) {
        __m512 complete = _mm512_sub_ps(load(x + r * M + j), all(row_a[r]));
        top = _mm512_mask_max_ps(top, lanes(j), top, complete);
      }
    const float largest = _mm512_reduce_max_ps(top);
    if (largest <= maximum) return maximum;
    flush();
    const float shrink = std::exp(maximum - largest);
    for (i64 i = 0; i < D * M; ++i) sum[i] *= shrink;
    for (i64 j = 0; j < M; ++j) count[j] *= shrink;
    return largest;
  }

  float* saved(i64 cell) const { return call.sums + (cell * call.heads + head) * (D + 1) * M; }

  void forward(i64 cell, i64 first_head, i64 num) {
    const std::vector<float> ones(STRIP, 1.f);
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    for (i64 h = 0; h < num; ++h) turn_to(first_head, h).maximum = -INFINITY, clear_sums();
    walk(first_head, num, first, last, [&](Head& own, i64 t, i64 n) {
      fetch(strip, call.k, t, n), fetch(other, call.v, t, n);
      exponents(), half_squares(strip, n);
      own.maximum = raise(own.maximum);
      for (i64 r = 0; r < STRIP; ++r) row_a[r] += own.maximum;
      features<false, true, false>(ones.data(), nullptr);
      append_columns(other);
      filled += STRIP;
    });
    for (i64 h = 0; h < num; ++h) {
      Head& own = turn_to(first_head, h);
      add_epsilon();
      own.base = 0;
      for (i64 j = 0; j < m; ++j) own.base += eps * (count[j] += eps * float(last - first));
      std::copy_n(sum, D * M, saved(cell)), std::copy_n(count, M, saved(cell) + D * M);
      call.maxima[cell * call.heads + head] = own.maximum;
      pack_by_feature(by_feature);
    }
    read_queries(cell, first_head, num);
  }

  void read_queries(i64 cell, i64 first_head, i64 num) {
    const i64 first = call.query_offsets[cell], last = call.query_offsets[cell + 1];
    walk(first_head, num, first, last, [&](Head& own, i64 t, i64 n) {
      fetch(strip, call.q, t, n);
      exponents(), row_maxima();
      features<true, false, false>(nullptr, count);
      multiply(small, e_rows, MK, by_feature, D, MK);
      for (i64 r = 0; r < n; ++r) {
        const float divisor = row_b[r] + own.base;
        call.divisors[(t + r) * call.heads + head] = divisor;
        for (i64 i = 0; i < D; ++i) small[r * D + i] = (small[r * D + i] + floor[i]) / divisor;
      }
      store(call.out, t, n);
    });
  }

  // other = g_a = gradient / divisor, rounded; row_b = g_b = -g_a . attended value.
  void upstream(i64 t, i64 n) {
    fetch(other, call.grad, t, n), fetch(third, call.out, t, n);
    for (i64 r = 0; r < STRIP; ++r) {
      const float* divisor = call.divisors + (t + r) * call.heads + head;
      const __m512 inverse = all(r < n ? 1 / *divisor : 0);
      __m512 along = _mm512_setzero_ps();
      for (i64 i = r * D; i < (r + 1) * D; i += 32) {
        const __m512 a = _mm512_mul_ps(load_bf16(other + i), inverse);
        const __m512 b = _mm512_mul_ps(load_bf16(other + i + 16), inverse);
        along = _mm512_fmadd_ps(a, load_bf16(third + i), along);
        along = _mm512_fmadd_ps(b, load_bf16(third + i + 16), along);
        _mm512_storeu_si512(other + i, narrow(a, b));
      }
      row_b[r] = -_mm512_reduce_add_ps(along);
    }
  }

  void backward(i64 cell, i64 first_head, i64 num) {
    const i64 first = call.query_offsets[cell], last = call.query_offsets[cell + 1];
    float along[STRIP];
    for (i64 h = 0; h < num; ++h) {
      turn_to(first_head, h).base = 0;
      std::copy_n(saved(cell), D * M, sum);
      pack_by_width(by_width);
      clear_sums();
    }
    walk(first_head, num, first, last, [&](Head& own, i64 t, i64 n) {
      fetch(strip, call.q, t, n);
      upstream(t, n);
      std::copy_n(row_b, STRIP, along);
      for (i64 r = 0; r < n; ++r) own.base += eps * along[r];
      exponents(), row_maxima();
      features<false, true, true>(along, nullptr);
      append_columns(other);
      filled += STRIP;
      multiply(dphi, other, D, by_width, M, D);
      feature_gradients(along, saved(cell) + D * M);
      multiply(small, e_rows, MK, back, D, MK);
      store(call.grad_q, t, n);
    });
    for (i64 h = 0; h < num; ++h) {
      const Head& own = turn_to(first_head, h);
      add_epsilon();
      for (i64 j = 0; j < m; ++j) count[j] += own.base;
      pack_by_width(by_width), pack_by_feature(by_feature);
    }
    keys_backward(cell, first_head, num);
  }

  void keys_backward(i64 cell, i64 first_head, i64 num) {
    const float squared = float(call.scale * call.scale);
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    walk(first_head, num, first, last, [&](Head&, i64 t, i64 n) {
      const float maximum = call.maxima[cell * call.heads + head];
      fetch(strip, call.k, t, n), fetch(other, call.v, t, n);
      exponents(), half_squares(strip, n);
      for (i64 r = 0; r < STRIP; ++r) row_a[r] += maximum;
      features<true, false, true>(nullptr, nullptr);
      multiply(small, e_rows, MK, by_feature, D, MK);
      for (i64 r = 0; r < n; ++r)
        for (i64 i = 0; i < D; ++i) small[r * D + i] += floor[i];
      store(call.grad_v, t, n);
      multiply(dphi, other, D, by_width, M, D);
      feature_gradients(nullptr, count);
      multiply(small, e_rows, MK, back, D, MK);
      for (i64 r = 0; r < n; ++r)
        for (i64 i = 0; i < D; i += 16) {
          float* at = small + r * D + i;
          const __m512 k = _mm512_mul_ps(load_bf16(strip + r * D + i), all(squared * row_b[r]));
          _mm512_storeu_ps(at, _mm512_sub_ps(load(at), k));
        }
      store(call.grad_k, t, n);
    });
  }
};

int run(const Call* call, void (Worker::*step)(i64, i64, i64)) {
  // As many heads at a time as leave every thread some.
  const i64 share = round_up(call->cells * call->heads, call->threads) / call->threads;
  const i64 most = std::max<i64>(1, std::min({share, call->heads, MOST_HEADS}));
  const i64 groups = round_up(call->heads, most) / most, all = call->cells * groups;
  std::atomic<i64> next{0};
  std::atomic<bool> failed{false};
  auto work = [&] {
    try {
      Worker worker(*call, most);
      for (i64 i; (i = next++) < all;) {
        const i64 first = i % groups * most;
        (worker.*step)(i / groups, first, std::min(most, call->heads - first));
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (i64 i = 1; i < std::min(call->threads, all); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
  }  // no more threads to be had: those there are do the work
  work();
  for (std::thread& other : others) other.join();
  return failed;
}

}  // namespace

// All return 0 for success.
extern "C" int favor_prepare() {
#ifdef FAVOR_AMX
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) != 0;
#else
  return 0;
#endif
}
extern "C" int favor_forward(const Call* call) { return run(call, &Worker::forward); }
extern "C" int favor_backward(const Call* call) { return run(call, &Worker::backward); }
