// A Footprint is the set of bytes that a strided tensor occupies. The functions say whether two tensors, or two
// elements of one tensor, share a byte.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>

namespace blurry_attn {

// An element is `size` bytes from first + sum of stride * i on, where 0 <= i <= most in each dimension.
struct Footprint {
  struct Dimension {
    int64_t stride, most;
  };
  int64_t first, size;
  c10::SmallVector<Dimension, 4> dimensions;  // those of more than one element, longest stride first

  int64_t span() const;  // bytes from the first element to the last
};

// Both answers are exact, unless the search for a common byte takes too many steps: it then returns true.
bool overlap(const Footprint& a, const Footprint& b);
bool overlaps_itself(const Footprint& footprint);

}  // namespace blurry_attn
