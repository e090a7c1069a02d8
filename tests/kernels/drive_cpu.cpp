// Calls the CPU kernels through their C interface on pseudo-random problems whose arrays are exactly as large as
// hfquant.h says, and compares each result with the same sum in double. Tests build and run it.
//
//     drive_cpu heap|guard SEED PROBLEMS THREADS [ISA...]
//
// "heap" leaves it to a sanitizer or valgrind to see accesses out of bounds. "guard" puts arrays next to pages that
// cannot be accessed, so that those of vector instructions which no sanitizer knows, such as gathers, end the program.
#include "hfquant.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

bool guarded = false;

// `count` elements at the very end, or the very beginning, of what may be accessed.
template <class T>
class Array {
  public:
    Array() = default;
    Array(int64_t count, bool at_start) : count_(count) {
        const size_t bytes = size_t(count) * sizeof(T);
        if (!guarded) {
            data_ = static_cast<T *>(std::malloc(bytes));
            return;
        }
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
        mapped_ = inside + 2 * page;
        void *all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char *>(all);
        mprotect(base_, page, PROT_NONE);
        mprotect(base_ + page + inside, page, PROT_NONE);
        data_ = reinterpret_cast<T *>(base_ + page + (at_start ? 0 : inside - bytes));
    }
    ~Array() {
        if (base_) munmap(base_, mapped_);
        else std::free(data_);
    }
    Array(Array &&other) noexcept { swap(other); }
    Array &operator=(Array &&other) noexcept {
        swap(other);
        return *this;
    }
    T *data() const { return data_; }
    int64_t size() const { return count_; }
    T &operator[](int64_t i) const { return data_[i]; }

  private:
    void swap(Array &other) {
        std::swap(data_, other.data_);
        std::swap(base_, other.base_);
        std::swap(mapped_, other.mapped_);
        std::swap(count_, other.count_);
    }
    T *data_ = nullptr;
    char *base_ = nullptr;
    size_t mapped_ = 0;
    int64_t count_ = 0;
};

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }
    int64_t between(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }
    bool one_in(int64_t count) { return between(1, count) == 1; }
    double real(double low, double high) { return low + double(bits() >> 11) * 0x1p-53 * (high - low); }
    template <size_t COUNT>
    int64_t of(const int64_t (&values)[COUNT]) { return values[between(0, COUNT - 1)]; }
    template <class T>
    Array<T> array(int64_t count) { return Array<T>(count, one_in(4)); }

  private:
    uint64_t state_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double value_of(const void *from, int64_t index, int type) {
    if (type == HFQ_FLOAT32) return static_cast<const float *>(from)[index];
    const uint16_t bits = static_cast<const uint16_t *>(from)[index];
    const int mantissa_bits = type == HFQ_BFLOAT16 ? 7 : 10, bias = type == HFQ_BFLOAT16 ? 127 : 15;
    const int mantissa = bits & ((1 << mantissa_bits) - 1), exponent = (bits & 0x7FFF) >> mantissa_bits;
    double value = std::ldexp(exponent ? mantissa + (1 << mantissa_bits) : mantissa,
                              (exponent ? exponent : 1) - bias - mantissa_bits);
    if (exponent == 2 * bias + 1) value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
    return bits & 0x8000 ? -value : value;
}

// Numbers of any of the types, in exactly as many bytes.
struct Numbers {
    Array<float> floats;
    Array<uint16_t> words;
    int type;

    Numbers(Random &random, int64_t count, int kind, double low, double high) : type(kind) {
        if (type == HFQ_FLOAT32) floats = random.array<float>(count);
        else words = random.array<uint16_t>(count);
        for (int64_t i = 0; i < count; i++) set(i, random.real(low, high));
    }
    void set(int64_t i, double value) {  // 16-bit numbers are cut off, not rounded: any number will do
        if (type == HFQ_FLOAT32) {
            floats[i] = float(value);
        } else if (type == HFQ_BFLOAT16) {
            const float single = float(value);
            uint32_t bits;
            std::memcpy(&bits, &single, 4);
            words[i] = uint16_t(bits >> 16);
        } else {
            int exponent = 0;
            const bool finite = std::isfinite(value);
            const int mantissa = finite ? int(std::frexp(std::fabs(value), &exponent) * 2048) : 0;
            const bool normal = exponent + 14 > 0 && mantissa;
            const int magnitude = !finite ? 0x7C00 : normal ? (exponent + 14) << 10 | (mantissa & 1023) : 0;
            words[i] = uint16_t((value < 0 ? 0x8000 : 0) | magnitude);
        }
    }
    void *data() const { return type == HFQ_FLOAT32 ? static_cast<void *>(floats.data()) : words.data(); }
    double operator[](int64_t i) const { return value_of(data(), i, type); }
};

// Rows of `count` numbers of `bits` bits without gaps; what is left of their last bytes is random.
struct Packed {
    int64_t row_bytes;
    int bits;
    Array<uint8_t> bytes;

    Packed(Random &random, int64_t rows, int64_t count, int width)
        : row_bytes(ceil_div(count * width, 8)), bits(width), bytes(random.array<uint8_t>(rows * row_bytes)) {
        for (int64_t i = 0; i < bytes.size(); i++) bytes[i] = uint8_t(random.bits());
    }
    uint32_t at(int64_t row, int64_t column) const {
        uint32_t code = 0;
        for (int64_t bit = 0; bit < bits; bit++) {
            const int64_t place = column * bits + bit;
            code |= uint32_t(bytes[row * row_bytes + place / 8] >> place % 8 & 1) << bit;
        }
        return code;
    }
};

// What a call must give: results, and how far from them it may be.
struct Expected {
    std::vector<double> y, bound;
};

// Relative error of one rounding to a type, and what is lost where numbers get subnormal.
double rounding(int type) { return type == HFQ_BFLOAT16 ? 0x1p-8 : type == HFQ_FLOAT16 ? 0x1p-11 : 0x1p-24; }
double tiny(int type) { return type == HFQ_FLOAT16 ? 0x1p-24 : 0x1p-120; }

