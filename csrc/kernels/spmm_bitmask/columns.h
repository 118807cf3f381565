// From bits to a list of columns, eight at a time and without a branch: a table holds the positions of the set bits of
// each byte, all eight are written, and the list grows by how many there are.
#pragma once
#include <cstdint>

namespace {
namespace bitmask {

typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

struct Positions {
  uint8_t of[256][8];
  uint8_t count[256];
};
constexpr Positions make_positions() {
  Positions positions{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0; i < 8; ++i)
      if (bits >> i & 1) positions.of[bits][positions.count[bits]++] = static_cast<uint8_t>(i);
  return positions;
}
constexpr Positions kPositions = make_positions();

// Writes the set bits of `words` words to `columns`, counted from the first; up to seven more entries are overwritten.
inline int64_t columns_of(const uint32_t* bits, int64_t words, uint16_t* columns) {
  uint16_t* at = columns;
  for (int64_t w = 0; w < words; ++w)
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t eight = bits[w] >> byte * 8 & 0xFF;
      u8x8 positions;
      __builtin_memcpy(&positions, kPositions.of[eight], 8);
      const u16x8 listed = __builtin_convertvector(positions, u16x8) + static_cast<uint16_t>(w * 32 + byte * 8);
      __builtin_memcpy(at, &listed, sizeof listed);
      at += kPositions.count[eight];
    }
  return at - columns;
}

}  // namespace bitmask
}  // namespace
