// From stored codes to vectors of weights, for AVX-512 with VBMI and BF16.
//
// The order of columns inside a vector is the one that is cheapest to make, and inputs are brought into the same order
// once a call. A "chunk" is the run of columns that one load of codes covers; a "lane" is one of the 16 floats of a
// vector, which holds two bfloat16 numbers. All columns of a lane are near each other, so that they share a scale.
#pragma once

#include "common.h"

#include <immintrin.h>

namespace {

// Levels as bfloat16, one table of whole numbers and two of their low and high bytes.
struct Levels {
    alignas(64) bf16 words[64];
    alignas(64) uint8_t low[256], high[256];

    explicit Levels(const hfq_weight &w) {
        for (int code = 0; code < 256; code++) {
            const bf16 level = to_bf16(w.levels[code & ((1 << w.bits) - 1)]);
            if (code < 64) words[code] = level;
            low[code] = uint8_t(level);
            high[code] = uint8_t(level >> 8);
        }
    }
};

// The first `bytes` bytes at `from`, up to 64; the others are 0.
inline __m512i load_bytes(const uint8_t *from, int64_t bytes) {
    if (bytes >= 64) return _mm512_loadu_si512(from);
    return bytes <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), from);
}

// Four-bit codes: a shift and a 16-bit lookup for 32 columns. Word i of vector j holds column 4 i + j of the chunk.
struct Nibbles {
    static constexpr int COLUMNS = 128, BYTES = 64, VECTORS = 4, LANE = 8, LANES_TOGETHER = 1;
    __m512i table;

    explicit Nibbles(const Levels &levels) : table(_mm512_load_si512(levels.words)) {}

    void decode(__m512i codes, __m512i *to) const {
        to[0] = _mm512_permutexvar_epi16(codes, table);  // looks at the low five bits; the table repeats itself
        to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    }
};

// 64 codes of BITS bits, one a byte, from the first 8 * BITS bytes.
template <int BITS>
inline __m512i spread(__m512i packed) {
    if (BITS == 8) return packed;
    struct Tables {
        alignas(64) uint8_t byte[64] = {}, shift[64] = {};
        constexpr Tables() {
            for (int i = 0; i < 64; i++) {
                byte[i] = uint8_t((i / 8 * BITS + i % 8) & 63);  // eight codes are BITS bytes: a 64-bit part for each
                shift[i] = uint8_t(i % 8 * BITS);
            }
        }
    };
    static constexpr Tables tables;  // a table that is made at run time would be asked for each time whether it is made
    const __m512i parts = _mm512_permutexvar_epi8(_mm512_load_si512(tables.byte), packed);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift), parts);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << BITS) - 1));
}

// A table of 2^BITS bytes, looked up for 64 codes.
template <int BITS>
struct ByteTable {
    __m512i part[BITS == 8 ? 4 : BITS == 7 ? 2 : 1];

    explicit ByteTable(const uint8_t *from) {
        for (size_t i = 0; i < sizeof(part) / 64; i++) part[i] = _mm512_load_si512(from + 64 * i);
    }

    __m512i operator()(__m512i codes) const {
        if constexpr (BITS < 7) {
            return _mm512_permutexvar_epi8(codes, part[0]);
        } else if constexpr (BITS == 7) {
            return _mm512_permutex2var_epi8(part[0], codes, part[1]);
        } else {
            const __m512i lower = _mm512_permutex2var_epi8(part[0], codes, part[1]);
            const __m512i upper = _mm512_permutex2var_epi8(part[2], codes, part[3]);
            return _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(codes), upper);
        }
    }
};

// Codes of any other width. In 128-bit part q, the first vector holds columns 16 q to 16 q + 7 of the chunk and the second
// one the eight columns behind them. Up to six bits, a lookup of words needs no more than the code in the lowest bits of
// each: of 16 columns, those of the first vector are brought into the lower bytes of the words, the others into the upper
// ones. The two bytes of levels of wider codes are looked up apart and interleaved.
template <int BITS, bool WORDS = BITS <= 6>
struct Bytes {
    static constexpr int COLUMNS = 64, BYTES = 8 * BITS, VECTORS = 2, LANE = 16, LANES_TOGETHER = 4;
    ByteTable<BITS> low, high;

