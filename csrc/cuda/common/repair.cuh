// This file repairs sequences that hold a token that is not finite. A walk computes the tokens of a patch together, so
// such a token spoils its neighbours there. The repair computes the sequence and its final state again, token by token.
#pragma once

#include "common/half.cuh"
#include "common/shared.cuh"
#include "step/step.cuh"

namespace blurry_attn::cuda {
namespace {

// Plans has the plans of all launches of a call, and says which of them each head has.
struct Plans {
  static constexpr int kMost = 5;
  WalkPlan plan[kMost];
  uint8_t of_head[kMostHeads];

  int64_t count() const {
    int64_t most = 0;
    for (const WalkPlan& p : plan) most = std::max(most, p.count);
    return most;
  }
};

template <typename storage>
__global__ void __launch_bounds__(kStepThreads)
    repair_walks(Problem p, Outputs outputs, Plans plans, const uint8_t* unsound, float* contents) {
  wait_for_grid_before();
  const Sequence sequence(p, blockIdx.x / p.kv_heads);
  const int64_t head = blockIdx.x % p.kv_heads;
  const WalkPlan& plan = plans.plan[plans.of_head[head]];
  bool sound = true;
  for (int64_t i = 0; i < plan.stretches(sequence.length); ++i) {
    sound = sound && !unsound[plan.index(p, sequence.index, i) * p.kv_heads + head];
  }
  if (sound) return;
  const int64_t track = sequence.index * p.kv_heads + head;
  float* const keys = contents + track * p.slots * (p.key_dim + p.value_dim);
  float* const values = keys + p.slots * p.key_dim;
  const auto given = [](const void* state, int64_t i) { return state ? static_cast<const float*>(state)[i] : 0.f; };
  const int64_t key_size = p.slots * p.key_dim, value_size = p.slots * p.value_dim;
  for (int64_t i = threadIdx.x; i < key_size; i += blockDim.x) keys[i] = given(p.state_key, track * key_size + i);
  for (int64_t i = threadIdx.x; i < value_size; i += blockDim.x) {
    values[i] = given(p.state_value, track * value_size + i);
  }
  __syncthreads();
  const StepShape<float, 1> shape(p);
  for (int64_t t = 0; t < sequence.length; ++t) {
    const auto when = [&] { return sequence.position + t; };
    step_token<storage, true>(p, shape, when, sequence.batch, head, sequence.row + t, keys, values, outputs.out,
                              static_cast<float*>(outputs.lse), shared_memory);
  }
}

// The scratch memory of a walk with repair has a mark per stretch and head, then the contents of the slots.
inline int64_t marks(const Problem& p, const Plans& plans) { return (plans.count() * p.kv_heads + 15) / 16 * 16; }
inline int64_t repair_workspace(const Problem& p, const Plans& plans) {
  return marks(p, plans) +
         p.sequences * p.kv_heads * p.slots * (p.key_dim + p.value_dim) * static_cast<int64_t>(sizeof(float));
}
template <typename storage>
void launch_repair(const Problem& p, const Outputs& outputs, const Plans& plans, void* workspace) {
  const StepShape<float, 1> shape(p);
  uint8_t* const unsound = static_cast<uint8_t*>(workspace);
  launch_early("repair_walks", repair_walks<storage>, p.sequences * p.kv_heads, shape.threads(), shape.shared_bytes(),
               p.stream, p, outputs, plans, unsound, reinterpret_cast<float*>(unsound + marks(p, plans)));
}

}  // namespace
}  // namespace blurry_attn::cuda
