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

// Scales and zero points of the last four rows that were asked for: those of the next rows are made while the current
// ones are worked on, since reading what was only just written in other portions would stall.
struct Parameters {
    static constexpr int64_t ROWS = 4;
    const RowParameters &row;
    float *memory;  // [ROWS, 2, slots]
    int64_t slots;

    float *scale(int64_t n) const { return memory + n % ROWS * 2 * slots; }
    float *zero(int64_t n) const { return scale(n) + slots; }

    // Zero points become offsets where sums are multiplied, not weights.
    void prepare(int64_t n, bool as_offsets) const { row.load(n, scale(n), zero(n), as_offsets); }
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
        Walk factors(scales, parameters.scale(n)), offsets(scales, parameters.zero(n));
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

// The same for four-bit codes and more than one row of inputs, with scaled tables: weights are rounded to bfloat16. Two
// rows of weights share what is read of the inputs; the last one of an odd number is its own partner.
template <int GROUPS, int M>
void matvec_scaled(const Problem &p, const Scales<Nibbles> &scales, const Arranged &in, Share rows,
                   const Parameters &parameters) {
    const hfq_weight &w = p.weight;
    const int64_t whole = w.row_bytes / Nibbles::BYTES;
    const auto prepare = [&](int64_t n) {
        for (int64_t r = n; r < n + 2 && r < rows.last; r++) parameters.prepare(r, false);
    };
    prepare(rows.first);
    for (int64_t n = rows.first; n < rows.last; n += 2) {
        prepare(n + 2);
        const int64_t partner = n + 1 < rows.last ? n + 1 : n;
        ScaledNibbles<GROUPS> first(scales, w.levels, parameters.scale(n), parameters.zero(n), 0);
        ScaledNibbles<GROUPS> second(scales, w.levels, parameters.scale(partner), parameters.zero(partner), 0);
        __m512 part[2][M][2];  // one chain of sums would wait for itself
#pragma GCC unroll 8
        for (int i = 0; i < 2 * M; i++) part[0][i / 2][i % 2] = part[1][i / 2][i % 2] = _mm512_setzero_ps();
        const uint8_t *from = w.codes + n * w.row_bytes;
        const int64_t apart = (partner - n) * w.row_bytes;
        const bf16 *x = in.x;
        const auto step = [&](__m512i one, __m512i two) {
            first.next_chunk();
            second.next_chunk();
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, x += 32 * M) {
                const __m512bh a = (__m512bh)first.look_up(one), b = (__m512bh)second.look_up(two);
                one = _mm512_srli_epi16(one, 4);
                two = _mm512_srli_epi16(two, 4);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    const __m512bh input = (__m512bh)_mm512_load_si512(x + 32 * m);
                    part[0][m][j & 1] = _mm512_dpbf16_ps(part[0][m][j & 1], a, input);
                    part[1][m][j & 1] = _mm512_dpbf16_ps(part[1][m][j & 1], b, input);
                }
            }
        };
        for (int64_t chunk = 0; chunk < whole; chunk++, from += Nibbles::BYTES) {
            _mm_prefetch(reinterpret_cast<const char *>(from + AHEAD), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(from + apart + AHEAD), _MM_HINT_T0);
            step(_mm512_loadu_si512(from), _mm512_loadu_si512(from + apart));
        }
        for (int64_t chunk = whole; chunk < in.chunks; chunk++, from += Nibbles::BYTES) {
            const int64_t left = w.row_bytes - chunk * Nibbles::BYTES;
            step(load_bytes(from, left), load_bytes(from + apart, left));
        }
        for (int64_t r = 0; r <= partner - n; r++) {
            __m512 total[M];
            for (int m = 0; m < M; m++) total[m] = _mm512_add_ps(part[r][m][0], part[r][m][1]);
            write_row<M>(p, n + r, total);
        }
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
    const int64_t own = Parameters::ROWS * 2 * slots;
    Buffer<float> memory(own * p.threads);
    if (!x.data || !sums.data || !memory.data || !scales.index.data) return -1;
    std::memset(memory.data, 0, own * p.threads * sizeof(float));
    for (int64_t m = 0; m < p.m; m++) {
        arrange<Codes>(static_cast<const bf16 *>(p.x) + m * w.k, w.k, x.data + 32 * m, p.m);
        if (w.zero) lane_sums<Codes>(x.data + 32 * m, chunks, sums.data + 16 * m, p.m);
    }
    const Arranged in = {x.data, sums.data, chunks};
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share rows(w.n, 1, id, omp_get_num_threads());
        const Parameters parameters = {row, memory.data + own * id, slots};
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
