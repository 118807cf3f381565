// The tile instructions. GCC declares 8 bytes as read by _tile_loadconfig and none by _tile_loadd, so at -O3 it may
// drop the stores that fill the configuration or a buffer just before: each wrapper is fenced by a compiler barrier.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {
namespace amx {

#define ZS_BARRIER asm volatile("" ::: "memory")
// Tile numbers are immediate operands, hence macros.
#define ZS_TILE_ZERO(tile) _tile_zero(tile)
#define ZS_TILE_LOAD(tile, base, stride) \
  do {                                   \
    ZS_BARRIER;                          \
    _tile_loadd(tile, base, stride);     \
  } while (0)
#define ZS_TILE_STORE(tile, base, stride) \
  do {                                    \
    _tile_stored(tile, base, stride);     \
    ZS_BARRIER;                           \
  } while (0)
#define ZS_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#define ZS_TILE_DOT_INT8(c, a, b) _tile_dpbssd(c, a, b)
#define ZS_TILE_DOT_BYTES(c, a, b) _tile_dpbusd(c, a, b)  // a unsigned, b signed

// All eight tiles: 16 rows of 64 bytes. With `inputs` of 32 (bytes), 4 and 5 have rows of 32 bytes and 6 and 7 have 8
// rows, as operands of a product over 32 inputs. Never assume that a configuration is still loaded: other libraries use
// the tiles on the same threads.
struct Tiles {
  explicit Tiles(int inputs = 64) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes_per_row[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = static_cast<uint16_t>(i == 4 || i == 5 ? inputs : 64);
      config.rows[i] = static_cast<uint8_t>(i == 6 || i == 7 ? inputs / 4 : 16);
    }
    ZS_BARRIER;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

}  // namespace amx
}  // namespace
