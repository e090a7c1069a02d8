// Inputs in tiles, transposed: what rows of weights are multiplied with.
#pragma once

#include "amx_tiles.h"
#include "common.h"
#include "threads.h"

#include <immintrin.h>

namespace {

constexpr int64_t DEPTH = 16;  // steps, of 64 bytes of each row, that lie together

// Sixteen lines of sixteen numbers of four bytes.
inline void transpose(__m512i *lines) {
    __m512i pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // in part q of fours[i + j]: column 4 q + j of lines i to i + 3
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xDD);
        const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xDD);
        lines[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        lines[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        lines[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
        lines[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
}

// Tiles [blocks of DEPTH steps, tiles of 16 rows, DEPTH], each column by column if TURNED; rows that are not there are 0.
template <bool TURNED>
struct Tiled {
    const int64_t m, tiles, steps;
    const Buffer<uint8_t> data;

    Tiled(int64_t rows, int64_t count)
        : m(rows), tiles(ceil_div(rows, TILE_LINES)), steps(count),
          data(ceil_div(steps, DEPTH) * tiles * DEPTH * TILE_BYTES) {}

    uint8_t *at(int64_t tile, int64_t step) const {
        return data.data + ((step / DEPTH * tiles + tile) * DEPTH + step % DEPTH) * TILE_BYTES;
    }

    // All of them, of a matrix [m, steps, 64 bytes]: `rows(thread, m, count)` gives its first of up to 16 rows, which are
    // `stride` bytes apart.
    template <class Rows>
    void pack(int threads, int64_t stride, const Rows &rows) const {
#pragma omp parallel num_threads(threads)
        {
            const int id = omp_get_thread_num();
            const Share mine(tiles, 1, id, omp_get_num_threads());
            for (int64_t tile = mine.first; tile < mine.last; tile++) {
                const int64_t first = tile * TILE_LINES, count = m - first < TILE_LINES ? m - first : TILE_LINES;
                pack_tile(tile, rows(id, first, count), stride, count);
            }
        }
    }

  private:
    void pack_tile(int64_t tile, const uint8_t *rows, int64_t stride, int64_t count) const {
        for (int64_t step = 0; step < steps; step++) {
            __m512i lines[TILE_LINES];
            for (int64_t r = 0; r < TILE_LINES; r++)
                lines[r] = r < count ? _mm512_loadu_si512(rows + r * stride + step * TILE_LINE) : _mm512_setzero_si512();
            if (TURNED) transpose(lines);
            for (int64_t r = 0; r < TILE_LINES; r++) _mm512_store_si512(at(tile, step) + r * TILE_LINE, lines[r]);
        }
    }
};

using InputTiles = Tiled<true>;

}  // namespace
