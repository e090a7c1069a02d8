// Integer weights times integer inputs with `vpdpbusd`: four products of an unsigned and a signed byte and their sum. Codes
// are unsigned as they are; what they are larger than their levels is taken back with the sum of the inputs.
#pragma once

#include "avx512_decode.h"
#include "avx512_gemm.h"
#include "avx512_rows.h"
#include "quantized_input.h"

namespace {

constexpr int64_t SOON = 1024;  // bytes that a panel is asked for from the second-level cache

// Sums of the lanes of four vectors of integers.
inline __m128i add_int_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// sums + the products of unsigned bytes with signed ones. As assembly, because GCC 12 moves the intrinsic's sums to the
// stack and back in every step.
inline __m512i dot_bytes(__m512i sums, __m512i bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(signed_bytes));
    return sums;
}

// sums [T, 4], rows PANEL_ROWS apart, += the products of T rows of inputs, x [vectors, T, 64], with four rows of codes.
// `codes(i, r)` gives vector i of row r.
template <int T, class Codes, class Asks>
inline void int_tile(const int8_t *x, int64_t vectors, const Codes &codes, Asks ahead, int32_t *sums) {
    __m512i acc[T][TILE_ROWS] = {};
    for (int64_t i = 0; i < vectors; i++, x += T * 64) {
        ahead.ask();
        const __m512i w0 = codes(i, 0), w1 = codes(i, 1), w2 = codes(i, 2), w3 = codes(i, 3);
#pragma GCC unroll 6
        for (int t = 0; t < T; t++) {
            const __m512i input = _mm512_load_si512(x + t * 64);
            acc[t][0] = dot_bytes(acc[t][0], w0, input);
            acc[t][1] = dot_bytes(acc[t][1], w1, input);
            acc[t][2] = dot_bytes(acc[t][2], w2, input);
            acc[t][3] = dot_bytes(acc[t][3], w3, input);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
        __m128i *to = reinterpret_cast<__m128i *>(sums + t * PANEL_ROWS);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), add_int_lanes(acc[t][0], acc[t][1], acc[t][2], acc[t][3])));
    }
}

template <class Codes, class Asks>
inline void int_tiles(int64_t inputs, const int8_t *x, int64_t vectors, const Codes &codes, Asks ahead, int32_t *sums) {
    switch (inputs) {
#define CASE(T) \
    case T: return int_tile<T>(x, vectors, codes, ahead, sums);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// Mark the columns that hold a magnitude of at least the split in any row.
inline void mark_large512(const Problem &p, float split, uint8_t *large) {
    const int64_t k = p.weight.k, lines = ceil_div(k, 64);
    const __m512 bound = _mm512_set1_ps(split);
#pragma omp parallel for num_threads(p.threads)
    for (int64_t line = 0; line < lines; line++)  // a thread has columns of its own, and cache lines
        for (int64_t j = line * 64; j < k && j < line * 64 + 64; j += 16) {
            __mmask16 found = 0;
            for (int64_t m = 0; m < p.m; m++) {
                const __m512 values = _mm512_abs_ps(load_floats(p.x, m * k + j, k - j, p.type));
                found |= _mm512_cmp_ps_mask(values, bound, _CMP_GE_OQ);
            }
            for (int64_t i = 0; i < 16 && j + i < k; i++) large[j + i] = uint8_t(found >> i & 1);
        }
}

// Numbers divided by one, rounded as a division is. That is slow: where quotients are small, as they are by a scale that was
// found, the product with the reciprocal is corrected twice by what it leaves over, which is exact (Markstein, 1990).
class Divide {
  public:
    Divide(float number, bool small)
        : by(_mm512_set1_ps(number)), reciprocal(_mm512_set1_ps(1 / number)), fast(small && number > LEAST) {}

    __m512 operator()(__m512 values) const {
        if (!fast) return _mm512_div_ps(values, by);
        const __m512 near = corrected(_mm512_mul_ps(values, reciprocal), values);
        return corrected(near, values);
    }

  private:
    static constexpr float LEAST = 1e-20f;  // so that nothing that is left over is too small for a float
    const __m512 by, reciprocal;
    const bool fast;

    __m512 corrected(__m512 quotient, __m512 values) const {
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, by, values), reciprocal, quotient);
    }
};

// The input of a call: integers in tiles of up to `room` rows, and per row their scale and sum.
struct IntInput {
    const hfq_input &input;
    const int64_t width;
    const int room;
    const Buffer<int8_t> x;   // [m, width]
    const Buffer<float> scale;
    const Buffer<int32_t> sum;  // of the integers
    const Kept &kept;
    const Buffer<float> apart;  // [m, kept.count]

    IntInput(const Problem &p, const hfq_input &in, const Kept &k, int rows)
        : input(in), width(ceil_div(p.weight.k, 64) * 64), room(rows), x(p.m * width), scale(p.m), sum(p.m), kept(k),
          apart(p.m * k.count) {}

