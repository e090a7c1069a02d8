// Numbers to the nearest level of a grid: by arithmetic where levels are consecutive integers, and down a tree of
// thresholds otherwise. A source that includes it says what a vector is.
#pragma once

#include "common.h"
#include "threads.h"

#include <cmath>

namespace {

constexpr int64_t TILE = 512;            // columns rounded at once: their scales stay near
constexpr int64_t WORTHWHILE = 1 << 15;  // numbers from which on threads are faster than one
constexpr int MOST_LANES = 16;

// Thresholds as a binary tree, each level of it in one piece: the children of node i are 2 i and 2 i + 1. Those that a
// grid does not have are infinity, which no number is above.
struct Tree {
    alignas(64) float nodes[256];
    alignas(64) float levels[256] = {};
    int32_t last;  // code
    bool keeps_nan;

    Tree(const hfq_rounding &r, int bits) : last(r.count - 1), keeps_nan(r.keeps_nan) {
        nodes[0] = 0;
        for (int depth = 0; depth < bits; depth++) {
            for (int place = 0; place < 1 << depth; place++) {
                const int index = ((2 * place + 1) << (bits - 1 - depth)) - 1;
                nodes[(1 << depth) + place] = index < last ? r.thresholds[index] : INFINITY;
            }
        }
        for (int node = 1 << bits; node < 256; node++) nodes[node] = 0;  // vectors of nodes are read whole
        std::memcpy(levels, r.levels, r.count * sizeof(float));
    }
};

// A part of a row, with the parameters of each of its numbers.
struct Tile {
    const void *x;
    int64_t at;  // of its first number behind x
    int type;
    int64_t count;
    const float *scale, *zero;
    uint8_t *codes;
    float *values;
};

// Spread the parameters [groups] of a row over `count` columns from `first` on. In whole vectors, as they are read: up
// to one more is written, and what is there is divided by and thrown away.
template <class V>
inline void spread(const float *from, int64_t group, int64_t first, int64_t count, float *to) {
    V::put(to + count, V::fill(1));
    int64_t g = first / group;
    for (int64_t j = 0; j < count; g++) {
        const int64_t next = (g + 1) * group - first, stop = next < count ? next : count;
        const auto value = V::fill(from[g]);
        for (; j < stop; j += V::LANES) V::put(to + j, value);
        j = stop;
    }
}

// Call `each` for the tiles of all rows, on several threads.
template <class V, class Each>
void for_tiles(const RoundingProblem &p, const Each &each) {
    const hfq_rounding &r = p.rounding;
    const int64_t tiles = ceil_div(r.k, TILE), groups = ceil_div(r.k, r.group);
#pragma omp parallel num_threads(p.threads) if (r.n * r.k >= WORTHWHILE)
    {
        alignas(64) float scale[TILE + MOST_LANES], zero[TILE + MOST_LANES];
        const Share mine(r.n * tiles, 1, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t i = mine.first; i < mine.last; i++) {
            const int64_t row = i / tiles, first = i % tiles * TILE, start = row / r.scale_height * groups;
            const int64_t count = r.k - first < TILE ? r.k - first : TILE, to = row * r.k + first;
            spread<V>(r.scale + start, r.group, first, count, scale);
            if (r.zero) spread<V>(r.zero + start, r.group, first, count, zero);
            each(Tile{p.x, row * r.row_stride + first, p.type, count, scale, r.zero ? zero : nullptr,
                      p.codes ? p.codes + to : nullptr, p.values ? p.values + to : nullptr});
        }
    }
}

// V: vectors of V::LANES numbers, `Floats` and `Ints`, and what can be done to them.
template <class V, int BITS, int DEPTH = 0>
inline typename V::Ints search(const Tree &tree, typename V::Floats x, typename V::Ints node) {
    if constexpr (DEPTH == BITS) {
        return V::minimum(V::subtract(node, 1 << BITS), tree.last);
    } else {
        const auto threshold = V::template pick<1 << DEPTH>(tree.nodes + (1 << DEPTH), node);
        return search<V, BITS, DEPTH + 1>(tree, x, V::child(node, x, threshold));
    }
}

template <class V, int BITS>
void round_by_tree(const RoundingProblem &p) {
    const Tree tree(p.rounding, BITS);
    for_tiles<V>(p, [&](const Tile &t) {
        for (int64_t j = 0; j < t.count; j += V::LANES) {
            const auto scale = V::load(t.scale + j), x = V::divide(V::load(t.x, t.at + j, t.count - j, t.type), scale);
            const auto code = search<V, BITS>(tree, x, V::set(1));
            if (t.codes) {
                V::store(t.codes + j, t.count - j, code);
            } else {
                const auto level = V::template pick<1 << BITS>(tree.levels, code);
                V::store(t.values + j, t.count - j, V::multiply(tree.keeps_nan ? V::nan_or(x, level) : level, scale));
            }
        }
    });
}

template <class V, bool ZERO>
void round_by_arithmetic(const RoundingProblem &p) {
    const int32_t last = p.rounding.count - 1;
    const float low = ZERO ? 0.0f : p.rounding.levels[0], high = ZERO ? float(last) : p.rounding.levels[last];
    for_tiles<V>(p, [low, high](const Tile &t) {
        for (int64_t j = 0; j < t.count; j += V::LANES) {
            const auto scale = V::load(t.scale + j);
            auto x = V::round(V::divide(V::load(t.x, t.at + j, t.count - j, t.type), scale));
            if constexpr (ZERO) x = V::add(x, V::load(t.zero + j));
            x = V::limit(x, low, high);
            if (t.codes) {
                V::store(t.codes + j, t.count - j, V::integers(V::add(x, V::fill(-low))));
            } else {
                if constexpr (ZERO) x = V::subtract(x, V::load(t.zero + j));
                V::store(t.values + j, t.count - j, V::multiply(x, scale));
            }
        }
    });
}

template <class V>
void round_with(const RoundingProblem &p) {
    if (p.rounding.zero) return round_by_arithmetic<V, true>(p);
    if (!p.rounding.thresholds) return round_by_arithmetic<V, false>(p);
    if (p.rounding.count <= 4) return round_by_tree<V, 2>(p);
    if (p.rounding.count <= 8) return round_by_tree<V, 3>(p);
    if (p.rounding.count <= 16) return round_by_tree<V, 4>(p);
    if (p.rounding.count <= 32) return round_by_tree<V, 5>(p);
    if (p.rounding.count <= 64) return round_by_tree<V, 6>(p);
    if (p.rounding.count <= 128) return round_by_tree<V, 7>(p);
    round_by_tree<V, 8>(p);
}

}  // namespace
