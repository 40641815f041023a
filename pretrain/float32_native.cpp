// Attention and feed-forward in float32, forward only, on x86-64 CPUs with AVX2 or AVX-512: what
// labelling cells takes. Formulas and names are those of pretrain/favor_tiled.py.
//
// Vectors are the compiler's own; one matrix product serves everything. Rows are taken in strips of
// 64, whose exponents or hidden units stay in the second cache and are never written to memory. A
// row's result does not depend on the strip it falls into, nor on the number of threads.
#include <cmath>

#include "native_threads.h"

struct Rows {  // a (tokens, heads, dim) tensor whose last dimension is dense; strides in elements
  float* data;
  i64 token, head;
  float* at(i64 t, i64 h) const { return data + t * token + h * head; }
};

struct Attention {  // mirrored by ctypes in pretrain/float32_native.py
  Rows q, k, v, out;
  const float* directions;             // (m, d), scaled by d^-1/4
  const i64 *offsets, *query_offsets;  // (cells + 1)
  i64 cells, heads, dim, features, threads;
  double epsilon, scale;  // scale = d^-1/4
};

struct FeedForward {  // x + W2 gelu(W1 norm(x) + b1) + b2; mirrored, too
  const float *x, *gamma, *beta, *w1, *b1, *w2, *b2;  // (n, D), (D), (D), (H, D), (H), (D, H), (D)
  float* out;                                         // (n, D)
  i64 rows, width, hidden, threads;
  double epsilon;
};

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16, ROWS = 8;  // floats of a vector; rows that a step of the product takes
#else
constexpr int WIDTH = 8, ROWS = 4;
#endif
constexpr int STRIP = 64;
constexpr float LOWEST = -1e30f;  // an exponent that makes a feature of zero

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Whole __attribute__((vector_size(WIDTH * 4)));

Vector load(const float* p) {
  Vector x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }
Vector all(float x) { return x - Vector{}; }
Vector larger(Vector a, Vector b) { return a > b ? a : b; }

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

