// Feed-forward with its norm and residual, forward and backward, for x86-64 CPUs with AVX-512:
//
//   out = x + W2 gelu(W1 norm(x) + b1) + b2, for n rows of D; H hidden units
//
// A worker takes 64 rows (forward) or 256 (backward) at a time and walks along the hidden units in
// chunks of 160, so that all it touches stays in the second cache. Neither normalized inputs nor
// hidden units are ever written: the backward pass computes them again.
//
// Gradients of weights are sums over all rows. Each span of rows, whose bounds follow from their
// number alone, is summed from zero, and the spans' sums are added in their order: the result does
// not depend on the number of threads.
#include "feed_forward_plan.h"

namespace {

struct Worker {
  const Plan& plan;
  const FeedForward& layer;
  const i64 D, H, K, N, HP;
  Memory memory;
  Tiles tiles;
  i64 block;                   // rows at a time
  bf16 *normal, *normal_t;     // normalized rows: as A (block x K); transposed (K x block)
  bf16 *grad, *grad_t;         // the same of the gradient of `out`
  float *y, *pre, *dh;         // (block x N); products of a group (GROUP x CHUNK)
  bf16* narrow_rows;           // hidden units of a group as A (GROUP x CHUNK)
  uint32_t *act_pairs, *pre_pairs;  // a block's hidden units and their gradients as B
  float *line, *mean, *scale;  // a row; moments of each

  Worker(const Plan& p, bool backward)
      : plan(p), layer(p.layer), D(p.D), H(p.H), K(p.K), N(p.N), HP(p.HP),
        block(backward ? BLOCK : GROUP) {
    normal = memory.make<bf16>(block * K);
    y = memory.make<float>(block * N), pre = memory.make<float>(GROUP * CHUNK);
    narrow_rows = memory.make<bf16>(GROUP * CHUNK);
    line = memory.make<float>(K), mean = memory.make<float>(block);
    scale = memory.make<float>(block);
    if (!backward) return;
    normal_t = memory.make<bf16>(block * K);
    grad = memory.make<bf16>(block * K), grad_t = memory.make<bf16>(block * K);
    dh = memory.make<float>(GROUP * CHUNK);
    act_pairs = memory.make<uint32_t>(block / 2 * CHUNK);
    pre_pairs = memory.make<uint32_t>(block / 2 * CHUNK);
  }

  __mmask16 lanes(i64 i) const { return D - i >= 16 ? 0xffff : D <= i ? 0 : (1u << (D - i)) - 1; }

  __m512 load_row(const void* from, i64 row, i64 i) const {  // of (n, D), as x; zero beyond D
    const i64 at = row * D + i;
    if (layer.wide) return _mm512_maskz_loadu_ps(lanes(i), (const float*)from + at);
    return widen(_mm256_maskz_loadu_epi16(lanes(i), (const bf16*)from + at));
  }
  void store_row(void* to, i64 row, i64 i, __m512 value) const {
    const i64 at = row * D + i;
    if (layer.wide) return _mm512_mask_storeu_ps((float*)to + at, lanes(i), value);
    const __m512i pairs = narrow(value, value);
    _mm256_mask_storeu_epi16((bf16*)to + at, lanes(i), _mm512_castsi512_si256(pairs));
  }

  // normal = norm(x) of rows [t, t + n); zero beyond.
  void normalize(i64 t, i64 n) {
    for (i64 r = 0; r < n; ++r) {
      __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
      for (i64 i = 0; i < D; i += 16) {
        const __m512 x = load_row(layer.x, t + r, i);
        _mm512_storeu_ps(line + i, x);
        total = _mm512_add_ps(total, x);
      }
      const __m512 middle = all(_mm512_reduce_add_ps(total) / D);
      for (i64 i = 0; i < D; i += 16) {
        const __m512 x = _mm512_maskz_sub_ps(lanes(i), load(line + i), middle);
        _mm512_storeu_ps(line + i, x);
        squares = _mm512_fmadd_ps(x, x, squares);
      }
      mean[r] = _mm512_cvtss_f32(middle);
      scale[r] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + float(layer.epsilon));
      for (i64 i = 0; i < K; i += 32) {
        __m512 part[2];
        for (int h = 0; h < 2; ++h) {
          const i64 at = i + 16 * h;
          const __m512 hat = _mm512_mul_ps(load(line + at), all(scale[r]));
          part[h] = _mm512_fmadd_ps(hat, load(plan.gamma + at), load(plan.beta + at));
        }
        _mm512_storeu_si512(normal + r * K + i, narrow(part[0], part[1]));
      }
    }
    std::memset(normal + n * K, 0, (block - n) * K * 2);
  }

  void transpose_rows(bf16* to, const bf16* rows) {  // (block x K) as (K x block)
    for (i64 r = 0; r < block; r += 32)
      for (i64 i = 0; i < K; i += 16) {
        __m512i part[16];
        for (int a = 0; a < 16; ++a) {
          const bf16* from = rows + (r + 2 * a) * K + i;
          const __m256i even = _mm256_loadu_si256((const __m256i*)from);
          const __m256i odd = _mm256_loadu_si256((const __m256i*)(from + K));
          part[a] = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        }
        transpose(part);
        for (int a = 0; a < 16; ++a) _mm512_storeu_si512(to + (i + a) * block + r, part[a]);
      }
  }

