// What a worker of the attention keeps, and what it does to a strip of 32 rows of one head
// (pretrain/favor_native.cpp walks along the cells with it).
#pragma once

#include "attention_call.h"
#include "native_tiles.h"

using Call = AttentionCall<bf16>;  // sums: (D + 1, M) of each, S transposed, then z; centers: (D)

namespace {

constexpr float FAR = 1e30f;  // subtracted from an exponent, leaves a feature of zero
constexpr int BLOCK = 256;  // rows whose features are kept until they are summed
constexpr i64 MOST_HEADS = 16;  // of a worker: what is kept for each, 150 KB, has to stay in cache

struct Strips {
  const Call& call;
  const i64 d, m;       // as given
  const i64 D, M, MK;   // d and m rounded up to 32; m to 16 (columns) and to 32 (when summed over)
  const float eps;
  Memory memory;
  Tiles tiles;

  float *x, *dphi;                       // a strip's exponents, then features; their gradients
  float* small;                          // a strip's product (32 x D)
  float* shift;                          // of each row: what is subtracted from its exponents
  float *dot_z, *along, *dx_sums;        // of each row: e . z; g_a . a; the sum of its dx
  bf16 *strip, *other, *e_rows;          // a strip of q, k, v or grad (32 x D); features as A
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

  Strips(const Call& c, i64 num_heads)
      : call(c), d(c.dim), m(c.features), D(round_up(d, 32)), M(round_up(m, 16)),
        MK(round_up(m, 32)), eps(float(c.epsilon)) {
    x = make<float>(STRIP * M), dphi = make<float>(STRIP * M);
    small = make<float>(STRIP * D);
    for (float** rows : {&shift, &dot_z, &along, &dx_sums}) *rows = make<float>(STRIP);
    strip = make<bf16>(STRIP * D), other = make<bf16>(STRIP * D);
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

  template <class T> T* make(i64 n) { return memory.make<T>(n); }

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

  __mmask32 dims(i64 i) const { return d - i >= 32 ? ~0u : (1u << (d - i)) - 1; }

  // Copy rows [t, t + n) of a head; rows and columns beyond are zero.
  void fetch(bf16* to, const Rows<bf16>& from, i64 t, i64 n) {
    const bf16* row = from.at(t, head);
    const i64 ahead = STRIP * from.token;  // the next strip's
    for (i64 r = 0; r < n; ++r, row += from.token)
      for (i64 i = 0; i < d; i += 32) {
        _mm_prefetch((const char*)(row + ahead + i), _MM_HINT_T0);
        _mm512_storeu_si512(to + r * D + i, _mm512_maskz_loadu_epi16(dims(i), row + i));
      }
    std::memset(to + n * D, 0, (STRIP - n) * D * 2);
  }

  // c for now: the mean of the head's values in a cell.
  void find_center(i64 cell) {
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    float* mean = center(cell);
    std::fill_n(mean, D, 0.f);
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t);
      fetch(other, call.v, t, n);
      for (i64 i = 0; i < D; i += 16) {  // a strip by itself: long sums lose digits
        __m512 total = _mm512_setzero_ps();
        for (i64 r = 0; r < n; ++r) total = _mm512_add_ps(total, load_bf16(other + r * D + i));
        _mm512_storeu_ps(mean + i, _mm512_add_ps(load(mean + i), total));
      }
    }
    for (i64 i = 0; i < D; ++i) mean[i] /= float(last - first);
  }

  // other = a strip of v - c, rounded.
  void fetch_values(i64 cell, i64 t, i64 n) {
    const float* mean = center(cell);
    fetch(other, call.v, t, n);
    for (i64 r = 0; r < n; ++r)
      for (i64 i = 0; i < D; i += 32) {
        bf16* at = other + r * D + i;
        const __m512 low = _mm512_sub_ps(load_bf16(at), load(mean + i));
        const __m512 high = _mm512_sub_ps(load_bf16(at + 16), load(mean + i + 16));
        _mm512_storeu_si512(at, narrow(low, high));
      }
  }

