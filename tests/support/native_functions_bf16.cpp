// Functions inside the bf16 kernels, for tests by themselves.
#include "feed_forward_plan.h"

// 2^x and e^x, GELU and its slope, of n numbers; n is a multiple of 16.
extern "C" void functions(const float* x, float* powers, float* exponentials, float* values,
                          float* slopes, i64 n) {
  for (i64 i = 0; i < n; i += 16) {
    _mm512_storeu_ps(powers + i, exp2(load(x + i)));
    _mm512_storeu_ps(exponentials + i, exp2(_mm512_mul_ps(load(x + i), all(LOG2E))));
    const Gelu found = gelu(load(x + i));
    _mm512_storeu_ps(values + i, found.value), _mm512_storeu_ps(slopes + i, found.slope);
  }
}
