// What a call of the native attention is made of, for bf16 and float32.
#pragma once
#include "native_threads.h"

template <class T> struct Rows {  // (tokens, heads, dim), last dimension dense; strides in elements
  T* data;
  i64 token, head;
  T* at(i64 t, i64 h) const { return data + t * token + h * head; }
};

template <class T> struct AttentionCall {  // mirrored by ctypes in pretrain/native_calls.py
  Rows<T> q, k, v, out, grad, grad_q, grad_k, grad_v;
  const float* directions;             // (m, d), scaled by d^-1/4
  const i64 *offsets, *query_offsets;  // (cells + 1)
  // Kept for the backward pass: of each query and head, what its attended value was divided by;
  // of each cell and head, S and z as the kernel lays them, c (bf16), the largest exponent of keys.
  float *divisors, *sums, *centers, *maxima;
  i64 cells, heads, dim, features, threads;
  double epsilon, scale;  // scale = d^-1/4
};
