// The tile instructions as Intel's Software Developer's Manual (volume 2) describes them, in plain C++. What would be an
// exception of the processor ends the program.
#pragma once

#include "common.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

struct EmulatedTiles {
    TileConfig config;  // palette 0: not configured
    uint8_t data[TILE_REGISTERS][TILE_LINES][TILE_LINE];
};

inline EmulatedTiles &emulated() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

inline void require(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "tile instruction: %s\n", what);
    std::abort();
}

// A register that the configuration has.
template <int T>
EmulatedTiles &with_tile() {
    static_assert(0 <= T && T < TILE_REGISTERS, "there are eight registers");
    EmulatedTiles &tiles = emulated();
    require(tiles.config.palette == 1, "no configuration in this thread");
    require(tiles.config.lines[T] > 0, "the register is not configured");
    return tiles;
}

inline bool supports_tiles() { return true; }

inline void tile_configure(const TileConfig &config) {
    require(config.palette == 1, "palette 1 is the only one");
    require(config.start_row == 0, "an instruction would go on in the middle");
    for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes are set");
    for (int i = 0; i < 16; i++) {
        const int bytes = config.line_bytes[i], lines = config.lines[i];
        require(bytes <= TILE_LINE && lines <= TILE_LINES, "more than 16 lines of 64 bytes");
        require((bytes == 0) == (lines == 0), "lines without bytes, or bytes without lines");
        require(i < TILE_REGISTERS || lines == 0, "there are eight registers");
    }
    std::memset(&emulated(), 0, sizeof(EmulatedTiles));
    emulated().config = config;
}

inline void tile_release() { std::memset(&emulated(), 0, sizeof(EmulatedTiles)); }

template <int T>
void tile_zero() {
    std::memset(with_tile<T>().data[T], 0, TILE_BYTES);
}

template <int T>
void tile_load(const void *from, int64_t stride) {
    EmulatedTiles &tiles = with_tile<T>();
    std::memset(tiles.data[T], 0, TILE_BYTES);
    for (int line = 0; line < tiles.config.lines[T]; line++)
        std::memcpy(tiles.data[T][line], static_cast<const uint8_t *>(from) + line * stride, tiles.config.line_bytes[T]);
}

template <int T>
void tile_stream(const void *from, int64_t stride) {
    tile_load<T>(from, stride);
}

template <int T>
void tile_store(void *to, int64_t stride) {
    const EmulatedTiles &tiles = with_tile<T>();
    for (int line = 0; line < tiles.config.lines[T]; line++)
        std::memcpy(static_cast<uint8_t *>(to) + line * stride, tiles.data[T][line], tiles.config.line_bytes[T]);
}

// The registers of a product, whose sizes must fit together.
template <int C, int A, int B>
EmulatedTiles &with_tiles() {
    static_assert(C != A && C != B && A != B, "the three registers differ");
    EmulatedTiles &tiles = with_tile<C>();
    with_tile<A>();
    with_tile<B>();
    const TileConfig &config = tiles.config;
    require(config.line_bytes[A] % 4 == 0 && config.line_bytes[B] % 4 == 0, "numbers of four bytes");
    require(config.lines[C] == config.lines[A], "lines of C and A");
    require(config.line_bytes[C] == config.line_bytes[B], "columns of C and B");
    require(config.line_bytes[A] == 4 * config.lines[B], "columns of A and lines of B");
    return tiles;
}

// Subnormal numbers count as 0, as operands and as results.
inline float flushed(float value) { return std::fabs(value) < FLT_MIN ? std::copysign(0.0f, value) : value; }

inline float multiply_add(float a, float b, float sum) { return flushed(std::fma(flushed(a), flushed(b), flushed(sum))); }

// Of the pairs of columns, the first ones are added up apart from the second ones.
template <int C, int A, int B>
void tile_dp_bf16() {
    EmulatedTiles &tiles = with_tiles<C, A, B>();
    const int columns = tiles.config.line_bytes[C] / 4;
    for (int m = 0; m < tiles.config.lines[C]; m++) {
        float first[16] = {}, second[16] = {}, sums[16] = {};
        for (int k = 0; k < tiles.config.line_bytes[A] / 4; k++) {
            uint32_t a, b[16] = {};
            std::memcpy(&a, tiles.data[A][m] + 4 * k, 4);
            std::memcpy(b, tiles.data[B][k], tiles.config.line_bytes[B]);
            for (int n = 0; n < 16; n++) {
                first[n] = multiply_add(to_float(a << 16), to_float(b[n] << 16), first[n]);
                second[n] = multiply_add(to_float(a & 0xFFFF0000), to_float(b[n] & 0xFFFF0000), second[n]);
            }
        }
        std::memcpy(sums, tiles.data[C][m], 4 * columns);
        for (int n = 0; n < columns; n++) sums[n] = flushed(flushed(sums[n]) + flushed(first[n] + second[n]));
        std::memset(tiles.data[C][m], 0, TILE_LINE);
        std::memcpy(tiles.data[C][m], sums, 4 * columns);
    }
    for (int m = tiles.config.lines[C]; m < TILE_LINES; m++) std::memset(tiles.data[C][m], 0, TILE_LINE);
}

// Sums wrap around.
template <int C, int A, int B>
void tile_dp_busd() {
    EmulatedTiles &tiles = with_tiles<C, A, B>();
    const int columns = tiles.config.line_bytes[C] / 4;
    for (int m = 0; m < tiles.config.lines[C]; m++) {
        uint32_t sums[16] = {};
        std::memcpy(sums, tiles.data[C][m], 4 * columns);
        for (int k = 0; k < tiles.config.line_bytes[A] / 4; k++)
            for (int n = 0; n < columns; n++)
                for (int i = 0; i < 4; i++)
                    sums[n] += uint32_t(int32_t(tiles.data[A][m][4 * k + i]) * int8_t(tiles.data[B][k][4 * n + i]));
        std::memset(tiles.data[C][m], 0, TILE_LINE);
        std::memcpy(tiles.data[C][m], sums, 4 * columns);
    }
    for (int m = tiles.config.lines[C]; m < TILE_LINES; m++) std::memset(tiles.data[C][m], 0, TILE_LINE);
}

}  // namespace
