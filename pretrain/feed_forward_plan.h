// Sizes and packed weights of the feed-forward (pretrain/feed_forward_native.cpp), and its GELU.
#pragma once

#include "native_tiles.h"

struct FeedForward {  // mirrored by ctypes in pretrain/feed_forward_native.py; contiguous rows
  const void *x, *grad;                         // (n, D); of `out`
  void *out, *grad_x;                           // (n, D), all four of one type
  const float *gamma, *beta, *b1, *b2;          // (D), (D), (H), (D)
  const bf16 *w1, *w2;                          // (H, D), (D, H)
  float *grad_gamma, *grad_beta, *grad_b1, *grad_b2;
  bf16 *grad_w1, *grad_w2;
  i64 rows, width, hidden, threads, wide;       // wide: x is float, not bf16
  double epsilon;
};

namespace {

constexpr i64 CHUNK = 160;  // hidden units at a time
constexpr i64 GROUP = 64;   // rows that share a walk along the weights
constexpr i64 BLOCK = 256;  // rows that share a walk along the sums of gradients
constexpr i64 MOST_SPANS = 16, LEAST_SPAN = 512;

struct Gelu { __m512 value, slope; };

// x Φ(x) and its derivative Φ(x) + x φ(x). Φ is by Abramowitz and Stegun 7.1.26, off by 1e-7.
Gelu gelu(__m512 x) {
  const __m512 size = _mm512_abs_ps(x);
  const __m512 down = _mm512_mul_ps(_mm512_mul_ps(x, x), all(-0.5f * LOG2E));
  const __m512 bell = exp2(_mm512_max_ps(down, all(-200)));  // e^(-x²/2)
  const __m512 base = _mm512_fmadd_ps(size, all(0.3275911f * 0.70710678f), all(1));
  __m512 t = _mm512_rcp14_ps(base);
  t = _mm512_mul_ps(t, _mm512_fnmadd_ps(base, t, all(2)));
  __m512 p = all(1.061405429f / 2);
  p = _mm512_fmadd_ps(p, t, all(-1.453152027f / 2));
  p = _mm512_fmadd_ps(p, t, all(1.421413741f / 2));
  p = _mm512_fmadd_ps(p, t, all(-0.284496736f / 2));
  p = _mm512_fmadd_ps(p, t, all(0.254829592f / 2));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), bell);  // Φ(-|x|)
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 share = _mm512_mask_sub_ps(tail, positive, all(1), tail);
  const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, bell), all(0.39894228f), share);
  return {_mm512_mul_ps(x, share), slope};
}

// B (k x n) of a matrix whose columns are the rows of `from`, row length ld; k of 32, n of 16.
void pack_columns(uint32_t* to, const bf16* from, i64 ld, i64 k, i64 n) {
  for (i64 j = 0; j < n; j += 16)
    for (i64 i = 0; i < k; i += 32) {
      __m512i r[16];
      for (int a = 0; a < 16; ++a) r[a] = _mm512_loadu_si512(from + (j + a) * ld + i);
      transpose(r);
      for (int a = 0; a < 16; ++a) _mm512_storeu_si512(to + (i / 2 + a) * n + j, r[a]);
    }
}

// B (k x n) of a matrix whose rows are those of `from`; k even, n of 16.
void pack_rows(uint32_t* to, const bf16* from, i64 ld, i64 k, i64 n) {
  for (i64 i = 0; i < k; i += 2)
    for (i64 j = 0; j < n; j += 16) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(from + i * ld + j));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(from + (i + 1) * ld + j));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(to + i / 2 * n + j, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
    }
}

struct Sums {  // gradients of all weights, float: chunk after chunk of (K x chunk)
  float *w1, *w2, *b1, *b2, *gamma, *beta;
  i64 length;
  float* begin() const { return w1; }
};

struct Plan {  // sizes, and the weights as both passes need them; shared by all workers
  const FeedForward& layer;
  const i64 D, H, K, N, HP;  // K, N: D rounded up to 32 and to 16; HP: H to 32
  Memory memory;
  uint32_t *w1_columns, *w2_columns = nullptr, *w1_rows = nullptr, *w2_rows = nullptr;
  float *gamma, *beta, *b1, *b2;

  Plan(const FeedForward& l, bool backward)
      : layer(l), D(l.width), H(l.hidden), K(round_up(D, 32)), N(round_up(D, 16)),
        HP(round_up(H, 32)) {
    gamma = padded(l.gamma, D, K), beta = padded(l.beta, D, K);
    b1 = padded(l.b1, H, HP), b2 = padded(l.b2, D, K);
    bf16* w1 = memory.make<bf16>(HP * K);
    for (i64 h = 0; h < H; ++h) std::memcpy(w1 + h * K, l.w1 + h * D, D * 2);
    w1_columns = memory.make<uint32_t>(K / 2 * HP);
    if (backward) w1_rows = memory.make<uint32_t>(HP / 2 * N);
    bf16* w2 = memory.make<bf16>(K * HP);
    for (i64 i = 0; i < D; ++i) std::memcpy(w2 + i * HP, l.w2 + i * H, H * 2);
    (backward ? w2_rows : w2_columns) = memory.make<uint32_t>(K * HP / 2);
    for (i64 c = 0; c < HP; c += CHUNK) {
      const i64 w = std::min(CHUNK, HP - c);
      pack_columns(w1_columns + K / 2 * c, w1 + c * K, K, K, w);
      if (!backward) {
        pack_columns(w2_columns + c / 2 * N, w2 + c, HP, w, N);
        continue;
      }
      pack_rows(w1_rows + c / 2 * N, w1 + c * K, K, w, N);
      pack_rows(w2_rows + K / 2 * c, w2 + c, HP, K, w);
    }
  }
  float* padded(const float* from, i64 n, i64 to) {
    float* made = memory.make<float>(to);
    std::copy_n(from, n, made);
    return made;
  }
  Sums sums(Memory& where) const {
    const i64 weights = K * HP, length = weights * 2 + HP + 3 * K;
    float* at = where.make<float>(length);
    float* rest = at + length - HP - 3 * K;
    return {at, at + weights, rest, rest + HP, rest + HP + K, rest + HP + 2 * K, length};
  }
};

}  // namespace
