// Pieces that every instruction set shares. All of it has internal linkage: each source compiles its own copy with its
// own instructions, and the linker must not merge them.
#pragma once

#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace {

using bf16 = uint16_t;
using half = uint16_t;

inline float to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bf16(bf16 value) { return to_float(uint32_t(value) << 16); }

// Nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return bf16(bits >> 16 | 64);
    return bf16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Exact: a multiplication moves the exponent, subnormal numbers included. Without branches, as what follows: compilers
// make vectors of it.
inline float from_half(half value) {
    const uint32_t sign = uint32_t(value & 0x8000) << 16, rest = value & 0x7FFF;
    const uint32_t number = to_bits(to_float(rest << 13) * 0x1p112f), special = 0x7F800000 | (rest & 0x3FF) << 13;
    return to_float(sign | (rest >= 0x7C00 ? special : number));
}

// Nearest, ties to even, also where the result is subnormal.
inline half to_half(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    const uint32_t subnormal = to_bits(to_float(rest) + 0.5f) - 0x3F000000;
    const uint32_t normal = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
    uint32_t found = rest < 0x38800000 ? subnormal : normal;
    found = rest >= 0x477FF000 ? 0x7C00 : found;  // rounds to infinity
    return half(sign | (rest > 0x7F800000 ? 0x7E00 : found));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a call, freed at its end; aligned to a cache line.
template <class T>
struct Buffer {
    explicit Buffer(int64_t count) : data(static_cast<T *>(std::aligned_alloc(64, ceil_div(count * sizeof(T) + 1, 64) * 64))) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    T *data;
};

// The part of `count` things that thread `id` of `threads` does, in whole steps.
struct Share {
    int64_t first, last;
    Share(int64_t count, int64_t step, int id, int threads) {
        int64_t steps = ceil_div(count, step);
        first = steps * id / threads * step;
        last = steps * (id + 1) / threads * step;
        if (last > count) last = count;
    }
};

// Number `column` of a row of numbers of `bits` bits.
inline uint32_t code_at(const uint8_t *row, int64_t column, int bits) {
    const int64_t bit = column * bits;
    const int shift = int(bit & 7);
    uint32_t word = row[bit >> 3];
    if (shift + bits > 8) word |= uint32_t(row[(bit >> 3) + 1]) << 8;
    return word >> shift & ((1u << bits) - 1);
}

inline float load(const void *from, int64_t index, int type) {
    if (type == HFQ_FLOAT32) return static_cast<const float *>(from)[index];
    const uint16_t bits = static_cast<const uint16_t *>(from)[index];
    return type == HFQ_BFLOAT16 ? from_bf16(bits) : from_half(bits);
}

// Scales of row `row` as float32.
inline void row_scales(const hfq_weight &w, int64_t row, float *scale) {
    const int64_t groups = ceil_div(w.k, w.group), start = row / w.scale_height * groups;
    if (w.scale_codes) {
        for (int64_t g = 0; g < groups; g++)
            scale[g] = w.scale_levels[w.scale_codes[start + g]] * w.scale_scale[(start + g) / w.scale_group];
    } else if (w.scale_type == HFQ_FLOAT32) {
        std::memcpy(scale, static_cast<const float *>(w.scale) + start, groups * sizeof(float));
    } else if (w.scale_type == HFQ_BFLOAT16) {
        const bf16 *from = static_cast<const bf16 *>(w.scale) + start;
        for (int64_t g = 0; g < groups; g++) scale[g] = from_bf16(from[g]);
    } else {
        const half *from = static_cast<const half *>(w.scale) + start;
        for (int64_t g = 0; g < groups; g++) scale[g] = from_half(from[g]);
    }
}

// Zero points of row `row` as float32.
inline void row_zeros(const hfq_weight &w, int64_t row, float *zero) {
    const int64_t groups = ceil_div(w.k, w.group);
    const uint8_t *from = w.zero + row / w.scale_height * ceil_div(groups * w.zero_bits, 8);
    for (int64_t g = 0; g < groups; g++)
        zero[g] = w.zero_bits > 8 ? load(from, g, w.zero_type) : float(code_at(from, g, w.zero_bits));
}

inline void row_parameters(const hfq_weight &w, int64_t row, float *scale, float *zero) {
    row_scales(w, row, scale);
    if (w.zero) row_zeros(w, row, zero);
}

// Levels of the columns [first, last) of a row, one code after the other.
inline void decode_levels(const hfq_weight &w, const uint8_t *codes, int64_t first, int64_t last, float *out) {
    for (int64_t j = first; j < last; j++) out[j - first] = w.levels[code_at(codes, j, w.bits)];
}

// Levels of the columns [first, last) become weights: (level - zero) * scale.
inline void scale_levels(const hfq_weight &w, const float *scale, const float *zero, int64_t first, int64_t last,
                         float *values) {
    for (int64_t start = first, g = first / w.group; start < last; g++) {
        const int64_t stop = (g + 1) * w.group < last ? (g + 1) * w.group : last;
        const float factor = scale[g], offset = w.zero ? zero[g] : 0.0f;
        for (int64_t j = start - first; j < stop - first; j++) values[j] = (values[j] - offset) * factor;
        start = stop;
    }
}

inline void store(void *to, int64_t index, int type, float value) {
    if (type == HFQ_FLOAT32)
        static_cast<float *>(to)[index] = value;
    else
        static_cast<uint16_t *>(to)[index] = type == HFQ_BFLOAT16 ? to_bf16(value) : to_half(value);
}

// The result of row m of x and row n of the weight, of the sum of their products.
inline float finished(const Problem &p, int64_t m, int64_t n, float sum) {
    if (p.row_scale) sum *= p.row_scale[m];
    for (int64_t i = 0; i < p.kept_count; i++) sum += p.kept[m * p.kept_count + i] * p.kept_weight[i * p.weight.n + n];
    return sum + (p.bias ? p.bias[n] : 0.0f);
}

}  // namespace
