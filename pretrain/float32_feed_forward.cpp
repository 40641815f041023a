// Feed-forward with its norm and residual in float32, forward only: what labelling cells takes.
#include "float32_vectors.h"

// x + W2 gelu(W1 norm(x) + b1) + b2. Mirrored by ctypes in pretrain/float32_native.py.
struct FeedForward {
  const float *x, *gamma, *beta, *w1, *b1, *w2, *b2;  // (n, D), (D), (D), (H, D), (H), (D, H), (D)
  float* out;                                         // (n, D)
  i64 rows, width, hidden, threads;
  double epsilon;
};

namespace {

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

// Returns 0 for success.
extern "C" int float32_feed_forward(const FeedForward* call) try {
  const Layer layer(*call);
  const i64 tasks = round_up(call->rows, STRIP) / STRIP;
  return in_parallel(call->threads, tasks, [&](std::atomic<i64>& next) {
    Feeding worker(layer);
    for (i64 i; (i = next++) < tasks;)
      worker.feed(i * STRIP, std::min<i64>(STRIP, call->rows - i * STRIP));
  });
} catch (...) {
  return 1;
}
