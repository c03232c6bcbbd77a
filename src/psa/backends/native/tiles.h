/* Vectors, exp2 and the two register tiles every product of the backend is made of.
 *
 * Queries lie along the vector lanes: Q^T is [D][LANES], scores S^T are [rows][LANES]. A pyramid row then enters a product only as
 * scalars broadcast from wherever it lies, so gathering rows costs nothing and no row is ever packed or transposed. */
#ifndef PSA_TILES_H
#define PSA_TILES_H

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
#ifndef NV
#define NV 4
#endif
#define vmax(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX__)
#include <immintrin.h>
#define VL 8
#ifndef NV
#define NV 2
#endif
#define vmax(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define VL 4
#ifndef NV
#define NV 4
#endif
#define vmax(a, b) ((vf)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#else
#define VL 4
#ifndef NV
#define NV 2
#endif
#define vmax(a, b) vselect((a) > (b), (a), (b))
#endif

#ifndef MR
#define MR 6                /* pyramid rows of a score tile: MR * NV accumulators */
#endif
#ifndef ND
#define ND 6                /* channels of an output tile */
#endif
#define LANES (VL * NV)     /* queries of one strip */
#define GROUP 128           /* queries that share one walk over the rows */
#define STRIPS (GROUP / LANES)
#ifndef CHUNK
#define CHUNK 96            /* pyramid rows per online-softmax step, a multiple of MR */
#endif
#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942f

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* 2^x for x up to about 100, relative error 1.2e-7; 0 below 2^-100 (so for -inf), NaN stays NaN. Polynomial: Cephes exp2f. */
INLINE vf vexp2(vf x) {
  const vf magic = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer and leaves that integer in the low bits */
  vf shifted = x + magic;
  vf f = x - (shifted - magic);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  vi scaled = (vi)p + ((vi)shifted << 23);
  return (vf)(scaled & ~(vi)(x < splat(-100.f)));
}

/* acc[i][:] += sum_t rows[i][t] * b[t][:] for MR rows; b is [n][ldb]. */
INLINE void dot_tile(int nv, const float *const *rows, const float *b, int64_t n, int64_t ldb, vf acc[MR][NV]) {
  const float *row[MR];
  UNROLL for (int i = 0; i < MR; i++) row[i] = rows[i];
  for (int64_t t = 0; t < n; t++) {
    vf column[NV];
    UNROLL for (int j = 0; j < nv; j++) column[j] = load(b + t * ldb + j * VL);
    UNROLL for (int i = 0; i < MR; i++) {
      float x = row[i][t];
      UNROLL for (int j = 0; j < nv; j++) acc[i][j] += x * column[j];
    }
  }
}

/* out[d][:] = out[d][:] * decay + sum_i rows[i][d] * p[i][:] for nd channels from `rows` on; out and p have rows of LANES. */
INLINE void outer_tile(int nd, int nv, const float *const *rows, int64_t d0, const float *p, int64_t n, const vf *decay, float *out) {
  vf acc[ND][NV];
  UNROLL for (int d = 0; d < nd; d++)
    UNROLL for (int j = 0; j < nv; j++) acc[d][j] = load(out + d * LANES + j * VL) * decay[j];
  for (int64_t i = 0; i < n; i++) {
    const float *row = rows[i] + d0;
    vf weight[NV];
    UNROLL for (int j = 0; j < nv; j++) weight[j] = load(p + i * LANES + j * VL);
    UNROLL for (int d = 0; d < nd; d++) {
      float x = row[d];
      UNROLL for (int j = 0; j < nv; j++) acc[d][j] += x * weight[j];
    }
  }
  UNROLL for (int d = 0; d < nd; d++)
    UNROLL for (int j = 0; j < nv; j++) store(out + d * LANES + j * VL, acc[d][j]);
}

/* out [dim][LANES] = out * decay + rows^T p. */
INLINE void outer_product(int nv, const float *const *rows, int64_t dim, const float *p, int64_t n, const vf *decay, float *out) {
  int64_t d = 0;
  for (; d + ND <= dim; d += ND) outer_tile(ND, nv, rows, d, p, n, decay, out + d * LANES);
  for (; d < dim; d++) outer_tile(1, nv, rows, d, p, n, decay, out + d * LANES);
}

#endif