// x Φ(x); Φ is by Abramowitz and Stegun 7.1.26, off by 1e-7.
Vector gelu(Vector x) {
  const Vector size = x < 0 ? -x : x;
  const Vector t = 1 / (size * (0.3275911f * 0.70710678f) + 1);
  Vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector tail = p * t * 0.5f * exponential(x * x * -0.5f);  // Φ(-|x|)
  return x * (x > 0 ? 1 - tail : tail);
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

// ---- attention --------------------------------------------------------------------------------

struct Attending {  // one worker's memory and steps: a head of a cell at a time
  const Attention& call;
  const i64 d, m, D, M;  // as given; rounded up to whole vectors
  const float eps;
  i64 head = 0;
  Memory memory;
  float *strip, *other;        // rows of q or k, and of v or what is read (64 x D)
  float* x;                    // their exponents, then features (64 x M)
  float* forth;                // directions, transposed (D x M)
  float *sum, *count, *floor;  // S (M x D), z (M); Σ of v, then what ε adds to a read (D)
  float *more, *above;         // a strip's share of z and of Σ v: long sums lose digits

  explicit Attending(const Attention& c)
      : call(c), d(c.dim), m(c.features), D(round_up(d, WIDTH)), M(round_up(m, WIDTH)),
        eps(float(c.epsilon)) {
    strip = memory.make<float>(STRIP * D), other = memory.make<float>(STRIP * D);
    x = memory.make<float>(STRIP * M), forth = memory.make<float>(D * M);
    sum = memory.make<float>(M * D), count = memory.make<float>(M), floor = memory.make<float>(D);
    more = memory.make<float>(M), above = memory.make<float>(D);
    for (i64 j = 0; j < m; ++j)
      for (i64 i = 0; i < d; ++i) forth[i * M + j] = c.directions[j * d + i];
  }

  // Copy rows [t, t + n) of the head; rows and columns beyond are zero.
  void fetch(float* to, const Rows& from, i64 t, i64 n) {
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

  void summarize(i64 first, i64 last) {
    const float half = float(call.scale * call.scale / 2);
    float maximum = -INFINITY, less[STRIP];
    std::fill_n(sum, M * D, 0.f), std::fill_n(count, M, 0.f), std::fill_n(floor, D, 0.f);
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t);
      fetch(strip, call.k, t, n), fetch(other, call.v, t, n);
      exponents();
      std::fill_n(more, M, 0.f), std::fill_n(above, D, 0.f);
      float top = maximum;
      for (i64 r = 0; r < n; ++r) {
        Vector squares{};
        for (i64 i = 0; i < D; i += WIDTH) {
          const Vector k = load(strip + r * D + i);
          squares += k * k;
          store(above + i, load(above + i) + load(other + r * D + i));
        }
        less[r] = half * total(squares);
        top = std::max(top, row_maximum(r) - less[r]);
      }
      if (top > maximum) shrink(std::exp(maximum - top));
      maximum = top;
      for (i64 r = 0; r < STRIP; ++r)
        for (i64 j = 0; j < M; j += WIDTH) {
          float* at = x + r * M + j;
          const Vector e = r < n ? exponential(load(at) - (less[r] + maximum)) : Vector{};
          store(at, e);
          store(more + j, load(more + j) + e);
        }
      for (i64 j = 0; j < M; ++j) count[j] += more[j];
      for (i64 i = 0; i < D; ++i) floor[i] += above[i];
      multiply(sum, {x, 1, M}, other, M, D, STRIP, true);
    }
    add_epsilon(last - first);
  }

  void shrink(float by) {
    for (i64 i = 0; i < M * D; ++i) sum[i] *= by;
    for (i64 j = 0; j < M; ++j) count[j] *= by;
  }

  // The ε of every feature: add its share to S and z, and make `floor` what it adds to a read.
  void add_epsilon(i64 keys) {
    for (i64 j = 0; j < m; ++j) {
      count[j] += eps * float(keys);
      for (i64 i = 0; i < D; ++i) sum[j * D + i] += eps * floor[i];
    }
    std::fill_n(floor, D, 0.f);
    for (i64 j = 0; j < m; ++j)
      for (i64 i = 0; i < D; ++i) floor[i] += eps * sum[j * D + i];
  }

  void read(i64 first, i64 last) {
    float base = 0;
    for (i64 j = 0; j < m; ++j) base += eps * count[j];
    for (i64 t = first; t < last; t += STRIP) {
      const i64 n = std::min<i64>(STRIP, last - t);
      float divisor[STRIP];
      fetch(strip, call.q, t, n);
      exponents();
      for (i64 r = 0; r < n; ++r) {
        const float top = row_maximum(r);
        Vector dot{};
        for (i64 j = 0; j < M; j += WIDTH) {
          const Vector e = exponential(load(x + r * M + j) - top);
          store(x + r * M + j, e);
          dot += e * load(count + j);
        }
        divisor[r] = base + total(dot);
      }
      multiply(other, {x, M, 1}, sum, round_up(n, ROWS), D, M);
      for (i64 r = 0; r < n; ++r) {
        float* to = call.out.at(t + r, head);
        for (i64 i = 0; i < d; ++i) to[i] = (other[r * D + i] + floor[i]) / divisor[r];
      }
    }
  }

  void attend(i64 cell, i64 h) {
    head = h;
    summarize(call.offsets[cell], call.offsets[cell + 1]);
    read(call.query_offsets[cell], call.query_offsets[cell + 1]);
  }
};

// ---- feed-forward -----------------------------------------------------------------------------

struct Layer {  // weights as the product takes them, padded; shared by all workers
  const FeedForward& call;
  const i64 d, D, H;  // as given, rounded up
  Memory memory;
  float *w1, *b1, *w2, *b2, *gamma, *beta;  // (D x H), (H), (H x D), (D) each