struct Sizes {
    int64_t n, k, m;
    int type;

    explicit Sizes(Random &random)
        : n(random.one_in(5) ? random.between(1, 150) : random.between(1, 30)),
          k(random.one_in(20) ? random.between(1, 2600) : random.between(1, random.one_in(3) ? 40 : 300)),
          m(random.one_in(2) ? random.between(1, 4) : random.between(1, 40)), type(int(random.between(0, 2))) {
        if (k > 300) m = std::min<int64_t>(m, 9);
    }
};

void describe(const Sizes &s, const hfq_weight &w) {
    std::printf("n=%lld k=%lld m=%lld type=%d bits=%d group=%lld height=%lld zero=%d of %d bits scale type %d%s\n",
                (long long)s.n, (long long)s.k, (long long)s.m, s.type, w.bits, (long long)w.group,
                (long long)w.scale_height, w.zero != nullptr, w.zero_bits, w.scale_type, w.scale_codes ? " quantized" : "");
}

// Run a problem on each instruction set. `call` fills y.
template <class Call>
bool agree(Random &random, const std::vector<std::string> &isas, const Sizes &s, const Expected &expected,
           const Call &call) {
    const uint16_t word = 0x7FA5;  // a NaN in each type that no kernel writes
    for (const std::string &isa : isas) {
        Numbers y(random, s.m * s.n, s.type, 0, 0);
        const int64_t words = s.m * s.n * (s.type == HFQ_FLOAT32 ? 2 : 1);
        for (int64_t i = 0; i < words; i++) std::memcpy(static_cast<char *>(y.data()) + 2 * i, &word, 2);
        if (hfq_use(isa.c_str()) || call(y.data())) return std::printf("%s: refused\n", isa.c_str()), false;
        for (int64_t i = 0; i < s.m * s.n; i++) {
            const double found = y[i], wanted = expected.y[size_t(i)];
            const int64_t last = s.type == HFQ_FLOAT32 ? 2 * i + 1 : i;
            const bool poisoned = !std::memcmp(static_cast<char *>(y.data()) + 2 * last, &word, 2);
            const bool right = std::isnan(wanted) ? std::isnan(found) && !poisoned
                                                  : found == wanted || std::fabs(found - wanted) <= expected.bound[size_t(i)];
            if (right) continue;
            std::printf("%s: row %lld column %lld: %g instead of %g, off by more than %g%s\n", isa.c_str(),
                        (long long)(i / s.n), (long long)(i % s.n), found, wanted, expected.bound[size_t(i)],
                        poisoned ? " (never written)" : "");
            return false;
        }
    }
    return true;
}

// A product as the last of two jobs.
int as_jobs(Random &random, const Sizes &s, const hfq_job &job, int threads) {
    Numbers other(random, s.m * s.n, s.type, 0, 0);
    hfq_job jobs[2] = {job, job};
    jobs[0].y = other.data();
    const int failed = hfq_linear_jobs(jobs, 2, s.type, threads);
    const size_t size = size_t(s.m * s.n) * (s.type == HFQ_FLOAT32 ? 4 : 2);
    return failed || std::memcmp(other.data(), job.y, size) ? -1 : 0;
}

// Any weight.
struct AnyWeight {
    hfq_weight w = {};
    int64_t columns, rows;  // of its blocks
    bool nested, zeros;
    Packed codes;
    Numbers levels, scales, scale_levels, outer, real_zero;
    Packed scale_codes, zero;

    AnyWeight(Random &random, const Sizes &s) : AnyWeight(random, s, frame(random, s), random.one_in(4), random.one_in(2)) {}

    double value(int64_t i, int64_t j) const { return (level(i, j) - shift(i, j)) * scale(i, j); }
    float in_float(int64_t i, int64_t j) const {
        const int64_t block = i / w.scale_height * columns + j / w.group;
        const float by = nested ? scale_levels.floats[scale_codes.at(0, block)] * outer.floats[block / w.scale_group]
                                : float(scales[block]);
        return (float(level(i, j)) - float(shift(i, j))) * by;
    }
    double size(int64_t i, int64_t j) const { return (std::fabs(level(i, j)) + std::fabs(shift(i, j))) * scale(i, j); }

  private:
    static hfq_weight frame(Random &random, const Sizes &s) {
        hfq_weight w = {};
        w.n = s.n, w.k = s.k, w.bits = int32_t(random.between(2, 8));
        const int64_t groups_of[] = {1, 8, 12, 16, 32, 32, 40, 64, 64, 96, 128, 128, 256, s.k, s.k + 5}, heights[] = {1, 1, 1, 3, 16, s.n};
        w.group = random.of(groups_of), w.scale_height = random.of(heights);
        w.scale_type = int32_t(random.between(0, 2)), w.zero_bits = int32_t(random.between(2, 8));
        w.zero_type = int32_t(random.between(0, 2));
        if (random.one_in(3)) w.zero_bits = w.zero_type == HFQ_FLOAT32 ? 32 : 16;
        const int64_t groups_of_scales[] = {1, 7, 16, 64, 256};
        w.scale_group = random.of(groups_of_scales);
        return w;
    }

