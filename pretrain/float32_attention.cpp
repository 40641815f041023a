// FAVOR+ attention in float32, forward and backward. Formulas and names are those of
// pretrain/favor_tiled.py (S, z, dS, dz, e, g_a, g_b); c is zero, for float32 has digits enough.
#include "attention_call.h"
#include "float32_vectors.h"

// What is kept for the backward pass is null where there is none; sums: (M, D) of S, then z (M).
using Attention = AttentionCall<float>;

namespace {

constexpr float LOWEST = -1e30f;  // an exponent of no feature: makes 1.6e-38, lost in every sum

struct Worker {  // memory and steps: a head of a cell at a time
  const Attention& call;
  const i64 d, m, D, M;  // as given; rounded up to whole vectors
  const float eps, half;  // half: of the squared scale
  i64 head = 0;
  Memory memory;
  float *strip, *other, *third;  // rows of q, k, v, or what is read of them (64 x D)
  float *x, *dx;                 // exponents, then features; their gradients (64 x M)
  float *forth, *back;           // directions, transposed (D x M), and as given (M x D)
  float *sum, *count, *floor;    // S or dS (M x D), z or dz (M), what ε adds to a read (D)
  float *turned;                 // S or dS, transposed (D x M)
  float *more, *above;           // a strip's share of z and of Σ v or Σ g: long sums lose digits
  float shift[STRIP];            // of each row: what is subtracted from its exponents
  float dx_sums[STRIP];          // of each row: the sum of its dx

  explicit Worker(const Attention& c)
      : call(c), d(c.dim), m(c.features), D(round_up(d, WIDTH)), M(round_up(m, WIDTH)),
        eps(float(c.epsilon)), half(float(c.scale * c.scale / 2)) {
    for (float** rows : {&strip, &other, &third}) *rows = memory.make<float>(STRIP * D);
    for (float** wide : {&x, &dx}) *wide = memory.make<float>(STRIP * M);
    for (float** matrix : {&forth, &back, &sum, &turned}) *matrix = memory.make<float>(M * D);
    for (float** line : {&count, &more}) *line = memory.make<float>(M);
    for (float** line : {&floor, &above}) *line = memory.make<float>(D);
    for (i64 j = 0; j < m; ++j) std::copy_n(c.directions + j * d, d, back + j * D);
    transpose(back, forth);
  }

  void transpose(const float* from, float* to) const {  // (M x D) to (D x M)
    for (i64 i = 0; i < D; ++i)
      for (i64 j = 0; j < M; ++j) to[i * M + j] = from[j * D + i];
  }

  float* kept(i64 cell) const { return call.sums + (cell * call.heads + head) * M * (D + 1); }
  float& divisor(i64 t) const { return call.divisors[t * call.heads + head]; }
  float& maximum(i64 cell) const { return call.maxima[cell * call.heads + head]; }

  // Copy rows [t, t + n) of the head; rows and columns beyond are zero.
  void fetch(float* to, const Rows<float>& from, i64 t, i64 n) const {
    for (i64 r = 0; r < n; ++r) std::copy_n(from.at(t + r, head), d, to + r * D);
    std::fill(to + n * D, to + STRIP * D, 0.f);
  }

  void exponents() {
    multiply(x, {strip, D, 1}, forth, STRIP, M, D);
    for (i64 r = 0; r < STRIP; ++r) std::fill(x + r * M + m, x + (r + 1) * M, LOWEST);
  }

  float row_maximum(i64 r) const {
    Vector top = load(x + r * M);
    for (i64 j = WIDTH; j < M; j += WIDTH) top = larger(top, load(x + r * M + j));
    return largest(top);
  }

  // shift = |k|²/2 of the strip.
  void half_squares(i64 n) {
    for (i64 r = 0; r < n; ++r) {
      Vector squares{};
      for (i64 i = 0; i < D; i += WIDTH) {
        const Vector k = load(strip + r * D + i);
        squares += k * k;
      }
      shift[r] = half * total(squares);
    }
  }

