// Portable C++: what runs where nothing better is built, and what the other sources are compared with.
#include "grid_input.h"
#include "portable.h"
#include "portable_rounding.h"
#include "steps.h"

namespace {

bool supported() { return true; }

int linear(const Problem &p) { return portable_linear(p, decode_levels); }

int linear_int(const Problem &p, const hfq_input &input) { return portable_linear_int(p, input, decode_levels); }

int linear_grid(const Problem &p, const hfq_input &input) { return grid_linear<float>(p, input, HFQ_FLOAT32, linear); }

void round(const RoundingProblem &p) { round_with<OneLane>(p); }

int dequantize(const hfq_weight &w, int64_t first, int64_t last, void *to, int type, int threads) {
    return dequantize_with<OneLane>(w, first, last, to, type, threads);
}

const Isa ISA = {"scalar", supported, linear, linear_int, linear_grid, round, dequantize, nullptr, step};

}  // namespace

extern "C" const Isa *hfq_scalar() { return &ISA; }
