// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512bf16 -mavx512vnni -mfma -mf16c -mamx-tile -mamx-bf16 -mamx-int8 -Wno-uninitialized -Wno-maybe-uninitialized
// AMX (Sapphire Rapids and later): many rows of bfloat16 or integer inputs are multiplied in tiles. Their
// products are so much faster than those of vectors that a tile is worth it for a few rows.
// All else is the code for AVX-512.
#include "amx_gradient.h"
#include "amx_workers.h"
#include "avx512_linear.h"
#include "avx512_rounding.h"
#include "grid_input.h"
#include "steps.h"

namespace {

class Tiles {
  public:
    // Fewer rows of inputs than cost as much with vectors as a whole tile does.
    template <class Codes>
    static int64_t matvec_rows(const hfq_weight &w) {
        if (Codes::VECTORS == 4) return w.k > 4096 ? 1 : 2;
        return Codes::BYTES == 64 ? 1 : 3;
    }

    template <class Codes>
    static int run(const Problem &p, const Levels &levels) {
        const int64_t chunks = ceil_div(p.weight.k, Codes::COLUMNS);
        const InputTiles x(p.m, chunks * Codes::VECTORS);
        const int64_t stride = 32 * x.steps + 32;  // one more vector: rows a power of two apart would share cache lines
        Buffer<bf16> arranged(p.threads * TILE_LINES * stride);
        const Bf16Rows<Codes> rows(p.weight, levels, p.threads, rows_together(x.tiles));
        if (!x.data.data || !arranged.data || !rows.ready()) return -1;
        x.pack(p.threads, 2 * stride, [&](int id, int64_t m, int64_t count) {
            bf16 *own = arranged.data + id * TILE_LINES * stride;
            for (int64_t r = 0; r < count; r++)
                arrange<Codes>(static_cast<const bf16 *>(p.x) + (m + r) * p.weight.k, p.weight.k, own + r * stride, 1);
            return reinterpret_cast<const uint8_t *>(own);
        });
        return multiply(p, x, rows, levels);
    }

  private:
    template <class Codes>
    using Rows = Bf16Rows<Codes>;

    // With the first decoder that fits.
    template <class Decoder, class... Others, class Codes>
    static int with_first(const Problem &p, const InputTiles &x, const Rows<Codes> &rows, const Levels &levels) {
        if (Decoder::fits(p.weight, rows.scales)) {
            const Decoder decoder(p.weight, levels, rows.scales);
            return tile_gemm(p, x, [&](int id) { return ChunkWorker<Decoder>(p, rows, decoder, id); });
        }
        if constexpr (sizeof...(Others) > 0)
            return with_first<Others...>(p, x, rows, levels);
        else
            return tile_gemm(p, x, [&](int id) { return RowWorker<Codes>(p, rows, id); });
    }

    template <class Codes>
    static int multiply(const Problem &p, const InputTiles &x, const Rows<Codes> &rows, const Levels &levels) {
        using Plain = PlainTiles<Codes>;
        if constexpr (Codes::VECTORS == 4)
            return with_first<Plain, NibbleTiles<1, false>, NibbleTiles<2, false>, NibbleTiles<4, false>, NibbleTiles<1, true>,
                              NibbleTiles<2, true>, NibbleTiles<4, true>>(p, x, rows, levels);
        else if constexpr (Codes::BYTES <= 8 * 6)
            return with_first<Plain, WordTiles<Codes::BYTES / 8>>(p, x, rows, levels);
        else
            return with_first<Plain>(p, x, rows, levels);
    }
};

int linear(const Problem &p) { return linear_with<Tiles>(p); }

template <int BITS>
int int_tiles_of(const Problem &p, const hfq_input &input) {
    if (p.m <= TILE_INPUTS) return linear_int_of<BITS>(p, input);  // waits for memory, not for products
    return linear_int_with(p, input, 1, [&](const IntInput &in) {
        const InputTiles x(p.m, in.width / TILE_LINE);
        if (!x.data.data) return -1;
        x.pack(p.threads, in.width, [&](int, int64_t m, int64_t) {
            return reinterpret_cast<const uint8_t *>(in.x.data + m * in.width);
        });
        return tile_gemm(p, x, [&](int) { return IntWorker<BITS>(p, in); });
    });
}

int linear_int(const Problem &p, const hfq_input &input) {
    return p.weight.bits == 4 ? int_tiles_of<4>(p, input) : int_tiles_of<8>(p, input);
}

int linear_grid(const Problem &p, const hfq_input &input) { return grid_linear_bf16(p, input, linear); }

bool supported() { return supports_avx512() && supports_tiles(); }

const Isa ISA = {"amx", supported, linear, linear_int, linear_grid, round, dequantize, input_grad_with<GradientInTiles>, step};

}  // namespace

extern "C" const Isa *hfq_amx() { return &ISA; }
