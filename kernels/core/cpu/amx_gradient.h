// Gradients of inputs in tiles: rows of gradients, as they are, times weights whose rows are woven in pairs, as for vectors.
#pragma once

#include "amx_gemm.h"
#include "avx512_gradient.h"

namespace {

constexpr int64_t STEP_ROWS = 32;       // rows of weights, in pairs, are a step;
constexpr int64_t WIDE_COLUMNS = 256;   // columns of them that are decoded together
constexpr int64_t COLUMN_TILES = WIDE_COLUMNS / TILE_LINES;
constexpr int64_t FEW_GRADIENTS = 4;    // rows of gradients that are multiplied sooner without tiles

// Sums [16 gradients, 16 columns]: the weights are the second operand.
struct GradientTiles {
    template <int C, int W, int X>
    static void add() {
        tile_dp_bf16<C, X, W>();
    }
};

// What one thread computes: some columns of the result [m, k].
template <class Codes>
class GradientProduct {
  public:
    GradientProduct(const Problem &problem, const Tiled<false> &gradients, const Bf16Rows<Codes> &weights, int thread)
        : p(problem), w(p.weight), x(gradients), rows(weights), id(thread), panel(DEPTH * COLUMN_TILES * TILE_BYTES),
          pair(2 * WIDE_COLUMNS), sums((x.tiles < INPUT_TILES ? x.tiles : INPUT_TILES) * COLUMN_TILES * TILE_BYTES) {}

    bool ready() const { return panel.data && pair.data && sums.data; }

    // Whole chunks.
    void run(Share mine) {
        for_each_block(x.tiles, mine, WIDE_COLUMNS, [&](int64_t tile, int64_t inputs, int64_t from, int64_t columns) {
            start = from;
            count = columns;
            for (int64_t step = 0; step < x.steps; step += DEPTH) {
                weave(step);
                multiply_panel<GradientTiles>({panel.data, COLUMN_TILES * TILE_BYTES, TILE_BYTES}, count / TILE_LINES, x, tile,
                                              inputs, step, [&](int64_t parts) { return codes_behind(step, parts); },
                                              {sums.data, COLUMN_TILES * TILE_BYTES});
            }
            for (int64_t m = 0; m < inputs * TILE_LINES && tile * TILE_LINES + m < p.m; m++) write(tile * TILE_LINES + m, m);
        });
    }

  private:
    const Problem &p;
    const hfq_weight &w;
    const Tiled<false> &x;
    const Bf16Rows<Codes> &rows;
    const int id;
    const Buffer<uint8_t> panel;  // [DEPTH, COLUMN_TILES] tiles of pairs of rows, woven columns
    const Buffer<bf16> pair;      // two rows before they are woven
    const Buffer<uint8_t> sums;   // [inputs, COLUMN_TILES] tiles
    int64_t start = 0, count = 0;  // the columns that are worked on

    // Rows that are not there are 0.
    void weave(int64_t step) {
        bf16 *a = pair.data, *b = pair.data + WIDE_COLUMNS;
        const int64_t steps = x.steps - step < DEPTH ? x.steps - step : DEPTH;
        for (int64_t r = 0; r < steps * STEP_ROWS; r += 2) {
            const int64_t row = step * STEP_ROWS + r, both = w.n - row < 2 ? w.n - row : 2;
            if (both > 0) rows.load(id, row, both);
            decode(row, 0, both > 0, a);
            decode(row + 1, 1, both > 1, b);
            uint8_t *to = panel.data + r / STEP_ROWS * COLUMN_TILES * TILE_BYTES + r % STEP_ROWS / 2 * TILE_LINE;
            for (int64_t j = 0; j < count; j += 32, to += 2 * TILE_BYTES) {
                const __m512i upper = _mm512_load_si512(a + j), lower = _mm512_load_si512(b + j);
                _mm512_store_si512(to, _mm512_unpacklo_epi16(upper, lower));
                _mm512_store_si512(to + TILE_BYTES, _mm512_unpackhi_epi16(upper, lower));
            }
        }
    }