    bool ready() const { return x.data && scale.data && sum.data && apart.data; }

    void quantize(const Problem &p, int64_t m, float *row) const {
        const int64_t k = p.weight.k;
        for (int64_t j = 0; j < k; j += 16) _mm512_storeu_ps(row + j, load_floats(p.x, m * k + j, k - j, p.type));
        for (int64_t i = 0; i < kept.count; i++) {
            apart.data[m * kept.count + i] = row[kept.columns.data[i]];
            row[kept.columns.data[i]] = 0;
        }
        const InTile at(m, p.m, width, 64, room);
        int8_t *to = x.data + at.offset;
        const float factor = row_scale(row, k);
        scale.data[m] = factor;
        const Divide divide(factor, input.scale == 0);
        const __m512 low = _mm512_set1_ps(input.low), high = _mm512_set1_ps(input.high);
        __m512i total = _mm512_setzero_si512();
        for (int64_t j = 0; j < width; j += 64, to += 64 * at.stride)
            for (int part = 0; part < 64; part += 16) {
                const int64_t rest = k - j - part;
                const __mmask16 there = rest >= 16 ? __mmask16(0xFFFF) : __mmask16(rest > 0 ? (1u << rest) - 1 : 0);
                const __m512 value = divide(_mm512_maskz_loadu_ps(there, row + j + part));
                const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
                total = _mm512_add_epi32(total, q);
                _mm_store_si128(reinterpret_cast<__m128i *>(to + part), _mm512_cvtepi32_epi8(q));
            }
        sum.data[m] = _mm512_reduce_add_epi32(total);
    }

  private:
    // As `quantize_row` finds it: NaN if a value is not finite.
    float row_scale(const float *row, int64_t k) const {
        __m512 top = _mm512_setzero_ps(), bad = top;
        for (int64_t j = 0; j < k; j += 16) {
            const __mmask16 there = k - j >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (k - j)) - 1);
            const __m512 values = _mm512_maskz_loadu_ps(there, row + j);
            top = _mm512_max_ps(top, _mm512_abs_ps(values));
            bad = _mm512_add_ps(bad, _mm512_sub_ps(values, values));
        }
        float found = input.scale != 0 ? input.scale : _mm512_reduce_max_ps(top) / input.high;
        if (found == 0) found = 1;
        if (found < FLT_MIN) found = FLT_MIN;
        return found + _mm512_reduce_add_ps(bad);
    }
};

template <int BITS>
struct IntPanel {
    const hfq_weight &w;

    __m512i load(int64_t row, int64_t i) const {
        const int64_t at = i * 8 * BITS, bytes = w.row_bytes - at;
        _mm_prefetch(reinterpret_cast<const char *>(w.codes + row * w.row_bytes + at) + 1024, _MM_HINT_T0);
        return spread<BITS>(load_bytes(w.codes + row * w.row_bytes + at, bytes));
    }
};

// From the sums of a panel of rows to results; each thread has its own.
struct IntResults {
    const Problem &p;
    const IntInput &in;
    const int64_t most;  // rows of a panel, whole vectors
    const Buffer<float> scale;
    const Buffer<float> kept;  // [kept.count, most]: the weights of the floating-point columns

    IntResults(const Problem &problem, const IntInput &input, int64_t rows)
        : p(problem), in(input), most(rows), scale(most), kept(in.kept.count * most) {}

    bool ready() const { return scale.data && kept.data; }

    void load(int64_t first, int64_t rows) const {
        std::memset(scale.data, 0, most * sizeof(float));
        for (int64_t r = 0; r < rows; r++) row_scales(p.weight, first + r, scale.data + r);
        for (int64_t i = 0; i < in.kept.count; i++)
            for (int64_t r = 0; r < most; r++)
                kept.data[i * most + r] = r < rows ? in.kept.weight(p.weight, in.input, first + r, scale.data[r], i) : 0;
    }

    // Results of input m for the rows that were loaded; of `sums` whole vectors are read.
    void write(int64_t m, int64_t first, int64_t rows, const int32_t *sums) const {
        const int32_t offset = -int32_t(p.weight.levels[0]);  // a code is its level and this
        const __m512i back = _mm512_set1_epi32(offset * in.sum.data[m]);
        const __m512 by = _mm512_set1_ps(in.scale.data[m]);
        const float *x = in.apart.data + m * in.kept.count;
        for (int64_t r = 0; r < rows; r += 16) {
            const __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(sums + r), back);
            __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(_mm512_load_ps(scale.data + r), by));
            for (int64_t i = 0; i < in.kept.count; i++)
                value = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), _mm512_load_ps(kept.data + i * most + r), value);
            finish(p, m, first + r, rows - r, value);
        }
    }
};