    AnyWeight(Random &random, const Sizes &s, const hfq_weight &given, bool with_scales, bool with_zeros)
        : w(given), columns(ceil_div(s.k, w.group)), rows(ceil_div(s.n, w.scale_height)), nested(with_scales), zeros(with_zeros),
          codes(random, s.n, s.k, w.bits), levels(random, std::max(16, 1 << w.bits), HFQ_FLOAT32, -1, 1),
          scales(random, nested ? 0 : rows * columns, w.scale_type, 0.01, 0.1),
          scale_levels(random, nested ? 256 : 0, HFQ_FLOAT32, 0.1, 1),
          outer(random, nested ? ceil_div(rows * columns, w.scale_group) : 0, HFQ_FLOAT32, 0.01, 0.1),
          real_zero(random, zeros && w.zero_bits > 8 ? rows * columns : 0, w.zero_type, -20, 20),
          scale_codes(random, 1, nested ? rows * columns : 0, 8),
          zero(random, zeros && w.zero_bits <= 8 ? rows : 0, columns, std::min(w.zero_bits, 8)) {
        if (random.one_in(2))
            for (int64_t code = 0; code < levels.floats.size(); code++) levels.floats[code] = float(code % 256);
        w.codes = codes.bytes.data(), w.row_bytes = codes.row_bytes, w.levels = levels.floats.data();
        if (nested) {
            w.scale_codes = scale_codes.bytes.data(), w.scale_levels = scale_levels.floats.data();
            w.scale_scale = outer.floats.data();
        } else {
            w.scale = scales.data();
        }
        if (zeros) w.zero = w.zero_bits > 8 ? static_cast<const uint8_t *>(real_zero.data()) : zero.bytes.data();
    }

    double level(int64_t i, int64_t j) const { return levels[codes.at(i, j)]; }
    double shift(int64_t i, int64_t j) const {
        const int64_t row = i / w.scale_height, column = j / w.group;
        if (!zeros) return 0;
        return w.zero_bits > 8 ? real_zero[row * columns + column] : double(zero.at(row, column));
    }
    double scale(int64_t i, int64_t j) const {
        const int64_t block = i / w.scale_height * columns + j / w.group;
        return nested ? scale_levels[scale_codes.at(0, block)] * outer[block / w.scale_group] : scales[block];
    }
};

// What a layer without quantized inputs gives for x [m, k], and how far from it results may be after so many roundings to
// the type of y.
Expected product(const Sizes &s, const AnyWeight &weight, const std::vector<double> &x, const float *offset, double roundings) {
    const double relative = roundings * rounding(s.type) + (double(s.k) / 16 + 32) * 0x1p-23;
    Expected expected{std::vector<double>(size_t(s.m * s.n)), std::vector<double>(size_t(s.m * s.n))};
    std::vector<double> value(static_cast<size_t>(s.k)), size(value);
    for (int64_t i = 0; i < s.n; i++) {
        for (int64_t j = 0; j < s.k; j++) value[size_t(j)] = weight.value(i, j), size[size_t(j)] = weight.size(i, j);
        for (int64_t m = 0; m < s.m; m++) {
            double sum = offset ? offset[i] : 0, terms = std::fabs(sum);
            for (int64_t j = 0; j < s.k; j++) {
                const double number = x[size_t(m * s.k + j)];
                sum += number * value[size_t(j)];
                terms += std::fabs(number) * size[size_t(j)];
            }
            expected.y[size_t(m * s.n + i)] = sum;
            expected.bound[size_t(m * s.n + i)] = relative * terms + tiny(s.type);
        }
    }
    return expected;
}

// Some columns of a weight as a matrix, which must be those computed in float32, rounded once.
bool dequantized(Random &random, const std::vector<std::string> &isas, const Sizes &s, const AnyWeight &weight, int threads) {
    const int64_t first = random.between(0, s.k - 1), last = random.between(first + 1, s.k), count = last - first;
    for (const std::string &isa : isas) {
        const Numbers matrix(random, s.n * count, s.type, 5, 6);
        if (hfq_use(isa.c_str()) || hfq_dequantize(&weight.w, first, last, matrix.data(), s.type, threads))
            return std::printf("%s: refused\n", isa.c_str()), false;
        for (int64_t i = 0; i < s.n; i++) {
            for (int64_t j = first; j < last; j++) {
                const float wanted = weight.in_float(i, j);
                const double found = matrix[i * count + j - first];
                const double bound = s.type == HFQ_FLOAT32 ? 0 : rounding(s.type) * std::fabs(wanted) + tiny(s.type);
                if (std::fabs(found - wanted) <= bound) continue;
                std::printf("%s: weight %lld %lld of columns %lld to %lld: %g instead of %g\n", isa.c_str(), (long long)i,
                            (long long)j, (long long)first, (long long)last, found, double(wanted));
                return false;
            }
        }
    }
    return true;
}

// The gradient of an input, where there is a kernel for it: grad [m, n] times the weight.
bool gradients(Random &random, const std::vector<std::string> &isas, const Sizes &s, const AnyWeight &weight, int threads) {
    const Numbers grad(random, s.m * s.n, s.type, -1, 1);
    const double relative = 3.1 * rounding(s.type) + (double(s.n) / 2 + 32) * 0x1p-23;
    std::vector<double> sums(size_t(s.m * s.k)), terms(sums);
    for (int64_t i = 0; i < s.n; i++)
        for (int64_t j = 0; j < s.k; j++) {
            const double value = weight.value(i, j), size = weight.size(i, j);
            for (int64_t m = 0; m < s.m; m++) {
                sums[size_t(m * s.k + j)] += grad[m * s.n + i] * value;
                terms[size_t(m * s.k + j)] += std::fabs(grad[m * s.n + i]) * size;
            }
        }
    for (const std::string &isa : isas) {
        const Numbers found(random, s.m * s.k, s.type, 500, 600);
        if (hfq_use(isa.c_str())) return std::printf("%s: refused\n", isa.c_str()), false;
        const int declined = hfq_input_grad(&weight.w, grad.data(), found.data(), s.m, s.type, threads);
        if (declined < 0) return std::printf("%s: no memory\n", isa.c_str()), false;
        for (int64_t i = 0; !declined && i < s.m * s.k; i++) {
            const double bound = relative * terms[size_t(i)] + tiny(s.type);
            if (std::fabs(found[i] - sums[size_t(i)]) <= bound) continue;
            std::printf("%s: gradient %lld of column %lld: %g instead of %g, off by more than %g\n", isa.c_str(),
                        (long long)(i / s.k), (long long)(i % s.k), found[i], sums[size_t(i)], bound);
            return false;
        }
    }
    return true;
}