    explicit Bytes(const Levels &levels) : low(levels.low), high(levels.high) {}

    void decode(__m512i packed, __m512i *to) const {
        const __m512i codes = spread<BITS>(packed);
        const __m512i l = low(codes), h = high(codes);
        to[0] = _mm512_unpacklo_epi8(l, h);
        to[1] = _mm512_unpackhi_epi8(l, h);
    }
};

template <int BITS>
struct Bytes<BITS, true> {
    static constexpr int COLUMNS = 64, BYTES = 8 * BITS, VECTORS = 2, LANE = 16, LANES_TOGETHER = 4;
    __m512i first, second;  // the same levels over and over, so that bits above a code do not matter

    explicit Bytes(const Levels &levels)
        : first(_mm512_load_si512(levels.words)), second(_mm512_load_si512(levels.words + 32)) {}
    Bytes(__m512i one, __m512i two) : first(one), second(two) {}

    void decode(__m512i packed, __m512i *to) const {
        struct Tables {
            alignas(64) uint8_t byte[64] = {}, shift[64] = {};
            constexpr Tables() {
                // In each 64-bit part, four columns in the lower half of its bits and the eighth ones behind them in the
                // upper half; both begin within a byte.
                for (int i = 0; i < 64; i++) {
                    const int lower = (i / 16 * 16 + i % 16 / 8 * 4) * BITS, upper = lower + 8 * BITS;
                    byte[i] = uint8_t((i % 8 < 4 ? lower / 8 + i % 4 : upper / 8 + i % 4) & 63);
                    const int skip = i % 8 / 2 * BITS;
                    shift[i] = uint8_t(i % 2 ? 32 + upper % 8 + skip : lower % 8 + skip);
                }
            }
        };
        static constexpr Tables tables;
        const __m512i parts = _mm512_permutexvar_epi8(_mm512_load_si512(tables.byte), packed);
        const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift), parts);
        to[0] = look_up(codes);
        to[1] = look_up(_mm512_srli_epi16(codes, 8));
    }

  private:
    __m512i look_up(__m512i codes) const {
        return BITS == 6 ? _mm512_permutex2var_epi16(first, codes, second) : _mm512_permutexvar_epi16(codes, first);
    }
};

// How the scales of a row are spread over the lanes of a chunk.
enum class Spread { ONE, FEW, ANY };

template <class Codes>
struct Scales {
    Spread how;
    int64_t chunks, groups, per_chunk, chunks_per_group;
    __m512i pick;
    Buffer<int32_t> index;  // of the group of each lane, for Spread::ANY

    explicit Scales(const hfq_weight &w)
        : how(spread_of(w)), chunks(ceil_div(w.k, Codes::COLUMNS)), groups(ceil_div(w.k, w.group)),
          index(how == Spread::ANY ? chunks * 16 : 0) {
        const int64_t group = w.group < w.k ? w.group : chunks * Codes::COLUMNS;
        per_chunk = Codes::COLUMNS / group;
        chunks_per_group = group / Codes::COLUMNS;
        alignas(64) int32_t lanes[16];
        for (int lane = 0; lane < 16; lane++)
            lanes[lane] = int32_t(lane / Codes::LANES_TOGETHER * Codes::LANE / (group < Codes::COLUMNS ? group : Codes::COLUMNS));
        pick = _mm512_load_si512(lanes);
        for (int64_t i = 0; how == Spread::ANY && index.data && i < chunks * 16; i++) {
            const int64_t found = (i / 16 * Codes::COLUMNS + i % 16 / Codes::LANES_TOGETHER * Codes::LANE) / group;
            index.data[i] = int32_t(found < groups ? found : groups - 1);
        }
    }

    static Spread spread_of(const hfq_weight &w) {
        if (w.group >= w.k || w.group % Codes::COLUMNS == 0) return Spread::ONE;
        return Codes::COLUMNS % w.group == 0 ? Spread::FEW : Spread::ANY;
    }

