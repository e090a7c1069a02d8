// The exported functions: they hand over to the best instruction set of this processor.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int COUNT = 4;
using Source = const Isa *(*)();
const Source SOURCES[COUNT] = {hfq_amx, hfq_avx512_bf16, hfq_avx2, hfq_scalar};  // best first

const Isa *usable(int index) {
    const Isa *isa = SOURCES[index] ? SOURCES[index]() : nullptr;
    return isa && isa->supported() ? isa : nullptr;
}

// The best one, or the one that is asked for.
const Isa *find(const char *asked) {
    for (int index = 0; index < COUNT; index++) {
        const Isa *isa = usable(index);
        if (isa && (!asked || !*asked || std::strcmp(asked, isa->name) == 0)) return isa;
    }
    return nullptr;
}

std::atomic<const Isa *> &chosen() {
    static std::atomic<const Isa *> isa{find(std::getenv("HFQUANT_CPU_ISA"))};
    return isa;
}

const char *list() {
    static char names[128];
    names[0] = '\0';
    for (int index = 0; index < COUNT; index++) {
        const Isa *isa = usable(index);
        if (!isa) continue;
        if (names[0]) std::strcat(names, ",");
        std::strcat(names, isa->name);
    }
    return names;
}

}  // namespace

int hfq_abi(void) { return HFQ_ABI; }

const char *hfq_isa(void) {
    const Isa *isa = chosen();
    return isa ? isa->name : nullptr;
}

int hfq_use(const char *name) {
    const Isa *isa = find(name);
    if (!isa) return -1;
    chosen() = isa;
    return 0;
}

const char *hfq_isas(void) {
    static const char *names = list();
    return names;
}

int hfq_linear(const hfq_weight *weight, const void *x, const float *bias, void *y, int64_t m, int type, int threads) {
    const Isa *isa = chosen();
    return isa ? isa->linear(Problem{*weight, x, bias, y, m, type, threads}) : -1;
}

int hfq_linear_int(const hfq_weight *weight, const hfq_input *input, const void *x, const float *bias, void *y,
                   int64_t m, int type, int threads) {
    const Isa *isa = chosen();
    return isa ? isa->linear_int(Problem{*weight, x, bias, y, m, type, threads}, *input) : -1;
}

int hfq_linear_grid(const hfq_weight *weight, const hfq_input *input, const void *x, const float *bias, void *y,
                    int64_t m, int type, int threads) {
    const Isa *isa = chosen();
    return isa ? isa->linear_grid(Problem{*weight, x, bias, y, m, type, threads}, *input) : -1;
}

int hfq_encode(const hfq_rounding *rounding, const void *x, uint8_t *codes, int type, int threads) {
    const Isa *isa = chosen();
    if (isa) isa->round(RoundingProblem{*rounding, x, codes, nullptr, type, threads});
    return isa ? 0 : -1;
}

int hfq_round(const hfq_rounding *rounding, const void *x, float *values, int type, int threads) {
    const Isa *isa = chosen();
    if (isa) isa->round(RoundingProblem{*rounding, x, nullptr, values, type, threads});
    return isa ? 0 : -1;
}

int hfq_input_grad(const hfq_weight *weight, const void *grad, void *to, int64_t m, int type, int threads) {
    const Isa *isa = chosen();
    if (!isa) return -1;
    return isa->input_grad ? isa->input_grad(Problem{*weight, grad, nullptr, to, m, type, threads}) : 1;
}

int run_step(const StepProblem &step) {
    const Isa *isa = chosen();
    if (isa) isa->step(step);
    return isa ? 0 : -1;
}

int hfq_dequantize(const hfq_weight *weight, int64_t first, int64_t last, void *to, int type, int threads) {
    const Isa *isa = chosen();
    return isa ? isa->dequantize(*weight, first, last, to, type, threads) : -1;
}
