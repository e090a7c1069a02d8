// `row_parameters` with AVX-512: short rows of codes have as many scales as vectors of weights, so this is hot.
#pragma once

#include "common.h"

#include <immintrin.h>

namespace {

// Scales that are codes themselves, up to the next one that has another factor.
inline void quantized_scales(const hfq_weight &w, int64_t start, int64_t count, float *to) {
    while (count > 0) {
        const int64_t factor = start / w.scale_group, rest = (factor + 1) * w.scale_group - start;
        const int64_t length = rest < count ? rest : count;
        const __m512 scale = _mm512_set1_ps(w.scale_scale[factor]);
        for (int64_t i = 0; i < length; i += 16) {
            const __mmask16 there = length - i < 16 ? __mmask16((1u << (length - i)) - 1) : __mmask16(0xFFFF);
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.scale_codes + start + i));
            _mm512_mask_storeu_ps(to + i, there, _mm512_mul_ps(_mm512_i32gather_ps(codes, w.scale_levels, 4), scale));
        }
        start += length;
        to += length;
        count -= length;
    }
}

// Zero points of four bits.
inline void nibble_zeros(const uint8_t *from, int64_t count, float *to) {
    for (int64_t g = 0; g < count; g += 16) {
        const int64_t rest = count - g < 16 ? count - g : 16;
        const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << (rest + 1) / 2) - 1), from + g / 2);
        const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        const __m512 zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
        _mm512_mask_storeu_ps(to + g, __mmask16((1u << rest) - 1), zeros);
    }
}

inline void row_parameters512(const hfq_weight &w, int64_t row, float *scale, float *zero) {
    const int64_t groups = ceil_div(w.k, w.group), start = row / w.scale_height * groups;
    if (w.scale_codes && w.scale_group >= 16) {
        quantized_scales(w, start, groups, scale);
    } else {
        row_scales(w, row, scale);
    }
    if (w.zero && w.zero_bits == 4) {
        nibble_zeros(w.zero + row / w.scale_height * ceil_div(groups * 4, 8), groups, zero);
    } else if (w.zero) {
        row_zeros(w, row, zero);
    }
}

}  // namespace
