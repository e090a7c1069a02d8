// A layer's input as integers, and the columns of it that stay in floating point.
#pragma once

#include "common.h"
#include "threads.h"

#include <cfloat>
#include <cmath>

namespace {

// Columns that take part in floating point, with their weights.
struct Kept {
    int64_t count = 0;
    Buffer<int32_t> columns;  // sorted
    Buffer<int32_t> stored;   // where the weight of a column is among the stored ones, or -1

    // `large`: for each column, whether it holds a magnitude of at least the split.
    Kept(const hfq_input &input, const uint8_t *large, int64_t k) : columns(k), stored(k) {
        if (!columns.data || !stored.data || (input.outlier_count == 0 && !(input.split < INFINITY))) return;
        int64_t next = 0;
        for (int64_t j = 0; j < k; j++) {
            const bool there = next < input.outlier_count && input.outliers[next] == j;
            if (!there && !large[j]) continue;
            columns.data[count] = int32_t(j);
            stored.data[count++] = there ? int32_t(next) : -1;
            next += there;
        }
    }

    // The weight of the kept column `i` in row `row`.
    float weight(const hfq_weight &w, const hfq_input &input, int64_t row, float scale, int64_t i) const {
        if (stored.data[i] < 0) return w.levels[code_at(w.codes + row * w.row_bytes, columns.data[i], w.bits)] * scale;
        const uint16_t bits = input.outlier_weight[row * input.outlier_count + stored.data[i]];
        return input.outlier_type == HFQ_BFLOAT16 ? from_bf16(bits) : from_half(bits);
    }
};

// Mark the columns of row x [k] that hold a magnitude of at least the split.
inline void mark_large(const Problem &p, int64_t m, float split, uint8_t *large) {
    for (int64_t j = 0; j < p.weight.k; j++)
        if (std::fabs(load(p.x, m * p.weight.k + j, p.type)) >= split) large[j] = 1;
}

// Integers of a row [k] float32, written by `put(column, integer)`; its scale, NaN if a value is not finite.
template <class Put>
inline float quantize_row(const float *row, int64_t k, const hfq_input &input, const Put &put) {
    float top = 0, bad = 0;
    for (int64_t j = 0; j < k; j++) {
        const float magnitude = std::fabs(row[j]);
        top = magnitude > top ? magnitude : top;
        bad += row[j] - row[j];  // 0, or NaN
    }
    float scale = input.scale != 0 ? input.scale : top / input.high;
    if (scale == 0) scale = 1;
    if (scale < FLT_MIN) scale = FLT_MIN;
    for (int64_t j = 0; j < k; j++) {
        float value = std::nearbyint(row[j] / scale);
        value = value < input.low ? input.low : value > input.high ? input.high : value;
        put(j, bad == 0 ? int32_t(value) : 0);
    }
    return scale + bad;
}

}  // namespace