// sums [m, PANEL_ROWS] += all inputs times `rows` rows of a panel over `count` columns from `start` on.
inline void multiply_int_panel(const IntInput &in, int64_t m, int64_t start, int64_t count, const uint8_t *panel, int64_t depth,
                               int64_t rows, CodesAhead codes, int32_t *sums) {
    const auto run = [&](const int8_t *x, int64_t inputs, int64_t first, int64_t r, Ahead ahead) {
        const uint8_t *from = panel + r * depth;
        const auto code = [&](int64_t i, int q) {
            _mm_prefetch(reinterpret_cast<const char *>(from) + (i * TILE_ROWS + q) * 64 + SOON, _MM_HINT_T0);
            return _mm512_load_si512(from + (i * TILE_ROWS + q) * 64);
        };
        int_tiles(inputs, x, count / 64, code, ahead, sums + first * PANEL_ROWS + r);
    };
    each_tile<64>(static_cast<const int8_t *>(in.x.data), m, in.width, start, count, rows, codes, run);
}

// sums [m, PANEL_ROWS] += the inputs of one tile times rows of codes, read where they are stored.
template <int BITS>
void multiply_codes(const IntInput &in, int64_t m, const IntPanel<BITS> &codes, int64_t first, int64_t rows, int32_t *sums) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        const int64_t last = rows - 1;  // rows behind it are not there: results of theirs are not used
        const auto code = [&](int64_t i, int q) { return codes.load(first + (r + q < last ? r + q : last), i); };
        int_tiles(m, in.x.data, in.width / 64, code, Nothing(), sums + r);
    }
}

template <int BITS>
int gemm_int(const Problem &p, const IntInput &in) {
    const hfq_weight &w = p.weight;
    const bool copy = p.m > TILE_INPUTS;  // codes are read more than once: lay them out as the tiles want them
    const int64_t depth = copy ? PANEL_BYTES : in.width;
    int failed = 0;
#pragma omp parallel num_threads(p.threads)
    {
        const Share mine(w.n, TILE_ROWS, omp_get_thread_num(), omp_get_num_threads());
        Buffer<uint8_t> panel(copy ? PANEL_ROWS * depth : 0);
        Buffer<int32_t> sums(p.m * PANEL_ROWS);
        const IntResults results(p, in, PANEL_ROWS);
        const bool ready = panel.data && sums.data && results.ready();
        if (!ready) {
#pragma omp atomic write
            failed = -1;
        }
        const IntPanel<BITS> codes{w};
        for (int64_t first = mine.first; ready && first < mine.last; first += PANEL_ROWS) {
            const int64_t rows = mine.last - first < PANEL_ROWS ? mine.last - first : PANEL_ROWS;
            std::memset(sums.data, 0, p.m * PANEL_ROWS * sizeof(int32_t));
            results.load(first, rows);
            for (int64_t start = 0; start < in.width; start += depth) {
                const int64_t count = in.width - start < depth ? in.width - start : depth, vectors = count / 64;
                for (int64_t r = 0; copy && r < rows; r++) {
                    uint8_t *to = panel.data + r / TILE_ROWS * TILE_ROWS * depth + r % TILE_ROWS * 64;
                    for (int64_t i = 0; i < vectors; i++)
                        _mm512_store_si512(to + i * TILE_ROWS * 64, codes.load(first + r, start / 64 + i));
                }
                const CodesAhead next = panel_behind(w, first, PANEL_ROWS, start, depth, in.width, 64);
                if (copy)
                    multiply_int_panel(in, p.m, start, count, panel.data, depth, rows, next, sums.data);
                else
                    multiply_codes(in, p.m, codes, first, rows, sums.data);
            }
            for (int64_t m = 0; m < p.m; m++) results.write(m, first, rows, sums.data + m * PANEL_ROWS);
        }
    }
    return failed;
}

// Quantizes the input into tiles of up to `room` rows, and hands it to `multiply`.
template <class Multiply>
int linear_int_with(const Problem &p, const hfq_input &input, int room, const Multiply &multiply) {
    const hfq_weight &w = p.weight;
    Buffer<uint8_t> large(w.k);
    if (!large.data) return -1;
    std::memset(large.data, 0, w.k);
    if (input.split < INFINITY) mark_large512(p, input.split, large.data);
    const Kept kept(input, large.data, w.k);
    const IntInput in(p, input, kept, room);
    const int64_t room_of_row = w.k + 16;  // whole vectors are stored
    Buffer<float> rows(room_of_row * p.threads);
    if (!kept.columns.data || !kept.stored.data || !in.ready() || !rows.data) return -1;
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share mine(p.m, 1, id, omp_get_num_threads());
        for (int64_t m = mine.first; m < mine.last; m++) in.quantize(p, m, rows.data + room_of_row * id);
    }
    return multiply(in);
}

template <int BITS>
int linear_int_of(const Problem &p, const hfq_input &input) {
    return linear_int_with(p, input, TILE_INPUTS, [&](const IntInput &in) { return gemm_int<BITS>(p, in); });
}

}  // namespace