  // Let c take what rounding has left of Σ (v - c), which is zero. A c below the last digits of v
  // is lost in v - c, for all tokens alike: of a long cell, whose mean is small, up to a fifth of
  // what is attended.
  void take_back_rounding(i64 cell) {
    const float n = float(call.offsets[cell + 1] - call.offsets[cell]);
    for (i64 i = 0; i < D; ++i) center(cell)[i] -= floor[i] / n;
  }

  // Round the strip in `small` (32 x D) into rows [t, t + n).
  void store(const Rows<bf16>& to, i64 t, i64 n) {
    bf16* row = to.at(t, head);
    for (i64 r = 0; r < n; ++r, row += to.token)
      for (i64 i = 0; i < d; i += 32) {
        const float* from = small + r * D + i;
        _mm512_mask_storeu_epi16(row + i, dims(i), narrow(load(from), load(from + 16)));
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

  // sum += columns x features of the block: S += eᵀ (v - c), or dS += eᵀ g_a. Begins the next one.
  void flush() {
    if (filled) multiply(sum, columns, BLOCK, e_pairs, M, filled, true, D);
    filled = 0;
  }

  void clear_sums() {
    std::fill_n(sum, D * M, 0.f), std::fill_n(count, M, 0.f), std::fill_n(floor, D, 0.f);
  }

  // shift = |k|²/2 of each key; FAR beyond the cell.
  void half_squares(const bf16* keys, i64 n) {
    const float half = float(call.scale * call.scale / 2);
    for (i64 r = 0; r < STRIP; ++r) {
      __m512 total = _mm512_setzero_ps();
      for (i64 i = 0; i < D; i += 16) {
        __m512 k = load_bf16(keys + r * D + i);
        total = _mm512_fmadd_ps(k, k, total);
      }
      shift[r] = r < n ? half * _mm512_reduce_add_ps(total) : FAR;
    }
  }

  // shift = the largest exponent of each query.
  void row_maxima() {
    for (i64 r = 0; r < STRIP; ++r) {
      __m512 top = all(-INFINITY);
      for (i64 j = 0; j < M; j += 16)
        top = _mm512_mask_max_ps(top, lanes(j), top, load(x + r * M + j));
      shift[r] = _mm512_reduce_max_ps(top);
    }
  }

  // Features of a strip, e = exp(x - shift), two rows at a time, in the forms asked for.
  //   ROWS: as A in e_rows. PAIRS: as B in e_pairs. KEEP: as floats in x.
  //   COUNT: count += Σ e. `z`: dot_z = e . z.
  template <bool ROWS, bool PAIRS, bool KEEP, bool COUNT>
  void features(const float* z = nullptr) {
    for (i64 r = 0; r < STRIP; r += 2) {
      __m512 dots[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      const __m512 less[2] = {all(shift[r] * LOG2E), all(shift[r + 1] * LOG2E)};
      float* rows[2] = {x + r * M, x + (r + 1) * M};
      uint32_t* pairs = e_pairs + (filled + r) / 2 * M;
      bf16* narrow_rows[2] = {e_rows + r * MK, e_rows + (r + 1) * MK};
      auto step = [&](i64 j, auto whole) __attribute__((always_inline)) {
        __m512 e[2][2] = {};
        for (i64 h = 0; h < 2 && (whole || j + 16 * h < M); ++h) {
          const i64 at = j + 16 * h;
          for (int i = 0; i < 2; ++i) {
            e[i][h] = exp2(_mm512_fmsub_ps(load(rows[i] + at), all(LOG2E), less[i]));
            if (!whole) e[i][h] = _mm512_maskz_mov_ps(lanes(at), e[i][h]);
            if (KEEP) _mm512_storeu_ps(rows[i] + at, e[i][h]);
          }
          if (PAIRS) _mm512_storeu_si512(pairs + at, pair(e[0][h], e[1][h]));
          if (COUNT) {
            const __m512 both = _mm512_add_ps(e[0][h], e[1][h]);
            _mm512_storeu_ps(count + at, _mm512_add_ps(load(count + at), both));
          }
          if (z)
            for (int i = 0; i < 2; ++i) dots[i] = _mm512_fmadd_ps(e[i][h], load(z + at), dots[i]);
        }
        if (ROWS)
          for (int i = 0; i < 2; ++i)
            _mm512_storeu_si512(narrow_rows[i] + j, narrow(e[i][0], e[i][1]));
      };
      i64 j = 0;
      for (; j + 32 <= m; j += 32) step(j, std::true_type{});
      for (; j < MK; j += 32) step(j, std::false_type{});
      if (z) dot_z[r] = _mm512_reduce_add_ps(dots[0]), dot_z[r + 1] = _mm512_reduce_add_ps(dots[1]);
    }
  }

  // along = g_a . a of each row, by way of the features: (e + ε) . (g_a Sᵀ).
  void read_gradients() {
    for (i64 r = 0; r < STRIP; ++r) {
      __m512 total = _mm512_setzero_ps();
      for (i64 j = r * M; j < (r + 1) * M; j += 16)
        total = _mm512_fmadd_ps(_mm512_add_ps(load(x + j), all(eps)), load(dphi + j), total);
      along[r] = _mm512_reduce_add_ps(total);
    }
  }

  // e_rows = dx. Of queries e ∘ (dphi + g_b zᵀ), with g_b in `weights`, and count += Σ eᵀ g_b (dz);
  // of keys e ∘ (dphi + dzᵀ). dx_sums = the sum of each row.
  template <bool QUERIES> void feature_gradients(const float* weights, const float* z) {
    for (i64 r = 0; r < STRIP; ++r) {
      const __m512 w = all(QUERIES ? weights[r] : 1);
      __m512 total = _mm512_setzero_ps();
      for (i64 j = 0; j < MK; j += 32) {
        __m512 g[2] = {};
        for (i64 h = 0; h < 2 && j + 16 * h < M; ++h) {
          const i64 at = j + 16 * h;
          const __m512 e = load(x + r * M + at);
          g[h] = _mm512_mul_ps(_mm512_fmadd_ps(w, load(z + at), load(dphi + r * M + at)), e);
          total = _mm512_add_ps(total, g[h]);
          if (QUERIES) _mm512_storeu_ps(count + at, _mm512_fmadd_ps(w, e, load(count + at)));
        }
        _mm512_storeu_si512(e_rows + r * MK + j, narrow(g[0], g[1]));
      }
      dx_sums[r] = _mm512_reduce_add_ps(total);
    }
  }

  // The ε of every feature: add its share to S (or dS), and make `floor` what it adds to a read.
  void add_epsilon() {
    for (i64 i = 0; i < D; ++i) {
      const __m512 share = all(eps * floor[i]);
      __m512 total = _mm512_setzero_ps();
      for (i64 j = 0; j < m; j += 16) {
        const __m512 more = _mm512_mask_add_ps(load(sum + i * M + j), lanes(j),
                                               load(sum + i * M + j), share);
        _mm512_storeu_ps(sum + i * M + j, more);
        total = _mm512_add_ps(total, more);  // beyond m there are zeros
      }
      floor[i] = eps * _mm512_reduce_add_ps(total);
    }
  }

  // Move c on to what is attended where all features are alike; S sums to nothing then, and has no
  // share in what ε adds to a read. Returns Σ z.
  float recenter(i64 cell) {
    float all_counts = 0;
    for (i64 j = 0; j < m; ++j) all_counts += count[j];
    for (i64 i = 0; i < D; ++i) {
      __m512 total = _mm512_setzero_ps();
      for (i64 j = i * M; j < (i + 1) * M; j += 16) total = _mm512_add_ps(total, load(sum + j));
      const float more = _mm512_reduce_add_ps(total) / all_counts;
      center(cell)[i] += more;
      for (i64 j = 0; j < M; ++j) sum[i * M + j] -= more * count[j];
    }
    return all_counts;
  }

  // x = the strip's exponents, before `shift` is taken off.
  void exponents() { multiply(x, strip, D, forth, M, D); }

  // Raise the running maximum to the largest exponent of the strip; what was summed shrinks.
  float raise(float maximum) {
    __m512 top = all(-INFINITY);
    for (i64 r = 0; r < STRIP; ++r)
      for (i64 j = 0; j < M; j += 16) {
        __m512 complete = _mm512_sub_ps(load(x + r * M + j), all(shift[r]));
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

  float* center(i64 cell) const { return call.centers + (cell * call.heads + head) * D; }
  float* saved(i64 cell) const { return call.sums + (cell * call.heads + head) * (D + 1) * M; }
};

}  // namespace