bool floating(Random &random, const std::vector<std::string> &isas, int threads) {
    const Sizes s(random);
    const AnyWeight weight(random, s);
    Numbers x(random, s.m * s.k, s.type, -0x1p-5, 0x1p-5);
    for (int64_t i = random.between(0, 9); i < s.m * s.k; i += random.between(1, 20)) x.set(i, random.one_in(2) ? 0 : 0.5);
    const Numbers bias(random, random.one_in(2) ? s.n : 0, HFQ_FLOAT32, -1, 1);
    const float *offset = bias.floats.size() ? bias.floats.data() : nullptr;
    std::vector<double> plain;
    for (int64_t i = 0; i < s.m * s.k; i++) plain.push_back(x[i]);
    // bfloat16 rounds levels, weights and results; float32 sums of 16 lanes, in any order, round for each product.
    const double roundings = s.type == HFQ_BFLOAT16 ? 3.1 : s.type == HFQ_FLOAT16 ? 1 : 0;
    const Expected expected = product(s, weight, plain, offset, roundings);
    if (!dequantized(random, isas, s, weight, threads)) return describe(s, weight.w), false;
    if (!gradients(random, isas, s, weight, threads)) return describe(s, weight.w), false;
    const bool joined = random.one_in(3);
    const auto call = [&](void *y) {
        return joined ? as_jobs(random, s, {&weight.w, nullptr, x.data(), offset, y, s.m}, threads)
                      : hfq_linear(&weight.w, x.data(), offset, y, s.m, s.type, threads);
    };
    if (agree(random, isas, s, expected, call)) return true;
    return describe(s, weight.w), false;
}

// Integers, floating-point numbers and powers of two, found by arithmetic, and others by a table.
struct AnyGrid {
    std::vector<float> numbers;
    int kind;

    explicit AnyGrid(Random &random) : kind(int(random.between(0, 3))) {
        const float e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6}, powers[] = {0, 0.25, 0.5, 1, 2, 4, 8, 16};
        for (int i = -7; i < 8; i++)
            numbers.push_back(kind == 0 ? float(i) : std::copysign((kind == 1 ? e2m1 : powers)[std::abs(i)], float(i)));
        if (kind == 3 && random.one_in(2))  // more than a few
            for (int i = 0; i < 200; i++) numbers.push_back(17 + float(i));
    }
    // The nearest number, ties to the one that is an even number of steps away from 0.
    float nearest(float value) const {
        size_t best = 0;
        for (size_t i = 1; i < numbers.size(); i++) {
            const double was = std::fabs(double(value) - numbers[best]), is = std::fabs(double(value) - numbers[i]);
            if (is < was || (is == was && i % 2 == 1)) best = i;  // 0 is the seventh
        }
        return numbers[best];
    }
    // The largest float32 that is rounded to the lower of two neighbours.
    float threshold(size_t i) const {
        float middle = float((double(numbers[i]) + numbers[i + 1]) / 2);
        return nearest(middle) == numbers[i] ? middle : std::nextafter(middle, -INFINITY);
    }
};

