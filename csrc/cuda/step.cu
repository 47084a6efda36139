// One token per sequence, in place: a block per (sequence, kv head) writes the token into the slots and attends.
#include "device.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

extern __shared__ __align__(32) unsigned char shared_memory[];

// Writes `token` into a slot's element and returns what it holds then; `before`: the slot was open before.
template <typename compute>
__device__ __forceinline__ compute update(compute* content, compute token, compute gate, bool before) {
  const compute now = written(before ? *content : compute(0), token, gate);
  if (!before || gate != compute(0)) *content = now;
  return now;
}

template <typename storage, typename compute>
__global__ void __launch_bounds__(kThreads)
    step_slots(Problem p, View out, compute* state_key, compute* state_value, const int64_t* position) {
  const int64_t sequence = blockIdx.x / p.kv_heads, head = blockIdx.x % p.kv_heads;
  const int group = static_cast<int>(p.query_heads / p.kv_heads), slots = static_cast<int>(p.slots);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int key_dim = static_cast<int>(p.key_dim), value_dim = static_cast<int>(p.value_dim);
  const Law<compute> law(p, head);
  const int64_t token = position[sequence] > 0 ? position[sequence] : 0;

  compute* gates = reinterpret_cast<compute*>(shared_memory);  // [slots]
  compute* weights = gates + slots;                            // [slots]
  compute* partial = weights + slots;                          // [kThreads]
  int* open = reinterpret_cast<int*>(partial + kThreads);      // [slots]: 0 shut, 1 opened by this token, 2 before
  TokenGates<compute> info;
  info.make(law, token);
  for (int m = threadIdx.x; m < slots; m += kThreads) {
    gates[m] = info.gate(law, m);
    open[m] = law.is_open(m, token) + law.is_open(m, token - 1);
  }
  __syncthreads();

  const storage* key = row_of<const storage>(p.key, sequence, head, 0);
  const storage* value = row_of<const storage>(p.value, sequence, head, 0);
  state_key += (sequence * p.kv_heads + head) * slots * key_dim;
  state_value += (sequence * p.kv_heads + head) * slots * value_dim;
  // Values: threads across the elements, and the slots dealt to `shares` of them.
  int across = kWarp;
  while (across < value_dim && across < kThreads) across *= 2;
  const int shares = kThreads / across, share = threadIdx.x / across;

  for (int i = 0; i < group; ++i) {
    const storage* query = row_of<const storage>(p.query, sequence, head * group + i, 0);
    for (int m = warp; m < slots; m += kWarps) {
      compute sum = 0;
      for (int d = lane; d < key_dim; d += kWarp) {
        compute* content = state_key + static_cast<int64_t>(m) * key_dim + d;
        const compute now =
            i == 0 ? update(content, to_compute<compute>(key[d * p.key.element]), gates[m], open[m] == 2) : *content;
        sum += to_compute<compute>(query[d * p.query.element]) * now;
      }
      sum = warp_sum(sum);
      if (lane == 0) weights[m] = open[m] ? static_cast<compute>(p.scale) * sum : -static_cast<compute>(INFINITY);
    }
    __syncthreads();
    if (warp == 0) {
      compute top = -static_cast<compute>(INFINITY), total = 0;
      for (int m = lane; m < slots; m += kWarp) top = weights[m] > top ? weights[m] : top;
      top = warp_max(top);
      for (int m = lane; m < slots; m += kWarp) total += weights[m] = open[m] ? exp(weights[m] - top) : compute(0);
      total = warp_sum(total);
      for (int m = lane; m < slots; m += kWarp) weights[m] /= total;
    }
    __syncthreads();
    storage* to = row_of<storage>(out, sequence, head * group + i, 0);
    for (int d0 = 0; d0 < value_dim; d0 += across) {
      const int d = d0 + threadIdx.x % across;
      compute sum = 0;
      for (int m = share; m < slots && d < value_dim; m += shares) {
        compute* content = state_value + static_cast<int64_t>(m) * value_dim + d;
        const compute now =
            i == 0 ? update(content, to_compute<compute>(value[d * p.value.element]), gates[m], open[m] == 2)
                   : *content;
        sum += weights[m] * now;
      }
      partial[threadIdx.x] = sum;
      __syncthreads();
      if (share == 0 && d < value_dim) {
        for (int other = 1; other < shares; ++other) sum += partial[other * across + threadIdx.x];
        to[d * out.element] = to_storage<storage>(sum);
      }
      __syncthreads();
    }
  }
}

// After every block has read the positions.
__global__ void __launch_bounds__(kThreads) step_positions(int64_t sequences, int64_t* position) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < sequences) position[i] += 1;
}

}  // namespace

void step(const Problem& problem, const View& out, void* state_key, void* state_value, int64_t* position) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    const int64_t shared_bytes = (2 * problem.slots + kThreads) * sizeof(number) + problem.slots * sizeof(int);
    launch("step_slots", step_slots<decltype(storage), number>, problem.sequences * problem.kv_heads, kThreads,
           shared_bytes, problem.stream, problem, out, static_cast<number*>(state_key),
           static_cast<number*>(state_value), position);
  });
  launch("step_positions", step_positions, (problem.sequences + kThreads - 1) / kThreads, kThreads, 0, problem.stream,
         problem.sequences, position);
}

}  // namespace blurry_attn::cuda
