// Few rows of inputs: each row of weights is decoded once, in registers, and multiplied with all of them. What is read
// from memory is the codes, once, in the order in which they lie there.
#pragma once

#include "avx512_decode.h"
#include "avx512_rows.h"
#include "threads.h"

namespace {

constexpr int MATVEC_ROWS = 4;      // most rows of inputs: more are worth a buffer of decoded weights
constexpr int64_t NEAR = 20 << 10;  // numbers of inputs that stay in the first-level cache
constexpr int64_t AHEAD = 2048;     // bytes that codes are asked for before they are needed

// Inputs as the kernels want them: what belongs to a chunk lies together, so that one pointer walks through all rows.
struct Arranged {
    const bf16 *x;      // [chunks, VECTORS, m, 32]
    const float *sums;  // [chunks, m, 16], with zero points
    int64_t chunks;
};

// A thread works on two rows at a time, which share what is read of the inputs: one of the first half of its rows and one
// of the second, so that it reads two parts of memory from their beginnings to their ends. Of an odd number of rows the
// last one of the first half has no partner but itself.
struct Pairs {
    const int64_t half, end, last;

    explicit Pairs(Share rows) : half((rows.last - rows.first + 1) / 2), end(rows.first + half), last(rows.last) {}
    int64_t partner(int64_t n) const { return n + half < last ? n + half : n; }
};

// Scales and zero points of the last two pairs that were asked for: those of the next pair are made while the current one
// is worked on, since reading what was only just written in other portions would stall.
struct Parameters {
    static constexpr int64_t ROWS = 4;
    const RowParameters &row;
    float *memory;  // [2, 2, 2, slots]
    int64_t slots;

    float *scale(int64_t n, int which) const { return memory + (n % 2 * 2 + which) * 2 * slots; }
    float *zero(int64_t n, int which) const { return scale(n, which) + slots; }

    // Zero points become offsets where sums are multiplied, not weights.
    void prepare(const Pairs &pairs, int64_t n, bool as_offsets) const {
        if (n >= pairs.end) return;
        row.load(n, scale(n, 0), zero(n, 0), as_offsets);
        row.load(pairs.partner(n), scale(n, 1), zero(n, 1), as_offsets);
    }
};

template <int M>
inline void write_row(const Problem &p, int64_t n, const __m512 *total) {
    for (int m = 0; m < M; m++) {
        const float sum = finished(p, m, n, _mm512_reduce_add_ps(total[m]));
        static_cast<bf16 *>(p.y)[m * p.weight.n + n] = to_bf16(sum);
    }
}

// Two rows of weights share what is read of the inputs; the last one of an odd number is its own partner.
template <class Codes, Spread HOW, bool ZERO, int M>
void matvec_rows(const Problem &p, const Codes &codes, const Scales<Codes> &scales, const Arranged &in, Share rows,
                 const Parameters &parameters) {
    using Walk = typename Scales<Codes>::template Walk<HOW>;
    const hfq_weight &w = p.weight;
    // Chunks whose load of 64 bytes stays inside the row.
    const int64_t whole = w.row_bytes < 64 ? 0 : (w.row_bytes - 64) / Codes::BYTES + 1;
    const Pairs pairs(rows);
    parameters.prepare(pairs, rows.first, true);
    for (int64_t n = rows.first; n < pairs.end; n++) {
        parameters.prepare(pairs, n + 1, true);
        const int64_t partner = pairs.partner(n);
        Walk factors[2] = {Walk(scales, parameters.scale(n, 0)), Walk(scales, parameters.scale(n, 1))};
        Walk offsets[2] = {Walk(scales, parameters.zero(n, 0)), Walk(scales, parameters.zero(n, 1))};
        __m512 total[2][M];
        for (int m = 0; m < M; m++) total[0][m] = total[1][m] = _mm512_setzero_ps();
        const uint8_t *from = w.codes + n * w.row_bytes;
        const int64_t apart = (partner - n) * w.row_bytes;
        const bf16 *x = in.x;
        const float *sums = in.sums;
        const auto step = [&](__m512i one, __m512i two) {
            __m512i weights[2][Codes::VECTORS];
            codes.decode(one, weights[0]);
            codes.decode(two, weights[1]);
            __m512 factor[2], offset[2];
            for (int r = 0; r < 2; r++) {
                factor[r] = factors[r].next();
                if (ZERO) offset[r] = offsets[r].next();
            }
            for (int m = 0; m < M; m++) {
                __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (int j = 0; j < Codes::VECTORS; j++) {
                    const __m512bh input = (__m512bh)_mm512_load_si512(x + 32 * (j * M + m));
                    for (int r = 0; r < 2; r++) sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)weights[r][j], input);
                }
                for (int r = 0; r < 2; r++) total[r][m] = _mm512_fmadd_ps(sum[r], factor[r], total[r][m]);
                if (!ZERO) continue;
                const __m512 lanes = _mm512_load_ps(sums + 16 * m);
                for (int r = 0; r < 2; r++) total[r][m] = _mm512_fmadd_ps(offset[r], lanes, total[r][m]);
            }
            x += Codes::COLUMNS * M;
            sums += 16 * M;
        };
#pragma GCC unroll 4
        for (int64_t chunk = 0; chunk < whole; chunk++, from += Codes::BYTES) {
            _mm_prefetch(reinterpret_cast<const char *>(from + AHEAD), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(from + apart + AHEAD), _MM_HINT_T0);
            step(_mm512_loadu_si512(from), _mm512_loadu_si512(from + apart));
        }
        for (int64_t chunk = whole; chunk < in.chunks; chunk++, from += Codes::BYTES) {
            const int64_t left = w.row_bytes - chunk * Codes::BYTES;
            step(load_bytes(from, left), load_bytes(from + apart, left));
        }
        write_row<M>(p, n, total[0]);
        write_row<M>(p, partner, total[1]);
    }
}

// The same for four-bit codes and more than one row of inputs, with scaled tables: weights are rounded to bfloat16. That
// costs less than to take zero points back from every sum, and waits less for inputs that lie in the second-level cache.
template <int GROUPS, int M>
void matvec_scaled(const Problem &p, const Scales<Nibbles> &scales, const Arranged &in, Share rows,
                   const Parameters &parameters) {
    const hfq_weight &w = p.weight;
    const int64_t whole = w.row_bytes / Nibbles::BYTES;
    const Pairs pairs(rows);
    parameters.prepare(pairs, rows.first, false);
    for (int64_t n = rows.first; n < pairs.end; n++) {
        parameters.prepare(pairs, n + 1, false);
        const int64_t partner = pairs.partner(n);
        ScaledNibbles<GROUPS> first(scales, w.levels, parameters.scale(n, 0), parameters.zero(n, 0), 0);
        ScaledNibbles<GROUPS> second(scales, w.levels, parameters.scale(n, 1), parameters.zero(n, 1), 0);
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
        for (int r = 0; r < 2; r++) {
            __m512 total[M];
            for (int m = 0; m < M; m++) total[m] = _mm512_add_ps(part[r][m][0], part[r][m][1]);
            write_row<M>(p, r ? partner : n, total);
        }
    }
}

template <class Codes, Spread HOW, bool ZERO>
void matvec_any(const Problem &p, const Codes &codes, const Scales<Codes> &scales, const Arranged &in, Share rows,
                const Parameters &parameters) {
    if constexpr (Codes::VECTORS == 4) {
        switch (p.m > 1 && (ZERO || p.m * p.weight.k > NEAR) ? 10 * scaled_groups(scales) + p.m : 0) {
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
