// Rows of weights as numbers in memory, scaled: what `gemm` multiplies.
#pragma once

#include "avx512_decode.h"
#include "avx512_gemm.h"
#include "avx512_rows.h"

namespace {

// Scales and zero points of a panel of rows, for each thread.
struct PanelScales {
    const hfq_weight &w;
    const RowParameters row;
    const int64_t slots;
    const int64_t most;          // rows of a panel
    const Buffer<float> values;  // [threads, most, 2, slots]

    PanelScales(const hfq_weight &weight, int threads, int64_t rows = PANEL_ROWS)
        : w(weight), row(w), slots(RowParameters::slots(w)), most(rows), values(threads * most * 2 * slots) {
        if (values.data) std::memset(values.data, 0, threads * most * 2 * slots * sizeof(float));
    }
    float *scale(int thread, int64_t r) const { return values.data + (thread * most + r) * 2 * slots; }
    float *zero(int thread, int64_t r) const { return scale(thread, r) + slots; }
    void load(int thread, int64_t first, int64_t count) const {
        for (int64_t r = 0; r < count; r++) row.load(first + r, scale(thread, r), zero(thread, r));
    }
};

// bfloat16 weights in the order of `Codes`: (level - zero) * scale, rounded once. Vectors of a row are `apart` vectors apart.
template <class Codes>
struct Bf16Rows : PanelScales {
    const Codes codes;
    const Scales<Codes> scales;

    Bf16Rows(const hfq_weight &weight, const Levels &levels, int threads, int64_t rows = PANEL_ROWS)
        : PanelScales(weight, threads, rows), codes(levels), scales(weight) {}

    bool ready() const { return values.data && scales.index.data; }

    void decode(int thread, int64_t row, int64_t r, int64_t start, int64_t count, bf16 *to, int64_t apart = TILE_ROWS) const {
        const float *s = scale(thread, r), *z = zero(thread, r);
        if constexpr (Codes::VECTORS == 4) {
            switch (scaled_groups(scales)) {
                case 1: return lookup<1>(s, z, row, start, count, to, apart);
                case 2: return lookup<2>(s, z, row, start, count, to, apart);
                case 4: return lookup<4>(s, z, row, start, count, to, apart);
            }
        }
        if (scales.how == Spread::ONE) return multiply<Spread::ONE>(s, z, row, start, count, to, apart);
        if (scales.how == Spread::FEW) return multiply<Spread::FEW>(s, z, row, start, count, to, apart);
        return multiply<Spread::ANY>(s, z, row, start, count, to, apart);
    }

  private:
    __m512i chunk_of(int64_t row, int64_t chunk) const {
        const int64_t at = chunk * Codes::BYTES;
        const uint8_t *from = w.codes + row * w.row_bytes + at;
        _mm_prefetch(reinterpret_cast<const char *>(from + 4 * w.row_bytes), _MM_HINT_T0);  // rows come one by one
        return load_bytes(from, w.row_bytes - at);
    }

    template <Spread HOW>
    void multiply(const float *s, const float *z, int64_t row, int64_t start, int64_t count, bf16 *to, int64_t apart) const {
        using Walk = typename Scales<Codes>::template Walk<HOW>;
        const int64_t first = start / Codes::COLUMNS, last = (start + count) / Codes::COLUMNS;
        Walk factors(scales, s, first), offsets(scales, z, first);
        for (int64_t chunk = first; chunk < last; chunk++) {
            const __m512 factor = factors.next(), offset = offsets.next();
            __m512i levels[Codes::VECTORS];
            codes.decode(chunk_of(row, chunk), levels);
            for (int j = 0; j < Codes::VECTORS; j++, to += 32 * apart)
                _mm512_store_si512(to, scaled(levels[j], factor, offset));
        }
    }

    // Even and odd words apart, as float32, and together again.
    static __m512i scaled(__m512i levels, __m512 scale, __m512 zero) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(levels, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(levels, _mm512_set1_epi32(int(0xFFFF0000))));
        const __m512 low = _mm512_mul_ps(_mm512_sub_ps(even, zero), scale);
        const __m512 high = _mm512_mul_ps(_mm512_sub_ps(odd, zero), scale);
        const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low half: the even ones
        const __m512i weave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(weave, packed);
    }

    template <int GROUPS>
    void lookup(const float *s, const float *z, int64_t row, int64_t start, int64_t count, bf16 *to, int64_t apart) const {
        const int64_t first = start / Codes::COLUMNS, last = (start + count) / Codes::COLUMNS;
        ScaledNibbles<GROUPS> nibbles(scales, w.levels, s, z, first);
        for (int64_t chunk = first; chunk < last; chunk++) {
            __m512i values[4];
            nibbles.decode(chunk_of(row, chunk), values);
            for (int j = 0; j < 4; j++, to += 32 * apart) _mm512_store_si512(to, values[j]);
        }
    }
};

// float32 weights in the order of the matrix.
template <int BITS>
struct FloatRows : PanelScales {
    FloatRows(const hfq_weight &weight, int threads) : PanelScales(weight, threads) {}

    bool ready() const { return values.data; }

    // `start` and `count` are multiples of 64.
    void decode(int thread, int64_t row, int64_t r, int64_t start, int64_t count, float *to) const {
        const uint8_t *codes = w.codes + row * w.row_bytes;
        alignas(64) float plain[64];
        for (int64_t j = start; j < start + count; j += 64) {
            const int64_t at = j * BITS / 8, bytes = w.row_bytes - at;
            const __m512i spread_out = spread<BITS>(load_bytes(codes + at, bytes));
            _mm512_store_ps(plain, level(_mm512_castsi512_si128(spread_out)));
            _mm512_store_ps(plain + 16, level(_mm512_extracti32x4_epi32(spread_out, 1)));
            _mm512_store_ps(plain + 32, level(_mm512_extracti32x4_epi32(spread_out, 2)));
            _mm512_store_ps(plain + 48, level(_mm512_extracti32x4_epi32(spread_out, 3)));
            const int64_t last = j + 64 < w.k ? j + 64 : w.k;
            scale_levels(w, scale(thread, r), zero(thread, r), j, last, plain);
            for (int i = 0; i < 4; i++, to += 16 * TILE_ROWS) _mm512_store_ps(to, _mm512_load_ps(plain + 16 * i));
        }
    }

  private:
    __m512 level(__m128i bytes) const {
        const __m512i codes = _mm512_cvtepu8_epi32(bytes);
        if constexpr (BITS <= 4) return _mm512_permutexvar_ps(codes, _mm512_loadu_ps(w.levels));
        return _mm512_i32gather_ps(codes, w.levels, 4);
    }
};

}  // namespace
