// What threads of `tile_gemm` do: weights in bfloat16, and integer ones.
#pragma once

#include "amx_gemm.h"
#include "amx_rows.h"
#include "avx512_int8.h"

namespace {

// Some rows of a weight, and their results.
class Bf16Worker {
  public:
    using Kind = Bf16Tiles;

    bool ready() const { return true; }
    void load(int64_t row, int64_t count) {
        first = row, rows = count;
        scales.load(id, first, rows);
    }

  protected:
    const Problem &p;
    const PanelScales &scales;
    const int id;
    int64_t first = 0, rows = 0;

    Bf16Worker(const Problem &problem, const PanelScales &all, int thread) : p(problem), scales(all), id(thread) {}

    void finish_rows(int64_t m, const float *sums) const {
        for (int64_t r = 0; r < rows; r += TILE_LINES) finish(p, m, first + r, rows - r, sums + r);
    }
};

// Chunk by chunk.
template <class Decoder>
class ChunkWorker : public Bf16Worker {
  public:
    using Codes = typename Decoder::Codes;
    static constexpr int64_t STEPS = Codes::VECTORS, STEP_BYTES = Codes::BYTES / STEPS;

    ChunkWorker(const Problem &problem, const PanelScales &all, const Decoder &decode, int thread)
        : Bf16Worker(problem, all, thread), decoder(decode) {}

    void decode(int64_t r, int64_t count, int64_t step, int64_t steps, int64_t ahead, TileLines to) const {
        const int64_t row_bytes = p.weight.row_bytes, apart = 2 * scales.slots;
        for (int64_t i = 0; i < steps; i += STEPS, to.at += STEPS * to.next) {
            const int64_t chunk = (step + i) / STEPS, at = chunk * Codes::BYTES, group = decoder.first(chunk);
            const uint8_t *from = p.weight.codes + (first + r) * row_bytes + at;
            const float *scale = scales.scale(id, r) + group, *zero = scales.zero(id, r) + group;
            for (int64_t n = 0; n < count; n++, from += row_bytes, scale += apart, zero += apart) {
                if (ahead) _mm_prefetch(reinterpret_cast<const char *>(from + ahead), _MM_HINT_T1);
                decoder.decode(load_bytes(from, row_bytes - at), scale, zero, to.at + n * to.row, to.next);
            }
        }
    }
    void write(int64_t m, float *sums) const {
        for (int64_t r = 0; !Decoder::SCALED && r < rows; r++) sums[r] *= *scales.scale(id, r);
        finish_rows(m, sums);
    }

  private:
    const Decoder decoder;
};

// Row by row: any other scales.
template <class AnyCodes>
class RowWorker : public Bf16Worker {
  public:
    using Codes = AnyCodes;
    using Rows = Bf16Rows<Codes>;
    static constexpr int64_t STEP_BYTES = Codes::BYTES / Codes::VECTORS;

    RowWorker(const Problem &problem, const Rows &all, int thread) : Bf16Worker(problem, all, thread), weights(all) {}

    void decode(int64_t r, int64_t count, int64_t step, int64_t steps, int64_t ahead, TileLines to) const {
        const uint8_t *from = p.weight.codes + (first + r) * p.weight.row_bytes + step * STEP_BYTES + ahead;
        for (int64_t n = 0; n < count; n++, from += p.weight.row_bytes) {
            for (int64_t i = 0; ahead && i < steps * STEP_BYTES; i += 64) _mm_prefetch(reinterpret_cast<const char *>(from + i), _MM_HINT_T1);
            weights.decode(id, first + r + n, r + n, 32 * step, 32 * steps, reinterpret_cast<bf16 *>(to.at + n * to.row), to.next / 64);
        }
    }
    void write(int64_t m, const float *sums) const { finish_rows(m, sums); }

  private:
    const Rows &weights;
};

// Codes are the unsigned side: what they are larger than their levels, `IntResults` takes back.
template <int BITS>
class IntWorker {
  public:
    using Kind = IntTiles;
    static constexpr int64_t STEP_BYTES = 8 * BITS;

    IntWorker(const Problem &p, const IntInput &in) : w(p.weight), results(p, in, rows_together(ceil_div(p.m, TILE_LINES))) {}

    bool ready() const { return results.ready(); }
    void load(int64_t row, int64_t count) {
        first = row, rows = count;
        results.load(first, rows);
    }
    void decode(int64_t r, int64_t count, int64_t step, int64_t steps, int64_t ahead, TileLines to) const {
        const uint8_t *from = w.codes + (first + r) * w.row_bytes + step * STEP_BYTES;
        for (int64_t n = 0; n < count; n++, from += w.row_bytes, to.at += to.row)
            for (int64_t i = 0; i < steps; i++) {
                const int64_t at = i * STEP_BYTES;
                if (ahead) _mm_prefetch(reinterpret_cast<const char *>(from + at + ahead), _MM_HINT_T1);
                _mm512_store_si512(to.at + i * to.next, spread<BITS>(load_bytes(from + at, w.row_bytes - step * STEP_BYTES - at)));
            }
    }
    void write(int64_t m, const int32_t *sums) const { results.write(m, first, rows, sums); }

  private:
    const hfq_weight &w;
    const IntResults results;
    int64_t first = 0, rows = 0;
};

}  // namespace
