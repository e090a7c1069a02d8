// The small operations between the products of a decoder layer, portable and left to the compiler's vectors.
//
// Each rounds to the type of its numbers wherever torch's operators do, so that results are theirs but for the order
// of a norm's sum and the last bit of an exponential.
#pragma once

#include "common.h"
#include "threads.h"

#include <cmath>

namespace {

constexpr int64_t SUMS = 32;        // sums that do not wait for each other
constexpr int64_t ALONE = 1 << 15;  // numbers that one thread is done with before others have woken up

// Nearest, ties to even. NaN stays one without being looked at: those that operations make, or get as bfloat16, have
// zeros in the lower half.
inline uint32_t bf16_bits(float value) {
    const uint32_t bits = to_bits(value);
    return bits + 0x7FFF + (bits >> 16 & 1);
}

template <int TYPE>
inline float rounded(float value) {
    if (TYPE == HFQ_BFLOAT16) return to_float(bf16_bits(value) & 0xFFFF0000);
    return TYPE == HFQ_FLOAT16 ? from_half(to_half(value)) : value;
}

template <int TYPE>
inline void put(void *to, int64_t index, float value) {
    if (TYPE == HFQ_BFLOAT16)
        static_cast<bf16 *>(to)[index] = bf16(bf16_bits(value) >> 16);
    else
        store(to, index, TYPE, value);
}

// e^x within two units in the last place, 0 from about 2^-125.5 on: 2^power times the polynomial of Cephes' expf for what remains.
inline float exponential(float x) {
    x = -87.5f > x ? -87.5f : x;
    x = 89.0f < x ? 89.0f : x;  // infinity from here on; NaN stays
    const float at = x * 1.44269504f + 0x1.8p23f, whole = at - 0x1.8p23f;
    const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const uint32_t power = to_bits(at) - to_bits(0x1.8p23f);
    return (sum + sum) * to_float((power + 126) << 23);  // 2^128 is no float, 2 * 2^127 may be
}

// y = gain * (x / root mean square of x), a row of n.
template <int TYPE>
void norm_row(const StepProblem &s, int64_t row) {
    const int64_t start = row * s.n;
    float sums[SUMS] = {};
    int64_t j = 0;
    for (; j + SUMS <= s.n; j += SUMS)
        for (int64_t l = 0; l < SUMS; l++) {
            const float value = load(s.x, start + j + l, TYPE);
            sums[l] += value * value;
        }
    for (; j < s.n; j++) sums[0] += load(s.x, start + j, TYPE) * load(s.x, start + j, TYPE);
    for (int64_t half = SUMS / 2; half; half /= 2)
        for (int64_t l = 0; l < half; l++) sums[l] += sums[l + half];
    const float factor = 1.0f / std::sqrt(sums[0] / float(s.n) + s.scalar);
#pragma omp simd
    for (j = 0; j < s.n; j++)
        put<TYPE>(s.y, start + j, load(s.fixed, j, TYPE) * rounded<TYPE>(load(s.x, start + j, TYPE) * factor));
}

// Rotary positions: y = x * cos + (its halves swapped, the upper one negative) * sin, heads of n.
template <int TYPE>
void rope_row(const StepProblem &s, int64_t row) {
    const int64_t half = s.n / 2, start = row * s.n, position = row / s.parts % s.positions * s.n;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float low = load(s.x, start + j, TYPE), high = load(s.x, start + half + j, TYPE);
        const float a = rounded<TYPE>(low * load(s.other, position + j, TYPE));
        const float b = rounded<TYPE>(high * load(s.more, position + j, TYPE));
        const float c = rounded<TYPE>(high * load(s.other, position + half + j, TYPE));
        const float d = rounded<TYPE>(low * load(s.more, position + half + j, TYPE));
        put<TYPE>(s.y, start + j, a - b);
        put<TYPE>(s.y, start + half + j, c + d);
    }
}

// y = silu(x) * other.
template <int TYPE>
void gate_row(const StepProblem &s, int64_t row) {
#pragma omp simd
    for (int64_t j = row * s.n; j < (row + 1) * s.n; j++) {
        const float value = load(s.x, j, TYPE);
        put<TYPE>(s.y, j, rounded<TYPE>(value / (1.0f + exponential(-value))) * load(s.other, j, TYPE));
    }
}

template <int TYPE>
void add_row(const StepProblem &s, int64_t row) {
#pragma omp simd
    for (int64_t j = row * s.n; j < (row + 1) * s.n; j++) put<TYPE>(s.y, j, load(s.x, j, TYPE) + load(s.other, j, TYPE));
}

constexpr int64_t TOKENS = 32;   // keys and values that are widened at once
constexpr int64_t QUERIES = 8;   // heads that share them
constexpr int64_t WIDEST = 512;  // numbers of a head

// What queries have gathered from the tokens so far: the largest score, the sum of the exponentials of the others below
// it, and the values, each times its exponential.
struct Gathered {
    float most, sum;
    alignas(64) float values[WIDEST];
};

