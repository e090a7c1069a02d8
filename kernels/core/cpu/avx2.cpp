// flags: -mavx2 -mfma -mf16c
// AVX2 and FMA (Haswell, Zen and later): the portable computation, vectorized by the compiler, with faster decoding.
#include "avx2_rounding.h"
#include "grid_input.h"
#include "portable.h"
#include "steps.h"

#include <immintrin.h>

namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Sixteen levels in two registers of eight; bit 3 of a code says which.
struct SixteenLevels {
    __m256 low, high;

    explicit SixteenLevels(const float *levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}

    __m256 operator()(__m256i codes) const {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
    }
};

// Eight bytes, sixteen codes: nibble i of the 32-bit half h is column 8 h + i.
void decode_nibbles(const hfq_weight &w, const uint8_t *codes, int64_t first, int64_t last, float *out) {
    const SixteenLevels levels(w.levels);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    int64_t j = first;
    for (; j + 8 <= last; j += 8, out += 8) {
        uint32_t word;
        std::memcpy(&word, codes + j / 2, 4);
        const __m256i spread = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts);
        _mm256_storeu_ps(out, levels(_mm256_and_si256(spread, _mm256_set1_epi32(15))));
    }
    decode_levels(w, codes, j, last, out);
}

void decode_bytes(const hfq_weight &w, const uint8_t *codes, int64_t first, int64_t last, float *out) {
    int64_t j = first;
    for (; j + 8 <= last; j += 8, out += 8) {
        const __m256i spread = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + j)));
        _mm256_storeu_ps(out, _mm256_i32gather_ps(w.levels, spread, 4));
    }
    decode_levels(w, codes, j, last, out);
}

int linear(const Problem &p) {
    if (p.weight.bits == 4) return portable_linear(p, decode_nibbles);
    if (p.weight.bits == 8) return portable_linear(p, decode_bytes);
    return portable_linear(p, decode_levels);
}

int linear_int(const Problem &p, const hfq_input &input) {
    if (p.weight.bits == 4) return portable_linear_int(p, input, decode_nibbles);
    if (p.weight.bits == 8) return portable_linear_int(p, input, decode_bytes);
    return portable_linear_int(p, input, decode_levels);
}

int linear_grid(const Problem &p, const hfq_input &input) { return grid_linear<float>(p, input, HFQ_FLOAT32, linear); }

void round(const RoundingProblem &p) { round_with<EightLanes>(p); }

int dequantize(const hfq_weight &w, int64_t first, int64_t last, void *to, int type, int threads) {
    return dequantize_with<EightLanes>(w, first, last, to, type, threads);
}

const Isa ISA = {"avx2", supported, linear, linear_int, linear_grid, round, dequantize, nullptr, step};

}  // namespace

extern "C" const Isa *hfq_avx2() { return &ISA; }