bool grids(Random &random, const std::vector<std::string> &isas, int threads) {
    const Sizes s(random);
    const AnyWeight weight(random, s);
    const AnyGrid grid(random);
    hfq_input input = {};
    input.low = grid.numbers.front(), input.high = grid.numbers.back();
    input.mantissa_bits = grid.kind == 0 ? 8 : grid.kind == 1, input.normal = grid.kind == 0 ? 256 : grid.kind == 1 ? 1 : 0.25;
    const int64_t count = int64_t(grid.numbers.size());
    const Array<float> levels = random.array<float>(count), thresholds = random.array<float>(count - 1);
    std::copy(grid.numbers.begin(), grid.numbers.end(), levels.data());
    for (int64_t i = 0; i + 1 < count; i++) thresholds[i] = grid.threshold(size_t(i));
    if (grid.kind == 3) input.levels = levels.data(), input.thresholds = thresholds.data(), input.level_count = count;
    input.scale = random.one_in(3) ? float(random.real(0.01, 0.3)) : 0;
    input.split = random.one_in(3) ? 3 : std::numeric_limits<float>::infinity();
    const int64_t heights[] = {1, 1, 1, 2, s.m, s.m + 3}, widths[] = {s.k, s.k, s.k, 32, 7, 1};
    input.height = random.of(heights), input.width = std::min(s.k, random.of(widths));
    input.scale_type = int32_t(random.between(0, 2)), input.scale_last = random.one_in(2);
    if (grid.kind == 0 && random.one_in(2)) input.zero = 1, input.low = 0, input.high = 15, input.zero_point = float(random.between(0, 15));
    std::vector<int32_t> places(size_t(s.k)), kept;
    for (int64_t j = 0; j < s.k; j++) places[size_t(j)] = int32_t(j);
    for (int64_t j = s.k - 1; j > 0; j--) std::swap(places[size_t(j)], places[size_t(random.between(0, j))]);
    if (random.one_in(2)) std::sort(places.begin(), places.end());
    const Array<int32_t> order = random.array<int32_t>(s.k);
    std::copy(places.begin(), places.end(), order.data());
    if (!std::is_sorted(places.begin(), places.end())) input.order = order.data();
    const bool stored = random.one_in(2);
    for (int64_t j = 0; stored && j < s.k; j++)
        if (random.one_in(20)) kept.push_back(int32_t(j));
    const Array<int32_t> outliers = random.array<int32_t>(int64_t(kept.size()));
    std::copy(kept.begin(), kept.end(), outliers.data());
    input.outlier_count = outliers.size(), input.outlier_type = int32_t(random.between(1, 2));
    const Numbers outlier_weight(random, s.n * input.outlier_count, input.outlier_type, -1, 1);
    input.outliers = outliers.data(), input.outlier_weight = outlier_weight.words.data();
    Numbers x(random, s.m * s.k, s.type, -2, 2);
    for (int64_t i = random.between(0, 99); i < s.m * s.k; i += random.between(1, 500)) x.set(i, random.real(-8, 8));
    const Numbers bias(random, random.one_in(2) ? s.n : 0, HFQ_FLOAT32, -1, 1);
    const float *offset = bias.floats.size() ? bias.floats.data() : nullptr;

    enum { ROUNDED, SPLIT, APART };
    std::vector<int> kind(size_t(s.k), ROUNDED);
    for (int64_t i = 0; i < s.m * s.k; i++)
        if (std::fabs(x[i]) >= input.split) kind[size_t(i % s.k)] = SPLIT;
    for (const int32_t j : kept) kind[size_t(j)] = APART;
    const bool given = input.scale != 0;
    const int64_t height = given ? 1 : input.height, width = given ? s.k : input.width;
    std::vector<double> plain(size_t(s.m * s.k)), seen(plain);
    for (int64_t top = 0; top < s.m; top += height)
        for (int64_t left = 0; left < s.k; left += width) {
            const int64_t bottom = std::min(top + height, s.m), right = std::min(left + width, s.k);
            float low = 0, high = 0;
            const auto rest = [&](int64_t m, int64_t j) { return kind[size_t(j)] == ROUNDED ? float(x[m * s.k + j]) : 0.0f; };
            for (int64_t m = top; m < bottom; m++)
                for (int64_t j = left; j < right; j++) low = std::min(low, rest(m, j)), high = std::max(high, rest(m, j));
            float scale = input.zero ? (high - low) / input.high : std::max(high, -low) / input.high;
            scale = given ? input.scale : scale == 0 ? 1 : scale;
            if (!given && input.scale_type != HFQ_FLOAT32) {  // to 8 or 11 bits, nearest, ties to even
                int exponent;
                const int bits = input.scale_type == HFQ_BFLOAT16 ? 8 : 11;
                const double fraction = std::frexp(double(scale), &exponent);
                const int last = input.scale_type == HFQ_FLOAT16 && exponent < -13 ? 24 + exponent : bits;
                const double steps = std::ldexp(fraction, last);
                scale = float(std::ldexp(last < bits ? std::max(1.0, std::ceil(steps)) : std::nearbyint(steps), exponent - last));
            }
            const float zero = !input.zero ? 0 : given ? input.zero_point : std::min(15.0f, std::nearbyint(-low / scale));
            for (int64_t m = top; m < bottom; m++)
                for (int64_t j = left; j < right; j++) {
                    const float value = rest(m, j) / scale;
                    const float whole = std::min(std::max(std::nearbyint(value) + zero, 0.0f), 15.0f) - zero;
                    const double number = double(input.zero ? whole : grid.nearest(value)) * scale;
                    plain[size_t(m * s.k + j)] = kind[size_t(j)] == SPLIT ? x[m * s.k + j] : kind[size_t(j)] == APART ? 0 : number;
                }
        }
    for (int64_t m = 0; m < s.m; m++)
        for (int64_t j = 0; j < s.k; j++) seen[size_t(m * s.k + j)] = plain[size_t(m * s.k + places[size_t(j)])];
    // bfloat16 may round inputs times their scale as well.
    const double roundings = s.type == HFQ_BFLOAT16 ? 4.1 : s.type == HFQ_FLOAT16 ? 1 : 0;
    Expected expected = product(s, weight, seen, offset, roundings);
    for (int64_t i = 0; i < s.n; i++)
        for (int64_t m = 0; m < s.m; m++)
            for (size_t o = 0; o < kept.size(); o++) {
                const double more = x[m * s.k + kept[o]] * outlier_weight[i * input.outlier_count + int64_t(o)];
                expected.y[size_t(m * s.n + i)] += more;
                expected.bound[size_t(m * s.n + i)] += (roundings * rounding(s.type) + 0x1p-20) * std::fabs(more);
            }
    const auto call = [&](void *y) { return hfq_linear_grid(&weight.w, &input, x.data(), offset, y, s.m, s.type, threads); };
    if (agree(random, isas, s, expected, call)) return true;
    std::printf("grid %d scale %g of type %d split %g zero %d, %lld outliers, blocks %lld x %lld, %s: ", grid.kind, input.scale,
                input.scale_type, input.split, input.zero, (long long)input.outlier_count, (long long)input.height,
                (long long)input.width, input.order ? "ordered" : "as they are");
    return describe(s, weight.w), false;
}

