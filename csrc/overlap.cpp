// This file decides whether strided tensors overlap, by a search over the sums of their strides.
#include "overlap.h"

#include <algorithm>

namespace blurry_attn {

namespace {

using Dimension = Footprint::Dimension;

constexpr int kMostTries = 10000;  // strides that divide each other, or nearly, need only a few

// reaches() says whether a sum of stride * i, 0 <= i <= most in each dimension, is in low .. high. `span` is the
// largest such sum.
bool reaches(const Dimension* dimension, int64_t span, int64_t low, int64_t high, int& tries) {
  if (high < 0 || low > span) return false;
  if (low <= 0 || high >= span) return true;  // the smallest sum, or the largest
  if (--tries < 0) return true;
  const auto [stride, most] = *dimension;
  span -= stride * most;
  const int64_t least = low > span ? (low - span + stride - 1) / stride : 0;
  for (int64_t i = std::min(most, high / stride); i >= least; --i) {
    if (reaches(dimension + 1, span, low - i * stride, high - i * stride, tries)) return true;
  }
  return false;
}

}  // namespace

int64_t Footprint::span() const {
  int64_t sum = 0;
  for (const auto& [stride, most] : dimensions) sum += stride * most;
  return sum;
}

bool overlap(const Footprint& a, const Footprint& b) {
  const int64_t apart = b.first - a.first, span_a = a.span(), span_b = b.span();
  if (apart >= span_a + a.size || -apart >= span_b + b.size) return false;
  // The distance from an element of b to one of a is a sum of strides, if b is counted from its last one. Dimensions
  // of equal stride become one.
  c10::SmallVector<Dimension, 8> both;
  auto next_a = a.dimensions.begin(), next_b = b.dimensions.begin();
  while (next_a != a.dimensions.end() || next_b != b.dimensions.end()) {
    const bool of_a =
        next_b == b.dimensions.end() || (next_a != a.dimensions.end() && next_a->stride >= next_b->stride);
    const Dimension next = of_a ? *next_a++ : *next_b++;
    if (!both.empty() && both.back().stride == next.stride) {
      both.back().most += next.most;
    } else {
      both.push_back(next);
    }
  }
  int tries = kMostTries;
  return reaches(both.data(), span_a + span_b, apart + span_b - a.size + 1, apart + span_b + b.size - 1, tries);
}

bool overlaps_itself(const Footprint& footprint) {
  int64_t shorter = footprint.span();  // span of the dimensions after this one
  int tries = kMostTries;
  for (const Dimension& dimension : footprint.dimensions) {
    const auto [stride, most] = dimension;
    shorter -= stride * most;
    if (stride >= shorter + footprint.size) continue;
    // Two elements may lie one step or more of this stride apart, and shorter strides in either direction.
    c10::SmallVector<Dimension, 4> differences{{stride, most - 1}};
    for (const Dimension* rest = &dimension + 1; rest != footprint.dimensions.end(); ++rest) {
      differences.push_back({rest->stride, 2 * rest->most});
    }
    const int64_t none = shorter - stride;
    if (reaches(differences.data(), stride * (most - 1) + 2 * shorter, none - footprint.size + 1,
                none + footprint.size - 1, tries)) {
      return true;
    }
  }
  return false;
}

}  // namespace blurry_attn
