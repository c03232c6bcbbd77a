/* What a call is made of, and the threads that work through it. Mirrored by `Args` in calls.py, field by field. */
#ifndef PSA_ARGS_H
#define PSA_ARGS_H

#include <pthread.h>
#include <sched.h>

#include "tiles.h"

/* Strides count elements. Row ids: level index e starts at offset(e); ids below k_len are tokens, the rest lie in pool_k / pool_v,
 * [batch * kv_heads][rows - k_len][dim]. row_bias is in log2 units. */
typedef struct {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, block_m, block_n, n_levels, n_rows, causal, threads;
  double scale;
  const float *q, *k, *v; /* last dimension contiguous */
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const uint8_t *levels; /* [.,.,M,N] */
  int64_t levels_stride[2];
  const uint16_t *pair_bias; /* float16 [.,.,M,N] or NULL */
  int64_t pair_stride[2];
  const int32_t *real_before; /* [batch][k_len + 1]: real tokens before each position, or NULL: all real */
  const float *query_power;   /* [.,heads,dim] or NULL */
  int64_t power_stride;
  const float *bias_cap;
  int64_t cap_stride[2];
  float *row_bias; /* [.,.,n_rows] */
  int64_t row_bias_stride[2];
  float *pool_k, *pool_v;
  float *out, *lse;                                     /* [batch,heads,q_len(,dim)] */
  const float *grad_out, *grad_lse;                     /* as out, lse; grad_lse may be NULL */
  float *grad_q, *grad_k, *grad_v, *grad_pool_k, *grad_pool_v; /* zeroed by the caller, except grad_q */
} Args;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t level_rows(const Args *a, int e) { return ceil_div(a->k_len, (int64_t)1 << e); }

/* Real tokens of row r of level index e in batch item b. */
INLINE int64_t real_count(const Args *a, int64_t b, int e, int64_t r) {
  int64_t start = r << e, end = min64((r + 1) << e, a->k_len);
  if (!a->real_before) return end - start;
  const int32_t *before = a->real_before + b * (a->k_len + 1);
  return before[end] - before[start];
}

/* One phase: `work` claims items from `next` until none is left. */
typedef struct Phase {
  const Args *args;
  int64_t items;
  atomic_llong next;
  atomic_int failed;
  atomic_llong *turns; /* backward only: query blocks already added, per (batch, kv head) */
  void (*work)(struct Phase *);
} Phase;

static int64_t claim(Phase *phase) {
  int64_t item = atomic_fetch_add(&phase->next, 1);
  return item < phase->items && !atomic_load(&phase->failed) ? item : -1;
}

static void *thread_main(void *phase) {
  ((Phase *)phase)->work(phase);
  return NULL;
}

/* Runs a phase on up to `threads` threads, this one included. Returns 0, or -1 when memory ran out. */
static int run_phase(Phase *phase) {
  enum { MOST = 256 };
  pthread_t thread[MOST];
  int64_t wanted = min64(min64(phase->args->threads, phase->items), MOST), started = 0;
  while (started < wanted - 1 && !pthread_create(&thread[started], NULL, thread_main, phase)) started++;
  phase->work(phase);
  for (int64_t i = 0; i < started; i++) pthread_join(thread[i], NULL);
  return atomic_load(&phase->failed) ? -1 : 0;
}

static void *scratch(size_t bytes) {
  void *p = NULL;
  return posix_memalign(&p, 64, bytes + 64) ? NULL : p;
}

#endif
