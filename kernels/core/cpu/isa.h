// What a source of kernels offers to the dispatcher.
#pragma once

#include "hfquant.h"

struct Problem {
    const hfq_weight &weight;
    const void *x;
    const float *bias;
    void *y;
    int64_t m;
    int type;                            // of x
    int threads;
    int result = type;                   // of y
    const float *row_scale = nullptr;    // [m]: factors of sums
    const float *kept = nullptr;         // [m, kept_count]: columns of x that are not in it,
    const float *kept_weight = nullptr;  // [kept_count, n]: and of the weight, which are not in it either
    int64_t kept_count = 0;
};

// One of `codes` and `values` is given.
struct RoundingProblem {
    const hfq_rounding &rounding;
    const void *x;
    uint8_t *codes;
    float *values;
    int type;
    int threads;
};

// A small operation on x [m * parts, n] of `type`, with every pointer that it needs.
struct StepProblem {
    int op;
    const void *x, *other, *more;
    void *y;
    const void *fixed;
    int64_t m, n, parts, sharing, positions, tokens;
    float scalar;
    int type;
    int threads;
};

struct Isa {
    const char *name;
    bool (*supported)();
    int (*linear)(const Problem &problem);
    int (*linear_int)(const Problem &problem, const hfq_input &input);
    int (*linear_grid)(const Problem &problem, const hfq_input &input);
    void (*round)(const RoundingProblem &problem);
    int (*dequantize)(const hfq_weight &weight, int64_t first, int64_t last, void *to, int type, int threads);
    int (*input_grad)(const Problem &problem);  // x [m, n] and y [m, k]; 1 for what it is not made for, NULL for none
    void (*step)(const StepProblem &step);
};

// With the instruction set in use. Returns 0, or -1 if there is none.
int run_step(const StepProblem &step);

// Weak: a source whose instructions the compiler does not know is not in the library.
extern "C" {
__attribute__((weak)) const Isa *hfq_scalar();
__attribute__((weak)) const Isa *hfq_avx2();
__attribute__((weak)) const Isa *hfq_avx512_bf16();
__attribute__((weak)) const Isa *hfq_amx();
}
