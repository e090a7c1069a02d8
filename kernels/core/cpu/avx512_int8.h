// Integer weights times integer inputs with `vpdpbusd`: four products of an unsigned and a signed byte and their sum. Codes
// are unsigned as they are; what they are larger than their levels is taken back with the sum of the inputs.
#pragma once

#include "avx512_decode.h"
#include "avx512_gemm.h"
#include "avx512_rows.h"
#include "quantized_input.h"

namespace {

// Sums of the lanes of four vectors of integers.
inline __m128i add_int_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// sums [T, 4], rows PANEL_ROWS apart, += the products of T rows of inputs, x [vectors, T, 64], with four rows of codes.
// `codes(i, r)` gives vector i of row r.
template <int T, class Codes>
inline void int_tile(const int8_t *x, int64_t vectors, const Codes &codes, int32_t *sums) {
    __m512i acc[T][TILE_ROWS];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < TILE_ROWS; r++) acc[t][r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < vectors; i++, x += T * 64) {
        __m512i weights[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) weights[r] = codes(i, r);
        for (int t = 0; t < T; t++) {
            const __m512i input = _mm512_load_si512(x + t * 64);
            for (int r = 0; r < TILE_ROWS; r++) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], weights[r], input);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
        __m128i *to = reinterpret_cast<__m128i *>(sums + t * PANEL_ROWS);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), add_int_lanes(acc[t][0], acc[t][1], acc[t][2], acc[t][3])));
    }
}

template <class Codes>
inline void int_tiles(int64_t inputs, const int8_t *x, int64_t vectors, const Codes &codes, int32_t *sums) {
    switch (inputs) {
#define CASE(T) \
    case T: return int_tile<T>(x, vectors, codes, sums);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// The input of a call: integers in tiles, and per row their scale and sum.
struct IntInput {
    const hfq_input &input;
    const int64_t width;
    const Buffer<int8_t> x;   // [m, width]
    const Buffer<float> scale;
    const Buffer<int32_t> sum;  // of the integers
    const Kept &kept;
    const Buffer<float> apart;  // [m, kept.count]

    IntInput(const Problem &p, const hfq_input &in, const Kept &k)
        : input(in), width(ceil_div(p.weight.k, 64) * 64), x(p.m * width), scale(p.m), sum(p.m), kept(k),
          apart(p.m * k.count) {}

    bool ready() const { return x.data && scale.data && sum.data && apart.data; }

    void quantize(const Problem &p, int64_t m, float *row) const {
        const int64_t k = p.weight.k;
        for (int64_t j = 0; j < k; j++) row[j] = load(p.x, m * k + j, p.type);
        for (int64_t i = 0; i < kept.count; i++) {
            apart.data[m * kept.count + i] = row[kept.columns.data[i]];
            row[kept.columns.data[i]] = 0;
        }
        const InTile at(m, p.m, width, 64);
        int8_t *to = x.data + at.offset;
        const float factor = row_scale(row, k);
        scale.data[m] = factor;
        const __m512 by = _mm512_set1_ps(factor), low = _mm512_set1_ps(input.low), high = _mm512_set1_ps(input.high);
        __m512i total = _mm512_setzero_si512();
        for (int64_t j = 0; j < width; j += 64, to += 64 * at.stride)
            for (int part = 0; part < 64; part += 16) {
                const int64_t rest = k - j - part;
                const __mmask16 there = rest >= 16 ? __mmask16(0xFFFF) : __mmask16(rest > 0 ? (1u << rest) - 1 : 0);
                const __m512 value = _mm512_div_ps(_mm512_maskz_loadu_ps(there, row + j + part), by);
                const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
                total = _mm512_add_epi32(total, q);
                _mm_store_si128(reinterpret_cast<__m128i *>(to + part), _mm512_cvtepi32_epi8(q));
            }
        sum.data[m] = _mm512_reduce_add_epi32(total);
    }

  private:
    // As `quantize_row` finds it: NaN if a value is not finite.
    float row_scale(const float *row, int64_t k) const {
        __m512 top = _mm512_setzero_ps(), bad = top;
        for (int64_t j = 0; j < k; j += 16) {
            const __mmask16 there = k - j >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (k - j)) - 1);
            const __m512 values = _mm512_maskz_loadu_ps(there, row + j);
            top = _mm512_max_ps(top, _mm512_abs_ps(values));
            bad = _mm512_add_ps(bad, _mm512_sub_ps(values, values));
        }
        float found = input.scale != 0 ? input.scale : _mm512_reduce_max_ps(top) / input.high;
        if (found == 0) found = 1;
        if (found < FLT_MIN) found = FLT_MIN;
        return found + _mm512_reduce_add_ps(bad);
    }
};

template <int BITS>
struct IntPanel {
    const hfq_weight &w;
    int64_t vectors;

    __m512i load(int64_t row, int64_t i) const {
        const int64_t at = i * 8 * BITS, bytes = w.row_bytes - at;
        return spread<BITS>(load_bytes(w.codes + row * w.row_bytes + at, bytes < 8 * BITS ? bytes : 8 * BITS));
    }
};

