// Vectors of sixteen numbers, for `round_with`. Tables of up to 256 numbers are looked up in registers.
#pragma once

#include "avx512_rows.h"
#include "dequantize.h"

namespace {

struct SixteenLanes {
    static constexpr int64_t LANES = 16;
    using Floats = __m512;
    using Ints = __m512i;

    static __m512 load(const void *x, int64_t at, int64_t count, int type) { return load_floats(x, at, count, type); }
    static __m512 load(const float *from) { return _mm512_loadu_ps(from); }
    static void put(float *to, __m512 values) { _mm512_storeu_ps(to, values); }
    static __m512 fill(float value) { return _mm512_set1_ps(value); }
    static __m512i set(int32_t value) { return _mm512_set1_epi32(value); }
    static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
    static __m512i subtract(__m512i a, int32_t b) { return _mm512_sub_epi32(a, set(b)); }
    static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
    static __m512 divide(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
    static __m512i minimum(__m512i a, int32_t b) { return _mm512_min_epi32(a, set(b)); }
    static __m512 round(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static __m512 limit(__m512 x, float low, float high) {  // of a NaN, the second operand is the result
        return _mm512_min_ps(fill(high), _mm512_max_ps(fill(low), x));
    }
    static __m512i integers(__m512 x) { return _mm512_cvtps_epi32(x); }  // NaN: a number whose last byte is 0
    static __m512 nan_or(__m512 x, __m512 other) {
        return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
    }
    static __m512i child(__m512i node, __m512 x, __m512 threshold) {
        const __m512i left = _mm512_add_epi32(node, node);
        return _mm512_mask_add_epi32(left, _mm512_cmp_ps_mask(x, threshold, _CMP_NLE_UQ), left, set(1));
    }

    template <int COUNT>
    static __m512 pick(const float *table, __m512i index) {
        if constexpr (COUNT == 1) {
            return _mm512_set1_ps(*table);
        } else if constexpr (COUNT < 16) {  // what lies behind the table is read and not picked
            return _mm512_permutexvar_ps(_mm512_and_si512(index, set(COUNT - 1)), _mm512_loadu_ps(table));
        } else if constexpr (COUNT == 16) {
            return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
        } else if constexpr (COUNT == 32) {
            return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
        } else {
            const __mmask16 upper = _mm512_test_epi32_mask(index, set(COUNT / 2));
            return _mm512_mask_blend_ps(upper, pick<COUNT / 2>(table, index), pick<COUNT / 2>(table + COUNT / 2, index));
        }
    }
    static void store(uint8_t *to, int64_t count, __m512i code) {
        const __m128i bytes = _mm512_cvtepi32_epi8(code);  // in a register: to memory it is slow on some processors
        if (count >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i *>(to), bytes);
        _mm_mask_storeu_epi8(to, __mmask16((1u << count) - 1), bytes);
    }
    static void store(float *to, int64_t count, __m512 value) {
        if (count >= 16) return _mm512_storeu_ps(to, value);
        _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), value);
    }

    // Up to sixteen values to element `at` on, rounded to `type` as `::store` does.
    static void store(void *to, int64_t at, int64_t count, int type, __m512 value) {
        if (type == HFQ_FLOAT32) return store(static_cast<float *>(to) + at, count, value);
        const __m256i words = type == HFQ_FLOAT16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : bf16_of(value);
        auto *out = static_cast<uint16_t *>(to) + at;
        if (count >= 16) return _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), words);
        _mm256_mask_storeu_epi16(out, __mmask16((1u << count) - 1), words);
    }
    static __m256i bf16_of(__m512 value) {  // the instruction for this takes subnormal numbers for 0
        const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, set(0x7FFF))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, set(0x7FC0)));
    }
    static __m512i bytes(const uint8_t *from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }
};

inline void round(const RoundingProblem &p) { round_with<SixteenLanes>(p); }

inline int dequantize(const hfq_weight &w, int64_t first, int64_t last, void *to, int type, int threads) {
    return dequantize_with<SixteenLanes>(w, first, last, to, type, threads);
}

}  // namespace