    // Whether all columns of a lane have the same scale.
    static bool fits(const hfq_weight &w) { return w.group >= w.k || w.group % Codes::LANE == 0; }

    // Steps through the chunks of a row; each step gives the values of the lanes.
    template <Spread HOW>
    struct Walk {
        const float *values;
        const int32_t *index;
        int64_t step, left;  // of values from chunk to chunk, or chunks with one value and how many of them are left
        __m512 held;
        __m512i pick;

        Walk(const Scales &s, const float *row, int64_t chunk = 0)
            : values(row), index(HOW == Spread::ANY ? s.index.data + 16 * chunk : nullptr), step(s.chunks_per_group), left(0),
              held(_mm512_setzero_ps()), pick(s.pick) {
            if constexpr (HOW == Spread::FEW) {
                step = s.per_chunk;
                values += chunk * step;
            }
            if constexpr (HOW == Spread::ONE) {
                values += chunk / step;
                if (chunk % step == 0) return;
                held = _mm512_set1_ps(*values++);
                left = step - chunk % step;
            }
        }

        __m512 next() {
            if constexpr (HOW == Spread::ONE) {
                if (left == 0) {
                    held = _mm512_set1_ps(*values++);
                    left = step;
                }
                left--;
                return held;
            } else if constexpr (HOW == Spread::FEW) {
                const __m512 few = _mm512_permutexvar_ps(pick, _mm512_loadu_ps(values));
                values += step;
                return few;
            } else {
                const __m512i at = _mm512_load_si512(index);
                index += 16;
                return _mm512_i32gather_ps(at, values, 4);
            }
        }
    };
};

// Four-bit codes whose chunk has GROUPS scales, 1, 2 or 4: the tables of levels are scaled, not the weights, so that
// (level - zero) * scale, rounded to bfloat16, costs no more than a lookup. Without ZERO points these are not read.
template <int GROUPS, bool ZERO>
class NibbleTables {
  public:
    explicit NibbleTables(const float *all_levels) : levels(_mm512_loadu_ps(all_levels)) {
        alignas(64) uint16_t which[32];  // 16 times the scale of a word: the tables lie behind each other
        for (int word = 0; word < 32; word++) which[word] = uint16_t(word * GROUPS / 32 * 16);
        offset = _mm512_load_si512(which);
    }

    // Those of one chunk, from its scales and zero points.
    struct Made {
        __m512i first, second;
    };

    Made make(const float *scale, const float *zero) const {
        const __m512i first = pair(scale, zero, 0, GROUPS > 1);
        return {first, GROUPS == 4 ? pair(scale, zero, 2, 3) : first};
    }

    // Weights of the lowest four bits of each word.
    __m512i look_up(__m512i codes, Made made) const {
        if (GROUPS == 1) return _mm512_permutexvar_epi16(codes, made.first);
        const __m512i at = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), offset, 0xEA);  // (a & b) | c
        if (GROUPS == 2) return _mm512_permutexvar_epi16(at, made.first);
        return _mm512_permutex2var_epi16(made.first, at, made.second);
    }

  private:
    __m512 levels;
    __m512i offset;

    __m512 table(const float *scale, const float *zero, int group) const {
        const __m512 by = _mm512_set1_ps(scale[group]);
        return _mm512_mul_ps(ZERO ? _mm512_sub_ps(levels, _mm512_set1_ps(zero[group])) : levels, by);
    }

    __m512i pair(const float *scale, const float *zero, int low, int high) const {
        const __m512 a = table(scale, zero, low), b = low == high ? a : table(scale, zero, high);
        return (__m512i)_mm512_cvtne2ps_pbh(b, a);
    }
};

// One row of such codes, chunk by chunk.
template <int GROUPS>
class ScaledNibbles {
  public:
    ScaledNibbles(const Scales<Nibbles> &scales, const float *all_levels, const float *row_scale, const float *row_zero,
                  int64_t chunk)
        : tables(all_levels), scale(row_scale), zero(row_zero) {
        step = GROUPS == 1 ? scales.chunks_per_group : 1;
        left = step - chunk % step;
        skip(chunk / step * GROUPS);
        make();
    }

