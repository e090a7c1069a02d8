// y^T = W x^T in tiles: 16 rows of weights, decoded as they come, times 16 rows of inputs, which are transposed once a
// call. Four tiles of sums are worked on together. All of a matrix is counted in steps of 64 bytes of its rows.
#pragma once

#include "amx_inputs.h"

#include <type_traits>

namespace {

constexpr int64_t TOGETHER = 2;          // tiles of rows, and of inputs, that are multiplied with each other
constexpr int64_t WIDE_ROWS = 256;       // rows of weights that are decoded together, where there are many inputs:
constexpr int64_t WIDE_TILES = WIDE_ROWS / TILE_LINES;  // DEPTH steps of them, and all sums, stay in the second-level cache
constexpr int64_t INPUT_TILES = 64;      // of those that meet them together

// Of few inputs all sums stay in registers, and decoded weights in the first-level cache:
constexpr int64_t UNIT = 4;              // steps that are decoded together
constexpr int64_t UNIT_LINE = UNIT * TILE_LINE, UNIT_BYTES = TILE_LINES * UNIT_LINE;

// Rows of weights that are worked on together, for inputs of so many tiles.
inline int64_t rows_together(int64_t inputs) { return (inputs > TOGETHER ? WIDE_TILES : TOGETHER) * TILE_LINES; }

// Where lines of tiles go.
struct TileLines {
    uint8_t *at;
    int64_t row, next;  // bytes from one row to the next, and from a line of a row to the next
};

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

// Registers: sums B a + b, weights 4 and 5, inputs 6 + b.
template <int N, class Use>
inline void each(const Use &use) {
    if constexpr (N > 1) each<N - 1>(use);
    use(std::integral_constant<int, N - 1>());
}

template <int A, int B>
inline void zero_sums() {
    each<A>([](auto a) { each<B>([&](auto b) { tile_zero<B * a + b>(); }); });
}

// Sums [B, A] in memory; those of two tiles of inputs are `next` bytes apart.
template <int A, int B>
inline void load_sums(const uint8_t *from, int64_t next) {
    each<A>([&](auto a) { each<B>([&](auto b) { tile_load<B * a + b>(from + a * TILE_BYTES + b * next, TILE_LINE); }); });
}

template <int A, int B>
inline void store_sums(uint8_t *to, int64_t next) {
    each<A>([&](auto a) { each<B>([&](auto b) { tile_store<B * a + b>(to + a * TILE_BYTES + b * next, TILE_LINE); }); });
}

// The codes of some rows, asked for a few lines at a time while others are multiplied: all at once, they would keep the
// core waiting.
struct CodesBehind {
    const char *row;
    int64_t rows, row_bytes, bytes;  // `bytes` of each of them
    int64_t lines;                   // at a time
    int64_t at = 0;

