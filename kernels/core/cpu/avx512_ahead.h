// Memory that is read later, asked for line by line while something else is computed: the inputs of many rows lie in the
// third-level cache or behind it, the codes of a weight in memory.
#pragma once

#include "common.h"

#include <immintrin.h>

namespace {

struct Lines {
    const char *at;
    int64_t step;  // bytes; 0 for nothing more

    void ask() {
        _mm_prefetch(at, _MM_HINT_T1);
        at += step;
    }
};

// What a tile asks for, in each of its steps.
struct Ahead {
    Lines inputs, codes;

    void ask() {
        inputs.ask();
        codes.ask();
    }
};

struct Nothing {
    void ask() const {}
};

// The next tile of inputs, in as many parts as it has rows; a part has a line for each of the `vectors` steps of a tile.
class InputsAhead {
  public:
    InputsAhead(const void *from, int64_t rows, int64_t vectors)
        : at(static_cast<const char *>(from)), left(rows), part(vectors * 64) {}

    Lines next() {
        if (left == 0) return {at, 0};
        left--;
        at += part;
        return {at - part, 64};
    }

  private:
    const char *at;
    int64_t left;
    const int64_t part;
};

// The codes of the next panel of a weight, a row after the other.
class CodesAhead {
  public:
    // `rows` rows from `row` on, if there are so many, from a column on; `step`: bytes of each for a step of a tile.
    CodesAhead(const hfq_weight &w, int64_t row, int64_t rows, int64_t column, int64_t step)
        : row_bytes(w.row_bytes), step(step), at(reinterpret_cast<const char *>(w.codes)),
          left(w.n - row < rows ? w.n - row : rows) {
        if (left > 0) at += row * row_bytes + column * w.bits / 8;
    }

    Lines next() {
        if (left <= 0) return {at, 0};
        left--;
        at += row_bytes;
        return {at - row_bytes, step};
    }

  private:
    const int64_t row_bytes, step;
    const char *at;
    int64_t left;
};

// The same for a panel behind that of `depth` columns from `start` on, of `height` rows from `row` on: its next columns,
// or the first ones of the next rows. A step of a tile has `lanes` of `width` columns.
inline CodesAhead panel_behind(const hfq_weight &w, int64_t row, int64_t height, int64_t start, int64_t depth, int64_t width,
                               int64_t lanes) {
    const bool down = start + depth >= width;
    return {w, down ? row + height : row, height, down ? 0 : start + depth, lanes * w.bits / 8};
}

}  // namespace
