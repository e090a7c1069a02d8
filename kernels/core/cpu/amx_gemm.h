// y^T = W x^T in tiles: 16 rows of weights, decoded as they come, times 16 rows of inputs, which are transposed once a
// call. Four tiles of sums are worked on together. All of a matrix is counted in steps of 64 bytes of its rows.
#pragma once

#include "amx_tiles.h"
#include "common.h"
#include "threads.h"

#include <type_traits>

#include <immintrin.h>

namespace {

constexpr int64_t WIDE_ROWS = 128;       // rows of weights that are decoded together
constexpr int64_t WIDE_TILES = WIDE_ROWS / TILE_LINES;
constexpr int64_t DEPTH = 16;            // steps of them: those of two tiles stay in the first-level cache
constexpr int64_t INPUT_TILES = 64;      // that meet a panel together: these and their sums stay in the second-level cache

// Two kinds of product: sums += a tile of weights times one of inputs.
struct Bf16Tiles {
    using Sum = float;
    template <int C, int A, int B>
    static void add() {
        tile_dp_bf16<C, A, B>();
    }
};

struct IntTiles {
    using Sum = int32_t;
    template <int C, int A, int B>
    static void add() {
        tile_dp_busd<C, A, B>();
    }
};

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

// Tiles [steps, 16, 16] of four bytes, column by column, of up to 16 rows of inputs; rows that are not there are 0.
inline void pack_inputs(const uint8_t *rows, int64_t stride, int64_t count, int64_t steps, uint8_t *to) {
    for (int64_t step = 0; step < steps; step++, to += TILE_BYTES) {
        __m512i lines[TILE_LINES];
        for (int64_t r = 0; r < TILE_LINES; r++)
            lines[r] = r < count ? _mm512_loadu_si512(rows + r * stride + step * TILE_LINE) : _mm512_setzero_si512();
        transpose(lines);
        for (int64_t r = 0; r < TILE_LINES; r++) _mm512_store_si512(to + r * TILE_LINE, lines[r]);
    }
}

// Tiles with something between them, in bytes.
template <class Byte>
struct Spaced {
    Byte *at;
    int64_t next;
};

template <int A, int B, class Use>
inline void each_sum(const Use &use) {
    use(std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
    if constexpr (B > 1) use(std::integral_constant<int, 0>(), std::integral_constant<int, 1>());
    if constexpr (A > 1) use(std::integral_constant<int, 1>(), std::integral_constant<int, 0>());
    if constexpr (A > 1 && B > 1) use(std::integral_constant<int, 1>(), std::integral_constant<int, 1>());
}

// sums [B, A] (+)= A tiles of rows times B tiles of inputs over `steps`; `fresh`: there are no sums yet.
template <class Kind, int A, int B>
inline void multiply_tiles(Spaced<const uint8_t> weights, Spaced<const uint8_t> x, int64_t steps, Spaced<uint8_t> sums,
                           bool fresh) {
    const auto sum_of = [&](int a, int b) { return sums.at + a * TILE_BYTES + b * sums.next; };
    each_sum<A, B>([&](auto a, auto b) {
        if (fresh)
            tile_zero<2 * a + b>();
        else
            tile_load<2 * a + b>(sum_of(a, b), TILE_LINE);
    });
    for (int64_t step = 0; step < steps; step++, weights.at += TILE_BYTES, x.at += TILE_BYTES) {
        tile_load<6>(x.at, TILE_LINE);
        tile_load<4>(weights.at, TILE_LINE);
        Kind::template add<0, 4, 6>();
        if constexpr (B > 1) {
            tile_load<7>(x.at + x.next, TILE_LINE);
            Kind::template add<1, 4, 7>();
        }
        if constexpr (A > 1) {
            tile_load<5>(weights.at + weights.next, TILE_LINE);
            Kind::template add<2, 5, 6>();
        }
        if constexpr (A > 1 && B > 1) Kind::template add<3, 5, 7>();
    }
    each_sum<A, B>([&](auto a, auto b) { tile_store<2 * a + b>(sum_of(a, b), TILE_LINE); });
}

// What a thread works in: a panel of weights [WIDE_TILES, DEPTH], sums [inputs, WIDE_TILES], both of tiles.
struct Workspace {
    const Buffer<uint8_t> panel, sums;

    explicit Workspace(int64_t inputs)
        : panel(WIDE_TILES * DEPTH * TILE_BYTES),
          sums((inputs < INPUT_TILES ? inputs : INPUT_TILES) * WIDE_TILES * TILE_BYTES) {}

    bool ready() const { return panel.data && sums.data; }
    uint8_t *line(int64_t r) const {
        return panel.data + r / TILE_LINES * DEPTH * TILE_BYTES + r % TILE_LINES * TILE_LINE;
    }
    uint8_t *sum(int64_t input, int64_t row) const { return sums.data + (input * WIDE_TILES + row) * TILE_BYTES; }
};

// The panel, `rows` tiles of it, times `inputs` tiles of inputs, which are `steps` apart, over `count` steps.
template <class Kind>
void multiply_panel(const Workspace &space, int64_t rows, const uint8_t *x, int64_t inputs, int64_t steps, int64_t count,
                    bool fresh) {
    for (int64_t a = 0; a < rows; a += 2)
        for (int64_t b = 0; b < inputs; b += 2) {
            const Spaced<const uint8_t> weights{space.line(a * TILE_LINES), DEPTH * TILE_BYTES};
            const Spaced<const uint8_t> columns{x + b * steps * TILE_BYTES, steps * TILE_BYTES};
            const Spaced<uint8_t> sums{space.sum(b, a), WIDE_TILES * TILE_BYTES};
            const bool more_rows = a + 1 < rows, more_inputs = b + 1 < inputs;
            const auto run = more_rows ? more_inputs ? multiply_tiles<Kind, 2, 2> : multiply_tiles<Kind, 2, 1>
                                       : more_inputs ? multiply_tiles<Kind, 1, 2> : multiply_tiles<Kind, 1, 1>;
            run(weights, columns, count, sums, fresh);
        }
}

// Sums of a tile of inputs become lines [16, WIDE_ROWS], each of one row of inputs.
template <class Sum>
void gather_sums(const Workspace &space, int64_t input, int64_t rows, Sum *to) {
    for (int64_t a = 0; a < rows; a++) {
        __m512i lines[TILE_LINES];
        for (int r = 0; r < TILE_LINES; r++) lines[r] = _mm512_load_si512(space.sum(input, a) + r * TILE_LINE);
        transpose(lines);
        for (int m = 0; m < TILE_LINES; m++) _mm512_store_si512(to + m * WIDE_ROWS + a * TILE_LINES, lines[m]);
    }
}

// y = x W^T + bias with inputs [tiles, steps] from `pack_inputs`. `make(thread)` gives a worker:
//   Kind                          of its products
//   load(first, rows)             get ready for rows of weights
//   decode(r, step, steps, to)    write steps of the row r of these, TILE_BYTES apart
//   write(m, first, rows, sums)   results of a row of inputs
template <class Make>
int tile_gemm(const Problem &p, const uint8_t *x, int64_t steps, const Make &make) {
    using Worker = decltype(make(0));
    const int64_t tiles = ceil_div(p.m, TILE_LINES);
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share mine(p.weight.n, TILE_LINES, id, omp_get_num_threads());
        const Workspace space(tiles);
        Worker worker = make(id);
        const bool ready = space.ready() && worker.ready();
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        const TileSession session;
        alignas(64) typename Worker::Kind::Sum lines[TILE_LINES * WIDE_ROWS];
        for (int64_t b = 0; ready && b < tiles; b += INPUT_TILES) {
            const int64_t inputs = tiles - b < INPUT_TILES ? tiles - b : INPUT_TILES;
            for (int64_t first = mine.first; first < mine.last; first += WIDE_ROWS) {
                const int64_t rows = mine.last - first < WIDE_ROWS ? mine.last - first : WIDE_ROWS;
                const int64_t row_tiles = ceil_div(rows, TILE_LINES);
                worker.load(first, rows);
                for (int64_t step = 0; step < steps; step += DEPTH) {
                    const int64_t count = steps - step < DEPTH ? steps - step : DEPTH;
                    // Lines of the last tile that are no rows hold anything: they have sums of their own, not used.
                    for (int64_t r = 0; r < rows; r++) worker.decode(r, step, count, space.line(r));
                    multiply_panel<typename Worker::Kind>(space, row_tiles, x + (b * steps + step) * TILE_BYTES, inputs, steps, count,
                                           step == 0);
                }
                for (int64_t i = 0; i < inputs; i++) {
                    gather_sums(space, i, row_tiles, lines);
                    const int64_t m = (b + i) * TILE_LINES, rest = p.m - m < TILE_LINES ? p.m - m : TILE_LINES;
                    for (int64_t j = 0; j < rest; j++) worker.write(m + j, first, rows, lines + j * WIDE_ROWS);
                }
            }
        }
    }
    return failed;
}

}  // namespace
