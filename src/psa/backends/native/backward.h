/* Gradients: P again from lse, then dP, dS and the three outer products, all in one walk over a query block's rows.
 *
 * A row's gradient from one query block is collected in private scratch and added to the shared sum when that block's turn comes
 * (query blocks of a kv head take turns in order), so that the sums do not depend on the number of threads. */
#ifndef PSA_BACKWARD_H
#define PSA_BACKWARD_H

#include "rows.h"

typedef struct {
  RowList list;
  int64_t width;                                   /* dim, padded to whole vectors */
  float *q_lanes, *grad_lanes, *dq_lanes;          /* [STRIPS][dim][LANES] */
  float *q_rows, *grad_rows;                       /* [GROUP][width] */
  float *p, *ds;                                   /* [STRIPS][CHUNK][LANES] */
  float *dk, *dv;                                  /* [rows of the list][width] */
  float lse[GROUP], delta[GROUP];
} Backward;

INLINE void probabilities(int nv, Backward *s, const Args *a, int strip, int64_t r0, int64_t n, int64_t position) {
  const float *q = s->q_lanes + strip * a->dim * LANES, *grad = s->grad_lanes + strip * a->dim * LANES;
  for (int64_t r = r0; r < r0 + n; r += MR) {
    int64_t at = (strip * CHUNK + r - r0) * LANES;
    vf acc[MR][NV];
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++) acc[i][j] = splat(s->list.bias[r + i]) - load(s->lse + strip * LANES + j * VL);
    dot_tile(nv, s->list.k + r, q, a->dim, LANES, acc);
    if (a->causal && tile_is_cut(s->list.last + r, position)) mask_causal(nv, acc, s->list.last + r, position);
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++) store(s->p + at + i * LANES + j * VL, vexp2(acc[i][j]));
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++) acc[i][j] = -load(s->delta + strip * LANES + j * VL);
    dot_tile(nv, s->list.v + r, grad, a->dim, LANES, acc);
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++)
        store(s->ds + at + i * LANES + j * VL, acc[i][j] * load(s->p + at + i * LANES + j * VL));
  }
}

INLINE void backward_chunk(int nv, Backward *s, const Args *a, int strip, int64_t r0, int64_t n, int64_t position) {
  vf one[NV];
  UNROLL for (int j = 0; j < nv; j++) one[j] = splat(1.f);
  probabilities(nv, s, a, strip, r0, n, position);
  outer_product(nv, s->list.k + r0, a->dim, s->ds + strip * CHUNK * LANES, n, one, s->dq_lanes + strip * a->dim * LANES);
}

/* to [row][width] += weights [STRIPS][CHUNK][LANES]^T rows, for MR rows and nv vectors of channels from `to` on. */
INLINE void row_gradient_tile(int nv, float *to, int64_t width, const float *weights, const float *rows, int64_t count) {
  vf acc[MR][NV];
  UNROLL for (int i = 0; i < MR; i++)
    UNROLL for (int j = 0; j < nv; j++) acc[i][j] = load(to + i * width + j * VL);
  for (int64_t first = 0; first < count; first += LANES, weights += CHUNK * LANES) {
    const float *weight[MR];
    UNROLL for (int i = 0; i < MR; i++) weight[i] = weights + i * LANES;
    dot_tile(nv, weight, rows + first * width, min64(LANES, count - first), width, acc);
  }
  UNROLL for (int i = 0; i < MR; i++)
    UNROLL for (int j = 0; j < nv; j++) store(to + i * width + j * VL, acc[i][j]);
}

static void row_gradients(float *to, int64_t n, int64_t width, const float *weights, const float *rows, int64_t count) {
  for (int64_t d = 0; d < width;) {
    int64_t left = (width - d) / VL, vectors = left >= NV ? NV : 1;
    for (int64_t r = 0; r < n; r += MR) {
      if (vectors == NV) row_gradient_tile(NV, to + r * width + d, width, weights + r * LANES, rows + d, count);
      else row_gradient_tile(1, to + r * width + d, width, weights + r * LANES, rows + d, count);
    }
    d += vectors * VL;
  }
}

/* Queries, output gradients, lse and delta = rowsum(dO * O) - grad_lse of one group, in the layouts that the products want. */
static void load_group(Backward *s, const Args *a, const float *q, int64_t q_stride, int64_t at, int64_t count) {
  int64_t dim = a->dim, width = s->width;
  const float *grad = a->grad_out + at * dim, *out = a->out + at * dim;
  rows_to_lanes(s->q_lanes, q, q_stride, count, dim, (float)(a->scale * LOG2E));
  rows_to_lanes(s->grad_lanes, grad, dim, count, dim, 1.f);
  memset(s->dq_lanes, 0, sizeof(float) * (size_t)(GROUP * dim));
  memset(s->q_rows, 0, sizeof(float) * (size_t)(GROUP * width));
  memset(s->grad_rows, 0, sizeof(float) * (size_t)(GROUP * width));
  for (int64_t i = 0; i < GROUP; i++) s->lse[i] = INFINITY, s->delta[i] = 0.f; /* P = 0 for lanes past the end and empty rows */
  for (int64_t i = 0; i < count; i++) {
    memcpy(s->q_rows + i * width, q + i * q_stride, sizeof(float) * (size_t)dim);
    memcpy(s->grad_rows + i * width, grad + i * dim, sizeof(float) * (size_t)dim);
    if (a->lse[at + i] == -INFINITY) continue;
    float delta = 0.f;
    for (int64_t d = 0; d < dim; d++) delta += grad[i * dim + d] * out[i * dim + d];
    s->lse[i] = LOG2E * a->lse[at + i];
    s->delta[i] = delta - (a->grad_lse ? a->grad_lse[at + i] : 0.f);
  }
}

