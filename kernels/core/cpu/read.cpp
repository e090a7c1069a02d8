// Memory read as fast as it can be: what the speed of kernels that read weights once is compared with.
#include "hfquant.h"
#include "threads.h"

int64_t hfq_read(const int64_t *from, int64_t count, int threads) {
    int64_t total = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t part = count / omp_get_num_threads() / 32 * 32;
        const int64_t *words = from + part * omp_get_thread_num();
        int64_t sums[32] = {};
        for (int64_t i = 0; i < part; i += 32) {
            for (int64_t line = 0; line < 32; line += 8) __builtin_prefetch(words + i + 512 + line);
            for (int64_t j = 0; j < 32; j++) sums[j] += words[i + j];
        }
        for (const int64_t sum : sums) total += sum;
    }
    return total;
}
