// Reading a blob: from bytes of any origin to a Weight whose every pointer and index is safe to follow.
#pragma once
#include <string>

#include "core.h"

namespace zs {

uint64_t hash_blob(const uint8_t* data, uint64_t nbytes);

// Empty if `data` holds a sound blob (then `weight` is filled), else one line that says what is wrong.
std::string read_blob(const uint8_t* data, uint64_t nbytes, Weight& weight);

}  // namespace zs
