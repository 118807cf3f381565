// Which ISA rows this CPU and kernel offer, and which one is in force.
#pragma once

namespace zs::isa {

int count();                   // rows compiled in, lowest first
const char* name(int row);     // "scalar", "avx2", ...
const char* missing(int row);  // null where the row can run here, else what it lacks
int active();                  // the highest row allowed: the best available, or the one that limit() set
bool limit(const char* name);  // false if the name is unknown or the row cannot run here

}  // namespace zs::isa
