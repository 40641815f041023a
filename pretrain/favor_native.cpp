// FAVOR+ attention, forward and backward, for bf16 inputs on x86-64 CPUs with AVX-512.
//
// pretrain/favor_tiled.py tells the formulas; the names here are the same (S, z, dS, dz, e). A
// worker takes some heads of a cell and walks along its tokens in strips of 32 rows, so that a
// strip's exponents (32 x m), the features made of them and all matrices they meet stay in the
// second cache. Nothing as long as the cell and as wide as m is ever written. Every 256 tokens it
// goes on to the next head: heads lie side by side in memory, and passing along the whole cell for
// each of them takes a tenth longer. One worker does the whole of a
// head, in one order: the result does not depend on the number of threads.
#include <sys/syscall.h>
#include <unistd.h>

#include "favor_strips.h"

namespace {

struct Worker : Strips {
  using Strips::Strips;

  void forward(i64 cell, i64 first_head, i64 num) {
    const i64 first = call.offsets[cell], last = call.offsets[cell + 1];
    for (i64 h = 0; h < num; ++h)
      turn_to(first_head, h).maximum = -INFINITY, clear_sums(), find_center(cell);
    walk(first_head, num, first, last, [&](Head& own, i64 t, i64 n) {
      fetch(strip, call.k, t, n), fetch_values(cell, t, n);
      exponents(), half_squares(strip, n);
      own.maximum = raise(own.maximum);
      for (i64 r = 0; r < STRIP; ++r) shift[r] += own.maximum;
      features<false, true, false, true>();  // e_k; z += Σ e_k
      append_columns(other);                 // v - c, for S += e_kᵀ (v - c) of the block
      filled += STRIP;
    });
    for (i64 h = 0; h < num; ++h) {
      Head& own = turn_to(first_head, h);
      take_back_rounding(cell);
      add_epsilon();
      for (i64 j = 0; j < m; ++j) count[j] += eps * float(last - first);
      own.base = eps * recenter(cell);
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
      features<true, false, false, false>(count);      // e_q and e_q z
      multiply(small, e_rows, MK, by_feature, D, MK);  // a = e_q S: ε Σ S is nothing, see recenter
      for (i64 r = 0; r < n; ++r) {                    // out = c + a / b
        const float divisor = dot_z[r] + own.base;     // b = (e_q + ε) z
        const __m512 inverse = all(1 / divisor);
        call.divisors[(t + r) * call.heads + head] = divisor;
        for (i64 i = 0; i < D; i += 16) {
          float* at = small + r * D + i;
          _mm512_storeu_ps(at, _mm512_fmadd_ps(load(at), inverse, load(center(cell) + i)));
        }
      }
      store(call.out, t, n);
    });
  }

  // other = g_a = gradient / divisor, rounded; zero beyond the cell.
  void upstream(i64 t, i64 n) {
    fetch(other, call.grad, t, n);
    for (i64 r = 0; r < n; ++r) {
      const __m512 inverse = all(1 / call.divisors[(t + r) * call.heads + head]);
      for (i64 i = r * D; i < (r + 1) * D; i += 32) {
        const __m512 low = _mm512_mul_ps(load_bf16(other + i), inverse);
        const __m512 high = _mm512_mul_ps(load_bf16(other + i + 16), inverse);
        _mm512_storeu_si512(other + i, narrow(low, high));
      }
    }
  }

  void backward(i64 cell, i64 first_head, i64 num) {
    const i64 first = call.query_offsets[cell], last = call.query_offsets[cell + 1];
    float g_b[STRIP];
    for (i64 h = 0; h < num; ++h) {
      turn_to(first_head, h).base = 0;
      std::copy_n(saved(cell), D * M, sum);
      pack_by_width(by_width);
      clear_sums();
    }
    walk(first_head, num, first, last, [&](Head& own, i64 t, i64 n) {
      fetch(strip, call.q, t, n);
      upstream(t, n);
      exponents(), row_maxima();
      features<false, true, true, false>();  // e_q
      append_columns(other);                 // g_a, for dS += e_qᵀ g_a of the block
      filled += STRIP;
      multiply(dphi, other, D, by_width, M, D);  // g_a Sᵀ
      read_gradients();  // a is read again: what was attended has been rounded, with c in it
      for (i64 r = 0; r < STRIP; ++r) {
        g_b[r] = r < n ? -along[r] / call.divisors[(t + r) * call.heads + head] : 0;
        own.base += eps * g_b[r];
      }
      feature_gradients<true>(g_b, saved(cell) + D * M);  // dx = e_q ∘ (g_a Sᵀ + g_b zᵀ)
      multiply(small, e_rows, MK, back, D, MK);           // dq = dx P
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
      fetch(strip, call.k, t, n), fetch_values(cell, t, n);
      exponents(), half_squares(strip, n);
      for (i64 r = 0; r < STRIP; ++r) shift[r] += maximum;
      features<true, false, true, false>();            // e_k
      multiply(small, e_rows, MK, by_feature, D, MK);  // dv = (e_k + ε) dS
      for (i64 r = 0; r < n; ++r)
        for (i64 i = 0; i < D; i += 16) {
          float* at = small + r * D + i;
          _mm512_storeu_ps(at, _mm512_add_ps(load(at), load(floor + i)));
        }
      store(call.grad_v, t, n);
      multiply(dphi, other, D, by_width, M, D);  // (v - c) dSᵀ
      feature_gradients<false>(nullptr, count);  // dx = e_k ∘ ((v - c) dSᵀ + dzᵀ)
      multiply(small, e_rows, MK, back, D, MK);  // dk = dx P - (Σ dx) k / √d
      for (i64 r = 0; r < n; ++r)
        for (i64 i = 0; i < D; i += 16) {
          float* at = small + r * D + i;
          const __m512 k = _mm512_mul_ps(load_bf16(strip + r * D + i), all(squared * dx_sums[r]));
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
  return in_parallel(call->threads, all, [&](std::atomic<i64>& next) {
    Worker worker(*call, most);
    for (i64 i; (i = next++) < all;) {
      const i64 first = i % groups * most;
      (worker.*step)(i / groups, first, std::min(most, call->heads - first));
    }
  });
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
