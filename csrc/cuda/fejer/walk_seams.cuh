// This file compares cells where two forward walks meet at a seam.
#pragma once

#include "common/rows.cuh"
#include "fejer/seams.cuh"

namespace blurry_attn::cuda {
namespace {

// Finds the sequences whose walks disagree on the cells that ended in the lap before a seam. A few neighbouring threads
// share a row, a chunk each.
template <typename storage, int dim>
__global__ void __launch_bounds__(kSeamThreads) fejer_walk_seams(Problem p, HeadList heads, Seams seams) {
  seams.compare(p, heads, [&](const SeamBlock& block, const Stretch& before) {
    if (before.end - before.sequence.position <= seams.plan.warm_up) return false;  // the warm-up lacks nothing
    constexpr int kChunks = dim / 8;
    const auto chunks = [&](bool warmed_up) {
      return static_cast<const uint4*>(seams.rows) +
             seams.row(block.seam, heads.count, block.head_index, warmed_up, block.side) * kChunks;
    };
    const uint4 *const exact = chunks(false), *const warmed_up = chunks(true);
    const int items = static_cast<int>(p.slots) * kChunks;
    bool differ = false;
#pragma unroll 2
    for (int first = 0; first < items; first += kSeamThreads) {
      const bool exists = first + static_cast<int>(threadIdx.x) < items;
      const int item = exists ? first + static_cast<int>(threadIdx.x) : 0;
      const uint4 a = load_global(exact + item), b = load_global((exists ? warmed_up : exact) + item);
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
      float difference = 0.f, size = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 known = unpack<storage>(x[i]), other = unpack<storage>(y[i]);
        difference += (other.x - known.x) * (other.x - known.x) + (other.y - known.y) * (other.y - known.y);
        size += known.x * known.x + known.y * known.y;
      }
#pragma unroll
      for (int i = 1; i < kChunks; i *= 2) {
        difference += __shfl_xor_sync(kAllLanes, difference, i);
        size += __shfl_xor_sync(kAllLanes, size, i);
      }
      differ = differ || !within_rounding<storage>(difference, size);
    }
    return differ;
  });
}

}  // namespace
}  // namespace blurry_attn::cuda
