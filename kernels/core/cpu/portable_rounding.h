// Vectors of one number, for `round_with`.
#pragma once

#include "dequantize.h"

namespace {

struct OneLane {
    static constexpr int64_t LANES = 1;
    using Floats = float;
    using Ints = int32_t;

    static float load(const void *x, int64_t at, int64_t, int type) { return ::load(x, at, type); }
    static float load(const float *from) { return *from; }
    static void put(float *to, float value) { *to = value; }
    static float fill(float value) { return value; }
    static int32_t set(int32_t value) { return value; }
    static float add(float a, float b) { return a + b; }
    static float subtract(float a, float b) { return a - b; }
    static int32_t subtract(int32_t a, int32_t b) { return a - b; }
    static float multiply(float a, float b) { return a * b; }
    static float divide(float a, float b) { return a / b; }
    static int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }
    static float round(float x) { return std::nearbyint(x); }
    static float limit(float x, float low, float high) {  // NaN stays NaN
        x = x < low ? low : x;
        return x > high ? high : x;
    }
    static int32_t integers(float x) { return x == x ? int32_t(x) : 0; }
    static float nan_or(float x, float other) { return x == x ? other : x; }

    // The child of a node on whose side x is: above, or NaN, is right.
    static int32_t child(int32_t node, float x, float threshold) { return 2 * node + !(x <= threshold); }

    // Number `index` of a table of COUNT, or that many behind the first where it is larger.
    template <int COUNT>
    static float pick(const float *table, int32_t index) {
        return table[index & (COUNT - 1)];
    }
    static void store(uint8_t *to, int64_t, int32_t code) { *to = uint8_t(code); }
    static void store(float *to, int64_t, float value) { *to = value; }
    static void store(void *to, int64_t at, int64_t, int type, float value) { ::store(to, at, type, value); }
    static int32_t bytes(const uint8_t *from) { return *from; }
};

}  // namespace
