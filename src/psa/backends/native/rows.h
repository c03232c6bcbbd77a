/* Which pyramid rows a query block attends, and its queries laid along the lanes. */
#ifndef PSA_ROWS_H
#define PSA_ROWS_H

#include "pyramid.h"

typedef struct {
  const float **k, **v;
  float *bias;   /* log2 units */
  int32_t *last; /* position of the row's last token */
  int32_t *id;
  int64_t n; /* a multiple of MR; the padding repeats a row with bias -inf */
} RowList;

static int row_list_alloc(RowList *list, const Args *a) {
  size_t n = (size_t)(a->k_len + 2 * MR);
  list->k = scratch(n * sizeof *list->k);
  list->v = scratch(n * sizeof *list->v);
  list->bias = scratch(n * sizeof *list->bias);
  list->last = scratch(n * sizeof *list->last);
  list->id = scratch(n * sizeof *list->id);
  return list->k && list->v && list->bias && list->last && list->id;
}

static void row_list_free(RowList *list) {
  free(list->k), free(list->v), free(list->bias), free(list->last), free(list->id);
}

/* float16 bits to float, without relying on compiler support for the type. */
INLINE float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff, bits = magnitude << 13;
  float value;
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  memcpy(&value, &bits, 4);
  if (magnitude < 0x7c00) value *= 0x1p112f;
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

/* Rows of query block m that some of its queries may see; rows without a real token are left out. */
static void list_rows(RowList *list, const Args *a, int64_t b, int64_t h, int64_t m) {
  int64_t blocks_m = ceil_div(a->q_len, a->block_m), blocks_n = ceil_div(a->k_len, a->block_n);
  int64_t h_kv = h / (a->heads / a->kv_heads), unit = b * a->kv_heads + h_kv;
  int64_t last_position = min64((m + 1) * a->block_m, a->q_len) - 1 + a->k_len - a->q_len;
  const uint8_t *levels = a->levels + b * a->levels_stride[0] + h * a->levels_stride[1] + m * blocks_n;
  const uint16_t *pair = a->pair_bias ? a->pair_bias + b * a->pair_stride[0] + h * a->pair_stride[1] + m * blocks_n : NULL;
  const float *row_bias = a->row_bias + b * a->row_bias_stride[0] + h * a->row_bias_stride[1];
  Rows k[8] = {token_rows(a->k, a->k_stride, b, h_kv)}, v[8] = {token_rows(a->v, a->v_stride, b, h_kv)};
  int64_t offset[8] = {0}, n = 0;
  (void)blocks_m;
  for (int e = 1; e < a->n_levels; e++) {
    k[e] = pooled_rows(a, a->pool_k, unit, e), v[e] = pooled_rows(a, a->pool_v, unit, e);
    offset[e] = level_offset(a, e);
  }
  for (int64_t block = 0; block < blocks_n; block++) {
    if (!levels[block]) continue;
    int e = __builtin_ctz(levels[block]);
    int64_t size = a->block_n >> e, stop = min64((block + 1) * size, level_rows(a, e));
    float extra = pair && e ? LOG2E * half_to_float(pair[block]) : 0.f;
    for (int64_t r = block * size; r < stop; r++) {
      int64_t last = min64((r + 1) << e, a->k_len) - 1;
      if (a->causal && last > last_position) break;
      float bias = row_bias[offset[e] + r];
      if (bias == -INFINITY) continue;
      list->k[n] = k[e].data + r * k[e].stride, list->v[n] = v[e].data + r * v[e].stride;
      list->bias[n] = bias + extra, list->last[n] = (int32_t)last, list->id[n] = (int32_t)(offset[e] + r);
      n++;
    }
  }
  for (; n % MR; n++) {
    list->k[n] = list->k[n - 1], list->v[n] = list->v[n - 1], list->id[n] = list->id[n - 1];
    list->bias[n] = -INFINITY, list->last[n] = -1;
  }
  list->n = n;
}

/* out [STRIPS][dim][LANES] = factor * rows [n][dim] transposed, lanes past n zero. */
static void rows_to_lanes(float *out, const float *rows, int64_t stride, int64_t n, int64_t dim, float factor) {
  int64_t strips = ceil_div(n, LANES);
  for (int64_t strip = 0; strip < strips; strip++)
    for (int64_t lane = 0; lane < LANES; lane++) {
      int64_t i = strip * LANES + lane;
      float *to = out + strip * dim * LANES + lane;
      for (int64_t d = 0; d < dim; d++) to[d * LANES] = i < n ? factor * rows[i * stride + d] : 0.f;
    }
}

/* rows [n][dim] = in [STRIPS][dim][LANES] transposed, times factor[i]. */
static void lanes_to_rows(float *rows, const float *in, int64_t n, int64_t dim, const float *factor) {
  for (int64_t i = 0; i < n; i++) {
    const float *from = in + i / LANES * dim * LANES + i % LANES;
    for (int64_t d = 0; d < dim; d++) rows[i * dim + d] = factor[i] * from[d * LANES];
  }
}

/* Scores below the causal diagonal become -inf: lane j holds position first + j. */
INLINE void mask_causal(int nv, vf acc[MR][NV], const int32_t *last, int64_t first) {
  vi lane;
  for (int j = 0; j < VL; j++) lane[j] = j;
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < nv; j++) {
      vi position = lane + (int32_t)(first + j * VL);
      acc[i][j] = vselect((vi)(position < last[i]), splat(-INFINITY), acc[i][j]);
    }
}

/* Does some row of a tile end after `first`? */
INLINE int tile_is_cut(const int32_t *last, int64_t first) {
  int cut = 0;
  for (int i = 0; i < MR; i++) cut |= last[i] > first;
  return cut;
}

#endif
