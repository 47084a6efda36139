// One token per sequence, in place: a block per (sequence, kv head).
#include "step.cuh"

namespace blurry_attn::cuda {
namespace {

extern __shared__ __align__(32) unsigned char shared_memory[];

template <typename storage, typename compute>
__global__ void __launch_bounds__(kStepThreads)
    step_slots(Problem p, View out, compute* state_key, compute* state_value, const int64_t* position) {
  const int64_t sequence = blockIdx.x / p.kv_heads, head = blockIdx.x % p.kv_heads;
  const int64_t token = position[sequence] > 0 ? position[sequence] : 0;
  step_token<storage, compute>(p, Law<compute>(p, head), sequence, head, 0, token,
                               state_key + blockIdx.x * p.slots * p.key_dim,
                               state_value + blockIdx.x * p.slots * p.value_dim, out, nullptr, shared_memory);
}

// After every block has read the positions.
__global__ void __launch_bounds__(kStepThreads) step_positions(int64_t sequences, int64_t* position) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < sequences) position[i] += 1;
}

}  // namespace

void step(const Problem& problem, const View& out, void* state_key, void* state_value, int64_t* position) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    launch("step_slots", step_slots<decltype(storage), number>, problem.sequences * problem.kv_heads, kStepThreads,
           step_shared_bytes<number>(problem.slots), problem.stream, problem, out, static_cast<number*>(state_key),
           static_cast<number*>(state_value), position);
  });
  launch("step_positions", step_positions, (problem.sequences + kStepThreads - 1) / kStepThreads, kStepThreads, 0,
         problem.stream, problem.sequences, position);
}

}  // namespace blurry_attn::cuda
