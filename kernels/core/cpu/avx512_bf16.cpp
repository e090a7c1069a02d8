// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512bf16 -mavx512vnni -mfma -mf16c -Wno-uninitialized -Wno-maybe-uninitialized
// AVX-512 with VBMI and BF16 (Zen 4, Sapphire Rapids and later): bfloat16 inputs meet bfloat16 weights in
// `vdpbf16ps`, which adds up in float32; other inputs are computed in float32.
#include "avx512_int8.h"
#include "avx512_matvec.h"
#include "avx512_panel.h"

namespace {

bool supported() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
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
        for (int64_t j = 0; j < width; j++)
            to[j / 16 * 16 * at.stride + j % 16] = j < w.k ? load(p.x, m * w.k + j, p.type) : 0.0f;
    }
    return gemm<InFloat>(p, x.data, width, 64, rows);
}

template <class Codes>
int in_bf16(const Problem &p) {
    const hfq_weight &w = p.weight;
    const Levels levels(w);
    if (p.m <= MATVEC_ROWS) return matvec<Codes>(p, Codes(levels));
    const int64_t width = ceil_div(w.k, Codes::COLUMNS) * Codes::COLUMNS;
    Buffer<bf16> x(p.m * width);
    const Bf16Rows<Codes> rows(w, levels, p.threads);
    if (!x.data || !rows.ready()) return -1;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t m = 0; m < p.m; m++) {
        const InTile at(m, p.m, width, InBf16::LANES);
        arrange<Codes>(static_cast<const bf16 *>(p.x) + m * w.k, w.k, x.data + at.offset, at.stride);
    }
    return gemm<InBf16>(p, x.data, width, Codes::COLUMNS, rows);
}

template <int BITS, class Codes = Bytes<BITS>>
int linear_of(const Problem &p) {
    return p.type == HFQ_BFLOAT16 && Scales<Codes>::fits(p.weight) ? in_bf16<Codes>(p) : in_float<BITS>(p);
}

int linear(const Problem &p) {
    switch (p.weight.bits) {
        case 2: return linear_of<2>(p);
        case 3: return linear_of<3>(p);
        case 4: return linear_of<4, Nibbles>(p);
        case 5: return linear_of<5>(p);
        case 6: return linear_of<6>(p);
        case 7: return linear_of<7>(p);
        default: return linear_of<8>(p);
    }
}

int linear_int(const Problem &p, const hfq_input &input) {
    return p.weight.bits == 4 ? linear_int_of<4>(p, input) : linear_int_of<8>(p, input);
}

const Isa ISA = {"avx512_bf16", supported, linear, linear_int};

}  // namespace

extern "C" const Isa *hfq_avx512_bf16() { return &ISA; }
