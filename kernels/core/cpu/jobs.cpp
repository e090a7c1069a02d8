// Several products in one call: what a decoding step does to one input, or to one expert's tokens after the other's.
//
// Where every job has one row of inputs, all of them share one parallel region: each thread takes its part of the
// rows of each weight, so that threads meet once and not after every small matrix. Rows do not depend on each other:
// the results are those of single calls, to the last bit.
#include "hfquant.h"

#include "threads.h"

namespace {

int run(const hfq_job &job, int type, int threads) {
    if (job.input) return hfq_linear_int(job.weight, job.input, job.x, job.bias, job.y, job.m, type, threads);
    return hfq_linear(job.weight, job.x, job.bias, job.y, job.m, type, threads);
}

int64_t divisor(int64_t a, int64_t b) { return b ? divisor(b, a % b) : a; }

int64_t groups_of(const hfq_weight &w) { return (w.k + w.group - 1) / w.group; }

int64_t size_of(int type) { return type == HFQ_FLOAT32 ? 4 : 2; }

// Rows that a weight can be cut after: whole blocks, and whole blocks of scales.
int64_t step_of(const hfq_weight &w) {
    if (!w.scale_codes) return w.scale_height;
    return w.scale_height * (w.scale_group / divisor(groups_of(w), w.scale_group));
}

template <class T>
const T *ahead(const T *from, int64_t count) {
    return from ? from + count : nullptr;
}

// The rows [first, last) of a weight; `first` is a multiple of its step.
hfq_weight rows_of(hfq_weight w, int64_t first, int64_t last) {
    const int64_t above = first / w.scale_height, groups = groups_of(w);
    w.n = last - first;
    w.codes += first * w.row_bytes;
    w.scale = ahead(static_cast<const char *>(w.scale), above * groups * size_of(w.scale_type));
    w.zero = ahead(w.zero, above * ((groups * w.zero_bits + 7) / 8));
    w.scale_codes = ahead(w.scale_codes, above * groups);
    if (w.scale_codes) w.scale_scale += above * groups / w.scale_group;
    return w;
}

// What thread `id` does of a job with one row of inputs.
int run_part(const hfq_job &job, int type, int id, int threads) {
    const hfq_weight &w = *job.weight;
    const int64_t step = step_of(w), steps = (w.n + step - 1) / step;
    const int64_t first = steps * id / threads * step, end = steps * (id + 1) / threads * step;
    const int64_t last = end < w.n ? end : w.n;
    if (first >= last) return 0;
    const hfq_weight rows = rows_of(w, first, last);
    hfq_input input = {};
    hfq_job part = {&rows, nullptr, job.x, ahead(job.bias, first), static_cast<char *>(job.y) + first * size_of(type), 1};
    if (job.input) {
        input = *job.input;
        input.outlier_weight = ahead(input.outlier_weight, first * input.outlier_count);
        part.input = &input;
    }
    return run(part, type, 1);
}

// Whether every thread has rows of each weight to work on.
bool can_share(const hfq_job *jobs, int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++)
        if (jobs[i].m != 1 || jobs[i].weight->n < threads * step_of(*jobs[i].weight)) return false;
    return count > 1 && threads > 1;
}

}  // namespace

int hfq_linear_jobs(const hfq_job *jobs, int64_t count, int type, int threads) {
    int failed = 0;
    if (!can_share(jobs, count, threads)) {
        for (int64_t i = 0; i < count && !failed; i++) failed = run(jobs[i], type, threads);
        return failed;
    }
#pragma omp parallel num_threads(threads) reduction(| : failed)
    for (int64_t i = 0; i < count; i++) failed |= run_part(jobs[i], type, omp_get_thread_num(), omp_get_num_threads());
    return failed ? -1 : 0;
}
