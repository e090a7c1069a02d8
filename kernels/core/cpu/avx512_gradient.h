// Gradients of inputs: rows of gradients times the weight itself, not its transpose. Two rows of weights are woven into
// each other, so that one instruction multiplies both with a pair of numbers of the gradient, and sums of 16 columns
// stay in a vector to the end. A strip of columns of a panel of rows stays in the first-level cache while all rows of
// the gradient pass by.
#pragma once

#include "avx512_panel.h"

namespace {

constexpr int64_t GRADIENT_DEPTH = 256;    // rows of weights that are decoded together,
constexpr int64_t GRADIENT_COLUMNS = 512;  // and columns of them
constexpr int64_t MOST_GRADIENTS = 384;    // rows that are multiplied with a weight before it is decoded again
constexpr int STRIP = 4;                   // vectors of 16 columns each that are multiplied together

// The column of a chunk that a lane of a woven vector holds; two of them are made of each vector of a row.
template <class Codes>
constexpr int32_t woven_column(int vector, int lane) {
    const int word = lane / 4 * 8 + vector % 2 * 4 + lane % 4, from = vector / 2;
    return Codes::VECTORS == 4 ? 4 * word + from : word / 8 * 16 + 8 * from + word % 8;
}

// Where each column of a chunk lies among its woven ones.
template <class Codes>
struct Woven {
    alignas(64) int32_t at[Codes::COLUMNS] = {};
    constexpr Woven() {
        for (int i = 0; i < Codes::COLUMNS; i++) at[woven_column<Codes>(i / 16, i % 16)] = i;
    }
};

// sums [T, STRIP, 16] += T rows of gradients times a strip. Of both, pairs with the same rows of weights lie together:
// grad [pairs, T], w [pairs, STRIP, 16].
template <int T>
inline void gradient_tile(const uint32_t *grad, const bf16 *w, int64_t pairs, Ahead ahead, float *sums) {
    __m512 acc[T][STRIP];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < STRIP; v++) {
            acc[t][v] = _mm512_setzero_ps();
            _mm_prefetch(reinterpret_cast<const char *>(sums + (t * STRIP + v) * 16), _MM_HINT_T0);
        }
    for (int64_t i = 0; i < pairs; i++, grad += T, w += 32 * STRIP) {
        ahead.ask();
        InBf16::Vector weights[STRIP];
        for (int v = 0; v < STRIP; v++) weights[v] = InBf16::load(w + 32 * v);
        for (int t = 0; t < T; t++) {
            const InBf16::Vector by = (InBf16::Vector)_mm512_set1_epi32(int(grad[t]));
            for (int v = 0; v < STRIP; v++) acc[t][v] = InBf16::dot(acc[t][v], by, weights[v]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < STRIP; v++, sums += 16) _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), acc[t][v]));
}

inline void gradient_tiles(int64_t rows, const uint32_t *grad, const bf16 *w, int64_t pairs, Ahead ahead, float *sums) {
    switch (rows) {
#define CASE(T) \
    case T: return gradient_tile<T>(grad, w, pairs, ahead, sums);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// The rows [first, first + count) of a gradient [m, n], pair by pair; an odd one is paired with 0.
inline void pair_rows(const bf16 *grad, int64_t n, int64_t first, int64_t count, uint32_t *to) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t t = 0; t < count; t++) {
            const bf16 *from = grad + (first + t) * n + i;
            *to++ = i + 1 < n ? from[0] | uint32_t(from[1]) << 16 : from[0];
        }
}

// What one thread computes: some columns of some rows of the result [m, k].
template <class Codes>
class GradientPart {
  public:
    GradientPart(const Problem &problem, const Bf16Rows<Codes> &weights, const uint32_t *pairs, int thread)
        : p(problem), w(p.weight), rows(weights), grad(pairs), id(thread), size(tile_inputs(p.m)),
          panel(GRADIENT_DEPTH * GRADIENT_COLUMNS), one(2 * GRADIENT_COLUMNS), sums(p.m * GRADIENT_COLUMNS) {}

    bool ready() const { return panel.data && one.data && sums.data; }

    // Columns [start, start + count), whole chunks, of the rows [first, last), whole tiles.
    void run(int64_t start, int64_t count, int64_t first, int64_t last) {
        const int64_t pairs = ceil_div(w.n, 2);
        std::memset(sums.data, 0, p.m * count * sizeof(float));
        for (int64_t n = 0; n < w.n; n += GRADIENT_DEPTH) {
            const int64_t depth = w.n - n < GRADIENT_DEPTH ? w.n - n : GRADIENT_DEPTH, deep = ceil_div(depth, 2);
            weave(n, depth, start, count);
            CodesAhead codes(w, n + GRADIENT_DEPTH, GRADIENT_DEPTH, start, ceil_div(count * w.bits, 8 * deep));
            for (int64_t column = 0; column < count; column += 16 * STRIP)
                for (int64_t m = first; m < last; m += size) {
                    const int64_t together = last - m < size ? last - m : size, next = m + size < last ? m + size : first;
                    const Lines soon = {reinterpret_cast<const char *>(grad + next * pairs + n / 2 * together), 4 * together};
                    gradient_tiles(together, grad + m * pairs + n / 2 * together, panel.data + column * GRADIENT_DEPTH, deep,
                                   {soon, codes.next()}, sums.data + column * p.m + m * 16 * STRIP);
                }
        }
        for (int64_t m = first; m < last; m++) write(m, start, count);
    }