bool integers(Random &random, const std::vector<std::string> &isas, int threads) {
    const Sizes s(random);
    hfq_weight w = {};
    w.n = s.n, w.k = w.group = s.k, w.scale_height = 1, w.bits = random.one_in(2) ? 4 : 8, w.zero_bits = w.bits;
    const Packed codes(random, s.n, s.k, w.bits);
    w.codes = codes.bytes.data(), w.row_bytes = codes.row_bytes;
    const bool four = w.bits == 4 || random.one_in(3), narrow = random.one_in(2);  // four bits may lie in bytes
    const int64_t low = -(four ? 8 : 128) + narrow, count = (four ? 16 : 256) - narrow;
    const Numbers levels(random, 1 << w.bits, HFQ_FLOAT32, 0, 0);
    for (int64_t code = 0; code < count; code++) levels.floats[code] = float(low + code);
    for (int64_t i = 0; w.bits == 8 && i < codes.bytes.size(); i++) codes.bytes[i] = uint8_t(codes.bytes[i] % count);
    for (int64_t i = 0; w.bits == 4 && i < codes.bytes.size(); i++)
        codes.bytes[i] = uint8_t(codes.bytes[i] / 16 % count * 16 + codes.bytes[i] % 16 % count);
    w.levels = levels.floats.data();
    w.scale_type = int32_t(random.between(0, 2));
    const Numbers scales(random, s.n, w.scale_type, 0.001, 0.02);
    w.scale = scales.data();

    hfq_input input = {};
    input.high = random.one_in(3) ? 7 : 127, input.low = -input.high - float(random.one_in(2));
    input.scale = random.one_in(3) ? float(random.real(0.001, 0.05)) : 0;
    input.split = random.one_in(2) ? 3 : std::numeric_limits<float>::infinity();
    std::vector<int32_t> kept;
    const bool stored = random.one_in(2);
    const int64_t each = random.one_in(8) ? 1 : random.between(2, 60);
    for (int64_t j = 0; stored && j < s.k; j++)
        if (random.one_in(each)) kept.push_back(int32_t(j));
    const Array<int32_t> outliers = random.array<int32_t>(int64_t(kept.size()));
    std::copy(kept.begin(), kept.end(), outliers.data());
    input.outlier_count = outliers.size(), input.outlier_type = int32_t(random.between(1, 2));
    const Numbers outlier_weight(random, s.n * input.outlier_count, input.outlier_type, -1, 1);
    if (!kept.empty()) input.outliers = outliers.data(), input.outlier_weight = outlier_weight.words.data();
    Numbers x(random, s.m * s.k, s.type, -2, 2);
    for (int64_t i = random.between(0, 99); i < s.m * s.k; i += random.between(1, 500)) x.set(i, random.real(-8, 8));
    if (random.one_in(8)) x.set(random.between(0, s.m * s.k - 1), std::numeric_limits<double>::infinity());
    const Numbers bias(random, random.one_in(2) ? s.n : 0, HFQ_FLOAT32, -1, 1);
    const float *offset = bias.floats.size() ? bias.floats.data() : nullptr;

    std::vector<int64_t> place(size_t(s.k), -1);  // of a kept column among the stored ones, -2 if only split off
    for (int64_t i = 0; i < s.m * s.k; i++)
        if (std::isfinite(input.split) && std::fabs(x[i]) >= input.split) place[size_t(i % s.k)] = -2;
    for (size_t i = 0; i < kept.size(); i++) place[size_t(kept[i])] = int64_t(i);
    Expected expected{std::vector<double>(size_t(s.m * s.n)), std::vector<double>(size_t(s.m * s.n))};
    std::vector<double> q(static_cast<size_t>(s.k));
    for (int64_t m = 0; m < s.m; m++) {
        float top = 0;
        bool finite = true;
        for (int64_t j = 0; j < s.k; j++) {
            if (place[size_t(j)] != -1) continue;
            top = std::max(top, float(std::fabs(x[m * s.k + j])));
            finite = finite && std::isfinite(x[m * s.k + j]);
        }
        const float step = input.scale != 0 ? input.scale : top == 0 ? 1 : top / input.high;
        for (int64_t j = 0; j < s.k; j++) {
            const float number = std::nearbyint(float(x[m * s.k + j]) / step);
            q[size_t(j)] = place[size_t(j)] != -1 ? 0 : std::min(std::max(number, input.low), input.high);
        }
        for (int64_t i = 0; i < s.n; i++) {
            double sum = 0, apart = offset ? offset[i] : 0, terms = std::fabs(apart);
            for (int64_t j = 0; j < s.k; j++) {
                const double level = levels[codes.at(i, j)];
                const int64_t at = place[size_t(j)];
                if (at == -1) {
                    sum += q[size_t(j)] * level;
                } else {
                    const double product = x[m * s.k + j] * (at >= 0 ? outlier_weight[i * input.outlier_count + at] : level * scales[i]);
                    apart += product, terms += std::fabs(product);
                }
            }
            const double exact = sum * scales[i] * step, wanted = finite ? exact + apart : std::nan("");
            const double relative = rounding(s.type) + (double(s.k) / 16 + 8) * 0x1p-23;
            const bool infinite = !std::isfinite(wanted);  // a kept infinity: as NaN, or as itself, depending on zeros
            expected.y[size_t(m * s.n + i)] = wanted;
            expected.bound[size_t(m * s.n + i)] = infinite ? 0 : relative * (std::fabs(exact) + terms) + tiny(s.type);
        }
    }
    const bool joined = random.one_in(3);
    const auto call = [&](void *y) {
        return joined ? as_jobs(random, s, {&w, &input, x.data(), offset, y, s.m}, threads)
                      : hfq_linear_int(&w, &input, x.data(), offset, y, s.m, s.type, threads);
    };
    if (agree(random, isas, s, expected, call)) return true;
    std::printf("input %g to %g scale %g split %g, %lld outliers of type %d, levels from %g: ", input.low, input.high,
                input.scale, input.split, (long long)input.outlier_count, input.outlier_type, levels[0]);
    return describe(s, w), false;
}

