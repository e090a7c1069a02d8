// Many rows of inputs: a panel of weights is decoded into the second-level cache, and multiplied with all inputs. Both
// sides lie along the columns, so that nothing is transposed; the 16 partial sums of a product are added at its end.
#pragma once

#include "avx512_ahead.h"
#include "common.h"
#include "threads.h"

#include <immintrin.h>

namespace {

// One kind of number: how many a vector holds, and how two vectors are multiplied and added.
struct InBf16 {
    using Type = bf16;
    static constexpr int LANES = 32;
    using Vector = __m512bh;
    static Vector load(const bf16 *from) { return (__m512bh)_mm512_load_si512(from); }
    static __m512 dot(__m512 sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, a, b); }
};

struct InFloat {
    using Type = float;
    static constexpr int LANES = 16;
    using Vector = __m512;
    static Vector load(const float *from) { return _mm512_load_ps(from); }
    static __m512 dot(__m512 sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

constexpr int64_t PANEL_ROWS = 96;       // of weights that are decoded together
constexpr int64_t PANEL_BYTES = 4096;    // of a row of them
constexpr int TILE_ROWS = 4, TILE_INPUTS = 6;
constexpr int64_t FEW_INPUTS = 12;       // of which FEW_BYTES each stay in the first-level cache, with a tile of weights;
constexpr int64_t FEW_BYTES = 2048;
constexpr int FEW_BITS = 4;              // so little of wider codes takes more time to fetch than it saves

// Sums of the lanes of four vectors.
inline __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xEE);
    const __m512 all = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// sums [T, 4], rows PANEL_ROWS apart, += T rows of inputs times four rows of weights over `vectors` vectors. Of both,
// the vectors with the same columns lie together: x [vectors, T, LANES], w [vectors, TILE_ROWS, LANES].
template <class In, int T>
inline void tile(const typename In::Type *x, const typename In::Type *w, int64_t vectors, Ahead ahead, float *sums) {
    __m512 acc[T][TILE_ROWS];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < TILE_ROWS; r++) acc[t][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < vectors; i++, x += T * In::LANES, w += TILE_ROWS * In::LANES) {
        ahead.ask();
        typename In::Vector weights[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) weights[r] = In::load(w + r * In::LANES);
        for (int t = 0; t < T; t++) {
            const typename In::Vector input = In::load(x + t * In::LANES);
            for (int r = 0; r < TILE_ROWS; r++) acc[t][r] = In::dot(acc[t][r], input, weights[r]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
        float *to = sums + t * PANEL_ROWS;
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), add_lanes(acc[t][0], acc[t][1], acc[t][2], acc[t][3])));
    }
}

template <class In>
inline void tiles(int64_t inputs, const typename In::Type *x, const typename In::Type *w, int64_t vectors, Ahead ahead,
                  float *sums) {
    switch (inputs) {
#define CASE(T) \
    case T: return tile<In, T>(x, w, vectors, ahead, sums);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// Rows of inputs in a tile: as many as there are room for, spread evenly over the tiles.
inline int64_t tile_inputs(int64_t m, int room = TILE_INPUTS) { return ceil_div(m, ceil_div(m, room)); }

constexpr int64_t MOST_INPUTS = 528;  // rows that are multiplied with a weight before it is decoded again

// A problem in parts of at most as many rows, more of which would not stay in cache; `run(part)` may fail.
template <class Run>
int in_blocks(const Problem &p, int64_t most, int64_t columns_of_x, int64_t columns_of_y, const Run &run) {
    const int64_t size = ceil_div(ceil_div(p.m, ceil_div(p.m, most)), TILE_INPUTS) * TILE_INPUTS;
    const int64_t x_bytes = columns_of_x * (p.type == HFQ_FLOAT32 ? 4 : 2);
    const int64_t y_bytes = columns_of_y * (p.result == HFQ_FLOAT32 ? 4 : 2);
    int failed = 0;
    for (int64_t first = 0; first < p.m && !failed; first += size) {
        Problem part = p;
        part.m = p.m - first < size ? p.m - first : size;
        part.x = static_cast<const char *>(p.x) + first * x_bytes;
        part.y = static_cast<char *>(p.y) + first * y_bytes;
        if (p.row_scale) part.row_scale += first;
        if (p.kept) part.kept += first * p.kept_count;
        failed = run(part);
    }
    return failed;
}

// Where input row m lies in memory of [m, width], and how many vectors its own ones are apart: tile after tile.
struct InTile {
    int64_t offset, stride;
    InTile(int64_t m, int64_t count, int64_t width, int lanes, int room = TILE_INPUTS) {
        const int64_t size = tile_inputs(count, room), first = m / size * size, rest = count - first;
        stride = rest < size ? rest : size;
        offset = first * width + (m - first) * lanes;
    }
};

// Up to 16 results of row m of x and the rows of weights from `row` on, of the sums of their products, into y.
inline void finish(const Problem &p, int64_t m, int64_t row, int64_t count, __m512 values) {
    const __mmask16 there = count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xFFFF);
    const int64_t n = p.weight.n, at = m * n + row;
    if (p.row_scale) values = _mm512_mul_ps(values, _mm512_set1_ps(p.row_scale[m]));
    for (int64_t i = 0; i < p.kept_count; i++) {
        const __m512 by = _mm512_set1_ps(p.kept[m * p.kept_count + i]);
        values = _mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(there, p.kept_weight + i * n + row), values);
    }
    if (p.bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(there, p.bias + row));
    if (p.result == HFQ_FLOAT32) {
        _mm512_mask_storeu_ps(static_cast<float *>(p.y) + at, there, values);
    } else {
        const __m256i narrow = p.result == HFQ_BFLOAT16
                                   ? (__m256i)_mm512_cvtneps_pbh(values)
                                   : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(p.y) + at, there, narrow);
    }
}

