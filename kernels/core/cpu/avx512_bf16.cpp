// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512bf16 -mavx512vnni -mfma -mf16c -Wno-uninitialized -Wno-maybe-uninitialized
// AVX-512 with VBMI and BF16 (Zen 4, Sapphire Rapids and later): bfloat16 inputs meet bfloat16 weights in
// `vdpbf16ps`, which adds up in float32; other inputs are computed in float32.
#include "avx512_gradient.h"
#include "avx512_int8.h"
#include "avx512_linear.h"
#include "avx512_rounding.h"
#include "grid_input.h"
#include "steps.h"

namespace {

class Vectors {
  public:
    template <class Codes>
    static int64_t matvec_rows(const hfq_weight &) {
        return MATVEC_ROWS;
    }

    template <class Codes>
    static int run(const Problem &p, const Levels &levels) {
        return in_blocks(p, MOST_INPUTS, p.weight.k, p.weight.n, [&](const Problem &part) { return block<Codes>(part, levels); });
    }

  private:
    template <class Codes>
    static int block(const Problem &p, const Levels &levels) {
        const hfq_weight &w = p.weight;
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
};

int linear(const Problem &p) { return linear_with<Vectors>(p); }

int linear_int(const Problem &p, const hfq_input &input) {
    return p.weight.bits == 4 ? linear_int_of<4>(p, input) : linear_int_of<8>(p, input);
}

int linear_grid(const Problem &p, const hfq_input &input) { return grid_linear_bf16(p, input, linear); }

const Isa ISA = {"avx512_bf16", supports_avx512, linear, linear_int, linear_grid, round, dequantize, input_grad_with<GradientInVectors>, step};

}  // namespace

extern "C" const Isa *hfq_avx512_bf16() { return &ISA; }