// What the floating-point columns add to the results of a panel: `weights` [kept.count, PANEL_ROWS].
inline void add_kept(const IntInput &in, int64_t m, const float *weights, int64_t rows, float *values) {
    const float *x = in.apart.data + m * in.kept.count;
    for (int64_t r = 0; r < rows; r += 16) {
        __m512 sum = _mm512_load_ps(values + r);
        for (int64_t i = 0; i < in.kept.count; i++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), _mm512_load_ps(weights + i * PANEL_ROWS + r), sum);
        _mm512_store_ps(values + r, sum);
    }
}

template <int BITS>
int gemm_int(const Problem &p, const IntInput &in) {
    const hfq_weight &w = p.weight;
    const int64_t vectors = in.width / 64;
    const int32_t offset = -int32_t(w.levels[0]);  // a code is its level and this
    const bool copy = p.m > TILE_INPUTS;  // codes are read more than once: lay them out as the tiles want them
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const Share mine(w.n, TILE_ROWS, omp_get_thread_num(), omp_get_num_threads());
        Buffer<uint8_t> panel(copy ? PANEL_ROWS * in.width : 0);
        Buffer<int32_t> sums(p.m * PANEL_ROWS);
        Buffer<float> kept(in.kept.count * PANEL_ROWS);
        alignas(64) float scale[PANEL_ROWS], values[PANEL_ROWS];
        const bool ready = panel.data && sums.data && kept.data;
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        const IntPanel<BITS> codes{w, vectors};
        for (int64_t first = mine.first; ready && first < mine.last; first += PANEL_ROWS) {
            const int64_t rows = mine.last - first < PANEL_ROWS ? mine.last - first : PANEL_ROWS;
            std::memset(sums.data, 0, p.m * PANEL_ROWS * sizeof(int32_t));
            std::memset(scale, 0, sizeof scale);
            for (int64_t r = 0; r < rows; r++) row_scales(w, first + r, scale + r);
            for (int64_t i = 0; i < in.kept.count; i++)
                for (int64_t r = 0; r < PANEL_ROWS; r++)
                    kept.data[i * PANEL_ROWS + r] = r < rows ? in.kept.weight(w, in.input, first + r, scale[r], i) : 0;
            if (copy)
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t i = 0; i < vectors; i++)
                        _mm512_store_si512(panel.data + r / TILE_ROWS * TILE_ROWS * in.width + (i * TILE_ROWS + r % TILE_ROWS) * 64,
                                           codes.load(first + r, i));
            for (int64_t m = 0; m < p.m; m += TILE_INPUTS) {
                const InTile at(m, p.m, in.width, 64);
                const int8_t *x = in.x.data + at.offset;
                for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                    int32_t *to = sums.data + m * PANEL_ROWS + r;
                    if (copy) {
                        const uint8_t *from = panel.data + r * in.width;
                        int_tiles(at.stride, x, vectors,
                                  [&](int64_t i, int q) { return _mm512_load_si512(from + (i * TILE_ROWS + q) * 64); }, to);
                    } else {
                        const int64_t last = rows - 1;  // rows behind it are not there: results of theirs are not used
                        const auto row = [&](int q) { return first + (r + q < last ? r + q : last); };
                        int_tiles(at.stride, x, vectors, [&](int64_t i, int q) { return codes.load(row(q), i); }, to);
                    }
                }
            }
            for (int64_t m = 0; m < p.m; m++) {
                const __m512i back = _mm512_set1_epi32(offset * in.sum.data[m]);
                const __m512 by = _mm512_set1_ps(in.scale.data[m]);
                for (int64_t r = 0; r < PANEL_ROWS; r += 16) {
                    const __m512i raw = _mm512_loadu_si512(sums.data + m * PANEL_ROWS + r);
                    const __m512i exact = _mm512_sub_epi32(raw, back);
                    const __m512 factor = _mm512_mul_ps(_mm512_load_ps(scale + r), by);
                    _mm512_store_ps(values + r, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), factor));
                }
                if (in.kept.count) add_kept(in, m, kept.data, rows, values);
                for (int64_t r = 0; r < rows; r += 16) finish(p, m * w.n + first + r, first + r, rows - r, values + r);
            }
        }
    }
    return failed;
}

template <int BITS>
int linear_int_of(const Problem &p, const hfq_input &input) {
    const hfq_weight &w = p.weight;
    Buffer<uint8_t> large(w.k);
    if (!large.data) return -1;
    std::memset(large.data, 0, w.k);
    if (input.split < INFINITY) {
        for (int64_t m = 0; m < p.m; m++) mark_large(p, m, input.split, large.data);
    }
    const Kept kept(input, large.data, w.k);
    const IntInput in(p, input, kept);
    Buffer<float> rows(w.k * p.threads);
    if (!kept.columns.data || !kept.stored.data || !in.ready() || !rows.data) return -1;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share mine(p.m, 1, id, omp_get_num_threads());
        for (int64_t m = mine.first; m < mine.last; m++) in.quantize(p, m, rows.data + w.k * id);
    }
    return gemm_int<BITS>(p, in);
}

}  // namespace
