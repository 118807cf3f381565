#include "blob.h"

#include <cstring>

#include "table.h"

namespace zs {
namespace {

constexpr uint16_t kVersion = 1;
constexpr uint64_t kAlignment = 64;

uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * 0x9E3779B97F4A7C15ull;
  return state ^ (state >> 32);
}

std::string quoted(const char* text, size_t limit) {
  std::string shown = "'";
  for (size_t i = 0; i < limit && text[i]; ++i) shown += text[i] >= 32 && text[i] < 127 ? text[i] : '?';
  return shown + "'";
}

std::string check_header(const Header& header, uint64_t nbytes) {
  if (std::memcmp(header.magic, "ZEROSKIP", 8)) return "not a zeroskip blob: it starts with " + quoted(header.magic, 8);
  for (size_t i = strnlen(header.format, 8); i < 8; ++i)
    if (header.format[i]) return "the format's name is not padded with NUL";
  if (header.version != kVersion)
    return "format version " + std::to_string(header.version) + ", this build reads version 1: update zeroskip";
  if (header.nbytes != nbytes)
    return "truncated or extended: " + std::to_string(nbytes) + " bytes, its header says " +
           std::to_string(header.nbytes);
  // 2^48 weights: far beyond any model, and every length that a check computes stays below 2^63.
  if (header.m == 0 || header.k == 0 || header.m > 0x7FFFFFFF || header.k > 0x7FFFFFFF ||
      static_cast<uint64_t>(header.m) * header.k >> 48)
    return "impossible shape " + std::to_string(header.m) + " x " + std::to_string(header.k);
  if (header.values < 1 || header.values > 4) return "unknown value type " + std::to_string(header.values);
  const bool integers = header.values >= static_cast<uint8_t>(Values::int8);
  if (integers ? header.group_size != 32 && header.group_size != 64 && header.group_size != 128
               : header.group_size != 0)
    return "impossible group size " + std::to_string(header.group_size);
  if (integers ? header.scales != static_cast<uint8_t>(Type::fp32) && header.scales != static_cast<uint8_t>(Type::fp16)
               : header.scales != 0)
    return "unknown type of scales " + std::to_string(header.scales);
  if (header.sections > kMaxSections) return "too many sections: " + std::to_string(header.sections);
  if (header.nnz > static_cast<uint64_t>(header.m) * header.k)
    return "more non-zeros (" + std::to_string(header.nnz) + ") than weights";
  return "";
}

}  // namespace

uint64_t hash_blob(const uint8_t* data, uint64_t nbytes) {
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto absorb = [&](const uint8_t* line) {
    uint64_t words[8];
    std::memcpy(words, line, 64);
    for (int i = 0; i < 8; ++i) lanes[i] = mix(lanes[i], words[i]);
  };
  Header header;
  std::memcpy(&header, data, sizeof header);
  header.hash = 0;
  absorb(reinterpret_cast<const uint8_t*>(&header));
  for (uint64_t at = 64; at + 64 <= nbytes; at += 64) absorb(data + at);
  uint64_t folded = 0;
  for (uint64_t lane : lanes) folded = mix(folded, lane);
  return folded;
}

std::string read_blob(const uint8_t* data, uint64_t nbytes, Weight& weight) {
  if (nbytes < sizeof(Header) || nbytes % kAlignment)
    return "not a zeroskip blob: " + std::to_string(nbytes) + " bytes, expected a positive multiple of 64";
  std::memcpy(&weight.header, data, sizeof(Header));
  const Header& header = weight.header;
  if (std::string problem = check_header(header, nbytes); !problem.empty()) return problem;

  const uint64_t table_end = (sizeof(Header) + header.sections * sizeof(Section) + 63) / 64 * 64;
  if (table_end > nbytes) return "truncated inside its section table";
  for (int i = 0; i < kMaxSections; ++i) {
    weight.section[i] = nullptr;
    weight.nbytes[i] = 0;
    if (i >= header.sections) continue;
    Section section;
    std::memcpy(&section, data + sizeof(Header) + i * sizeof(Section), sizeof section);
    if (section.offset % kAlignment || section.offset < table_end || section.offset > nbytes ||
        section.nbytes > nbytes - section.offset)
      return "section " + std::to_string(i) + " (offset " + std::to_string(section.offset) + ", " +
             std::to_string(section.nbytes) + " bytes) does not lie inside the blob";
    weight.section[i] = data + section.offset;
    weight.nbytes[i] = section.nbytes;
  }
  if (hash_blob(data, nbytes) != header.hash) return "content hash differs: the bytes were changed or damaged";
  if (const char* problem = check_sections(weight)) return quoted(header.format, 8) + ": " + problem;
  return "";
}

}  // namespace zs
