// Scales and zero points of a row, and inputs, as float32. Short groups have half as many scales as there are vectors of
// weights, so this is hot. Whole vectors are written, up to 31 numbers behind the last one: masked stores cannot be
// read again at once.
#pragma once

#include "avx512_decode.h"

#include <immintrin.h>

namespace {

// Up to 16 inputs from element `at` on as float32, zeros behind them.
inline __m512 load_floats(const void *from, int64_t at, int64_t count, int type) {
    const __mmask16 there = count >= 16 ? __mmask16(0xFFFF) : __mmask16(count > 0 ? (1u << count) - 1 : 0);
    if (type == HFQ_FLOAT32) return _mm512_maskz_loadu_ps(there, static_cast<const float *>(from) + at);
    const __m256i narrow = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t *>(from) + at);
    if (type == HFQ_FLOAT16) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// Scales that are bytes: four tables, one for each byte of a float32 level, looked up for 64 codes at a time.
struct ScaleLevels {
    ByteTable<8> byte[4];

    explicit ScaleLevels(const hfq_weight &w) : ScaleLevels(Split(w)) {}

    void decode(__m512i codes, __m512 *to) const {
        // What the interleaving below puts into 16 numbers that follow each other lies 16 apart before it.
        struct Order {
            alignas(64) uint8_t at[64] = {};
            constexpr Order() {
                for (int q = 0; q < 4; q++)
                    for (int j = 0; j < 4; j++)
                        for (int i = 0; i < 4; i++) at[16 * q + 4 * j + i] = uint8_t(16 * j + 4 * q + i);
            }
        };
        static constexpr Order order;
        codes = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), codes);
        const __m512i b0 = byte[0](codes), b1 = byte[1](codes), b2 = byte[2](codes), b3 = byte[3](codes);
        const __m512i low = _mm512_unpacklo_epi8(b0, b1), high = _mm512_unpacklo_epi8(b2, b3);
        to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
        to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
        const __m512i low2 = _mm512_unpackhi_epi8(b0, b1), high2 = _mm512_unpackhi_epi8(b2, b3);
        to[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low2, high2));
        to[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low2, high2));
    }

  private:
    struct Split {
        alignas(64) uint8_t bytes[4][256];
        explicit Split(const hfq_weight &w) {
            std::memset(bytes, 0, sizeof bytes);
            for (int code = 0; w.scale_codes && code < 256; code++) {
                const uint32_t bits = to_bits(w.scale_levels[code]);
                for (int i = 0; i < 4; i++) bytes[i][code] = uint8_t(bits >> 8 * i);
            }
        }
    };

    explicit ScaleLevels(const Split &s)
        : byte{ByteTable<8>(s.bytes[0]), ByteTable<8>(s.bytes[1]), ByteTable<8>(s.bytes[2]), ByteTable<8>(s.bytes[3])} {}
};

// Reads the parameters of any row; made once a call.
class RowParameters {
  public:
    explicit RowParameters(const hfq_weight &weight) : w(weight), groups(ceil_div(w.k, w.group)), levels(weight) {}

    // Numbers that `load` may write for a row.
    static int64_t slots(const hfq_weight &w) { return ceil_div(w.k, w.group) + 80; }

    // Scales of row `row`, and with zero points also these, or what they take from a row: -zero * scale.
    void load(int64_t row, float *scale, float *zero, bool as_offsets = false) const {
        const int64_t start = row / w.scale_height * groups;
        if (w.scale_codes) {
            ask(w.scale_codes + start, groups);
            quantized(start, scale);
        } else {
            const int64_t size = w.scale_type == HFQ_FLOAT32 ? 4 : 2;
            ask(static_cast<const uint8_t *>(w.scale) + start * size, groups * size);
            widen(w.scale, start, w.scale_type, scale);
        }
        if (!w.zero) return;
        const int64_t bytes = ceil_div(groups * w.zero_bits, 8);
        const uint8_t *from = w.zero + row / w.scale_height * bytes;
        ask(from, bytes);
        if (w.zero_bits > 8)
            widen(from, 0, w.zero_type, zero);
        else if (w.zero_bits == 4)
            nibbles(from, zero);
        else
            for (int64_t g = 0; g < groups; g++) zero[g] = float(code_at(from, g, w.zero_bits));
        if (!as_offsets) return;
        for (int64_t g = 0; g < groups; g += 16) {
            const __m512 less = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(zero + g));
            _mm512_storeu_ps(zero + g, _mm512_mul_ps(less, _mm512_loadu_ps(scale + g)));
        }
    }

  private:
    const hfq_weight &w;
    const int64_t groups;
    const ScaleLevels levels;

    // Ask for what a row some way ahead will read: too little, too rarely, for the processor to see it coming.
    static void ask(const uint8_t *from, int64_t bytes) {
        const char *ahead = reinterpret_cast<const char *>(from) + 8 * bytes;
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
    }

    // Scales that are codes themselves, up to the next one that has another factor and so on.
    void quantized(int64_t start, float *to) const {
        for (int64_t done = 0; done < groups;) {
            const int64_t factor = (start + done) / w.scale_group, rest = (factor + 1) * w.scale_group - start - done;
            const int64_t length = rest < groups - done ? rest : groups - done;
            const __m512 by = _mm512_set1_ps(w.scale_scale[factor]);
            for (int64_t i = 0; i < length; i += 64) {
                __m512 found[4];
                levels.decode(load_bytes(w.scale_codes + start + done + i, length - i), found);
                for (int j = 0; j < 4 && i + 16 * j < length; j++)
                    _mm512_storeu_ps(to + done + i + 16 * j, _mm512_mul_ps(found[j], by));
            }
            done += length;
        }
    }

    // The numbers from element `start` on as float32. What they are is asked once, not for every vector.
    void widen(const void *from, int64_t start, int type, float *to) const {
        int64_t g = 0;
        if (type == HFQ_BFLOAT16) {
            const uint16_t *numbers = static_cast<const uint16_t *>(from) + start;
            for (; g + 16 <= groups; g += 16) {
                const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(numbers + g));
                _mm512_storeu_ps(to + g, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16)));
            }
        }
        for (; g < groups; g += 16) _mm512_storeu_ps(to + g, load_floats(from, start + g, groups - g, type));
    }

    // Zero points of four bits: 32 at a time, as far as they go.
    void nibbles(const uint8_t *from, float *to) const {
        for (int64_t g = 0; g < groups; g += 32, from += 16) {
            const int64_t rest = (groups - g + 1) / 2;
            const __m128i bytes = rest >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(from))
                                             : _mm_maskz_loadu_epi8(__mmask16((1u << rest) - 1), from);
            const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
            const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
            _mm512_storeu_ps(to + g, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high))));
            _mm512_storeu_ps(to + g + 16, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high))));
        }
    }
};

}  // namespace
