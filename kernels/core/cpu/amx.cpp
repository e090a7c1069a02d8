// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512bf16 -mavx512vnni -mfma -mf16c -mamx-tile -mamx-bf16 -mamx-int8 -Wno-uninitialized -Wno-maybe-uninitialized
// AMX (Sapphire Rapids and later): many rows of bfloat16 or integer inputs are multiplied in tiles. Their
// products are so much faster than those of vectors that a tile is worth it from the first row on that `matvec` does not
// take, full or not.
// All else is the code for AVX-512.
#include "avx512_gradient.h"
#include "avx512_int8.h"
#include "avx512_linear.h"
#include "avx512_rounding.h"
#include "grid_input.h"

#include "amx_gemm.h"

namespace {

template <class Codes>
struct Bf16Worker {
    using Kind = Bf16Tiles;
    using Rows = Bf16Rows<Codes, TILE_LINES>;
    const Problem &p;
    const Rows &rows;
    const int id;
    int64_t panel = 0;  // its first row

    bool ready() const { return true; }
    void load(int64_t first, int64_t count) {
        panel = first;
        rows.load(id, first, count);
    }
    void decode(int64_t r, int64_t step, int64_t steps, uint8_t *to) const {
        rows.decode(id, panel + r, r, 32 * step, 32 * steps, reinterpret_cast<bf16 *>(to));
    }
    void write(int64_t m, int64_t first, int64_t count, const float *sums) const {
        for (int64_t r = 0; r < count; r += 16) finish(p, m, first + r, count - r, sums + r);
    }
};

// Codes are the unsigned side: what they are larger than their levels, `IntResults` takes back.
template <int BITS>
struct IntWorker {
    using Kind = IntTiles;
    const IntPanel<BITS> codes;
    const IntResults results;
    int64_t panel = 0;

    IntWorker(const Problem &p, const IntInput &in) : codes{p.weight}, results(p, in, WIDE_ROWS) {}

    bool ready() const { return results.ready(); }
    void load(int64_t first, int64_t count) {
        panel = first;
        results.load(first, count);
    }
    void decode(int64_t r, int64_t step, int64_t steps, uint8_t *to) const {
        const hfq_weight &w = codes.w;
        const uint8_t *soon = w.codes + (panel + r + 4) * w.row_bytes + step * 8 * BITS;  // rows come one by one
        for (int64_t i = 0; i < steps; i++) {
            _mm_prefetch(reinterpret_cast<const char *>(soon + i * 8 * BITS), _MM_HINT_T0);
            _mm512_store_si512(to + i * TILE_BYTES, codes.load(panel + r, step + i));
        }
    }
    void write(int64_t m, int64_t first, int64_t count, const int32_t *sums) const { results.write(m, first, count, sums); }
};

// Packs inputs [m, steps]: `rows(thread, m, count)` gives the first of up to 16 rows, `stride` bytes apart.
template <class Rows>
void pack_all(const Problem &p, int64_t steps, int64_t stride, const Rows &rows, uint8_t *to) {
#pragma omp parallel num_threads(p.threads)
    {
        const int id = omp_get_thread_num();
        const Share mine(ceil_div(p.m, TILE_LINES), 1, id, omp_get_num_threads());
        for (int64_t tile = mine.first; tile < mine.last; tile++) {
            const int64_t m = tile * TILE_LINES, count = p.m - m < TILE_LINES ? p.m - m : TILE_LINES;
            pack_inputs(rows(id, m, count), stride, count, steps, to + tile * steps * TILE_BYTES);
        }
    }
}

struct Tiles {
    template <class Codes>
    static int run(const Problem &p, const Levels &levels) {
        using Worker = Bf16Worker<Codes>;
        const hfq_weight &w = p.weight;
        const int64_t steps = ceil_div(w.k, Codes::COLUMNS) * Codes::COLUMNS / 32;
        const int64_t stride = 32 * steps + 32;  // one more vector: rows a power of two apart would share cache lines
        Buffer<uint8_t> x(ceil_div(p.m, TILE_LINES) * steps * TILE_BYTES);
        Buffer<bf16> arranged(p.threads * TILE_LINES * stride);
        const typename Worker::Rows rows(w, levels, p.threads, WIDE_ROWS);
        if (!x.data || !arranged.data || !rows.ready()) return -1;
        const auto sixteen = [&](int id, int64_t m, int64_t count) {
            bf16 *own = arranged.data + id * TILE_LINES * stride;
            for (int64_t r = 0; r < count; r++)
                arrange<Codes>(static_cast<const bf16 *>(p.x) + (m + r) * w.k, w.k, own + r * stride, 1);
            return reinterpret_cast<const uint8_t *>(own);
        };
        pack_all(p, steps, 2 * stride, sixteen, x.data);
        return tile_gemm(p, x.data, steps, [&](int id) { return Worker{p, rows, id}; });
    }
};

int linear(const Problem &p) { return linear_with<Tiles>(p); }

template <int BITS>
int int_tiles_of(const Problem &p, const hfq_input &input) {
    if (p.m <= TILE_INPUTS) return linear_int_of<BITS>(p, input);  // waits for memory, not for products
    return linear_int_with(p, input, 1, [&](const IntInput &in) {
        const int64_t steps = in.width / TILE_LINE;
        Buffer<uint8_t> x(ceil_div(p.m, TILE_LINES) * steps * TILE_BYTES);
        if (!x.data) return -1;
        const auto sixteen = [&](int, int64_t m, int64_t) {
            return reinterpret_cast<const uint8_t *>(in.x.data + m * in.width);
        };
        pack_all(p, steps, in.width, sixteen, x.data);
        return tile_gemm(p, x.data, steps, [&](int) { return IntWorker<BITS>(p, in); });
    });
}

int linear_int(const Problem &p, const hfq_input &input) {
    return p.weight.bits == 4 ? int_tiles_of<4>(p, input) : int_tiles_of<8>(p, input);
}

int linear_grid(const Problem &p, const hfq_input &input) { return grid_linear_bf16(p, input, linear); }

bool supported() { return supports_avx512() && supports_tiles(); }

const Isa ISA = {"amx", supported, linear, linear_int, linear_grid, round, dequantize, input_grad};

}  // namespace

extern "C" const Isa *hfq_amx() { return &ISA; }
