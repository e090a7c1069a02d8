// How codes become lines of tiles, a chunk of a row at a time. Each kind of decoder has
//   Codes                                 as they are stored
//   first(chunk)                          the first scale of a chunk
//   decode(codes, scale, zero, to, next)  VECTORS lines, `next` bytes apart; `scale` and `zero` from the first one on
#pragma once

#include "amx_tiles.h"
#include "avx512_panel.h"

namespace {

// Levels as they are: scales are those of whole rows, which sums are multiplied with.
template <class AnyCodes>
struct PlainTiles {
    using Codes = AnyCodes;
    static constexpr bool SCALED = false;
    const Codes codes;

    PlainTiles(const hfq_weight &, const Levels &levels, const Scales<Codes> &) : codes(levels) {}

    static bool fits(const hfq_weight &w, const Scales<Codes> &) { return w.group >= w.k && !w.zero; }

    int64_t first(int64_t) const { return 0; }
    void decode(__m512i packed, const float *, const float *, uint8_t *to, int64_t next) const {
        __m512i values[Codes::VECTORS];
        codes.decode(packed, values);
        for (int j = 0; j < Codes::VECTORS; j++) _mm512_store_si512(to + j * next, values[j]);
    }
};

// Four-bit codes of chunks with GROUPS scales each.
template <int GROUPS, bool ZERO>
class NibbleTiles {
  public:
    using Codes = Nibbles;
    static constexpr bool SCALED = true;

    NibbleTiles(const hfq_weight &w, const Levels &, const Scales<Codes> &scales)
        : tables(w.levels), chunks(scales.chunks_per_group) {}

    static bool fits(const hfq_weight &w, const Scales<Codes> &scales) {
        return scaled_groups(scales) == GROUPS && (w.zero != nullptr) == ZERO;
    }

    int64_t first(int64_t chunk) const { return GROUPS > 1 ? chunk * GROUPS : chunk / chunks; }
    void decode(__m512i packed, const float *scale, const float *zero, uint8_t *to, int64_t next) const {
        const auto made = tables.make(scale, zero);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, to += next) {
            _mm512_store_si512(to, tables.look_up(packed, made));
            packed = _mm512_srli_epi16(packed, 4);
        }
    }

  private:
    const NibbleTables<GROUPS, ZERO> tables;
    const int64_t chunks;  // of a group
};

// Other codes of up to six bits whose chunks have one scale each, in the same way.
template <int BITS>
class WordTiles {
  public:
    using Codes = Bytes<BITS>;
    static constexpr bool SCALED = true;

    WordTiles(const hfq_weight &w, const Levels &, const Scales<Codes> &scales) : chunks(scales.chunks_per_group) {
        for (int code = 0; code < MOST; code++) levels[code] = w.levels[code & ((1 << BITS) - 1)];
    }

    static bool fits(const hfq_weight &, const Scales<Codes> &scales) { return scales.how == Spread::ONE; }

    int64_t first(int64_t chunk) const { return chunk / chunks; }
    void decode(__m512i packed, const float *scale, const float *zero, uint8_t *to, int64_t next) const {
        const __m512 by = _mm512_set1_ps(*scale), less = _mm512_set1_ps(zero ? *zero : 0.0f);
        __m512i words[2];
        for (int i = 0; i < 2; i++) {
            const float *from = levels + i * (MOST / 2);
            const __m512 low = table(from, by, less), high = BITS > 4 ? table(from + 16, by, less) : low;
            words[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            if (BITS < 6) break;
        }
        __m512i values[2];
        Codes(words[0], words[BITS == 6]).decode(packed, values);
        _mm512_store_si512(to, values[0]);
        _mm512_store_si512(to + next, values[1]);
    }

  private:
    static constexpr int MOST = 64;  // of levels, over and over
    alignas(64) float levels[MOST];
    const int64_t chunks;  // of a group

    static __m512 table(const float *from, __m512 by, __m512 less) {
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(from), less), by);
    }
};

}  // namespace
