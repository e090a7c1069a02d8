// Few rows of inputs: each row of weights is decoded once, in registers, and multiplied with all of them. What is read
// from memory is the codes, once, in the order in which they lie there.
#pragma once

#include "avx512_decode.h"
#include "avx512_rows.h"
#include "threads.h"

namespace {

constexpr int MATVEC_ROWS = 4;      // most rows of inputs: more are worth a buffer of decoded weights
constexpr int64_t AHEAD = 4096;     // bytes that codes are asked for before they are needed

// Inputs as the kernels want them: what belongs to a chunk lies together, so that one pointer walks through all rows.
struct Arranged {
    const bf16 *x;      // [chunks, VECTORS, m, 32]
    const float *sums;  // [chunks, m, 16], with zero points
    int64_t chunks;
};

// Scales and zero points of two rows: those of the next row are made while the current one is worked on, since reading
// what was only just written in other portions would stall.
struct Parameters {
    const RowParameters &row;
    float *scale[2], *zero[2];

    // Zero points become offsets where sums are multiplied, not weights.
    void prepare(int64_t n, bool as_offsets) const { row.load(n, scale[n & 1], zero[n & 1], as_offsets); }
};

template <int M>
inline void write_row(const Problem &p, int64_t n, const __m512 *total) {
    for (int m = 0; m < M; m++) {
        const float sum = finished(p, m, n, _mm512_reduce_add_ps(total[m]));
        static_cast<bf16 *>(p.y)[m * p.weight.n + n] = to_bf16(sum);
    }
}

template <class Codes, Spread HOW, bool ZERO, int M>
void matvec_rows(const Problem &p, const Codes &codes, const Scales<Codes> &scales, const Arranged &in, Share rows,
                 const Parameters &parameters) {
    using Walk = typename Scales<Codes>::template Walk<HOW>;
    const hfq_weight &w = p.weight;
    // Chunks whose load of 64 bytes stays inside the row.
    const int64_t whole = w.row_bytes < 64 ? 0 : (w.row_bytes - 64) / Codes::BYTES + 1;
    if (rows.first < rows.last) parameters.prepare(rows.first, true);
    for (int64_t n = rows.first; n < rows.last; n++) {
        if (n + 1 < rows.last) parameters.prepare(n + 1, true);
        Walk factors(scales, parameters.scale[n & 1]), offsets(scales, parameters.zero[n & 1]);
        __m512 total[M];
        for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
        const uint8_t *from = w.codes + n * w.row_bytes;
        const bf16 *x = in.x;
        const float *sums = in.sums;
        const auto step = [&](__m512i packed) {
            __m512i weights[Codes::VECTORS];
            codes.decode(packed, weights);
            const __m512 factor = factors.next();
            const __m512 offset = ZERO ? offsets.next() : _mm512_setzero_ps();
            for (int m = 0; m < M; m++) {
                __m512 sum = _mm512_setzero_ps();
                for (int j = 0; j < Codes::VECTORS; j++)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)weights[j], (__m512bh)_mm512_load_si512(x + 32 * (j * M + m)));
                total[m] = _mm512_fmadd_ps(sum, factor, total[m]);
                if (ZERO) total[m] = _mm512_fmadd_ps(offset, _mm512_load_ps(sums + 16 * m), total[m]);
            }
            x += Codes::COLUMNS * M;
            sums += 16 * M;
        };
        for (int64_t chunk = 0; chunk < whole; chunk++, from += Codes::BYTES) {
            _mm_prefetch(reinterpret_cast<const char *>(from + AHEAD), _MM_HINT_T0);
            step(_mm512_loadu_si512(from));
        }
        for (int64_t chunk = whole; chunk < in.chunks; chunk++, from += Codes::BYTES)
            step(load_bytes(from, w.row_bytes - chunk * Codes::BYTES));
        write_row<M>(p, n, total);
    }
}