// Of a head, which is short: `dot` of portable.h, made for rows of a weight, adds up more sums in the end.
inline float inner(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

// Up to TOKENS more tokens for one query; keys [tokens, n], and values [tokens, n] with zeros behind each row, up to `wide`.
inline void gather(Gathered &to, const float *query, const float *keys, const float *values, int64_t tokens, int64_t n,
                   int64_t wide) {
    alignas(64) float weight[TOKENS] = {};
    for (int64_t t = 0; t < tokens; t++) weight[t] = inner(query, keys + t * n, n);
    float most = to.most, sum = 0.0f;
    for (int64_t t = 0; t < tokens; t++) most = weight[t] > most ? weight[t] : most;
    const float below = most == -INFINITY ? 0.0f : most;  // infinities have no difference
#pragma omp simd
    for (int64_t t = 0; t < TOKENS; t++) weight[t] = exponential(weight[t] - below);
    for (int64_t t = 0; t < tokens; t++) sum += weight[t];
    const float shrunk = exponential(to.most - below);
    to.most = most;
    to.sum = to.sum * shrunk + sum;
    for (int64_t j = 0; j < wide; j += SUMS) {
        float lanes[SUMS];
        for (int64_t l = 0; l < SUMS; l++) lanes[l] = to.values[j + l] * shrunk;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t l = 0; l < SUMS; l++) lanes[l] += weight[t] * values[t * wide + j + l];
        for (int64_t l = 0; l < SUMS; l++) to.values[j + l] = lanes[l];
    }
}

// Attention of one token: up to QUERIES heads that share the keys and values [tokens, n] of head `shared`.
template <int TYPE>
void attend_heads(const StepProblem &s, int64_t first, int64_t count, int64_t shared) {
    alignas(64) float query[QUERIES][WIDEST], keys[TOKENS * WIDEST], values[TOKENS * WIDEST];
    Gathered gathered[QUERIES];
    const int64_t wide = ceil_div(s.n, SUMS) * SUMS;
    if (wide > s.n) std::memset(values, 0, TOKENS * wide * sizeof(float));
    for (int64_t q = 0; q < count; q++) {
        for (int64_t j = 0; j < s.n; j++) query[q][j] = load(s.x, (first + q) * s.n + j, TYPE) * s.scalar;
        gathered[q].most = -INFINITY;
        gathered[q].sum = 0.0f;
        std::memset(gathered[q].values, 0, sizeof gathered[q].values);
    }
    for (int64_t t = 0; t < s.tokens; t += TOKENS) {
        const int64_t tokens = s.tokens - t < TOKENS ? s.tokens - t : TOKENS, start = (shared * s.tokens + t) * s.n;
        for (int64_t u = 0; u < tokens; u++)
#pragma omp simd
            for (int64_t j = 0; j < s.n; j++) {
                keys[u * s.n + j] = load(s.other, start + u * s.n + j, TYPE);
                values[u * wide + j] = load(s.more, start + u * s.n + j, TYPE);
            }
        for (int64_t q = 0; q < count; q++) gather(gathered[q], query[q], keys, values, tokens, s.n, wide);
    }
    for (int64_t q = 0; q < count; q++)
        for (int64_t j = 0; j < s.n; j++)
            put<TYPE>(s.y, (first + q) * s.n + j, gathered[q].values[j] / gathered[q].sum);
}

template <int TYPE>
void attend(const StepProblem &s) {
    const int64_t parts = ceil_div(s.sharing, QUERIES), shared = s.m * s.parts / s.sharing;
#pragma omp parallel for num_threads(s.threads) if (shared * parts * s.tokens * s.n > ALONE / 4)
    for (int64_t i = 0; i < shared * parts; i++) {
        const int64_t from = i % parts * QUERIES, left = s.sharing - from;
        attend_heads<TYPE>(s, i / parts * s.sharing + from, left < QUERIES ? left : QUERIES, i / parts);
    }
}

template <int TYPE>
void step_of(const StepProblem &s) {
    if (s.op == HFQ_ATTEND) return attend<TYPE>(s);
    const int64_t rows = s.m * s.parts;
    const auto run = s.op == HFQ_NORM   ? norm_row<TYPE>
                     : s.op == HFQ_ROPE ? rope_row<TYPE>
                     : s.op == HFQ_GATE ? gate_row<TYPE>
                                        : add_row<TYPE>;
#pragma omp parallel for num_threads(s.threads) if (rows * s.n > ALONE)
    for (int64_t row = 0; row < rows; row++) run(s, row);
}

void step(const StepProblem &s) {
    if (s.type == HFQ_FLOAT32) step_of<HFQ_FLOAT32>(s);
    if (s.type == HFQ_BFLOAT16) step_of<HFQ_BFLOAT16>(s);
    if (s.type == HFQ_FLOAT16) step_of<HFQ_FLOAT16>(s);
}

}  // namespace