  // x = features of the strip's first n rows, e = exp(x - shift), zero beyond.
  void features(i64 n) {
    for (i64 r = 0; r < n; ++r)
      for (i64 j = 0; j < M; j += WIDTH) {
        float* at = x + r * M + j;
        store(at, exponential(load(at) - shift[r]));
      }
    std::fill(x + n * M, x + STRIP * M, 0.f);
  }

  // sum += eᵀ rows, count += eᵀ weights, floor += rows: S and z from v and ones, dS and dz from
  // g_a and g_b.
  void add_strip(const float* rows, const float* weights) {
    std::fill_n(more, M, 0.f), std::fill_n(above, D, 0.f);
    for (i64 r = 0; r < STRIP; ++r) {
      for (i64 j = 0; j < M; j += WIDTH)
        store(more + j, load(more + j) + load(x + r * M + j) * weights[r]);
      for (i64 i = 0; i < D; i += WIDTH)
        store(above + i, load(above + i) + load(rows + r * D + i));
    }
    for (i64 j = 0; j < M; ++j) count[j] += more[j];
    for (i64 i = 0; i < D; ++i) floor[i] += above[i];
    multiply(sum, {x, 1, M}, rows, M, D, STRIP, true);
  }

  void clear() {
    std::fill_n(sum, M * D, 0.f), std::fill_n(count, M, 0.f), std::fill_n(floor, D, 0.f);
  }

  // The ε of every feature: add its share to S and z (or dS and dz).
  void add_epsilon(float weight) {
    for (i64 j = 0; j < m; ++j) {
      count[j] += eps * weight;
      for (i64 i = 0; i < D; ++i) sum[j * D + i] += eps * floor[i];
    }
  }

  // floor = what the ε of every feature adds to a read of S or dS.
  void find_floor() {
    std::fill_n(floor, D, 0.f);
    for (i64 j = 0; j < m; ++j)
      for (i64 i = 0; i < D; ++i) floor[i] += eps * sum[j * D + i];
  }