// The same of sums in memory; those that are not there are not read.
inline void finish(const Problem &p, int64_t m, int64_t row, int64_t count, const float *sums) {
    const __mmask16 there = count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xFFFF);
    finish(p, m, row, count, _mm512_maskz_loadu_ps(there, sums));
}

// All tiles of inputs x [m, width], with LANES columns in a vector, next to each four of `rows` rows of a panel with `count`
// columns from `start` on: `run(x, inputs, first, r, ahead)` multiplies `inputs` rows from `first` on with those from `r` on.
template <int LANES, class Type, class Run>
void each_tile(const Type *x, int64_t m, int64_t width, int64_t start, int64_t count, int64_t rows, CodesAhead codes,
               const Run &run) {
    const int64_t size = tile_inputs(m), after = start + count < width ? start + count : 0;
    const auto tile_at = [&](int64_t row, int64_t column) {
        const InTile at(row, m, width, LANES);
        return x + at.offset + column * at.stride;
    };
    for (int64_t first = 0; first < m; first += size) {
        const int64_t together = m - first < size ? m - first : size;
        const Type *own = tile_at(first, start);
        InputsAhead inputs(first + size < m ? tile_at(first + size, start) : tile_at(0, after), together, count / LANES);
        for (int64_t r = 0; r < rows; r += TILE_ROWS)  // rows behind the last one are old ones, not used
            run(own, together, first, r, Ahead{inputs.next(), codes.next()});
    }
}

// y = x W^T + bias, with x [m, width] in tiles. `rows.load(thread, first, count)` gets ready to decode rows of weights,
// `rows.decode(thread, row, r, start, count, to)` decodes columns of row `r` of these, TILE_ROWS vectors apart. `step`:
// columns that are decoded at once; `width` is a multiple of it.
template <class In, class Rows>
int gemm(const Problem &p, const typename In::Type *x, int64_t width, int64_t step, const Rows &weights) {
    using Type = typename In::Type;
    const hfq_weight &w = p.weight;
    const bool few = p.m <= FEW_INPUTS && w.bits <= FEW_BITS;
    const int64_t height = few ? TILE_ROWS : PANEL_ROWS;
    const int64_t depth = (few ? FEW_BYTES : PANEL_BYTES) / int64_t(sizeof(Type)) / step * step;
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share mine(w.n, TILE_ROWS, id, omp_get_num_threads());
        Buffer<Type> panel(height * depth);
        Buffer<float> sums(p.m * PANEL_ROWS);
        const bool ready = panel.data && sums.data;
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        for (int64_t first = mine.first; ready && first < mine.last; first += height) {
            const int64_t rows = mine.last - first < height ? mine.last - first : height;
            std::memset(sums.data, 0, p.m * PANEL_ROWS * sizeof(float));
            weights.load(id, first, rows);
            for (int64_t start = 0; start < width; start += depth) {
                const int64_t count = width - start < depth ? width - start : depth;
                for (int64_t r = 0; r < rows; r++)
                    weights.decode(id, first + r, r, start, count,
                                   panel.data + r / TILE_ROWS * TILE_ROWS * depth + r % TILE_ROWS * In::LANES);
                const CodesAhead next = panel_behind(w, first, height, start, depth, width, In::LANES);
                each_tile<In::LANES>(x, p.m, width, start, count, rows, next,
                                     [&](const Type *own, int64_t inputs, int64_t m, int64_t r, Ahead ahead) {
                                         tiles<In>(inputs, own, panel.data + r * depth, count / In::LANES, ahead,
                                                   sums.data + m * PANEL_ROWS + r);
                                     });
            }
            for (int64_t m = 0; m < p.m; m++)
                for (int64_t r = 0; r < rows; r += 16)
                    finish(p, m, first + r, rows - r, sums.data + m * PANEL_ROWS + r);
        }
    }
    return failed;
}

}  // namespace