// Rounding is exact: codes and values are compared bit by bit with those of a count of all thresholds.
bool rounded(Random &random, const std::vector<std::string> &isas, int threads) {
    hfq_rounding r = {};
    r.n = random.between(1, 20), r.k = random.one_in(4) ? random.between(500, 1100) : random.between(1, 70);
    if (random.one_in(20)) r.n = 40, r.k = 900;  // enough for more than one thread
    const int64_t groups_of[] = {1, 3, 8, 12, 16, 32, 64, 100, r.k, r.k + 5}, heights[] = {1, 1, 2, r.n};
    r.group = random.of(groups_of), r.scale_height = random.of(heights), r.row_stride = r.k + random.between(0, 3);
    const int64_t columns = ceil_div(r.k, r.group), rows = ceil_div(r.n, r.scale_height);
    const bool arithmetic = random.one_in(3), zeros = arithmetic && random.one_in(2);
    r.count = int32_t(random.one_in(2) ? random.between(2, 16) : random.between(2, 256)), r.keeps_nan = random.one_in(2);
    const int type = int(random.between(0, 2));
    const Numbers scale(random, rows * columns, HFQ_FLOAT32, 0.01, 0.1), zero(random, zeros ? rows * columns : 0, HFQ_FLOAT32, 0, 0);
    for (int64_t i = 0; i < zero.floats.size(); i++) zero.floats[i] = float(random.between(0, r.count - 1));
    const Numbers levels(random, r.count, HFQ_FLOAT32, -1, 1), thresholds(random, arithmetic ? 0 : r.count - 1, HFQ_FLOAT32, -1, 1);
    std::sort(levels.floats.data(), levels.floats.data() + r.count);
    std::sort(thresholds.floats.data(), thresholds.floats.data() + thresholds.floats.size());
    for (int64_t i = 0; arithmetic && i < r.count; i++) levels.floats[i] = float(i - r.count / 2 * !zeros);
    r.scale = scale.floats.data(), r.zero = zeros ? zero.floats.data() : nullptr, r.levels = levels.floats.data();
    r.thresholds = arithmetic ? nullptr : thresholds.floats.data();
    Numbers x(random, (r.n - 1) * r.row_stride + r.k, type, -0.1, 0.1);
    for (int64_t i = 0; i < (r.n - 1) * r.row_stride + r.k; i++) {
        const float tie = thresholds.floats.size() ? thresholds.floats[i % thresholds.floats.size()] * scale.floats[0] : 0.0f;
        if (random.one_in(4)) x.set(i, random.one_in(3) ? random.real(-30, 30) : double(tie));
        if (random.one_in(50)) x.set(i, std::numeric_limits<double>::infinity() * (random.one_in(2) ? 1 : -1));
    }
    const double large = double(r.count);
    for (const std::string &isa : isas) {
        Array<uint8_t> codes = random.array<uint8_t>(r.n * r.k);
        const Numbers values(random, r.n * r.k, HFQ_FLOAT32, 5, 6);
        if (hfq_use(isa.c_str()) || hfq_encode(&r, x.data(), codes.data(), type, threads) ||
            hfq_round(&r, x.data(), static_cast<float *>(values.data()), type, threads))
            return std::printf("%s: refused\n", isa.c_str()), false;
        for (int64_t i = 0; i < r.n * r.k; i++) {
            const int64_t row = i / r.k, column = i % r.k, block = row / r.scale_height * columns + column / r.group;
            const float step = scale.floats[block], q = float(x[row * r.row_stride + column]) / step;
            double code = 0, level = 0;
            if (arithmetic) {
                const double low = zeros ? 0 : levels[0], offset = zeros ? zero[block] : 0;
                const double number = std::min(std::max(std::nearbyint(double(q)) + offset, low), low + large - 1);
                code = number - low, level = number - offset;
            } else {
                for (int64_t t = 0; t < r.count - 1; t++) code += q > thresholds.floats[t];
                level = levels[int64_t(code)];
            }
            const float value = float(level) * step;
            if (codes[i] == code && values[i] == value) continue;
            std::printf("%s: row %lld column %lld of %lld x %lld, group %lld, %d levels%s: %d and %g instead of %g and %g\n",
                        isa.c_str(), (long long)row, (long long)column, (long long)r.n, (long long)r.k, (long long)r.group,
                        r.count, zeros ? ", zeros" : arithmetic ? ", arithmetic" : "", codes[i], values[i], code, value);
            return false;
        }
    }
    return true;
}

// One step, on arrays of exactly what it reads and writes. `over`: it writes over x.
struct AnyStep {
    Sizes s;
    hfq_step step = {};
    int64_t rows, positions, tokens;
    Numbers x, other, more, fixed;
    bool over;

    AnyStep(Random &random, int op) : AnyStep(random, Sizes(random), op, random.between(1, 5)) {}

    int operator()(void *y, int threads) const {
        void *const slots[] = {over ? y : x.data(), y, other.data(), more.data()};
        if (over) std::memcpy(y, x.data(), size_t(s.m * s.n) * (s.type == HFQ_FLOAT32 ? 4 : 2));
        return hfq_steps(&step, 1, slots, rows, positions, tokens, s.type, threads);
    }

    // What it gives for a row of x, and the sum of the magnitudes of what each number is the sum of.
    void expect(int64_t row, double *y, double *terms) const {
        const int64_t n = s.n, half = n / 2, start = row * n, turn = row / step.parts % positions * n;
        std::vector<double> weight = step.op == HFQ_ATTEND ? attention(row) : std::vector<double>();
        double squares = 0;
        for (int64_t j = 0; j < n; j++) squares += x[start + j] * x[start + j];
        for (int64_t j = 0; j < n; j++) {
            const double value = x[start + j], swapped = j < half ? -x[start + (j + half) % n] : x[start + j - half];
            double sum = 0, size = 0;
            const auto plus = [&](double term) { sum += term, size += std::fabs(term); };
            if (step.op == HFQ_NORM) plus(value / std::sqrt(squares / double(n) + step.scalar) * fixed[j]);
            if (step.op == HFQ_ROPE) plus(value * other[turn + j]), plus(swapped * more[turn + j]);
            if (step.op == HFQ_GATE) plus(value / (1 + std::exp(-value)) * other[start + j]);
            if (step.op == HFQ_ADD) plus(value + other[start + j]);
            for (size_t t = 0; t < weight.size(); t++)
                plus(weight[t] * more[(row / step.sharing * tokens + int64_t(t)) * n + j]);
            y[start + j] = sum, terms[start + j] = size;
        }
    }

  private:
    static Sizes sizes(Random &random, Sizes s, int op, int64_t rows, int64_t parts) {
        if (random.one_in(16)) s.n = op == HFQ_ATTEND ? random.between(450, 512) : random.between(3000, 4000);
        if (op == HFQ_ROPE) s.n += s.n % 2;
        s.m = rows * parts;
        return s;
    }
    AnyStep(Random &random, const Sizes &any, int op, int64_t sharing)
        : AnyStep(random, any, op, random.one_in(8) ? sharing + 8 : sharing, random.between(1, 2), random.between(1, 7)) {}

