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

bool floating(Random &random, const std::vector<std::string> &isas, int threads) {
    const Sizes s(random);
    hfq_weight w = {};
    w.n = s.n, w.k = s.k, w.bits = int32_t(random.between(2, 8));
    const Packed codes(random, s.n, s.k, w.bits);
    w.codes = codes.bytes.data(), w.row_bytes = codes.row_bytes;
    const int64_t groups_of[] = {1, 8, 12, 16, 32, 32, 40, 64, 64, 96, 128, 128, 256, s.k, s.k + 5}, heights[] = {1, 1, 1, 3, 16, s.n};
    w.group = random.of(groups_of), w.scale_height = random.of(heights);
    const Numbers levels(random, std::max(16, 1 << w.bits), HFQ_FLOAT32, -1, 1);
    if (random.one_in(2))
        for (int64_t code = 0; code < levels.floats.size(); code++) levels.floats[code] = float(code % 256);
    w.levels = levels.floats.data();
    const int64_t columns = ceil_div(s.k, w.group), rows = ceil_div(s.n, w.scale_height);
    w.scale_type = int32_t(random.between(0, 2));
    const bool nested = random.one_in(4), zeros = random.one_in(2);
    const int64_t groups_of_scales[] = {1, 7, 16, 64, 256};
    w.scale_group = random.of(groups_of_scales);
    const Numbers scales(random, nested ? 0 : rows * columns, w.scale_type, 0.01, 0.1);
    const Packed scale_codes(random, 1, nested ? rows * columns : 0, 8);
    const Numbers scale_levels(random, nested ? 256 : 0, HFQ_FLOAT32, 0.1, 1);
    const Numbers outer(random, nested ? ceil_div(rows * columns, w.scale_group) : 0, HFQ_FLOAT32, 0.01, 0.1);
    if (nested) {
        w.scale_codes = scale_codes.bytes.data(), w.scale_levels = scale_levels.floats.data();
        w.scale_scale = outer.floats.data();
    } else {
        w.scale = scales.data();
    }
    w.zero_bits = int32_t(random.between(2, 8));
    const Packed zero(random, zeros ? rows : 0, columns, w.zero_bits);
    if (zeros) w.zero = zero.bytes.data();
    Numbers x(random, s.m * s.k, s.type, -0x1p-5, 0x1p-5);
    for (int64_t i = random.between(0, 9); i < s.m * s.k; i += random.between(1, 20)) x.set(i, random.one_in(2) ? 0 : 0.5);
    const Numbers bias(random, random.one_in(2) ? s.n : 0, HFQ_FLOAT32, -1, 1);
    const float *offset = bias.floats.size() ? bias.floats.data() : nullptr;

    // bfloat16 rounds levels, weights and results; float32 sums of 16 lanes, in any order, round for each product.
    const double roundings = s.type == HFQ_BFLOAT16 ? 3.1 : s.type == HFQ_FLOAT16 ? 1 : 0;
    const double relative = roundings * rounding(s.type) + (double(s.k) / 16 + 32) * 0x1p-23;
    Expected expected{std::vector<double>(size_t(s.m * s.n)), std::vector<double>(size_t(s.m * s.n))};
    std::vector<double> weight(static_cast<size_t>(s.k)), size(weight);
    for (int64_t i = 0; i < s.n; i++) {
        for (int64_t j = 0; j < s.k; j++) {
            const int64_t block = i / w.scale_height * columns + j / w.group;
            const double scale = nested ? scale_levels[scale_codes.at(0, block)] * outer[block / w.scale_group] : scales[block];
            const double level = levels[codes.at(i, j)], shift = zeros ? zero.at(i / w.scale_height, j / w.group) : 0;
            weight[size_t(j)] = (level - shift) * scale, size[size_t(j)] = (std::fabs(level) + shift) * scale;
        }
        for (int64_t m = 0; m < s.m; m++) {
            double sum = offset ? offset[i] : 0, terms = std::fabs(sum);
            for (int64_t j = 0; j < s.k; j++) {
                sum += x[m * s.k + j] * weight[size_t(j)];
                terms += std::fabs(x[m * s.k + j]) * size[size_t(j)];
            }
            expected.y[size_t(m * s.n + i)] = sum;
            expected.bound[size_t(m * s.n + i)] = relative * terms + tiny(s.type);
        }
    }
    const bool joined = random.one_in(3);
    const auto call = [&](void *y) {
        return joined ? as_jobs(random, s, {&w, nullptr, x.data(), offset, y, s.m}, threads)
                      : hfq_linear(&w, x.data(), offset, y, s.m, s.type, threads);
    };
    if (agree(random, isas, s, expected, call)) return true;
    return describe(s, w), false;
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
        if (!(i % 3 ? floating(random, isas, threads) : integers(random, isas, threads)))
            return std::printf("problem %d of seed %llu\n", i, (unsigned long long)seed), 1;
    }
    std::printf("%d problems with %d threads on", problems, threads);
    for (const std::string &isa : isas) std::printf(" %s", isa.c_str());
    std::printf("\n");
    return 0;
}
