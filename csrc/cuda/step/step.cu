// This file launches the step, which takes one token per sequence in place, with a block per (sequence, kv head).
#include <algorithm>

#include "common/launch.cuh"
#include "common/shared.cuh"
#include "step/step.cuh"

namespace blurry_attn::cuda {
namespace {

// kResident is the number of threads of a multiprocessor that have registers for their parts of the slots.
template <bool whole, typename Shape>
constexpr int kResident = whole && Shape::kSmall ? 512 : 256;

template <typename storage, bool whole, typename Shape, typename compute = typename Shape::Number>
__global__ void __launch_bounds__(Shape::kThreads, kResident<whole, Shape> / Shape::kThreads)
    step_slots(Problem p, Shape shape, View out, compute* state_key, compute* state_value, const int64_t* position) {
  start_next_grid();
  const unsigned kv_heads = static_cast<unsigned>(p.kv_heads);
  const int64_t sequence = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads;
  const auto when = [&] { return bounded_position(position[sequence]); };
  step_token<storage, whole>(p, shape, when, sequence, head, 0, state_key + blockIdx.x * p.slots * p.key_dim,
                             state_value + blockIdx.x * p.slots * p.value_dim, out, static_cast<compute*>(nullptr),
                             shared_memory);
}

// step_positions advances the positions after every block of step_slots has read them. It reads them before it waits,
// since step_slots does not write them.
__global__ void __launch_bounds__(kStepThreads) step_positions(int64_t sequences, int64_t* position) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  const int64_t before = i < sequences ? bounded_position(position[i]) : 0;
  wait_for_grid_before();
  if (i < sequences) position[i] = before + 1;
}

template <typename storage, typename compute>
bool has_whole_rows(const Problem& p, const void* state_key, const void* state_value) {
  const auto aligned = [](const void* slots) {
    return reinterpret_cast<uintptr_t>(slots) % sizeof(Quad<compute>) == 0;
  };
  return p.key_dim % 4 == 0 && p.value_dim % 4 == 0 && aligned(state_key) && aligned(state_value) &&
         in_packs(p.query, 4, sizeof(storage)) && in_packs(p.key, 4, sizeof(storage)) &&
         in_packs(p.value, 4, sizeof(storage));
}

// with_shape() calls body(std::bool_constant<whole>(), shape) with the shape for the problem.
template <typename compute, typename body_type>
void with_shape(const Problem& p, bool whole, const body_type& body) {
  const int64_t dim = std::max(p.key_dim, p.value_dim);
  const auto either = [&](const auto& shape) {
    return whole ? body(std::true_type(), shape) : body(std::false_type(), shape);
  };
  if (whole && p.key_dim == p.value_dim && p.slots % StepShape<compute, 1>::kSlots == 0) {
    if (dim == 64) return body(std::true_type(), StepShape<compute, 1, 64>(p));
    if (dim == 128) return body(std::true_type(), StepShape<compute, 1, 128>(p));
  }
  if (dim <= kStepChunk) return either(StepShape<compute, 1>(p));
  if (dim <= 2 * kStepChunk) return either(StepShape<compute, 2>(p));
  return either(StepShape<compute, 4>(p));
}

}  // namespace

void step(const Problem& problem, const View& out, void* state_key, void* state_value, int64_t* position) {
  for_type(problem.dtype, [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    using compute = decltype(compute_tag);
    const bool whole = has_whole_rows<storage, compute>(problem, state_key, state_value);
    with_shape<compute>(problem, whole, [&](auto is_whole, auto shape) {
      launch("step_slots", step_slots<storage, decltype(is_whole)::value, decltype(shape)>,
             problem.sequences * problem.kv_heads, shape.threads(), shape.shared_bytes(), problem.stream, problem,
             shape, out, static_cast<compute*>(state_key), static_cast<compute*>(state_value), position);
    });
  });
  launch_early("step_positions", step_positions, (problem.sequences + kStepThreads - 1) / kStepThreads, kStepThreads, 0,
               problem.stream, problem.sequences, position);
}

}  // namespace blurry_attn::cuda