// The same for four-bit codes and more than one row of inputs, with scaled tables: weights are rounded to bfloat16.
template <int GROUPS, int M>
void matvec_scaled(const Problem &p, const Scales<Nibbles> &scales, const Arranged &in, Share rows,
                   const Parameters &parameters) {
    const hfq_weight &w = p.weight;
    const int64_t whole = w.row_bytes / Nibbles::BYTES;
    if (rows.first < rows.last) parameters.prepare(rows.first, false);
    for (int64_t n = rows.first; n < rows.last; n++) {
        if (n + 1 < rows.last) parameters.prepare(n + 1, false);
        ScaledNibbles<GROUPS> nibbles(scales, w.levels, parameters.scale[n & 1], parameters.zero[n & 1], 0);
        __m512 part[M][4];  // one chain of sums would wait for itself
        for (int m = 0; m < M; m++)
            for (int j = 0; j < 4; j++) part[m][j] = _mm512_setzero_ps();
        const uint8_t *from = w.codes + n * w.row_bytes;
        const bf16 *x = in.x;
        const auto step = [&](__m512i packed) {
            __m512i weights[4];
            nibbles.decode(packed, weights);
            for (int j = 0; j < 4; j++, x += 32 * M)
                for (int m = 0; m < M; m++)
                    part[m][j] = _mm512_dpbf16_ps(part[m][j], (__m512bh)weights[j], (__m512bh)_mm512_load_si512(x + 32 * m));
        };
        for (int64_t chunk = 0; chunk < whole; chunk++, from += Nibbles::BYTES) {
            _mm_prefetch(reinterpret_cast<const char *>(from + AHEAD), _MM_HINT_T0);
            step(_mm512_loadu_si512(from));
        }
        for (int64_t chunk = whole; chunk < in.chunks; chunk++, from += Nibbles::BYTES)
            step(load_bytes(from, w.row_bytes - chunk * Nibbles::BYTES));
        __m512 total[M];
        for (int m = 0; m < M; m++)
            total[m] = _mm512_add_ps(_mm512_add_ps(part[m][0], part[m][1]), _mm512_add_ps(part[m][2], part[m][3]));
        write_row<M>(p, n, total);
    }
}

template <class Codes, Spread HOW, bool ZERO>
void matvec_any(const Problem &p, const Codes &codes, const Scales<Codes> &scales, const Arranged &in, Share rows,
                const Parameters &parameters) {
    if constexpr (Codes::VECTORS == 4) {
        switch (p.m > 1 ? 10 * scaled_groups(scales) + p.m : 0) {
#define CASE(GROUPS, M) \
    case 10 * GROUPS + M: return matvec_scaled<GROUPS, M>(p, scales, in, rows, parameters);
            CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(2, 2) CASE(2, 3) CASE(2, 4) CASE(4, 2) CASE(4, 3) CASE(4, 4)
#undef CASE
        }
    }
    switch (p.m) {
#define CASE(M) \
    case M: return matvec_rows<Codes, HOW, ZERO, M>(p, codes, scales, in, rows, parameters);
        CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
    }
}

template <class Codes>
int matvec(const Problem &p, const Codes &codes) {
    const hfq_weight &w = p.weight;
    const Scales<Codes> scales(w);
    const int64_t chunks = scales.chunks, width = chunks * Codes::COLUMNS;
    Buffer<bf16> x(p.m * width);
    Buffer<float> sums(w.zero ? p.m * chunks * 16 : 0);
    const int64_t slots = RowParameters::slots(w);
    const RowParameters row(w);
    Buffer<float> memory(4 * slots * p.threads);
    if (!x.data || !sums.data || !memory.data || !scales.index.data) return -1;
    std::memset(memory.data, 0, 4 * slots * p.threads * sizeof(float));
    for (int64_t m = 0; m < p.m; m++) {
        arrange<Codes>(static_cast<const bf16 *>(p.x) + m * w.k, w.k, x.data + 32 * m, p.m);
        if (w.zero) lane_sums<Codes>(x.data + 32 * m, chunks, sums.data + 16 * m, p.m);
    }
    const Arranged in = {x.data, sums.data, chunks};
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share rows(w.n, 1, id, omp_get_num_threads());
        float *own = memory.data + 4 * slots * id;
        const Parameters parameters = {row, {own, own + slots}, {own + 2 * slots, own + 3 * slots}};
        const bool z = w.zero != nullptr;
#define RUN(HOW)                                                                       \
    (z ? matvec_any<Codes, HOW, true>(p, codes, scales, in, rows, parameters)         \
       : matvec_any<Codes, HOW, false>(p, codes, scales, in, rows, parameters))
        if (scales.how == Spread::ONE) RUN(Spread::ONE);
        if (scales.how == Spread::FEW) RUN(Spread::FEW);
        if (scales.how == Spread::ANY) RUN(Spread::ANY);
#undef RUN
    }
    return 0;
}

}  // namespace