  void forward(i64 t, i64 n) {
    normalize(t, n);
    for (i64 c = 0; c < HP; c += CHUNK) {
      const i64 w = std::min(CHUNK, HP - c);
      multiply(pre, normal, K, plan.w1_columns + K / 2 * c, w, K, false, GROUP);
      for (i64 r = 0; r < GROUP; ++r)
        for (i64 j = 0; j < w; j += 32) {
          const float *from = pre + r * w + j, *bias = plan.b1 + c + j;
          const Gelu low = gelu(_mm512_add_ps(load(from), load(bias)));
          const Gelu high = gelu(_mm512_add_ps(load(from + 16), load(bias + 16)));
          _mm512_storeu_si512(narrow_rows + r * w + j, narrow(low.value, high.value));
        }
      multiply(y, narrow_rows, w, plan.w2_columns + c / 2 * N, N, w, c > 0, GROUP);
    }
    for (i64 r = 0; r < n; ++r)
      for (i64 i = 0; i < D; i += 16) {
        const __m512 sum = _mm512_add_ps(load(y + r * N + i), load(plan.b2 + i));
        store_row(layer.out, t + r, i, _mm512_add_ps(sum, load_row(layer.x, t + r, i)));
      }
  }

  // grad = gradient of `out` in rows [t, t + n), zero beyond; b2 += their sum.
  void fetch_gradient(i64 t, i64 n, const Sums& sums) {
    for (i64 r = 0; r < n; ++r)
      for (i64 i = 0; i < K; i += 32) {
        const __m512 low = load_row(layer.grad, t + r, i), high = load_row(layer.grad, t + r, i + 16);
        _mm512_storeu_si512(grad + r * K + i, narrow(low, high));
        _mm512_storeu_ps(sums.b2 + i, _mm512_add_ps(load(sums.b2 + i), low));
        _mm512_storeu_ps(sums.b2 + i + 16, _mm512_add_ps(load(sums.b2 + i + 16), high));
      }
    std::memset(grad + n * K, 0, (block - n) * K * 2);
    transpose_rows(grad_t, grad);
  }

  // Hidden units of a group at row r of the block, and their gradients, in the forms asked for.
  void hidden_gradients(i64 at, i64 c, i64 w, const Sums& sums) {
    multiply(pre, normal + at * K, K, plan.w1_columns + K / 2 * c, w, K, false, GROUP);
    multiply(dh, grad + at * K, K, plan.w2_rows + K / 2 * c, w, K, false, GROUP);
    for (i64 r = 0; r < GROUP; r += 2)
      for (i64 j = 0; j < w; j += 32) {
        __m512 g[2][2];
        for (int h = 0; h < 2; ++h) {
          const i64 i = r * w + j + 16 * h, pairs = (at + r) / 2 * w + j + 16 * h;
          const __m512 bias = load(plan.b1 + c + j + 16 * h);
          const Gelu one = gelu(_mm512_add_ps(load(pre + i), bias));
          const Gelu two = gelu(_mm512_add_ps(load(pre + i + w), bias));
          g[0][h] = _mm512_mul_ps(load(dh + i), one.slope);
          g[1][h] = _mm512_mul_ps(load(dh + i + w), two.slope);
          _mm512_storeu_si512(act_pairs + pairs, pair(one.value, two.value));
          _mm512_storeu_si512(pre_pairs + pairs, pair(g[0][h], g[1][h]));
          float* bias_sum = sums.b1 + c + j + 16 * h;
          const __m512 both = _mm512_add_ps(g[0][h], g[1][h]);
          _mm512_storeu_ps(bias_sum, _mm512_add_ps(load(bias_sum), both));
        }
        for (int a = 0; a < 2; ++a)
          _mm512_storeu_si512(narrow_rows + (r + a) * w + j, narrow(g[a][0], g[a][1]));
      }
  }

  void backward(i64 t, i64 n, const Sums& sums) {
    normalize(t, n);
    transpose_rows(normal_t, normal);
    fetch_gradient(t, n, sums);
    for (i64 c = 0; c < HP; c += CHUNK) {
      const i64 w = std::min(CHUNK, HP - c);
      for (i64 at = 0; at < n; at += GROUP) {
        hidden_gradients(at, c, w, sums);
        multiply(y + at * N, narrow_rows, w, plan.w1_rows + c / 2 * N, N, w, c > 0, GROUP);
      }
      const i64 k = round_up(n, GROUP);
      multiply(sums.w1 + K * c, normal_t, block, pre_pairs, w, k, true, K);
      multiply(sums.w2 + K * c, grad_t, block, act_pairs, w, k, true, K);
    }
    for (i64 r = 0; r < n; ++r) norm_backward(t, r, sums);
  }

