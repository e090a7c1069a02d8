// A layer's input rounded to any grid: numbers for the kernels that multiply floating-point inputs. In plain C++ that
// compilers turn into vectors; each source compiles it with its own instructions.
#pragma once

#include "common.h"
#include "threads.h"

#include <cfloat>
#include <cmath>

namespace {

// Integers that are ordered as float32 numbers are, NaN beyond the infinities: vectors find their extremes in any order.
inline int32_t ordered(float value) {
    const int32_t bits = int32_t(to_bits(value));
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

inline float from_ordered(int32_t key) { return to_float(uint32_t(key ^ (key >> 31 & 0x7FFFFFFF))); }

// The smallest and the largest value of a block, 0 among them.
struct Ends {
    int32_t low = 0, high = 0;

    void add(const float *values, int64_t count) {
        int32_t lowest = low, highest = high;
        for (int64_t j = 0; j < count; j++) {
            const int32_t key = ordered(values[j]);
            lowest = key < lowest ? key : lowest;
            highest = key > highest ? key : highest;
        }
        low = lowest, high = highest;
    }
    void add(const Ends &other) {
        low = other.low < low ? other.low : low;
        high = other.high > high ? other.high : high;
    }
    bool finite() const { return high < 0x7F800000 && low > ~0x7F800000; }
};

// A scale as a type holds it: neither 0 nor infinite, and rounded up where float16 gets coarse.
inline float stored_scale(float scale, int type) {
    if (scale == 0) scale = 1;
    if (type == HFQ_FLOAT16) {
        if (scale < 0x1p-14f) {
            const float steps = std::ceil(scale * 0x1p24f);
            scale = (steps < 1 ? 1 : steps) * 0x1p-24f;
        }
        return from_half(to_half(scale < 65504 ? scale : 65504));
    }
    if (scale < FLT_MIN) scale = FLT_MIN;
    if (type == HFQ_BFLOAT16) return from_bf16(to_bf16(scale < 0x1.FEp127f ? scale : 0x1.FEp127f));
    return scale < FLT_MAX ? scale : FLT_MAX;
}

// What the values of a block are divided by, and the zero point that is added to them.
struct Step {
    float scale, zero;
    bool finite;

    Step(const hfq_input &in, const Ends &ends) : scale(1), zero(0), finite(ends.finite()) {
        if (!finite) return;
        const float low = from_ordered(ends.low), high = from_ordered(ends.high);
        if (in.scale != 0) {
            scale = in.scale, zero = in.zero_point;
        } else if (in.zero) {
            scale = stored_scale((high - low) / in.high, in.scale_type);
            zero = std::nearbyint(-low / scale);
            zero = zero < in.high ? zero : in.high;
        } else {
            scale = stored_scale((high > -low ? high : -low) / in.high, in.scale_type);
        }
    }
};

// The numbers of a grid nearest to `values` / scale, ties to even, times `factor`.
class Rounding {
  public:
    explicit Rounding(const hfq_input &input) : in(input) {
        for (int64_t i = 0; i < MOST; i++) {
            const bool there = in.levels && i + 1 < in.level_count;
            thresholds[i] = there ? in.thresholds[i] : INFINITY;
        }
    }

    void round(const float *values, int64_t count, const Step &by, float factor, float *to) const {
        if (in.levels && in.level_count <= FEW)
            by_counting(values, count, by, factor, to);
        else if (in.levels)
            by_search(values, count, by, factor, to);
        else if (in.mantissa_bits == 0)
            by_powers(values, count, by, factor, to);
        else
            by_arithmetic(values, count, by, factor, to);
    }

  private:
    static constexpr int64_t MOST = 255, FEW = 16;
    const hfq_input &in;
    float thresholds[MOST];

    // A number 1.5 * 2^23 steps above it leaves a float32 no bits below a step. The power of two at or below it says how
    // large a step is.
    void by_arithmetic(const float *values, int64_t count, const Step &by, float factor, float *to) const {
        const float scale = by.scale, low = in.low - by.zero, high = in.high - by.zero;
        const uint32_t least = to_bits(in.normal), up = (uint32_t(23 - in.mantissa_bits) << 23) + 0x400000;
        for (int64_t j = 0; j < count; j++) {
            float value = values[j] / scale;
            value = value < low ? low : value;
            value = value > high ? high : value;
            const uint32_t power = to_bits(value) & 0x7F800000;
            const float shift = to_float((power < least ? least : power) + up);
            to[j] = ((value + shift) - shift) * factor;
        }
    }

    // Powers of two and 0: in the middle of two of them, the one with the even code.
    void by_powers(const float *values, int64_t count, const Step &by, float factor, float *to) const {
        const float scale = by.scale, low = in.low, high = in.high, least = in.normal;
        const uint32_t parity = (to_bits(least) >> 23) + 1;
        for (int64_t j = 0; j < count; j++) {
            float value = values[j] / scale;
            value = value < low ? low : value;
            value = value > high ? high : value;
            const uint32_t sign = to_bits(value) & 0x80000000, bits = to_bits(value) ^ sign;
            const uint32_t odd = ((bits >> 23) + parity) & 1;
            float power = to_float((bits + odd + 0x3FFFFF) & 0x7F800000);
            power = power < least ? least : power;
            power = to_float(bits) <= least / 2 ? 0.0f : power;
            to[j] = to_float(to_bits(power) | sign) * factor;
        }
    }

    void by_counting(const float *values, int64_t count, const Step &by, float factor, float *to) const {
        float levels[FEW];
        for (int64_t i = 0; i < FEW; i++) levels[i] = i < in.level_count ? in.levels[i] * factor : 0;
        for (int64_t j = 0; j < count; j++) {
            const float value = values[j] / by.scale;
            int32_t at = 0;
            for (int64_t i = 0; i + 1 < FEW; i++) at += thresholds[i] < value;
            to[j] = levels[at];
        }
    }

    void by_search(const float *values, int64_t count, const Step &by, float factor, float *to) const {
        for (int64_t j = 0; j < count; j++) {
            const float value = values[j] / by.scale;
            int32_t at = 0;
            for (int32_t half = 128; half; half /= 2) at += half & -int32_t(thresholds[at + half - 1] < value);
            to[j] = in.levels[at] * factor;
        }
    }
};

inline void load_row(const Problem &p, int64_t m, float *to) {
    const int64_t k = p.weight.k, start = m * k;
    if (p.type == HFQ_FLOAT32) {
        std::memcpy(to, static_cast<const float *>(p.x) + start, k * sizeof(float));
        return;
    }
    const uint16_t *from = static_cast<const uint16_t *>(p.x) + start;
    if (p.type == HFQ_BFLOAT16)
        for (int64_t j = 0; j < k; j++) to[j] = from_bf16(from[j]);
    else
        for (int64_t j = 0; j < k; j++) to[j] = from_half(from[j]);
}

inline void narrow(float value, bf16 *to) { *to = to_bf16(value); }
inline void narrow(float value, float *to) { *to = value; }

// Columns that take part as they are: SPLIT with the weights of the matrix, APART with weights of their own.
enum Column : uint8_t { ROUNDED, SPLIT, APART };

// The input of a call as numbers of type T. With `scaled` they are those of the grid, and `scale` is left to the results.
template <class T>
class GridInput {
  public:
    const Problem &p;
    const hfq_input &in;
    const int64_t k, height, width, groups;
    Buffer<T> x;             // [m, k], in the order of the weight's columns
    Buffer<float> scale;     // [m]
    Buffer<float> kept;      // [m, outlier_count]
    Buffer<float> kept_weight;  // [outlier_count, n]
    bool scaled = false;

    GridInput(const Problem &problem, const hfq_input &input)
        : p(problem), in(input), k(p.weight.k), height(in.scale != 0 ? 1 : in.height), width(in.scale != 0 ? k : in.width),
          groups(ceil_div(k, width)), x(p.m * k), scale(p.m), kept(p.m * in.outlier_count),
          kept_weight(p.weight.n * in.outlier_count), columns(k), ends(p.m * groups), rows(2 * k * p.threads), rounding(in) {}

    bool ready() const {
        return x.data && scale.data && kept.data && kept_weight.data && columns.data && ends.data && rows.data;
    }

    void quantize() {
        const bool split = choose_columns();
        scaled = in.scale_last && groups == 1 && !split;
        if (height > 1) {
            each_row([&](int64_t m, float *row, float *) {
                load(m, row);
                find_ends(m, row);
            });
            for (int64_t m = 0; m < p.m; m++)
                for (int64_t g = 0; g < groups; g++) ends_of(m, g).add(ends.data[m * groups + g]);
        }
        each_row([&](int64_t m, float *row, float *rounded) {
            load(m, row);
            if (height == 1) find_ends(m, row);
            round(m, row, rounded);
            for (int64_t j = 0; split && j < k; j++)
                if (columns.data[j] == SPLIT) rounded[j] = ::load(p.x, m * k + j, p.type);
            write(m, rounded);
        });
#pragma omp parallel for num_threads(p.threads)
        for (int64_t i = 0; i < in.outlier_count; i++)
            for (int64_t n = 0; n < p.weight.n; n++)
                kept_weight.data[i * p.weight.n + n] = ::load(in.outlier_weight, n * in.outlier_count + i, in.outlier_type);
    }

    // y, of what the layer sees of its input.
    template <class Linear>
    int multiply(int type, const Linear &linear) const {
        Problem seen{p.weight, x.data, p.bias, p.y, p.m, type, p.threads, p.result};
        if (scaled) seen.row_scale = scale.data;
        seen.kept = kept.data, seen.kept_weight = kept_weight.data, seen.kept_count = in.outlier_count;
        return linear(seen);
    }

  private:
    const Buffer<uint8_t> columns;  // [k] of Column
    const Buffer<Ends> ends;        // [m, groups]; of blocks with more rows than one, the first one has those of all
    const Buffer<float> rows;       // [threads, 2, k]
    const Rounding rounding;

    // `work(m, row, rounded)` for all rows, with memory for two of them.
    template <class Work>
    void each_row(const Work &work) const {
#pragma omp parallel num_threads(p.threads) if (p.m > 1)
        {
            const int id = omp_get_thread_num();
            const Share mine(p.m, 1, id, omp_get_num_threads());
            float *own = rows.data + 2 * k * id;
            for (int64_t m = mine.first; m < mine.last; m++) work(m, own, own + k);
        }
    }

    // Whether columns are split off in this call.
    bool choose_columns() const {
        std::memset(columns.data, ROUNDED, k);
        if (in.split < INFINITY) {
#pragma omp parallel num_threads(p.threads)
            {
                const Share mine(k, 64, omp_get_thread_num(), omp_get_num_threads());
                for (int64_t m = 0; m < p.m; m++)
                    for (int64_t j = mine.first; j < mine.last; j++)
                        if (std::fabs(::load(p.x, m * k + j, p.type)) >= in.split) columns.data[j] = SPLIT;
            }
        }
        for (int64_t i = 0; i < in.outlier_count; i++) columns.data[in.outliers[i]] = APART;
        for (int64_t j = 0; j < k; j++)
            if (columns.data[j] == SPLIT) return true;
        return false;
    }

    // Row m as float32, 0 where columns are kept.
    void load(int64_t m, float *row) const {
        load_row(p, m, row);
        for (int64_t i = 0; i < in.outlier_count; i++) kept.data[m * in.outlier_count + i] = row[in.outliers[i]];
        if (in.outlier_count == 0 && !(in.split < INFINITY)) return;
        for (int64_t j = 0; j < k; j++) row[j] = columns.data[j] == ROUNDED ? row[j] : 0.0f;
    }

    int64_t length(int64_t g) const { return g + 1 < groups ? width : k - g * width; }

    Ends &ends_of(int64_t m, int64_t g) const { return ends.data[m / height * height * groups + g]; }

    void find_ends(int64_t m, const float *row) const {
        for (int64_t g = 0; g < groups; g++) {
            Ends found;
            found.add(row + g * width, length(g));
            ends.data[m * groups + g] = found;
        }
    }

    void round(int64_t m, const float *row, float *rounded) const {
        for (int64_t g = 0; g < groups; g++) {
            const Step by(in, ends_of(m, g));
            float *to = rounded + g * width;
            rounding.round(row + g * width, length(g), by, scaled ? 1 : by.scale, to);
            scale.data[m] = by.finite ? by.scale : NAN;
            for (int64_t j = 0; !scaled && !by.finite && j < length(g); j++) to[j] = NAN;
        }
    }

    void write(int64_t m, const float *rounded) const {
        T *to = x.data + m * k;
        if (in.order)
            for (int64_t j = 0; j < k; j++) narrow(rounded[in.order[j]], to + j);
        else
            for (int64_t j = 0; j < k; j++) narrow(rounded[j], to + j);
    }
};

// `type` is that of T, which `linear` gets.
template <class T, class Linear>
int grid_linear(const Problem &p, const hfq_input &input, int type, const Linear &linear) {
    GridInput<T> seen(p, input);
    if (!seen.ready()) return -1;
    seen.quantize();
    return seen.multiply(type, linear);
}

// For instruction sets that multiply bfloat16 inputs as they are.
template <class Linear>
int grid_linear_bf16(const Problem &p, const hfq_input &input, const Linear &linear) {
    if (p.type == HFQ_BFLOAT16) return grid_linear<bf16>(p, input, HFQ_BFLOAT16, linear);
    return grid_linear<float>(p, input, HFQ_FLOAT32, linear);
}

}  // namespace
