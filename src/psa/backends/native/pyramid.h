/* Pooled keys and values with true counts, their bias, and the way back for gradients.
 *
 * A row of level index e is the mean of its two rows of level e - 1 weighted by their real tokens, which is the plain mean over
 * the real tokens; the summed squared deviations follow Chan's update. */
#ifndef PSA_PYRAMID_H
#define PSA_PYRAMID_H

#include "args.h"

#define SPAN 128 /* tokens under one node of the coarsest level: spans are independent */

typedef struct {
  const float *data; /* of row 0 */
  int64_t stride;
} Rows;

INLINE int64_t level_offset(const Args *a, int e) {
  int64_t offset = 0;
  for (int i = 0; i < e; i++) offset += level_rows(a, i);
  return offset;
}

INLINE Rows token_rows(const float *base, const int64_t *stride, int64_t b, int64_t h) {
  return (Rows){base + b * stride[0] + h * stride[1], stride[2]};
}

INLINE Rows pooled_rows(const Args *a, const float *pool, int64_t unit, int e) {
  return (Rows){pool + (unit * (a->n_rows - a->k_len) + level_offset(a, e) - a->k_len) * a->dim, a->dim};
}

/* out = weighted mean of two rows; rows without real tokens are not read (padding may hold anything). */
static void mean_of_two(float *out, const float *x, const float *y, int64_t nx, int64_t ny, int64_t dim) {
  float wx = nx ? (float)nx / (float)(nx + ny) : 0.f, wy = ny ? (float)ny / (float)(nx + ny) : 0.f;
  if (nx && ny)
    for (int64_t d = 0; d < dim; d++) out[d] = wx * x[d] + wy * y[d];
  else if (nx || ny)
    memcpy(out, nx ? x : y, sizeof(float) * (size_t)dim);
  else
    memset(out, 0, sizeof(float) * (size_t)dim);
}

/* spread [row][dim]: summed squared deviations, from level e - 1 (two rows each) to e, in place for ascending rows. */
static void merge_spread(float *out, const float *sx, const float *sy, const float *x, const float *y, int64_t nx, int64_t ny, int64_t dim) {
  float w = nx && ny ? (float)nx * (float)ny / (float)(nx + ny) : 0.f;
  for (int64_t d = 0; d < dim; d++) {
    float between = w > 0.f ? x[d] - y[d] : 0.f;
    out[d] = (nx ? sx[d] : 0.f) + (ny ? sy[d] : 0.f) + w * between * between;
  }
}

static void write_bias(const Args *a, int64_t b, int64_t h_kv, int e, int64_t row, int64_t id, const float *spread) {
  int64_t n = real_count(a, b, e, row), share = a->heads / a->kv_heads;
  float count_bias = n ? log2f((float)n) : -INFINITY;
  if (!a->query_power) { /* one table per batch item, or one for all */
    if (h_kv == 0 && (b == 0 || a->row_bias_stride[0])) a->row_bias[b * a->row_bias_stride[0] + id] = count_bias;
    return;
  }
  for (int64_t h = h_kv * share; h < (h_kv + 1) * share; h++) {
    const float *power = a->query_power + b * a->power_stride + h * a->dim;
    float cap = a->bias_cap[b * a->cap_stride[0] + h * a->cap_stride[1]], sum = 0.f;
    for (int64_t d = 0; e && n && d < a->dim; d++) sum += power[d] * spread[d];
    float gain = n ? (float)(0.5 * a->scale * a->scale) * sum / (float)n : 0.f;
    a->row_bias[b * a->row_bias_stride[0] + h * a->row_bias_stride[1] + id] = count_bias + LOG2E * (gain < cap ? gain : cap);
  }
}