    void decode(int64_t row, int64_t r, bool there, bf16 *to) const {
        if (there)
            rows.decode(id, row, r, start, count, to, 1);
        else
            std::memset(to, 0, count * sizeof(bf16));
    }

    // The codes that are woven after those of `step`, in so many parts.
    CodesBehind codes_behind(int64_t step, int64_t parts) const {
        const bool down = step + DEPTH < x.steps;
        const int64_t row = down ? (step + DEPTH) * STEP_ROWS : 0, column = down ? start : start + count;
        const int64_t most = DEPTH * STEP_ROWS, height = w.n - row < most ? w.n - row : most, bytes = ceil_div(count * w.bits, 8);
        const char *from = reinterpret_cast<const char *>(w.codes) + row * w.row_bytes + column * w.bits / 8;
        return {from, height, w.row_bytes, bytes, ceil_div(height * ceil_div(bytes, TILE_LINE), parts)};
    }

    // Row `m` of the result, of row `r` of the sums.
    void write(int64_t m, int64_t r) const {
        static constexpr Woven<Codes> woven;
        const int64_t stop = start + count < w.k ? start + count : w.k;
        const uint8_t *from = sums.data + r / TILE_LINES * COLUMN_TILES * TILE_BYTES + r % TILE_LINES * TILE_LINE;
        bf16 *to = static_cast<bf16 *>(p.y) + m * w.k;
        for (int64_t j = start; j < stop; j += 16) {
            const int64_t chunk = (j - start) / Codes::COLUMNS * Codes::COLUMNS;
            const __m512i at = _mm512_load_si512(woven.at + (j - start - chunk));
            const __m512i tile = _mm512_slli_epi32(_mm512_srli_epi32(at, 4), 8), lane = _mm512_and_si512(at, _mm512_set1_epi32(15));
            const __m512 found = _mm512_i32gather_ps(_mm512_add_epi32(tile, lane), from + chunk / TILE_LINES * TILE_BYTES, 4);
            const __mmask16 there = stop - j < 16 ? __mmask16((1u << (stop - j)) - 1) : __mmask16(0xFFFF);
            _mm256_mask_storeu_epi16(to + j, there, (__m256i)_mm512_cvtneps_pbh(found));
        }
    }
};

template <class Codes>
int tile_gradient(const Problem &p) {
    const hfq_weight &w = p.weight;
    const Levels levels(w);
    const Bf16Rows<Codes> rows(w, levels, p.threads, 2);
    const Tiled<false> x(p.m, ceil_div(w.n, STEP_ROWS));
    const int64_t width = x.steps * STEP_ROWS;
    Buffer<bf16> padded(p.threads * TILE_LINES * width);
    if (!x.data.data || !padded.data || !rows.ready()) return -1;
    x.pack(p.threads, 2 * width, [&](int id, int64_t m, int64_t count) {
        bf16 *own = padded.data + id * TILE_LINES * width;
        for (int64_t r = 0; r < count; r++) {
            std::memcpy(own + r * width, static_cast<const bf16 *>(p.x) + (m + r) * w.n, w.n * sizeof(bf16));
            std::memset(own + r * width + w.n, 0, (width - w.n) * sizeof(bf16));
        }
        return reinterpret_cast<const uint8_t *>(own);
    });
    return in_shares(p.threads, ceil_div(w.k, Codes::COLUMNS) * Codes::COLUMNS, Codes::COLUMNS,
                     [&](int id) { return GradientProduct<Codes>(p, x, rows, id); });
}

struct GradientInTiles {
    template <class Codes>
    static int run(const Problem &p) {
        return p.m <= FEW_GRADIENTS ? GradientInVectors::run<Codes>(p) : tile_gradient<Codes>(p);
    }
};

}  // namespace