  void norm_backward(i64 t, i64 r, const Sums& sums) {
    const float* from = y + r * N;
    __m512 plain = _mm512_setzero_ps(), along = _mm512_setzero_ps();
    for (i64 i = 0; i < D; i += 16) {
      const __m512 x = _mm512_maskz_sub_ps(lanes(i), load_row(layer.x, t + r, i), all(mean[r]));
      const __m512 hat = _mm512_mul_ps(x, all(scale[r])), g = load(from + i);
      _mm512_storeu_ps(line + i, hat);
      _mm512_storeu_ps(sums.gamma + i, _mm512_fmadd_ps(g, hat, load(sums.gamma + i)));
      _mm512_storeu_ps(sums.beta + i, _mm512_add_ps(load(sums.beta + i), g));
      const __m512 inner = _mm512_mul_ps(g, load(plan.gamma + i));
      plain = _mm512_add_ps(plain, inner);
      along = _mm512_fmadd_ps(inner, hat, along);
    }
    const __m512 shift = all(_mm512_reduce_add_ps(plain) / D);
    const __m512 slope = all(_mm512_reduce_add_ps(along) / D);
    for (i64 i = 0; i < D; i += 16) {
      __m512 g = _mm512_fmsub_ps(load(from + i), load(plan.gamma + i), shift);
      g = _mm512_mul_ps(_mm512_fnmadd_ps(slope, load(line + i), g), all(scale[r]));
      store_row(layer.grad_x, t + r, i, _mm512_add_ps(g, load_row(layer.grad, t + r, i)));
    }
  }
};

// Write the gradients of weights, from chunks of (K x w), as they lie: (H, D) and (D, H).
void write_gradients(const Plan& plan, const Sums& sums) {
  const FeedForward& layer = plan.layer;
  const i64 D = plan.D, H = plan.H;
  std::copy_n(sums.gamma, D, layer.grad_gamma), std::copy_n(sums.beta, D, layer.grad_beta);
  std::copy_n(sums.b1, H, layer.grad_b1), std::copy_n(sums.b2, D, layer.grad_b2);
  alignas(64) bf16 line[32];
  for (i64 c = 0; c < plan.HP; c += CHUNK) {
    const i64 w = std::min(CHUNK, plan.HP - c);
    for (i64 i = 0; i < D; i += 16)
      for (i64 j = 0; j < w; j += 16) {
        __m512i r[16];
        for (int a = 0; a < 16; ++a)
          r[a] = _mm512_loadu_si512(sums.w1 + plan.K * c + (i + a) * w + j);
        transpose(r);
        for (i64 a = 0; a < std::min<i64>(16, H - c - j); ++a) {
          const __m512 row = _mm512_castsi512_ps(r[a]);
          _mm512_store_si512(line, narrow(row, row));
          std::memcpy(layer.grad_w1 + (c + j + a) * D + i, line, std::min<i64>(16, D - i) * 2);
        }
      }
    for (i64 i = 0; i < D; ++i)
      for (i64 j = 0; j < std::min(w, H - c); j += 32) {
        const float* row = sums.w2 + plan.K * c + i * w + j;
        _mm512_store_si512(line, narrow(load(row), load(row + 16)));
        std::memcpy(layer.grad_w2 + i * H + c + j, line, std::min<i64>(32, H - c - j) * 2);
      }
  }
}

}  // namespace

// Both return 0 for success.
extern "C" int feed_forward_forward(const FeedForward* layer) try {
  const Plan plan(*layer, false);
  const i64 tasks = round_up(layer->rows, GROUP) / GROUP;
  return in_parallel(layer->threads, tasks, [&](std::atomic<i64>& next) {
    Worker worker(plan, false);
    for (i64 i; (i = next++) < tasks;)
      worker.forward(i * GROUP, std::min(GROUP, layer->rows - i * GROUP));
  });
} catch (...) {
  return 1;
}

extern "C" int feed_forward_backward(const FeedForward* layer) try {
  const Plan plan(*layer, true);
  const i64 most = std::clamp<i64>(layer->rows / LEAST_SPAN, 1, MOST_SPANS);
  const i64 span = std::max(BLOCK, round_up(round_up(layer->rows, most) / most, BLOCK));
  const i64 tasks = round_up(layer->rows, span) / span;
  Memory memory;
  const Sums total = plan.sums(memory);
  std::atomic<i64> added{0};  // spans whose sums are in `total`
  const bool failed = in_parallel(layer->threads, tasks, [&](std::atomic<i64>& next) {
    Worker worker(plan, true);
    const Sums own = plan.sums(worker.memory);
    for (i64 i; (i = next++) < tasks;) {
      std::fill_n(own.begin(), own.length, 0.f);
      const i64 last = std::min((i + 1) * span, layer->rows);
      for (i64 t = i * span; t < last; t += BLOCK)
        worker.backward(t, std::min(BLOCK, last - t), own);
      while (added != i) std::this_thread::yield();  // whoever has the span before is at work
      for (i64 j = 0; j < own.length; ++j) total.begin()[j] += own.begin()[j];
      added = i + 1;
    }
  });
  if (!failed) write_gradients(plan, total);
  return failed;
} catch (...) {
  return 1;
}
