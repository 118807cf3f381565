#include "handles.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "blob.h"
#include "table.h"

namespace zs {
namespace {

constexpr size_t kCacheLimit = 1 << 16;  // stale addresses are dropped with the rest when this many were seen

std::shared_mutex mutex;
std::unordered_map<const uint8_t*, std::shared_ptr<const Handle>> handles;
std::unordered_map<std::string, std::vector<Bucket>> tuning;

std::string key_of(const Header& h) {
  const int step = h.nnz ? static_cast<int>(std::lround(std::log(static_cast<double>(h.nnz)) / std::log(1.02))) : -1;
  std::string key(h.format, 8);
  for (uint32_t part : {uint32_t(h.values), h.m, h.k, uint32_t(h.n), uint32_t(h.group), h.strip, uint32_t(h.group_size),
                        uint32_t(h.scales), uint32_t(step)})
    key += ':' + std::to_string(part);
  return key;
}

// Where nothing was measured: the highest row; for a handful of tokens no matrix unit, and the first of two ways.
std::vector<Bucket> default_buckets(const Header& header) {
  constexpr int64_t kOpen = std::numeric_limits<int64_t>::max();
  const Kernel* best = next_kernel(header, nullptr);
  if (!best) return {};
  const Kernel* next = next_kernel(header, best);
  if (!next) return {{kOpen, best}};
  const int64_t few = header.group_size ? 8 : 3;
  if (!std::strcmp(best->isa, "amx")) return {{few, next}, {kOpen, best}};
  if (!std::strcmp(best->isa, next->isa)) return {{few, best}, {kOpen, next}};
  return {{kOpen, best}};
}

}  // namespace

std::shared_ptr<const Handle> validate(const uint8_t* blob, uint64_t nbytes) {
  auto handle = std::make_shared<Handle>();
  const std::string problem = read_blob(blob, nbytes, handle->weight);
  std::unique_lock lock(mutex);
  if (!problem.empty()) {
    handles.erase(blob);
    throw std::invalid_argument(problem);
  }
  const auto tuned = tuning.find(key_of(handle->weight.header));
  handle->buckets = tuned != tuning.end() ? tuned->second : default_buckets(handle->weight.header);
  if (handles.size() >= kCacheLimit) handles.clear();
  handles[blob] = handle;
  return handle;
}

std::shared_ptr<const Handle> handle_of(const uint8_t* blob, uint64_t nbytes) {
  {
    std::shared_lock lock(mutex);
    const auto found = handles.find(blob);
    if (found != handles.end() && nbytes >= sizeof(Header) && found->second->weight.header.nbytes == nbytes &&
        !std::memcmp(blob, &found->second->weight.header, sizeof(Header)))
      return found->second;
  }
  return validate(blob, nbytes);
}

void tune(const Header& header, std::vector<Bucket> buckets) {
  std::unique_lock lock(mutex);
  const std::string key = key_of(header);
  for (auto& [blob, handle] : handles)
    if (key_of(handle->weight.header) == key) handle = std::make_shared<Handle>(Handle{handle->weight, buckets});
  tuning[key] = std::move(buckets);
}

void forget_tuning() {
  std::unique_lock lock(mutex);
  tuning.clear();
  handles.clear();
}

}  // namespace zs
