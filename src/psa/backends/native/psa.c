/* Pyramid attention on a CPU: forward. Compiled on first use by psa.backends.native; see tiles.h for the layout idea. */
#include "backward.h"

typedef struct {
  RowList list;
  float *q, *out, *score;                          /* [STRIPS][dim][LANES] twice, [CHUNK][LANES] */
  float running_max[GROUP], running_sum[GROUP];
} Forward;

/* Scores of one chunk for one strip, their maximum, then P = exp2(S - max) and out = out * decay + P V. */
INLINE void forward_chunk(int nv, Forward *s, const Args *a, int strip, int64_t r0, int64_t n, int64_t position) {
  const float *q = s->q + strip * a->dim * LANES;
  float *running_max = s->running_max + strip * LANES, *running_sum = s->running_sum + strip * LANES;
  vf top[NV], sum[NV], decay[NV];
  UNROLL for (int j = 0; j < nv; j++) top[j] = load(running_max + j * VL);
  for (int64_t r = r0; r < r0 + n; r += MR) {
    vf acc[MR][NV];
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++) acc[i][j] = splat(s->list.bias[r + i]);
    dot_tile(nv, s->list.k + r, q, a->dim, LANES, acc);
    if (a->causal && tile_is_cut(s->list.last + r, position)) mask_causal(nv, acc, s->list.last + r, position);
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int j = 0; j < nv; j++) {
        top[j] = vmax(top[j], acc[i][j]);
        store(s->score + (r - r0 + i) * LANES + j * VL, acc[i][j]);
      }
  }
  UNROLL for (int j = 0; j < nv; j++) {
    decay[j] = vexp2(load(running_max + j * VL) - top[j]);
    sum[j] = load(running_sum + j * VL) * decay[j];
  }
  for (int64_t i = 0; i < n; i++)
    UNROLL for (int j = 0; j < nv; j++) {
      float *at = s->score + i * LANES + j * VL;
      vf p = vexp2(load(at) - top[j]);
      sum[j] += p;
      store(at, p);
    }
  UNROLL for (int j = 0; j < nv; j++) {
    store(running_max + j * VL, top[j]);
    store(running_sum + j * VL, sum[j]);
  }
  outer_product(nv, s->list.v + r0, a->dim, s->score, n, decay, s->out + strip * a->dim * LANES);
}

/* The `count` queries from `first` on, at most GROUP. */
static void forward_group(Forward *s, const Args *a, int64_t b, int64_t h, int64_t first, int64_t count) {
  int64_t at = (b * a->heads + h) * a->q_len + first, strips = ceil_div(count, LANES);
  rows_to_lanes(s->q, a->q + b * a->q_stride[0] + h * a->q_stride[1] + first * a->q_stride[2], a->q_stride[2], count, a->dim,
                (float)(a->scale * LOG2E));
  memset(s->out, 0, sizeof(float) * (size_t)(strips * LANES * a->dim));
  for (int i = 0; i < GROUP; i++) s->running_max[i] = -1e30f, s->running_sum[i] = 0.f; /* finite: -inf minus it stays -inf */
  for (int64_t r0 = 0; r0 < s->list.n; r0 += CHUNK)
    for (int strip = 0; strip < strips; strip++) {
      int64_t n = min64(CHUNK, s->list.n - r0), position = first + strip * LANES + a->k_len - a->q_len;
      int64_t vectors = ceil_div(min64(count - strip * LANES, LANES), VL);
      if (vectors == 1) forward_chunk(1, s, a, strip, r0, n, position);
      else if (vectors == 2 && NV > 2) forward_chunk(2, s, a, strip, r0, n, position);
      else forward_chunk(NV, s, a, strip, r0, n, position);
    }
  for (int64_t i = 0; i < count; i++) {
    float sum = s->running_sum[i];
    a->lse[at + i] = sum == 0.f ? -INFINITY : LN2 * s->running_max[i] + logf(sum);
    s->running_sum[i] = sum == 0.f ? 0.f : 1.f / sum;
  }
  lanes_to_rows(a->out + at * a->dim, s->out, count, a->dim, s->running_sum);
}

static void forward_work(Phase *phase) {
  const Args *a = phase->args;
  Forward s = {0};
  size_t strip_floats = sizeof(float) * (size_t)(GROUP * a->dim);
  int64_t item, blocks = ceil_div(a->q_len, a->block_m);
  s.q = scratch(strip_floats), s.out = scratch(strip_floats), s.score = scratch(sizeof(float) * CHUNK * LANES);
  if (!row_list_alloc(&s.list, a) || !s.q || !s.out || !s.score) atomic_store(&phase->failed, 1);
  while ((item = claim(phase)) >= 0) {
    int64_t m = blocks - 1 - item % blocks, h = item / blocks % a->heads, b = item / blocks / a->heads;
    int64_t stop = min64((m + 1) * a->block_m, a->q_len);
    list_rows(&s.list, a, b, h, m);
    for (int64_t first = m * a->block_m; first < stop; first += GROUP)
      forward_group(&s, a, b, h, first, min64(GROUP, stop - first));
  }
  row_list_free(&s.list), free(s.q), free(s.out), free(s.score);
}

static int pool(const Args *a) {
  Phase phase = {.args = a, .items = a->batch * a->kv_heads * ceil_div(a->k_len, SPAN), .work = pool_work};
  return run_phase(&phase);
}

/* Fills pool_k, pool_v, row_bias, out and lse. Returns 0, or -1 when memory ran out. */
int psa_forward(const Args *a) {
  Phase phase = {.args = a, .items = a->batch * a->heads * ceil_div(a->q_len, a->block_m), .work = forward_work};
  return pool(a) ? -1 : run_phase(&phase);
}

/* Fills pool_k, pool_v, row_bias and the gradients. Returns 0, or -1 when memory ran out. */
int psa_backward(const Args *a) {
  int64_t units = a->batch * a->kv_heads;
  Phase attend = {.args = a, .items = a->batch * a->heads * ceil_div(a->q_len, a->block_m), .work = backward_work};
  Phase unpool = {.args = a, .items = units * ceil_div(a->k_len, SPAN), .work = unpool_work};
  attend.turns = calloc((size_t)units + 1, sizeof *attend.turns);
  int failed = !attend.turns || pool(a) || run_phase(&attend) || run_phase(&unpool);
  free(attend.turns);
  return failed ? -1 : 0;
}

/* Size of Args, so that the caller can prove that its mirror fits; lanes of a vector, for reports. */
int64_t psa_args_size(void) { return (int64_t)sizeof(Args); }
int64_t psa_vector_lanes(void) { return VL; }
