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

#define HFQ_ABI 5
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
    int32_t zero_bits;        /* 2 to 8 for whole numbers; 16 or 32 for real ones, */
    int32_t zero_type;        /* of this hfq_type */
    int32_t scale_type;       /* hfq_type */
} hfq_weight;

/* How a layer quantizes its input: to the numbers of a grid times a scale, found at run time, or one for all of x.
 * Columns that hold a magnitude of at least `split` in any row, and those of `outliers`, take part in floating point. */
typedef struct hfq_input {
    float low, high;              /* ends of the grid, such as -128 and 127 */
    float scale;                  /* for all of x; 0 to take largest magnitude / high of each block, or row */
    float split;                  /* infinity for none */
    int64_t outlier_count;
    const int32_t *outliers;      /* columns of x, sorted */
    const uint16_t *outlier_weight;  /* [n, outlier_count]: what the weight is there, */
    int32_t outlier_type;            /* bfloat16 or float16 */

    /* What follows is read by `hfq_linear_grid` alone. The numbers of a grid have so many bits behind their first one, */
    int32_t mantissa_bits;
    float normal;                 /* and from this one down to 0 the same step. Integers have, say, 8 and 256. */
    const float *levels;          /* Or they are any sorted ones: [level_count], NULL for none, */
    const float *thresholds;      /* and [level_count - 1] the largest number that is rounded to the lower of two. */
    int64_t level_count;          /* up to 256 */
    int64_t height, width;        /* of the blocks of x that share a scale that is found */
    int32_t scale_type;           /* that it is rounded to */
    int32_t zero;                 /* not 0: numbers from 0 to `high`, and a zero point goes with each scale: */
    float zero_point;             /* where `scale` is given */
    int32_t scale_last;           /* not 0: multiply a row's scale with its results, if the row is one block */
    const int32_t *order;         /* column of x that each column of the weight belongs to; NULL for its own */
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

/* How a matrix [n, k] is rounded: x / scale goes to the nearest level of a grid, a tie to the code of even parity counted
 * from zero. */
typedef struct hfq_rounding {
    int64_t n, k;
    int64_t row_stride;       /* numbers from one row of the matrix to the next */
    int64_t group;            /* columns that share a scale, at least 1; the last group of a row may be smaller */
    int64_t scale_height;     /* rows that share their scales, at least 1 */
    const float *scale;       /* [ceil(n / scale_height), ceil(k / group)] */
    const float *zero;        /* as many zero points, NULL for none: round(x / scale) + zero, within [0, count - 1] */
    int32_t count;            /* of levels, 2 to 256 */
    const float *levels;      /* [count], sorted */
    const float *thresholds;  /* [count - 1]: the largest number of each code but the last one. NULL: levels are
                               * consecutive integers, rounded to by arithmetic; where there is a zero point, too */
    int32_t keeps_nan;        /* whether the level nearest to NaN is NaN; with thresholds it is the last one otherwise */
} hfq_rounding;

/* What a step of `hfq_steps` does with a matrix x, whose rows follow each other without gaps. */
enum hfq_op {
    HFQ_LINEAR = 0, /* y = x W^T + bias */
    HFQ_NORM = 1,   /* y = fixed [n] * x / sqrt(mean of the row's squares + scalar) */
    HFQ_ROPE = 2,   /* rotary positions: y = x * cos + (-upper half of x, lower half of x) * sin; n is even */
    HFQ_GATE = 3,   /* y = silu(x) * other */
    HFQ_ADD = 4,    /* y = x + other */
    HFQ_ATTEND = 5  /* y = softmax(x keys^T * scalar) values, in float32: one token per row, its heads of n <= 512 */
};

/* One of several steps. x, y, other and more are numbers of slots, which hold addresses. All but HFQ_LINEAR see x as
 * [rows * parts, n], round to its type after each operation, and may write y over x or other. */
typedef struct hfq_step {
    int32_t op;               /* hfq_op */
    int32_t x, y;
    int32_t other;            /* second operand; HFQ_ROPE: cosines [positions, n]; HFQ_ATTEND: keys, */
    int32_t more;             /* sines [positions, n]; values, like keys [rows, parts / sharing, tokens, n] */
    float scalar;             /* HFQ_NORM: epsilon; HFQ_ATTEND: factor of the scores */
    int64_t n;                /* columns */
    int64_t parts;            /* rows of x for each row of the input: heads */
    int64_t sharing;          /* HFQ_ATTEND: heads of x for each head of keys and values */
    const hfq_weight *weight; /* HFQ_LINEAR, */
    const hfq_input *input;   /* as in hfq_job */
    const void *fixed;        /* bias [n] float32 or NULL; gain of a norm, of the type of x */
} hfq_step;

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

/* The same for any weight and any grid: the input is rounded to it, and multiplied in floating point. Columns of
 * `outliers` and `order` are below k. A block with a value that is not finite gives NaN; of a given scale, its row. */
HFQ_EXPORT int hfq_linear_grid(const hfq_weight *weight, const hfq_input *input, const void *x, const float *bias,
                               void *y, int64_t m, int type, int threads);

/* Round x [n, k] of `type`. `codes` [n, k]: of the levels; NaN becomes the last code, or 0 by arithmetic. */
HFQ_EXPORT int hfq_encode(const hfq_rounding *rounding, const void *x, uint8_t *codes, int type, int threads);

/* Round x [n, k] of `type`. `values` [n, k]: level times scale, or (code - zero) times scale. Both return 0, or -1 if
 * no instruction set is in use. */
HFQ_EXPORT int hfq_round(const hfq_rounding *rounding, const void *x, float *values, int type, int threads);

/* The columns [first, last) of a weight, [n, last - first] of `type`, rounded once from float32. Returns 0, or -1 if
 * memory ran out or no instruction set is in use. */
HFQ_EXPORT int hfq_dequantize(const hfq_weight *weight, int64_t first, int64_t last, void *to, int type, int threads);

/* to [m, k] = grad [m, n] W: the gradient of an input from that of its result, both of `type`. Weights are rounded to it.
 * Returns 1, and does nothing, where the instruction set in use is better off with `hfq_dequantize` and a product. */
HFQ_EXPORT int hfq_input_grad(const hfq_weight *weight, const void *grad, void *to, int64_t m, int type, int threads);

/* Several products; x and y of all are of `type`. The results are those of single calls. Returns 0, or -1 if one failed:
 * then nothing is known of what is in any y. */
HFQ_EXPORT int hfq_linear_jobs(const hfq_job *jobs, int64_t count, int type, int threads);

/* Several steps, each on what those before it wrote: x of `rows` rows, of which row r is at position r % positions.
 * Products in a row that read one slot run at once. Returns 0, or -1 if one failed: then nothing is known of what is in
 * any slot. */
HFQ_EXPORT int hfq_steps(const hfq_step *steps, int64_t count, void *const *slots, int64_t rows, int64_t positions,
                         int64_t tokens, int type, int threads);

/* The sum of `count` words, read by `threads` threads as fast as memory gives them; up to 32 a thread may be left out. */
HFQ_EXPORT int64_t hfq_read(const int64_t *from, int64_t count, int threads);

#ifdef __cplusplus
}
#endif
#endif
