// The whole computation in float32 and portable C++; a source that includes it says how codes become levels.
#pragma once

#include "common.h"
#include "quantized_input.h"
#include "threads.h"

namespace {

constexpr int LANES = 16;  // partial sums: enough for any compiler to keep a vector unit busy, and exacter than one

float dot(const float *a, const float *b, int64_t count) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += a[i + lane] * b[i + lane];
    for (int lane = 0; i < count; i++, lane++) sums[lane] += a[i] * b[i];
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return sums[0];
}

// Decode: (weight, codes of a row, first column, last column, to).
template <class Decode>
int portable_linear(const Problem &p, const Decode &decode) {
    const hfq_weight &w = p.weight;
    const int64_t groups = ceil_div(w.k, w.group);
    Buffer<float> x(p.m * w.k);
    if (!x.data) return -1;
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num(), count = omp_get_num_threads();
        const Share mine(p.m * w.k, 64, id, count);
        for (int64_t i = mine.first; i < mine.last; i++) x.data[i] = load(p.x, i, p.type);
        Buffer<float> row(w.k), scale(groups), zero(groups);
        const bool ready = row.data && scale.data && zero.data;
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp barrier
        const Share rows(w.n, 1, id, count);
        for (int64_t n = rows.first; ready && n < rows.last; n++) {
            row_parameters(w, n, scale.data, zero.data);
            decode(w, w.codes + n * w.row_bytes, 0, w.k, row.data);
            scale_levels(w, scale.data, zero.data, 0, w.k, row.data);
            for (int64_t m = 0; m < p.m; m++) {
                const float sum = dot(x.data + m * w.k, row.data, w.k);
                store(p.y, m * w.n + n, p.result, finished(p, m, n, sum));
            }
        }
    }
    return failed;
}

// Products of integers in int32; `decode` as above.
template <class Decode>
int portable_linear_int(const Problem &p, const hfq_input &input, const Decode &decode) {
    const hfq_weight &w = p.weight;
    Buffer<uint8_t> large(w.k);
    Buffer<int32_t> x(p.m * w.k);
    Buffer<float> scales(p.m), row(w.k);
    if (!large.data || !x.data || !scales.data || !row.data) return -1;
    std::memset(large.data, 0, w.k);
    for (int64_t m = 0; input.split < INFINITY && m < p.m; m++) mark_large(p, m, input.split, large.data);
    const Kept kept(input, large.data, w.k);
    Buffer<float> apart(p.m * kept.count);  // the kept columns of x
    if (!kept.columns.data || !kept.stored.data || !apart.data) return -1;
    for (int64_t m = 0; m < p.m; m++) {
        for (int64_t j = 0; j < w.k; j++) row.data[j] = load(p.x, m * w.k + j, p.type);
        for (int64_t i = 0; i < kept.count; i++) {
            apart.data[m * kept.count + i] = row.data[kept.columns.data[i]];
            row.data[kept.columns.data[i]] = 0;
        }
        scales.data[m] = quantize_row(row.data, w.k, input, [&](int64_t j, int32_t q) { x.data[m * w.k + j] = q; });
    }
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        Buffer<float> levels(w.k), outliers(kept.count);
        Buffer<int32_t> weights(w.k);
        const bool ready = levels.data && outliers.data && weights.data;
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        const Share rows(w.n, 1, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t n = rows.first; ready && n < rows.last; n++) {
            float scale;
            row_scales(w, n, &scale);
            decode(w, w.codes + n * w.row_bytes, 0, w.k, levels.data);
            for (int64_t j = 0; j < w.k; j++) weights.data[j] = int32_t(levels.data[j]);
            for (int64_t i = 0; i < kept.count; i++) outliers.data[i] = kept.weight(w, input, n, scale, i);
            for (int64_t m = 0; m < p.m; m++) {
                int32_t sum = 0;
                for (int64_t j = 0; j < w.k; j++) sum += x.data[m * w.k + j] * weights.data[j];
                float value = float(sum) * (scale * scales.data[m]);
                for (int64_t i = 0; i < kept.count; i++) value += apart.data[m * kept.count + i] * outliers.data[i];
                store(p.y, m * w.n + n, p.type, value + (p.bias ? p.bias[n] : 0.0f));
            }
        }
    }
    return failed;
}

}  // namespace
