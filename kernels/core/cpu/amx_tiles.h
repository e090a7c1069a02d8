// Tile registers: eight of 16 rows of 64 bytes, and the instructions for them, which only one header knows. Compiled with
// -DHFQ_EMULATE_TILES the instructions are functions in plain C++, for processors that do not have them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int TILE_LINES = 16, TILE_LINE = 64, TILE_BYTES = TILE_LINES * TILE_LINE, TILE_REGISTERS = 8;

// What `ldtilecfg` reads.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");

// All registers, whole.
inline TileConfig whole_tiles() {
    TileConfig config;
    std::memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < TILE_REGISTERS; i++) {
        config.line_bytes[i] = TILE_LINE;
        config.lines[i] = TILE_LINES;
    }
    return config;
}

}  // namespace

#ifdef HFQ_EMULATE_TILES
#include "amx_emulated.h"
#else
#include "amx_instructions.h"
#endif

namespace {

// While it lives, the thread may use tiles.
struct TileSession {
    TileSession() { tile_configure(whole_tiles()); }
    ~TileSession() { tile_release(); }
    TileSession(const TileSession &) = delete;
    TileSession &operator=(const TileSession &) = delete;
};

}  // namespace