    void ask() {
        for (int64_t i = 0; i < lines && rows > 0; i++) {
            _mm_prefetch(row + at, _MM_HINT_T1);
            at += TILE_LINE;
            if (at < bytes) continue;
            at = 0;
            row += row_bytes;
            rows--;
        }
    }
};

// Decoded weights, and bytes from a tile to that of the next step, and to that of the next rows.
struct Panel {
    const uint8_t *at;
    int64_t step, next;
};

// The sums += A tiles of rows times B tiles of inputs over `steps`. The inputs stay in the first-level cache, and `ahead` is
// asked for: `lines` of the next ones in each step.
template <class Kind, int A, int B>
inline void multiply_block(Panel w, const uint8_t *x, int64_t steps, const char *ahead, int64_t lines, CodesBehind &codes) {
    for (int64_t step = 0; step < steps; step++, w.at += w.step, x += TILE_BYTES) {
        for (int64_t i = 0; i < lines; i++, ahead += TILE_LINE) _mm_prefetch(ahead, _MM_HINT_T1);
        codes.ask();
        tile_load<6>(x, TILE_LINE);
        tile_stream<4>(w.at, TILE_LINE);
        Kind::template add<0, 4, 6>();
        if constexpr (B > 1) {
            tile_load<7>(x + DEPTH * TILE_BYTES, TILE_LINE);
            Kind::template add<1, 4, 7>();
        }
        if constexpr (A > 1) {
            tile_stream<5>(w.at + w.next, TILE_LINE);
            Kind::template add<B, 5, 6>();
        }
        if constexpr (A > 1 && B > 1) Kind::template add<3, 5, 7>();
    }
}

template <int N>
using Count = std::integral_constant<int, N>;

// Calls `use` with how many tiles of rows and of inputs are multiplied with each other, as types.
template <class Use>
inline void with_counts(int64_t rows, int64_t inputs, const Use &use) {
    if (rows > 1)
        inputs > 1 ? use(Count<2>(), Count<2>()) : use(Count<2>(), Count<1>());
    else
        inputs > 1 ? use(Count<1>(), Count<2>()) : use(Count<1>(), Count<1>());
}

// Sums in memory, and bytes from those of a tile of inputs to those of the next one.
struct Sums {
    uint8_t *at;
    int64_t next;
};

// A panel, `rows` tiles of it, times `inputs` tiles of inputs from `tile` on, of both DEPTH steps from `step` on; sums [inputs,
// rows] start at 0 with the first ones. `behind(parts)`: the codes that are asked for meanwhile, in so many parts.
template <class Kind, class Inputs, class Behind>
void multiply_panel(Panel w, int64_t rows, const Inputs &x, int64_t tile, int64_t inputs, int64_t step, const Behind &behind,
                    Sums sums) {
    const int64_t steps = x.steps - step < DEPTH ? x.steps - step : DEPTH;
    const int64_t parts = ceil_div(rows, TOGETHER), lines = ceil_div(TOGETHER * TILE_LINES, parts);
    CodesBehind codes = behind(parts * ceil_div(inputs, TOGETHER) * steps);
    for (int64_t b = 0; b < inputs; b += TOGETHER) {
        const char *next = reinterpret_cast<const char *>(x.at(tile + b + TOGETHER, step));
        for (int64_t a = 0; a < rows; a += TOGETHER, next += lines * steps * TILE_LINE)
            with_counts(rows - a, inputs - b, [&](auto A, auto B) {
                uint8_t *sum = sums.at + b * sums.next + a * TILE_BYTES;
                if (step == 0)
                    zero_sums<A, B>();
                else
                    load_sums<A, B>(sum, sums.next);
                multiply_block<Kind, A, B>({w.at + a * w.next, w.step, w.next}, x.at(tile + b, step), steps, next, lines, codes);
                store_sums<A, B>(sum, sums.next);
            });
    }
}

// Calls `use(tile, inputs, first, count)` for up to INPUT_TILES tiles of inputs at a time, and for up to `height` of what a
// thread's share is of: with as many of both as there are.
template <class Use>
void for_each_block(int64_t tiles, Share mine, int64_t height, const Use &use) {
    const TileSession session;
    for (int64_t tile = 0; tile < tiles; tile += INPUT_TILES) {
        const int64_t inputs = tiles - tile < INPUT_TILES ? tiles - tile : INPUT_TILES;
        for (int64_t first = mine.first; first < mine.last; first += height)
            use(tile, inputs, first, mine.last - first < height ? mine.last - first : height);
    }
}

// What one thread computes: the results of some rows of weights, which its worker knows:
//   Kind                                        of its products
//   ready()                                     whether there was memory for it
//   STEP_BYTES                                  of codes in a row
//   load(first, rows)                           get ready for rows of weights
//   decode(r, count, step, steps, ahead, to)    up to 16 rows, from row r of these on; and ask for the codes `ahead` bytes
//                                               behind theirs, if that is not 0
//   write(m, sums)                              results of a row of inputs for these rows
template <class Worker>
class TileProduct {
  public:
    using Kind = typename Worker::Kind;
    using Sum = typename Kind::Sum;

    template <class Make>
    TileProduct(const Problem &problem, const InputTiles &inputs, const Make &make, int thread)
        : p(problem), x(inputs), worker(make(thread)), few(x.tiles <= TOGETHER), height(rows_together(x.tiles)),
          panel(few ? 2 * height * UNIT_LINE : WIDE_TILES * DEPTH * TILE_BYTES),
          sums((x.tiles < INPUT_TILES ? x.tiles : INPUT_TILES) * height * TILE_LINE) {}

    bool ready() const { return panel.data && sums.data && worker.ready(); }

    void run(Share mine) {
        for_each_block(x.tiles, mine, height, [&](int64_t tile, int64_t inputs, int64_t from, int64_t count) {
            first = from;
            rows = count;
            worker.load(first, rows);
            if (few)
                with_counts(row_tiles(), inputs, [&](auto a, auto b) { this->template multiply_few<a, b>(); });
            else
                for (int64_t step = 0; step < x.steps; step += DEPTH) multiply_many(tile, inputs, step);
            for (int64_t i = 0; i < inputs; i++) write(tile, i);
        });
    }

  private:
    const Problem &p;
    const InputTiles &x;
    Worker worker;
    const bool few;
    const int64_t height;
    const Buffer<uint8_t> panel;  // [WIDE_TILES, DEPTH] tiles, or [2, height, UNIT] lines
    const Buffer<uint8_t> sums;   // [inputs, height / 16] tiles
    int64_t first = 0, rows = 0;  // of the weights that are worked on, up to `height`

    // Steps before which the codes of few rows are asked for: whole units, of a line of codes at least.
    static constexpr int64_t AHEAD = (TILE_LINE + UNIT * Worker::STEP_BYTES - 1) / (UNIT * Worker::STEP_BYTES) * UNIT;

    int64_t row_tiles() const { return ceil_div(rows, TILE_LINES); }

    uint8_t *sum(int64_t input, int64_t row) const { return sums.data + input * height * TILE_LINE + row * TILE_BYTES; }

