// These kernels turn logits into probabilities, and into the gradients of logits, in place.
#pragma once

#include "scan/stage.cuh"

namespace blurry_attn::cuda {
namespace {

// for_rows() goes over the rows of a workspace of logits with a warp per row. It runs body(number of the row's (batch,
// query head, token), offset of its logits).
template <typename body_type>
__device__ __forceinline__ void for_rows(const Problem& p, const ScanPlan& plan, int64_t first_stretch, int tiles,
                                         const body_type& body) {
  const BlockIndex block(p, tiles);
  const ScanStretch stretch(p, plan, first_stretch + block.entry);
  const int group = static_cast<int>(p.query_heads / p.kv_heads), warps = blockDim.x / kWarp;
  const int64_t offset = (block.entry * p.kv_heads + block.head) * plan.rows * group;
  for (int i = block.tile * warps + threadIdx.x / kWarp; i < stretch.length * group; i += tiles * warps) {
    const int64_t head = stretch.sequence.batch * p.query_heads + block.head * group + i % group;
    body(head * p.tokens + stretch.row() + i / group, (offset + i) * p.slots);
  }
}

// A row of a workspace lies over the lanes of a warp: at most 32 * per_lane slots, and `pad` past the last one.
template <int per_lane, typename compute>
__device__ __forceinline__ void load_row(compute (&values)[per_lane], const compute* row, int slots, compute pad) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < per_lane; ++k) values[k] = lane + k * kWarp < slots ? row[lane + k * kWarp] : pad;
}
template <int per_lane, typename compute>
__device__ __forceinline__ void store_row(const compute (&values)[per_lane], compute* row, int slots) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < per_lane; ++k) {
    if (lane + k * kWarp < slots) row[lane + k * kWarp] = values[k];
  }
}

// softmax_rows turns logits into probabilities, in place, and gives their lse.
template <typename compute, int per_lane>
__global__ void __launch_bounds__(kMaxThreads)
    softmax_rows(Problem p, ScanPlan plan, int tiles, int64_t first_stretch, compute* logits, compute* lse) {
  const int slots = static_cast<int>(p.slots);
  for_rows(p, plan, first_stretch, tiles, [&](int64_t row, int64_t offset) {
    const compute shut = -static_cast<compute>(INFINITY);
    compute z[per_lane], top = shut, total = 0;
    load_row(z, logits + offset, slots, shut);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) top = z[k] > top ? z[k] : top;
    top = warp_max(top);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) total += z[k] = exp(z[k] - top);
    total = warp_sum(total);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) z[k] /= total;
    store_row(z, logits + offset, slots);
    if (threadIdx.x % kWarp == 0) lse[row] = top + log(total);
  });
}

// softmax_rows_backward turns logits into probabilities, in place, and grad_out . values into scale times the gradients
// of the logits. The lse may have the rounding of other kernels, so probabilities are brought to a sum of one.
template <typename compute, int per_lane>
__global__ void __launch_bounds__(kMaxThreads)
    softmax_rows_backward(Problem p, ScanPlan plan, int tiles, int64_t first_stretch, compute scale, const compute* lse,
                          const compute* grad_lse, compute* logits, compute* grads) {
  const int slots = static_cast<int>(p.slots);
  for_rows(p, plan, first_stretch, tiles, [&](int64_t row, int64_t offset) {
    const compute shut = -static_cast<compute>(INFINITY), row_lse = lse[row];
    compute z[per_lane], dz[per_lane], total = 0, sum = 0;
    unsigned open = 0;  // a bit per slot
    load_row(z, logits + offset, slots, shut);
    load_row(dz, grads + offset, slots, compute(0));
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
      open |= z[k] != shut ? 1u << k : 0u;
      total += z[k] = z[k] != shut ? exp(z[k] - row_lse) : compute(0);
    }
    total = warp_sum(total);
#pragma unroll
    for (int k = 0; k < per_lane; ++k) {
      if (!(open >> k & 1)) continue;
      z[k] /= total;
      sum += z[k] * dz[k];
    }
    const compute delta = warp_sum(sum) - (grad_lse ? grad_lse[row] : compute(0));
#pragma unroll
    for (int k = 0; k < per_lane; ++k) dz[k] = open >> k & 1 ? scale * z[k] * (dz[k] - delta) : compute(0);
    store_row(z, logits + offset, slots);
    store_row(dz, grads + offset, slots);
  });
}

}  // namespace
}  // namespace blurry_attn::cuda