/* Pools tokens [start, start + SPAN) of one (batch, kv head) to every level; spread: SPAN * dim floats of scratch. */
static void pool_span(const Args *a, int64_t unit, int64_t start, float *spread) {
  int64_t b = unit / a->kv_heads, h = unit % a->kv_heads, dim = a->dim, stop = min64(start + SPAN, a->k_len), share_id = 0;
  Rows k = token_rows(a->k, a->k_stride, b, h), v = token_rows(a->v, a->v_stride, b, h);
  if (a->query_power) memset(spread, 0, sizeof(float) * (size_t)(SPAN * dim));
  for (int64_t r = start; r < stop; r++) write_bias(a, b, h, 0, r, r, spread);
  for (int e = 1; e < a->n_levels; e++) {
    share_id += level_rows(a, e - 1);
    Rows to_k = pooled_rows(a, a->pool_k, unit, e), to_v = pooled_rows(a, a->pool_v, unit, e);
    for (int64_t r = start >> e; r < ceil_div(stop, (int64_t)1 << e); r++) {
      int64_t x = 2 * r, y = min64(2 * r + 1, level_rows(a, e - 1) - 1);
      int64_t nx = real_count(a, b, e - 1, x), ny = y > x ? real_count(a, b, e - 1, y) : 0;
      const float *kx = k.data + x * k.stride, *ky = k.data + y * k.stride;
      int64_t first = start >> (e - 1);
      if (a->query_power)
        merge_spread(spread + (r - (start >> e)) * dim, spread + (x - first) * dim, spread + (y - first) * dim, kx, ky, nx, ny, dim);
      mean_of_two((float *)to_k.data + r * dim, kx, ky, nx, ny, dim);
      mean_of_two((float *)to_v.data + r * dim, v.data + x * v.stride, v.data + y * v.stride, nx, ny, dim);
      write_bias(a, b, h, e, r, share_id + r, spread + (r - (start >> e)) * dim);
    }
    k = to_k, v = to_v;
  }
}

static void pool_work(Phase *phase) {
  const Args *a = phase->args;
  int64_t item, spans = ceil_div(a->k_len, SPAN);
  float *spread = scratch(sizeof(float) * (size_t)(SPAN * a->dim));
  if (!spread) atomic_store(&phase->failed, 1);
  while ((item = claim(phase)) >= 0) pool_span(a, item / spans, item % spans * SPAN, spread);
  free(spread);
}

/* grad of level e - 1 += grad of level e, weighted as in mean_of_two. */
static void spread_gradient(const Args *a, int64_t b, int e, Rows from, Rows to, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++) {
    int64_t n = real_count(a, b, e, r);
    for (int64_t child = 2 * r; n && child < min64(2 * r + 2, level_rows(a, e - 1)); child++) {
      float w = (float)real_count(a, b, e - 1, child) / (float)n;
      const float *x = from.data + r * from.stride;
      float *y = (float *)to.data + child * to.stride;
      for (int64_t d = 0; w > 0.f && d < a->dim; d++) y[d] += w * x[d];
    }
  }
}

/* Hands the pooled rows' gradients of one span down to its tokens. */
static void unpool_span(const Args *a, int64_t unit, int64_t start) {
  int64_t b = unit / a->kv_heads, stop = min64(start + SPAN, a->k_len), dim = a->dim;
  for (int of_v = 0; of_v < 2; of_v++) {
    float *tokens = (of_v ? a->grad_v : a->grad_k) + unit * a->k_len * dim;
    for (int e = (int)a->n_levels - 1; e > 0; e--) {
      float *pool = of_v ? a->grad_pool_v : a->grad_pool_k;
      Rows to = e > 1 ? pooled_rows(a, pool, unit, e - 1) : (Rows){tokens, dim};
      spread_gradient(a, b, e, pooled_rows(a, pool, unit, e), to, start >> e, ceil_div(stop, (int64_t)1 << e));
    }
    for (int64_t i = start * dim; !of_v && i < stop * dim; i++) tokens[i] *= (float)a->scale;
  }
}

static void unpool_work(Phase *phase) {
  int64_t item, spans = ceil_div(phase->args->k_len, SPAN);
  while ((item = claim(phase)) >= 0) unpool_span(phase->args, item / spans, item % spans * SPAN);
}

#endif