  explicit Layer(const FeedForward& c)
      : call(c), d(c.width), D(round_up(d, WIDTH)), H(round_up(c.hidden, WIDTH)) {
    w1 = transposed(c.w1, c.hidden, d, H, D), w2 = transposed(c.w2, d, c.hidden, D, H);
    b1 = padded(c.b1, c.hidden, H), b2 = padded(c.b2, d, D);
    gamma = padded(c.gamma, d, D), beta = padded(c.beta, d, D);
  }
  float* padded(const float* from, i64 n, i64 to) {
    return std::copy_n(from, n, memory.make<float>(to)) - n;
  }
  float* transposed(const float* from, i64 rows, i64 columns, i64 to_rows, i64 to_columns) {
    float* made = memory.make<float>(to_rows * to_columns);
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < columns; ++c) made[c * to_rows + r] = from[r * columns + c];
    return made;
  }
};

struct Feeding {  // one worker's memory and step
  const Layer& layer;
  Memory memory;
  float *normal, *hidden, *y;  // (64 x D), (64 x H), (64 x D)

  explicit Feeding(const Layer& l) : layer(l) {
    normal = memory.make<float>(STRIP * l.D), y = memory.make<float>(STRIP * l.D);
    hidden = memory.make<float>(STRIP * l.H);
  }

  void normalize(const float* from, float* to) {
    const i64 d = layer.d, D = layer.D;
    std::copy_n(from, d, to);
    Vector sum{}, squares{};
    for (i64 i = 0; i < D; i += WIDTH) sum += load(to + i);
    const float mean = total(sum) / d;
    for (i64 i = 0; i < d; ++i) to[i] -= mean;
    for (i64 i = 0; i < D; i += WIDTH) squares += load(to + i) * load(to + i);
    const float scale = 1 / std::sqrt(total(squares) / d + float(layer.call.epsilon));
    for (i64 i = 0; i < D; i += WIDTH)
      store(to + i, load(to + i) * scale * load(layer.gamma + i) + load(layer.beta + i));
  }

  void feed(i64 t, i64 n) {
    const i64 d = layer.d, D = layer.D, H = layer.H, rows = round_up(n, ROWS);
    for (i64 r = 0; r < n; ++r) normalize(layer.call.x + (t + r) * d, normal + r * D);
    multiply(hidden, {normal, D, 1}, layer.w1, rows, H, D);
    for (i64 r = 0; r < n; ++r)
      for (i64 j = 0; j < H; j += WIDTH) {
        float* at = hidden + r * H + j;
        store(at, gelu(load(at) + load(layer.b1 + j)));
      }
    multiply(y, {hidden, H, 1}, layer.w2, rows, D, H);
    for (i64 r = 0; r < n; ++r) {
      const float* x = layer.call.x + (t + r) * d;
      float* to = layer.call.out + (t + r) * d;
      for (i64 i = 0; i < d; ++i) to[i] = x[i] + (y[r * D + i] + layer.b2[i]);
    }
  }
};

}  // namespace

// Both return 0 for success.
extern "C" int float32_attention(const Attention* call) {
  const i64 tasks = call->cells * call->heads;
  return in_parallel(call->threads, tasks, [&](std::atomic<i64>& next) {
    Attending worker(*call);
    for (i64 i; (i = next++) < tasks;) worker.attend(i / call->heads, i % call->heads);
  });
}

extern "C" int float32_feed_forward(const FeedForward* call) try {
  const Layer layer(*call);
  const i64 tasks = round_up(call->rows, STRIP) / STRIP;
  return in_parallel(call->threads, tasks, [&](std::atomic<i64>& next) {
    Feeding worker(layer);
    for (i64 i; (i = next++) < tasks;)
      worker.feed(i * STRIP, std::min<i64>(STRIP, call->rows - i * STRIP));
  });
} catch (const std::bad_alloc&) {
  return 1;
}
