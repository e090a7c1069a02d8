/* The C interface of the CPU kernels. Plain C: any language can load the library.
 *
 * A weight is a matrix [n, k] as hfquant stores it: rows of codes without gaps, lowest bit first; a code is an index
 * into `levels`. W[i, j] = (levels[code] - zero) * scale, with the scale and the zero of the block of columns j / group
 * and the block of rows i / scale_height. */
#ifndef HFQUANT_H
#define HFQUANT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HFQ_ABI 2
#define HFQ_EXPORT __attribute__((visibility("default")))

enum hfq_type { HFQ_FLOAT32 = 0, HFQ_BFLOAT16 = 1, HFQ_FLOAT16 = 2 };

typedef struct hfq_weight {
    int64_t n, k;
    int64_t row_bytes;        /* bytes of a row of codes */
    int64_t group;            /* columns that share a scale, at least 1; the last group of a row may be smaller */
    int64_t scale_height;     /* rows that share their scales */
    const uint8_t *codes;     /* [n, row_bytes] */
    const float *levels;      /* [2^bits], and at least 16 */
    const void *scale;        /* [ceil(n / scale_height), ceil(k / group)] of scale_type; NULL if quantized */
    const uint8_t *zero;      /* zero points of zero_bits bits, rows padded to whole bytes; NULL for none */
    const uint8_t *scale_codes;  /* quantized scales: a byte each, in one row; */
    const float *scale_levels;   /* [256] what the codes stand for, */
    const float *scale_scale;    /* and the factors of these, */
    int64_t scale_group;         /* each for so many scales */
    int32_t bits;             /* of a code: 2 to 8 */
    int32_t zero_bits;
    int32_t scale_type;       /* hfq_type */
} hfq_weight;

/* How a layer quantizes its input: to integers, with one scale for each row of x, found at run time, or one for all.
 * Columns that hold a magnitude of at least `split` in any row, and those of `outliers`, take part in floating point. */
typedef struct hfq_input {
    float low, high;              /* of the integers, such as -128 and 127 */
    float scale;                  /* for all rows; 0 to take largest magnitude / high of each row */
    float split;                  /* infinity for none */
    int64_t outlier_count;
    const int32_t *outliers;      /* columns, sorted */
    const uint16_t *outlier_weight;  /* [n, outlier_count]: what the weight is there, */
    int32_t outlier_type;            /* bfloat16 or float16 */
} hfq_input;

/* One product of `hfq_linear_jobs`: the arguments of `hfq_linear`, or with an `input` those of `hfq_linear_int`. */
typedef struct hfq_job {
    const hfq_weight *weight;
    const hfq_input *input;       /* NULL for none */
    const void *x;                /* [m, k] */
    const float *bias;            /* [n] or NULL */
    void *y;                      /* [m, n] */
    int64_t m;
} hfq_job;

/* Version of this interface, to be compared with HFQ_ABI. */
HFQ_EXPORT int hfq_abi(void);

/* The instruction set in use, such as "avx512_bf16": the best one, or the one that HFQUANT_CPU_ISA in the environment
 * asks for. NULL if that one is not known, not built, or not supported by this processor. */
HFQ_EXPORT const char *hfq_isa(void);

/* Use another one from now on, NULL for the best. Returns 0, or -1 if it cannot be used: then nothing changes. */
HFQ_EXPORT int hfq_use(const char *isa);

/* Comma-separated names of what is built and runs on this processor, best first. */
HFQ_EXPORT const char *hfq_isas(void);

/* y [m, n] = x [m, k] W^T + bias, rows without gaps; x and y of `type`, bias [n] float32 or NULL. Returns 0, or -1 if
 * memory ran out or no instruction set is in use. `threads`: how many to use at most. */
HFQ_EXPORT int hfq_linear(const hfq_weight *weight, const void *x, const float *bias, void *y, int64_t m, int type,
                          int threads);

/* The same for a layer that quantizes its input. The weight has integer levels of 4 or 8 bits, a scale for each row
 * and no zero points. Integer products are exact. A row of x with a value that is not finite gives NaN. */
HFQ_EXPORT int hfq_linear_int(const hfq_weight *weight, const hfq_input *input, const void *x, const float *bias,
                              void *y, int64_t m, int type, int threads);

/* Several products; x and y of all are of `type`. The results are those of single calls. Returns 0, or -1 if one failed:
 * then nothing is known of what is in any y. */
HFQ_EXPORT int hfq_linear_jobs(const hfq_job *jobs, int64_t count, int type, int threads);

/* The sum of `count` words, read by `threads` threads as fast as memory gives them; up to 32 a thread may be left out. */
HFQ_EXPORT int64_t hfq_read(const int64_t *from, int64_t count, int threads);

#ifdef __cplusplus
}
#endif
#endif
