// A weight as the matrix that it stands for, tile by tile: codes to bytes, bytes to levels, levels to weights.
#pragma once

#include "rounding.h"

namespace {

// The codes [first, first + count) of a row, a byte each; `first` is a multiple of 8.
inline void bytes_of(const hfq_weight &w, const uint8_t *row, int64_t first, int64_t count, uint8_t *to) {
    if (w.bits == 8) {
        std::memcpy(to, row + first, size_t(count));
    } else if (w.bits == 4) {
        const uint8_t *from = row + first / 2;
        for (int64_t i = 0; i < count / 2; i++) to[2 * i] = from[i] & 15, to[2 * i + 1] = from[i] >> 4;
        if (count % 2) to[count - 1] = from[count / 2] & 15;
    } else {
        for (int64_t j = 0; j < count; j++) to[j] = uint8_t(code_at(row, first + j, w.bits));
    }
}

// LEVELS: 16 or 256, at least as many as there are codes.
template <class V, int LEVELS>
int dequantize_to(const hfq_weight &w, int64_t first, int64_t last, void *to, int type, int threads) {
    alignas(64) float levels[LEVELS] = {};
    std::memcpy(levels, w.levels, (w.bits < 4 ? 16 : size_t(1) << w.bits) * sizeof(float));
    const int64_t groups = ceil_div(w.k, w.group), width = last - first, head = first % 8;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (w.n * width >= WORTHWHILE)
    {
        Buffer<float> scales(groups), zeros(groups);
        const bool ready = scales.data && zeros.data;
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        alignas(64) float scale[TILE + MOST_LANES], zero[TILE + MOST_LANES];
        alignas(64) uint8_t codes[TILE + MOST_LANES] = {};
        const Share rows(w.n, 1, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t n = rows.first; ready && n < rows.last; n++) {
            row_parameters(w, n, scales.data, zeros.data);
            for (int64_t start = first - head; start < last; start += TILE) {
                const int64_t count = last - start < TILE ? last - start : TILE;
                bytes_of(w, w.codes + n * w.row_bytes, start, count, codes);
                spread<V>(scales.data, w.group, start, count, scale);
                if (w.zero) spread<V>(zeros.data, w.group, start, count, zero);
                const int64_t skip = start < first ? head : 0, at = n * width + start - first;
                for (int64_t j = skip; j < count; j += V::LANES) {
                    auto x = V::template pick<LEVELS>(levels, V::bytes(codes + j));
                    if (w.zero) x = V::subtract(x, V::load(zero + j));
                    V::store(to, at + j, count - j, type, V::multiply(x, V::load(scale + j)));
                }
            }
        }
    }
    return failed;
}

template <class V>
int dequantize_with(const hfq_weight &w, int64_t first, int64_t last, void *to, int type, int threads) {
    return w.bits <= 4 ? dequantize_to<V, 16>(w, first, last, to, type, threads)
                       : dequantize_to<V, 256>(w, first, last, to, type, threads);
}

}  // namespace