    // Bytes from codes to those `steps` later, or where rows end before them, to those of the next rows.
    int64_t ahead(int64_t step, int64_t steps) const {
        return steps * Worker::STEP_BYTES + (step + steps < x.steps ? 0 : (height - 1) * p.weight.row_bytes);
    }

    // The codes that are decoded after those of `step`, in so many parts.
    CodesBehind codes_behind(int64_t step, int64_t parts) const {
        const bool along = step + DEPTH < x.steps;
        const int64_t row = first + (along ? 0 : height), bytes = DEPTH * Worker::STEP_BYTES;
        const int64_t count = p.weight.n - row < height ? p.weight.n - row : height;
        const char *from = reinterpret_cast<const char *>(p.weight.codes) + row * p.weight.row_bytes;
        return {from + (along ? (step + DEPTH) * Worker::STEP_BYTES : 0), count, p.weight.row_bytes, bytes,
                ceil_div(count * ceil_div(bytes, TILE_LINE), parts)};
    }

    // Lines of a tile that are no rows hold anything: they have sums of their own, which are not used.
    void decode(int64_t r, int64_t step, int64_t most, int64_t later, TileLines to) const {
        const int64_t steps = x.steps - step < most ? x.steps - step : most, count = rows - r < TILE_LINES ? rows - r : TILE_LINES;
        if (steps > 0) worker.decode(r, count, step, steps, later, to);
    }

    // All steps. A unit is multiplied after the next one is decoded: what was only just written would be waited for.
    template <int A, int B>
    void multiply_few() {
        zero_sums<A, B>();
        for (int64_t step = 0; step < x.steps + UNIT; step += UNIT) {
            const int64_t before = step - UNIT;
            uint8_t *to = panel.data + step / UNIT % 2 * height * UNIT_LINE;
            for (int64_t r = 0; r < A * TILE_LINES; r += TILE_LINES)
                decode(r, step, UNIT, ahead(step, AHEAD), {to + r * UNIT_LINE, UNIT_LINE, TILE_LINE});
            const uint8_t *from = panel.data + before / UNIT % 2 * height * UNIT_LINE;
            for (int64_t i = 0; before >= 0 && i < UNIT && before + i < x.steps; i++) {
                each<B>([&](auto b) { tile_load<6 + b>(x.at(b, before + i), TILE_LINE); });
                each<A>([&](auto a) {
                    tile_load<4 + a % 2>(from + a * UNIT_BYTES + i * TILE_LINE, UNIT_LINE);
                    each<B>([&](auto b) { Kind::template add<B * a + b, 4 + a % 2, 6 + b>(); });
                });
            }
        }
        store_sums<A, B>(sum(0, 0), height * TILE_LINE);
    }

    // DEPTH steps.
    void multiply_many(int64_t tile, int64_t inputs, int64_t step) {
        for (int64_t r = 0; r < rows; r += TILE_LINES)
            decode(r, step, DEPTH, 0, {panel.data + r * DEPTH * TILE_LINE, TILE_LINE, TILE_BYTES});
        const Panel decoded = {panel.data, TILE_BYTES, DEPTH * TILE_BYTES};
        multiply_panel<Kind>(decoded, row_tiles(), x, tile, inputs, step, [&](int64_t parts) { return codes_behind(step, parts); },
                             {sums.data, height * TILE_LINE});
    }

    // Results of a tile of inputs.
    void write(int64_t tile, int64_t input) {
        alignas(64) Sum lines[TILE_LINES * WIDE_ROWS];
        for (int64_t a = 0; a < row_tiles(); a++) {
            __m512i turned[TILE_LINES];
            for (int r = 0; r < TILE_LINES; r++) turned[r] = _mm512_load_si512(sum(input, a) + r * TILE_LINE);
            transpose(turned);
            for (int m = 0; m < TILE_LINES; m++) _mm512_store_si512(lines + m * WIDE_ROWS + a * TILE_LINES, turned[m]);
        }
        const int64_t row = (tile + input) * TILE_LINES;
        for (int64_t m = 0; m < TILE_LINES && row + m < p.m; m++) worker.write(row + m, lines + m * WIDE_ROWS);
    }
};

// Every thread does its share of `count` things, in whole steps, with what `make(thread)` gives it. Returns -1 if memory ran out.
template <class Make>
int in_shares(int threads, int64_t count, int64_t step, const Make &make) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int id = omp_get_thread_num();
        auto product = make(id);
        if (product.ready()) {
            product.run(Share(count, step, id, omp_get_num_threads()));
        } else {
#pragma omp atomic write
            failed = -1;
        }
    }
    return failed;
}

// y = x W^T + bias. `make(thread)` gives a worker of `TileProduct`.
template <class Make>
int tile_gemm(const Problem &p, const InputTiles &x, const Make &make) {
    using Product = TileProduct<decltype(make(0))>;
    return in_shares(p.threads, p.weight.n, TILE_LINES, [&](int id) { return Product(p, x, make, id); });
}

}  // namespace
