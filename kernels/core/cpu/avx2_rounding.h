// Vectors of eight numbers, for `round_with`. Tables of up to 16 numbers are looked up in registers.
#pragma once

#include "dequantize.h"

#include <immintrin.h>

namespace {

struct EightLanes {
    static constexpr int64_t LANES = 8;
    using Floats = __m256;
    using Ints = __m256i;

    static __m256 load(const void *x, int64_t at, int64_t count, int type) {
        if (count < 8) {
            alignas(32) float part[8] = {};
            for (int64_t j = 0; j < count; j++) part[j] = ::load(x, at + j, type);
            return _mm256_load_ps(part);
        }
        if (type == HFQ_FLOAT32) return _mm256_loadu_ps(static_cast<const float *>(x) + at);
        const auto *from = reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(x) + at);
        const __m128i narrow = _mm_loadu_si128(from);
        if (type == HFQ_FLOAT16) return _mm256_cvtph_ps(narrow);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    }
    static __m256 load(const float *from) { return _mm256_loadu_ps(from); }
    static void put(float *to, __m256 values) { _mm256_storeu_ps(to, values); }
    static __m256 fill(float value) { return _mm256_set1_ps(value); }
    static __m256i set(int32_t value) { return _mm256_set1_epi32(value); }
    static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
    static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
    static __m256i subtract(__m256i a, int32_t b) { return _mm256_sub_epi32(a, set(b)); }
    static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
    static __m256 divide(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
    static __m256i minimum(__m256i a, int32_t b) { return _mm256_min_epi32(a, set(b)); }
    static __m256 round(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static __m256 limit(__m256 x, float low, float high) {  // of a NaN, the second operand is the result
        return _mm256_min_ps(fill(high), _mm256_max_ps(fill(low), x));
    }
    static __m256i integers(__m256 x) { return _mm256_and_si256(_mm256_cvtps_epi32(x), set(255)); }  // NaN: 0
    static __m256 nan_or(__m256 x, __m256 other) {
        return _mm256_blendv_ps(other, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    static __m256i child(__m256i node, __m256 x, __m256 threshold) {
        const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_NLE_UQ));  // -1
        return _mm256_sub_epi32(_mm256_add_epi32(node, node), right);
    }

    template <int COUNT>
    static __m256 pick(const float *table, __m256i index) {
        if constexpr (COUNT == 1) {
            return _mm256_set1_ps(*table);
        } else if constexpr (COUNT < 8) {  // what lies behind the table is read and not picked
            return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), _mm256_and_si256(index, set(COUNT - 1)));
        } else if constexpr (COUNT == 8) {
            return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
        } else if constexpr (COUNT == 16) {
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            return _mm256_blendv_ps(pick<8>(table, index), pick<8>(table + 8, index), upper);
        } else {
            return _mm256_i32gather_ps(table, _mm256_and_si256(index, set(COUNT - 1)), 4);
        }
    }
    static void store(uint8_t *to, int64_t count, __m256i code) {
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        const __m128i bytes = _mm_packus_epi16(words, words);
        if (count >= 8) return _mm_storel_epi64(reinterpret_cast<__m128i *>(to), bytes);
        alignas(16) uint8_t part[16];
        _mm_store_si128(reinterpret_cast<__m128i *>(part), bytes);
        std::memcpy(to, part, size_t(count));
    }
    static void store(float *to, int64_t count, __m256 value) {
        if (count >= 8) return _mm256_storeu_ps(to, value);
        alignas(32) float part[8];
        _mm256_store_ps(part, value);
        std::memcpy(to, part, size_t(count) * sizeof(float));
    }

    // Up to eight values to element `at` on, rounded to `type` as `::store` does.
    static void store(void *to, int64_t at, int64_t count, int type, __m256 value) {
        if (type == HFQ_FLOAT32) return store(static_cast<float *>(to) + at, count, value);
        const __m128i words = type == HFQ_FLOAT16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : bf16_of(value);
        auto *out = static_cast<uint16_t *>(to) + at;
        if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i *>(out), words);
        alignas(16) uint16_t part[8];
        _mm_store_si128(reinterpret_cast<__m128i *>(part), words);
        std::memcpy(out, part, size_t(count) * sizeof(uint16_t));
    }
    static __m128i bf16_of(__m256 value) {
        const __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, set(0x7FFF))), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(rounded, set(0x7FC0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
    static __m256i bytes(const uint8_t *from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    }
};

}  // namespace