    // To be called before each chunk.
    void next_chunk() {
        if (left == 0) {
            make();
            left = step;
        }
        left--;
    }

    void decode(__m512i packed, __m512i *to) {
        next_chunk();
        to[0] = look_up(packed);
        to[1] = look_up(_mm512_srli_epi16(packed, 4));
        to[2] = look_up(_mm512_srli_epi16(packed, 8));
        to[3] = look_up(_mm512_srli_epi16(packed, 12));
    }

    // Weights of the lowest four bits of each word.
    __m512i look_up(__m512i codes) const { return tables.look_up(codes, made); }

  private:
    using Tables = NibbleTables<GROUPS, true>;
    const Tables tables;
    const float *scale, *zero;
    typename Tables::Made made;
    int64_t step, left;  // chunks with the same tables, and how many of them are left

    void skip(int64_t groups) {
        scale += groups;
        zero += groups;
    }

    // The tables of the next groups.
    void make() {
        made = tables.make(scale, zero);
        skip(GROUPS);
    }
};

// How many scales a chunk has, if that is one of the numbers that `ScaledNibbles` is made for; otherwise 0.
template <class Codes>
int scaled_groups(const Scales<Codes> &scales) {
    if (Codes::VECTORS != 4) return 0;
    if (scales.how == Spread::ONE) return 1;
    return scales.how == Spread::FEW && (scales.per_chunk == 2 || scales.per_chunk == 4) ? int(scales.per_chunk) : 0;
}

// Bring a row of inputs [k] into the order of the codes: vectors of 32, `stride` vectors apart, zeros behind its end.
template <class Codes>
inline void arrange(const bf16 *from, int64_t k, bf16 *to, int64_t stride) {
    alignas(64) bf16 plain[Codes::COLUMNS];
    const int64_t next = 32 * stride;
    for (int64_t start = 0; start < k; start += Codes::COLUMNS, from += Codes::COLUMNS, to += Codes::VECTORS * next) {
        const bf16 *chunk = from;
        if (k - start < Codes::COLUMNS) {
            std::memset(plain, 0, sizeof plain);
            std::memcpy(plain, from, (k - start) * sizeof(bf16));
            chunk = plain;
        }
        const __m512i a = _mm512_loadu_si512(chunk), b = _mm512_loadu_si512(chunk + 32);
        if constexpr (Codes::VECTORS == 2) {
            const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
            _mm512_store_si512(to, _mm512_permutex2var_epi64(a, even, b));
            _mm512_store_si512(to + next, _mm512_permutex2var_epi64(a, _mm512_add_epi64(even, _mm512_set1_epi64(2)), b));
        } else {
            const __m512i c = _mm512_loadu_si512(chunk + 64), d = _mm512_loadu_si512(chunk + 96);
            const __m512i fours = _mm512_set_epi16(124, 120, 116, 112, 108, 104, 100, 96, 92, 88, 84, 80, 76, 72, 68, 64,
                                                   60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
            for (int j = 0; j < 4; j++) {  // every fourth word of 64, then of the next 64
                const __m512i at = _mm512_add_epi16(fours, _mm512_set1_epi16(short(j)));
                const __m512i left = _mm512_permutex2var_epi16(a, at, b), right = _mm512_permutex2var_epi16(c, at, d);
                _mm512_store_si512(to + j * next, _mm512_inserti64x4(left, _mm512_castsi512_si256(right), 1));
            }
        }
    }
}

// Sums over the columns of each lane of arranged inputs, 16 a chunk, as far apart: what zero points are multiplied with.
template <class Codes>
inline void lane_sums(const bf16 *arranged, int64_t chunks, float *to, int64_t stride) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    for (int64_t chunk = 0; chunk < chunks; chunk++, to += 16 * stride) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < Codes::VECTORS; j++, arranged += 32 * stride)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_si512(arranged), ones);
        _mm512_store_ps(to, sum);
    }
}

}  // namespace