  void summarize_keys(i64 cell) {
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    const std::vector<float> ones(STRIP, 1.f);
    float reached = -INFINITY;
    clear();
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t);
      fetch(strip, call.k, t, n), fetch(other, call.v, t, n);
      exponents(), half_squares(n);
      float top = reached;
      for (i64 r = 0; r < n; ++r) top = std::max(top, row_maximum(r) - shift[r]);
      if (top > reached) shrink(std::exp(reached - top));
      reached = top;
      for (i64 r = 0; r < n; ++r) shift[r] += reached;
      features(n);
      add_strip(other, ones.data());
    }
    add_epsilon(float(last - first));
    if (!call.sums) return;
    std::copy_n(sum, M * D, kept(cell)), std::copy_n(count, M, kept(cell) + M * D);
    maximum(cell) = reached;
  }

  void shrink(float by) {
    for (i64 i = 0; i < M * D; ++i) sum[i] *= by;
    for (i64 j = 0; j < M; ++j) count[j] *= by;
  }

  void query_features(i64 t, i64 n) {
    fetch(strip, call.q, t, n);
    exponents();
    for (i64 r = 0; r < n; ++r) shift[r] = row_maximum(r);
    features(n);
  }

  void forward(i64 cell) {
    summarize_keys(cell);
    find_floor();
    float base = 0;
    for (i64 j = 0; j < m; ++j) base += eps * count[j];
    const i64 last = call.query_offsets[cell + 1];
    for (i64 t = call.query_offsets[cell]; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t);
      query_features(t, n);
      multiply(other, {x, M, 1}, sum, round_up(n, ROWS), D, M);  // e_q S; `floor` is ε Σ S
      for (i64 r = 0; r < n; ++r) {
        Vector dot{};
        for (i64 j = 0; j < M; j += WIDTH) dot += load(x + r * M + j) * load(count + j);
        const float by = base + total(dot);  // b = (e_q + ε) z
        if (call.divisors) divisor(t + r) = by;
        float* to = call.out.at(t + r, head);
        for (i64 i = 0; i < d; ++i) to[i] = (other[r * D + i] + floor[i]) / by;
      }
    }
  }

  void backward(i64 cell) {
    queries_backward(cell);
    keys_backward(cell);
  }

  // dx = e ∘ (dx + weights zᵀ); dx_sums = the sum of each row.
  void feature_gradients(i64 n, const float* weights, const float* z) {
    for (i64 r = 0; r < n; ++r) {
      Vector along{};
      for (i64 j = 0; j < M; j += WIDTH) {
        float* at = dx + r * M + j;
        const Vector g = (load(at) + load(z + j) * weights[r]) * load(x + r * M + j);
        store(at, g);
        along += g;
      }
      dx_sums[r] = total(along);
    }
  }

  // grad_q, and dS and dz in `sum` and `count`.
  void queries_backward(i64 cell) {
    const float* z = kept(cell) + M * D;
    const i64 first = call.query_offsets[cell], last = call.query_offsets[cell + 1];
    float g_b[STRIP], all_g_b = 0;
    transpose(kept(cell), turned);
    clear();
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t), rows = round_up(n, ROWS);
      query_features(t, n);
      fetch(other, call.grad, t, n);
      std::fill_n(g_b, STRIP, 0.f);
      for (i64 r = 0; r < n; ++r) {  // `other` becomes g_a = g / b; g_b = -g_a . (a / b)
        const float* read = call.out.at(t + r, head);
        for (i64 i = 0; i < d; ++i) g_b[r] -= (other[r * D + i] /= divisor(t + r)) * read[i];
        all_g_b += g_b[r];
      }
      add_strip(other, g_b);                            // dS += e_qᵀ g_a, dz += e_qᵀ g_b
      multiply(dx, {other, D, 1}, turned, rows, M, D);  // g_a Sᵀ
      feature_gradients(n, g_b, z);                     // dx = e_q ∘ (g_a Sᵀ + g_b zᵀ)
      multiply(third, {dx, M, 1}, back, rows, D, M);    // dq = dx P
      for (i64 r = 0; r < n; ++r) std::copy_n(third + r * D, d, call.grad_q.at(t + r, head));
    }
    add_epsilon(all_g_b);
  }

  void keys_backward(i64 cell) {
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    const std::vector<float> ones(STRIP, 1.f);
    transpose(sum, turned);
    find_floor();
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t), rows = round_up(n, ROWS);
      fetch(strip, call.k, t, n), fetch(other, call.v, t, n);
      exponents(), half_squares(n);
      for (i64 r = 0; r < n; ++r) shift[r] += maximum(cell);
      features(n);
      multiply(third, {x, M, 1}, sum, rows, D, M);      // e_k dS; `floor` is ε Σ dS
      multiply(dx, {other, D, 1}, turned, rows, M, D);  // v dSᵀ
      feature_gradients(n, ones.data(), count);         // dx = e_k ∘ (v dSᵀ + dzᵀ)
      multiply(other, {dx, M, 1}, back, rows, D, M);    // dk = dx P - (Σ dx) k / √d
      for (i64 r = 0; r < n; ++r) {
        float *to_k = call.grad_k.at(t + r, head), *to_v = call.grad_v.at(t + r, head);
        for (i64 i = 0; i < d; ++i) {
          to_k[i] = other[r * D + i] - dx_sums[r] * 2 * half * strip[r * D + i];
          to_v[i] = third[r * D + i] + floor[i];
        }
      }
    }
  }
};

int run(const Attention* call, void (Worker::*step)(i64)) {
  const i64 tasks = call->cells * call->heads;
  return in_parallel(call->threads, tasks, [&](std::atomic<i64>& next) {
    Worker worker(*call);
    for (i64 i; (i = next++) < tasks;) {
      worker.head = i % call->heads;
      (worker.*step)(i / call->heads);
    }
  });
}

}  // namespace

// Both return 0 for success.
extern "C" int float32_forward(const Attention* call) { return run(call, &Worker::forward); }
extern "C" int float32_backward(const Attention* call) { return run(call, &Worker::backward); }