static void backward_group(Backward *s, const Args *a, int64_t b, int64_t h, int64_t first, int64_t count) {
  int64_t at = (b * a->heads + h) * a->q_len + first;
  float scale[GROUP];
  load_group(s, a, a->q + b * a->q_stride[0] + h * a->q_stride[1] + first * a->q_stride[2], a->q_stride[2], at, count);
  memset(s->dk, 0, sizeof(float) * (size_t)(s->list.n * s->width));
  memset(s->dv, 0, sizeof(float) * (size_t)(s->list.n * s->width));
  for (int64_t r0 = 0; r0 < s->list.n; r0 += CHUNK) {
    int64_t n = min64(CHUNK, s->list.n - r0);
    for (int strip = 0; strip * LANES < count; strip++) {
      int64_t position = first + strip * LANES + a->k_len - a->q_len;
      if (count - strip * LANES <= VL) backward_chunk(1, s, a, strip, r0, n, position);
      else backward_chunk(NV, s, a, strip, r0, n, position);
    }
    row_gradients(s->dv + r0 * s->width, n, s->width, s->p, s->grad_rows, count);
    row_gradients(s->dk + r0 * s->width, n, s->width, s->ds, s->q_rows, count);
  }
  for (int i = 0; i < GROUP; i++) scale[i] = (float)a->scale;
  lanes_to_rows(a->grad_q + at * a->dim, s->dq_lanes, count, a->dim, scale);
}

/* Adds the private sums to the shared ones. */
static void add_row_gradients(const Backward *s, const Args *a, int64_t unit) {
  int64_t dim = a->dim, pooled = a->n_rows - a->k_len;
  for (int64_t r = 0; r < s->list.n; r++) {
    int64_t id = s->list.id[r];
    int64_t at = (id < a->k_len ? unit * a->k_len + id : unit * pooled + id - a->k_len) * dim;
    float *dk = (id < a->k_len ? a->grad_k : a->grad_pool_k) + at, *dv = (id < a->k_len ? a->grad_v : a->grad_pool_v) + at;
    const float *from_k = s->dk + r * s->width, *from_v = s->dv + r * s->width;
    for (int64_t d = 0; d < dim; d++) dk[d] += from_k[d];
    for (int64_t d = 0; d < dim; d++) dv[d] += from_v[d];
  }
}

static int backward_alloc(Backward *s, const Args *a) {
  size_t lanes = sizeof(float) * (size_t)(GROUP * a->dim), rows = sizeof(float) * (size_t)(GROUP * s->width);
  size_t list = sizeof(float) * (size_t)((a->k_len + 2 * MR) * s->width), weights = sizeof(float) * STRIPS * CHUNK * LANES;
  s->q_lanes = scratch(lanes), s->grad_lanes = scratch(lanes), s->dq_lanes = scratch(lanes);
  s->q_rows = scratch(rows), s->grad_rows = scratch(rows), s->p = scratch(weights), s->ds = scratch(weights);
  s->dk = scratch(list), s->dv = scratch(list);
  return row_list_alloc(&s->list, a) && s->q_lanes && s->grad_lanes && s->dq_lanes && s->q_rows && s->grad_rows && s->p && s->ds &&
         s->dk && s->dv;
}

static void backward_work(Phase *phase) {
  const Args *a = phase->args;
  Backward s = {.width = ceil_div(a->dim, VL) * VL};
  int64_t item, blocks = ceil_div(a->q_len, a->block_m), per_unit = blocks * (a->heads / a->kv_heads);
  if (!backward_alloc(&s, a)) atomic_store(&phase->failed, 1);
  while ((item = claim(phase)) >= 0) {
    int64_t unit = item / per_unit, turn = item % per_unit, b = unit / a->kv_heads;
    int64_t h = unit % a->kv_heads * (a->heads / a->kv_heads) + turn / blocks, m = turn % blocks;
    int64_t stop = min64((m + 1) * a->block_m, a->q_len);
    list_rows(&s.list, a, b, h, m);
    for (int64_t first = m * a->block_m; first < stop; first += GROUP) {
      backward_group(&s, a, b, h, first, min64(GROUP, stop - first));
      while (atomic_load(&phase->turns[unit]) < turn && !atomic_load(&phase->failed)) sched_yield();
      add_row_gradients(&s, a, unit);
    }
    atomic_store(&phase->turns[unit], turn + 1);
  }
  row_list_free(&s.list), free(s.q_lanes), free(s.grad_lanes), free(s.dq_lanes), free(s.q_rows), free(s.grad_rows);
  free(s.p), free(s.ds), free(s.dk), free(s.dv);
}

#endif