    AnyStep(Random &random, const Sizes &any, int op, int64_t sharing, int64_t heads, int64_t count)
        : s(sizes(random, any, op, count, op == HFQ_GATE || op == HFQ_ADD ? 1 : op == HFQ_ATTEND ? sharing * heads : heads)),
          rows(count), positions(random.between(1, count)), tokens(op == HFQ_ATTEND ? random.between(1, 70) : 1),
          x(random, s.m * s.n, s.type, -2, 2), other(random, second(op, heads), s.type, -2, 2),
          more(random, op == HFQ_ROPE || op == HFQ_ATTEND ? second(op, heads) : 0, s.type, -2, 2),
          fixed(random, op == HFQ_NORM ? s.n : 0, s.type, -2, 2), over(random.one_in(2)) {
        step.op = op, step.x = 0, step.y = 1, step.other = 2, step.more = 3, step.n = s.n, step.parts = s.m / rows;
        step.scalar = op == HFQ_ATTEND ? 1 / std::sqrt(float(s.n)) : 1e-5f, step.sharing = op == HFQ_ATTEND ? sharing : 1;
        if (op == HFQ_NORM) step.fixed = fixed.data();
    }
    int64_t second(int op, int64_t heads) const {
        if (op == HFQ_NORM) return 0;
        return s.n * (op == HFQ_ROPE ? positions : op == HFQ_ATTEND ? rows * heads * tokens : s.m);
    }
    std::vector<double> attention(int64_t row) const {
        std::vector<double> weight(size_t(tokens), 0.0);
        double all = 0;
        for (int64_t t = 0; t < tokens; t++) {
            double score = 0;
            for (int64_t i = 0; i < s.n; i++)
                score += x[row * s.n + i] * other[(row / step.sharing * tokens + t) * s.n + i];
            all += weight[size_t(t)] = std::exp(score * step.scalar);
        }
        for (double &part : weight) part /= all;
        return weight;
    }
};

// Every kind of step, each alone.
bool single_steps(Random &random, const std::vector<std::string> &isas, int threads) {
    for (int op = HFQ_NORM; op <= HFQ_ATTEND; op++) {
        const AnyStep any(random, op);
        const Sizes &s = any.s;
        Expected expected{std::vector<double>(size_t(s.m * s.n)), std::vector<double>(size_t(s.m * s.n))};
        // Three roundings to the type; float32 sums of squares or scores, and an exponential.
        const double relative = 3.1 * rounding(s.type) + (double(s.n) / 8 + 64) * 0x1p-23;
        for (int64_t row = 0; row < s.m; row++) any.expect(row, expected.y.data(), expected.bound.data());
        for (double &bound : expected.bound) bound = relative * bound + 4 * tiny(s.type);
        if (agree(random, isas, s, expected, [&](void *y) { return any(y, threads); })) continue;
        std::printf("step %d%s: %lld rows of %lld parts of %lld numbers of type %d, %lld positions, %lld tokens, sharing %lld\n",
                    op, any.over ? " over x" : "", (long long)any.rows, (long long)any.step.parts, (long long)s.n, s.type,
                    (long long)any.positions, (long long)any.tokens, (long long)any.step.sharing);
        return false;
    }
    return true;
}

// Products behind a norm have the bits of single calls.
bool joined_steps(Random &random, const std::vector<std::string> &isas, int threads) {
    const Sizes s(random);
    const AnyWeight weight(random, s);
    const Numbers x(random, s.m * s.k, s.type, -2, 2), gain(random, s.k, s.type, -1, 1), bias(random, s.n, HFQ_FLOAT32, -1, 1);
    const int count = int(random.between(1, 3));
    for (const std::string &isa : isas) {
        const Numbers normed(random, s.m * s.k, s.type, 5, 6), y(random, s.m * s.n, s.type, 5, 6);
        std::vector<Numbers> others;
        std::vector<void *> slots = {x.data(), normed.data()};
        std::vector<hfq_step> steps = {{HFQ_NORM, 0, 1, 0, 0, 1e-5f, s.k, 1, 1, nullptr, nullptr, gain.data()}};
        for (int i = 0; i < count; i++) {
            others.emplace_back(random, s.m * s.n, s.type, 5, 6);
            slots.push_back(others.back().data());
            steps.push_back({HFQ_LINEAR, 1, i + 2, 0, 0, 0, s.n, 1, 1, &weight.w, nullptr, bias.data()});
        }
        const size_t bytes = size_t(s.m * s.n) * (s.type == HFQ_FLOAT32 ? 4 : 2);
        bool same = !hfq_use(isa.c_str()) && !hfq_steps(steps.data(), count + 1, slots.data(), s.m, 1, 1, s.type, threads) &&
                    !hfq_linear(&weight.w, normed.data(), bias.floats.data(), y.data(), s.m, s.type, threads);
        for (const Numbers &other : others) same = same && !std::memcmp(other.data(), y.data(), bytes);
        if (same) continue;
        std::printf("%s: %d products behind a norm are not those of single calls: ", isa.c_str(), count);
        return describe(s, weight.w), false;
    }
    return true;
}

bool stepped(Random &random, const std::vector<std::string> &isas, int threads) {
    return single_steps(random, isas, threads) && joined_steps(random, isas, threads);
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 5) return std::fprintf(stderr, "usage: drive_cpu heap|guard SEED PROBLEMS THREADS [ISA...]\n"), 2;
    guarded = std::string(arguments[1]) == "guard";
    const uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
    const int problems = std::atoi(arguments[3]), threads = std::atoi(arguments[4]);
    std::vector<std::string> isas(arguments + 5, arguments + count);
    if (isas.empty()) {
        const std::string names = hfq_isas();
        for (size_t start = 0; start <= names.size();) {
            const size_t end = std::min(names.find(',', start), names.size());
            isas.push_back(names.substr(start, end - start));
            start = end + 1;
        }
    }
    for (int i = 0; i < problems; i++) {
        Random random(seed * 1000003 + uint64_t(i));
        bool (*const problems[])(Random &, const std::vector<std::string> &, int) = {integers, floating, grids, rounded, stepped};
        const auto problem = problems[i % 5];
        if (!problem(random, isas, threads))
            return std::printf("problem %d of seed %llu\n", i, (unsigned long long)seed), 1;
    }
    std::printf("%d problems with %d threads on", problems, threads);
    for (const std::string &isa : isas) std::printf(" %s", isa.c_str());
    std::printf("\n");
    return 0;
}
