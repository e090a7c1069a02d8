// A layer of a model in one call: products and what lies between them, one after the other.
#include "isa.h"

namespace {

constexpr int64_t MOST = 8;  // products that are handed over at once

hfq_job job_of(const hfq_step &s, void *const *slots, int64_t rows) {
    return {s.weight, s.input, slots[s.x], static_cast<const float *>(s.fixed), slots[s.y], rows};
}

// The products from `first` on that follow each other; none reads what another one writes.
int64_t products_from(const hfq_step *steps, int64_t first, int64_t count) {
    int64_t last = first;
    while (last < count && last < first + MOST && steps[last].op == HFQ_LINEAR && steps[last].x == steps[first].x) last++;
    return last - first;
}

}  // namespace

int hfq_steps(const hfq_step *steps, int64_t count, void *const *slots, int64_t rows, int64_t positions,
              int64_t tokens, int type, int threads) {
    for (int64_t i = 0; i < count;) {
        const int64_t products = products_from(steps, i, count);
        if (products) {
            hfq_job jobs[MOST];
            for (int64_t p = 0; p < products; p++) jobs[p] = job_of(steps[i + p], slots, rows);
            if (hfq_linear_jobs(jobs, products, type, threads)) return -1;
            i += products;
            continue;
        }
        const hfq_step &s = steps[i++];
        const StepProblem small = {s.op,    slots[s.x], slots[s.other], slots[s.more], slots[s.y],
                                   s.fixed, rows,       s.n,            s.parts,       s.sharing,
                                   positions, tokens,   s.scalar,          type,          threads};
        if (run_step(small)) return -1;
    }
    return 0;
}