  private:
    const Problem &p;
    const hfq_weight &w;
    const Bf16Rows<Codes> &rows;
    const uint32_t *grad;
    const int id;
    const int64_t size;         // rows of a tile
    const Buffer<bf16> panel;   // [strips, pairs, STRIP, 16, 2]
    const Buffer<bf16> one;     // two rows before they are woven
    const Buffer<float> sums;   // [strips, m, STRIP, 16], woven

    void weave(int64_t first, int64_t depth, int64_t start, int64_t count) {
        bf16 *a = one.data, *b = one.data + GRADIENT_COLUMNS;
        for (int64_t r = 0; r < depth; r += 2) {
            const int64_t both = depth - r < 2 ? 1 : 2;
            rows.load(id, first + r, both);
            rows.decode(id, first + r, 0, start, count, a, 1);
            if (both == 2) rows.decode(id, first + r + 1, 1, start, count, b, 1);
            else std::memset(b, 0, count * sizeof(bf16));
            bf16 *to = panel.data + r / 2 * 32 * STRIP;
            for (int64_t j = 0; j < count; j += 32) {
                const __m512i upper = _mm512_load_si512(a + j), lower = _mm512_load_si512(b + j);
                bf16 *at = to + j / (16 * STRIP) * (16 * STRIP * GRADIENT_DEPTH) + j % (16 * STRIP) * 2;
                _mm512_store_si512(at, _mm512_unpacklo_epi16(upper, lower));
                _mm512_store_si512(at + 32, _mm512_unpackhi_epi16(upper, lower));
            }
        }
    }

    void write(int64_t m, int64_t start, int64_t count) const {
        static constexpr Woven<Codes> woven;
        const int64_t stop = start + count < w.k ? start + count : w.k;
        bf16 *to = static_cast<bf16 *>(p.y) + m * w.k;
        for (int64_t j = start; j < stop; j += 16) {
            const int64_t chunk = (j - start) / Codes::COLUMNS * Codes::COLUMNS;
            const __m512i at = _mm512_load_si512(woven.at + (j - start - chunk));
            // Strips lie behind each other, with all their rows.
            const __m512i strip = _mm512_mullo_epi32(_mm512_srli_epi32(at, 6), _mm512_set1_epi32(int((p.m - 1) * 16 * STRIP)));
            const __m512 found = _mm512_i32gather_ps(_mm512_add_epi32(at, strip), sums.data + chunk * p.m + m * 16 * STRIP, 4);
            const __mmask16 there = stop - j < 16 ? __mmask16((1u << (stop - j)) - 1) : __mmask16(0xFFFF);
            _mm256_mask_storeu_epi16(to + j, there, (__m256i)_mm512_cvtneps_pbh(found));
        }
    }
};

template <class Codes>
int gradient_of(const Problem &p) {
    static_assert(GRADIENT_COLUMNS % Codes::COLUMNS == 0 && Codes::COLUMNS % (16 * STRIP) == 0, "whole chunks and strips");
    const hfq_weight &w = p.weight;
    const Levels levels(w);
    const Bf16Rows<Codes> rows(w, levels, p.threads, 2);
    const int64_t pairs = ceil_div(w.n, 2), size = tile_inputs(p.m);
    Buffer<uint32_t> grad(p.m * pairs);
    if (!grad.data || !rows.ready()) return -1;
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num(), count = omp_get_num_threads();
        const Share paired(p.m, size, id, count);
        for (int64_t m = paired.first; m < paired.last; m += size)
            pair_rows(static_cast<const bf16 *>(p.x), w.n, m, paired.last - m < size ? paired.last - m : size, grad.data + m * pairs);
        GradientPart<Codes> part(p, rows, grad.data, id);
        const bool ready = part.ready();
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp barrier
        // Threads take columns; where there are more threads than chunks of these, several share theirs.
        const int64_t chunks = ceil_div(w.k, Codes::COLUMNS), wide = chunks < count ? chunks : count, high = count / wide;
        if (ready && id < wide * high) {
            const Share columns(chunks * Codes::COLUMNS, Codes::COLUMNS, int(id % wide), int(wide));
            const Share mine(p.m, size, int(id / wide), int(high));
            for (int64_t start = columns.first; start < columns.last; start += GRADIENT_COLUMNS) {
                const int64_t rest = columns.last - start;
                part.run(start, rest < GRADIENT_COLUMNS ? rest : GRADIENT_COLUMNS, mine.first, mine.last);
            }
        }
    }
    return failed;
}

// Gradients in bfloat16 of a weight whose lanes have one scale each; 1 for others. `How::run<Codes>(problem)` computes them.
template <class How, class Codes>
int gradient_as(const Problem &p) {
    if (!Scales<Codes>::fits(p.weight)) return 1;
    return p.m == 0 ? 0 : How::template run<Codes>(p);
}

template <class How>
int input_grad_with(const Problem &p) {
    if (p.type != HFQ_BFLOAT16) return 1;
    switch (p.weight.bits) {
        case 2: return gradient_as<How, Bytes<2>>(p);
        case 3: return gradient_as<How, Bytes<3>>(p);
        case 4: return gradient_as<How, Nibbles>(p);
        case 5: return gradient_as<How, Bytes<5>>(p);
        case 6: return gradient_as<How, Bytes<6>>(p);
        case 7: return gradient_as<How, Bytes<7>>(p);
        default: return gradient_as<How, Bytes<8>>(p);
    }
}

struct GradientInVectors {
    template <class Codes>
    static int run(const Problem &p) {
        return in_blocks(p, MOST_GRADIENTS, p.weight.n, p.weight.k, [](const Problem &part) { return gradient_of<Codes>(part); });
    }
};

}  // namespace
