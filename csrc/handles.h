// From a blob's address to its validated Weight and the kernel for each token bucket.
//
// The cache is keyed by address. At each call the 64 header bytes, which hold a hash of the content, are compared, so
// a blob overwritten in place is validated anew. A handle is never changed after it was published, so any number of
// threads may use it.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core.h"

namespace zs {

struct Bucket {
  int64_t max_tokens;
  const Kernel* kernel;
};

struct Handle {
  Weight weight;
  std::vector<Bucket> buckets;  // ascending; the last one is open

  const Kernel* kernel_for(int64_t tokens) const {
    for (const Bucket& bucket : buckets)
      if (tokens <= bucket.max_tokens) return bucket.kernel;
    return buckets.empty() ? nullptr : buckets.back().kernel;
  }
};

// Throws std::invalid_argument with the problem if the bytes are no sound blob.
std::shared_ptr<const Handle> handle_of(const uint8_t* blob, uint64_t nbytes);

// The same, but every byte is read again, whatever was seen at this address before: for blobs of unknown origin, which
// may have been mapped where another one lay.
std::shared_ptr<const Handle> validate(const uint8_t* blob, uint64_t nbytes);

// From now on these buckets serve every blob of the same key: format, value type, shape, pattern, group size and type
// of the scales, nnz within 2 %.
void tune(const Header& header, std::vector<Bucket> buckets);
void forget_tuning();

}  // namespace zs
