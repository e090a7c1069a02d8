// `linear` for every width of codes: what the sources with AVX-512 BF16 share. They differ in how they multiply many
// rows of bfloat16 inputs.
#pragma once

#include "avx512_matvec.h"
#include "avx512_panel.h"

namespace {

inline bool supports_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

template <int BITS>
int in_float(const Problem &p) {
    const hfq_weight &w = p.weight;
    const int64_t width = ceil_div(w.k, 64) * 64;
    Buffer<float> x(p.m * width);
    const FloatRows<BITS> rows(w, p.threads);
    if (!x.data || !rows.ready()) return -1;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t m = 0; m < p.m; m++) {
        const InTile at(m, p.m, width, InFloat::LANES);
        float *to = x.data + at.offset;
        for (int64_t j = 0; j < width; j += 16, to += 16 * at.stride)
            _mm512_store_ps(to, load_floats(p.x, m * w.k + j, w.k - j, p.type));
    }
    return gemm<InFloat>(p, x.data, width, 64, rows);
}

template <class Many, class Codes>
int in_bf16(const Problem &p) {
    const Levels levels(p.weight);
    return p.m <= Many::template matvec_rows<Codes>(p.weight) ? matvec<Codes>(p, Codes(levels)) : Many::template run<Codes>(p, levels);
}

template <class Many, int BITS, class Codes = Bytes<BITS>>
int linear_of(const Problem &p) {
    return p.type == HFQ_BFLOAT16 && Scales<Codes>::fits(p.weight) ? in_bf16<Many, Codes>(p) : in_float<BITS>(p);
}

// `Many::run<Codes>(problem, levels)` multiplies more rows of bfloat16 inputs than `Many::matvec_rows<Codes>(weight)`, up to
// which `matvec` takes them.
template <class Many>
int linear_with(const Problem &p) {
    if (p.m == 0) return 0;
    switch (p.weight.bits) {
        case 2: return linear_of<Many, 2>(p);
        case 3: return linear_of<Many, 3>(p);
        case 4: return linear_of<Many, 4, Nibbles>(p);
        case 5: return linear_of<Many, 5>(p);
        case 6: return linear_of<Many, 6>(p);
        case 7: return linear_of<Many, 7>(p);
        default: return linear_of<Many, 8>(p);
    }
}

}  // namespace
