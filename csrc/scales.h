// Checking the scales of integer weights, for the check.cpp of a format.
#pragma once
#include <cstring>

#include "core.h"

namespace {

// Null if `scales`, `count` numbers of type `type`, are finite and positive where `exists(i)` and zero elsewhere.
template <typename Exists>
const char* check_scales(const uint8_t* scales, int64_t count, zs::Type type, Exists exists) {
  const bool half = type == zs::Type::fp16;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, scales + i * (half ? 2 : 4), half ? 2 : 4);
    if (!exists(i)) {
      if (bits) return "a scale of a row that does not exist is not zero";
    } else if (bits == 0 || bits >= (half ? 0x7C00u : 0x7F800000u)) {  // the sign is the highest bit
      return "a scale is zero, negative or not finite";
    }
  }
  return nullptr;
}

}  // namespace
