// This file compares, where two backward walks meet at a seam, the gradients of what the slots hold.
#pragma once

#include "common/rows.cuh"
#include "fejer/back_place.cuh"
#include "fejer/classes.cuh"
#include "fejer/seams.cuh"

namespace blurry_attn::cuda {
namespace {

// A seam has the gradients of the cells in the slots, and of two cells that may go on there.
inline int64_t grad_seam_rows(const Problem& p) { return p.slots + 2; }
inline int64_t grad_seam_bytes(const Problem& p, const WalkPlan& plan, const HeadClass& c) {
  return Seams::bytes(p, plan, c.heads, c.echo, grad_seam_rows(p), sizeof(float));
}

// Finds the sequences whose walks disagree on the gradients of cells at a seam. A difference counts if it is more than
// a rounding of the gradients of the tokens that it goes into, 64 tokens at a time.
template <typename storage, int dim>
__global__ void __launch_bounds__(kSeamThreads)
    fejer_back_seams(Problem p, Gradients gradients, HeadList heads, Seams seams) {
  seams.compare(p, heads, [&](const SeamBlock& block, const Stretch& before) {
    if (WalkBack::begins_at_end(before, seams.plan)) return false;
    constexpr int kChunks = dim / 8, kRowsAtOnce = kWarp / kChunks, kBlock = 64;
    const int head = heads.head[block.head_index], warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const Cells cells = p.laws[head].cells;
    const Sequence& s = before.sequence;
    const int64_t first_cell = cells.trailing(before.end) - p.slots;
    const int blocks = static_cast<int>((cells.window() + 2 * cells.resolution + kBlock - 1) / kBlock);
    const auto row_of_cells = [&](bool warmed_up) {
      return static_cast<const float*>(seams.rows) +
             (seams.row(block.seam, heads.count, block.head_index, warmed_up, block.side) - first_cell) * dim + lane;
    };
    const float *const exact = row_of_cells(false), *const warmed_up = row_of_cells(true);
    bool differ = false;
    for (int n = warp; n < blocks; n += kSeamThreads / kWarp) {
      const int64_t until = before.end - n * kBlock, from = until - kBlock > s.position ? until - kBlock : s.position;
      if (from >= until) break;
      float difference = 0.f, size = 0.f;
      const int64_t oldest = cells.trailing(from), newest = cells.trailing(until - 1) + 1;
#pragma unroll 4
      for (int64_t cell = oldest > first_cell ? oldest : first_cell; cell <= newest; ++cell) {
#pragma unroll
        for (int d = 0; d < dim; d += kWarp) {
          const float known = exact[cell * dim + d], apart = known - warmed_up[cell * dim + d];
          difference += apart * apart;
          size += known * known;
        }
      }
      difference = warp_sum(difference);
      if (within_rounding<storage>(difference, warp_sum(size))) continue;  // then tokens' gradients agree too
      size = 0.f;
      const View& view = block.side ? gradients.value : gradients.key;
      const int chunk = lane % kChunks;
      if (chunk * 8 < (block.side ? p.value_dim : p.key_dim)) {
        for (int64_t t = from + lane / kChunks; t < until; t += kRowsAtOnce) {
          const uint4 words =
              load_global(row_of<const storage>(view, s.batch, head, s.row + t - s.position) + chunk * 8);
          const uint32_t x[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<storage>(x[i]);
            size += pair.x * pair.x + pair.y * pair.y;
          }
        }
      }
      differ = differ || !within_rounding<storage>(difference, warp_sum(size));
    }
    return differ;
  });
}

}  // namespace
}  // namespace blurry_attn::cuda
