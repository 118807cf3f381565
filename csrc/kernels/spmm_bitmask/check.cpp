#include "kernels/spmm_bitmask/layout.h"
#include "scales.h"

namespace zs {
namespace {

uint64_t count(const uint32_t* bits, uint64_t words) {
  uint64_t found = 0;
  for (uint64_t i = 0; i < words; ++i) found += __builtin_popcount(bits[i]);
  return found;
}

// Elements of the values section that a row takes.
uint64_t length(const Header& header, const uint32_t* bits, uint64_t words) {
  if (static_cast<Values>(header.values) != Values::int4) return count(bits, words);
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < words; i += 4) {
    const uint64_t low = count(bits + i, 2), high = count(bits + i + 2, 2);
    bytes += low > high ? low : high;
  }
  return bytes;
}

}  // namespace

const char* check_bitmask(const Weight& weight) {
  const Header& header = weight.header;
  const auto type = static_cast<Values>(header.values);
  const bool integers = header.group_size != 0;
  if (header.sections != (integers ? 4 : 3))
    return integers ? "expected four sections: bits, row_offsets, values, scales"
                    : "expected three sections: bits, row_offsets, values";
  if (header.nnz / 2 > header.nbytes) return "the header promises more non-zeros than the blob has room for";
  const uint64_t m = header.m, words = bitmask::words(header);
  if (weight.nbytes[bitmask::kBitsSection] != m * words * sizeof(uint32_t))
    return "the bits section does not have the length that the shape asks for";
  if (weight.nbytes[bitmask::kOffsetsSection] != (m + 1) * sizeof(uint64_t))
    return "the row_offsets section does not have the length that the shape asks for";

  const uint64_t* offsets = bitmask::row_offsets(weight);
  const uint64_t stored = offsets[m], size = type == Values::fp32 ? 4 : type == Values::bf16 ? 2 : 1;
  if (offsets[0] != 0 || stored > header.nbytes || (type != Values::int4 && stored != header.nnz))
    return "row_offsets do not run from 0 to nnz";
  if (weight.nbytes[bitmask::kValuesSection] != stored * size + bitmask::kTailBytes)
    return "the values section does not have the length that nnz asks for";
  for (int64_t i = 0; i < bitmask::kTailBytes; ++i)
    if (weight.section[bitmask::kValuesSection][stored * size + i]) return "the values do not end in 64 bytes of zeros";

  uint64_t nnz = 0;
  for (uint64_t row = 0; row < m; ++row) {
    const uint32_t* bits = bitmask::bits_of(weight, static_cast<int64_t>(row));
    for (uint64_t i = header.k / 32; i < words; ++i)
      if (bits[i] & (i == header.k / 32 ? ~0u << header.k % 32 : ~0u)) return "a bit beyond the last column is set";
    if (offsets[row] > stored || offsets[row + 1] - offsets[row] != length(header, bits, words))
      return "row_offsets do not follow from the bits";
    nnz += count(bits, words);
  }
  if (nnz != header.nnz) return "nnz is not the number of bits";
  if (!integers) return nullptr;

  const uint64_t groups = (static_cast<uint64_t>(header.k) + header.group_size - 1) / header.group_size;
  const bool half = static_cast<Type>(header.scales) == Type::fp16;
  if (weight.nbytes[bitmask::kScalesSection] != m * groups * (half ? 2 : 4))
    return "the scales section does not have the length that the shape asks for";
  return check_scales(weight.section[bitmask::kScalesSection], static_cast<int64_t>(m * groups),
                      static_cast<Type>(header.scales), [](int64_t) { return true; });
}

}  // namespace zs
