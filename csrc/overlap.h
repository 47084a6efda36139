// Which bytes a strided tensor takes, and whether two tensors, or two elements of one, share any.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>

namespace blurry_attn {

// The bytes of a tensor's elements: `size` of them from first + sum of stride * i on, 0 <= i <= most per dimension.
struct Footprint {
  struct Dimension {
    int64_t stride, most;
  };
  int64_t first, size;
  c10::SmallVector<Dimension, 4> dimensions;  // of more than one element, the longest stride first

  int64_t span() const;  // from the first element to the last
};

// Both are exact, but for strides so interlocked that the search for a common byte is given up: then the answer is yes.
bool overlap(const Footprint& a, const Footprint& b);
bool overlaps_itself(const Footprint& footprint);

}  // namespace blurry_attn
