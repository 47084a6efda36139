// One token of one sequence and kv head: written into the slots, in place, and attended to by the heads of its group.
#pragma once

#include "device.cuh"

namespace blurry_attn::cuda {

constexpr int kStepThreads = 256;

template <typename compute>
constexpr int64_t step_shared_bytes(int64_t slots) {
  return (2 * slots + kStepThreads) * sizeof(compute) + slots * sizeof(int);
}

// Writes `token` into a slot's element and returns what it holds then; `before`: the slot was open before.
template <typename compute>
__device__ __forceinline__ compute update(compute* content, compute token, compute gate, bool before) {
  const compute now = written(before ? *content : compute(0), token, gate);
  if (!before || gate != compute(0)) *content = now;
  return now;
}

// For a block of kStepThreads. Reads and writes row `row` of the batch entry; `token`: its time. The slots are those of
// this sequence and head; `lse` may be null.
template <typename storage, typename compute>
__device__ void step_token(const Problem& p, const Law<compute>& law, int64_t batch, int64_t head, int64_t row,
                           int64_t token, compute* state_key, compute* state_value, const View& out, compute* lse,
                           unsigned char* shared) {
  constexpr int kThreads = kStepThreads, kWarps = kThreads / kWarp;
  const int group = static_cast<int>(p.query_heads / p.kv_heads), slots = static_cast<int>(p.slots);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int key_dim = static_cast<int>(p.key_dim), value_dim = static_cast<int>(p.value_dim);

  compute* gates = reinterpret_cast<compute*>(shared);     // [slots]
  compute* weights = gates + slots;                        // [slots]
  compute* partial = weights + slots;                      // [kThreads]
  int* open = reinterpret_cast<int*>(partial + kThreads);  // [slots]: 0 shut, 1 opened by this token, 2 before
  TokenGates<compute> info;
  info.make(law, token);
  for (int m = threadIdx.x; m < slots; m += kThreads) {
    gates[m] = info.gate(law, m);
    open[m] = law.is_open(m, token) + law.is_open(m, token - 1);
  }
  __syncthreads();

  const storage* key = row_of<const storage>(p.key, batch, head, row);
  const storage* value = row_of<const storage>(p.value, batch, head, row);
  // Values: threads across the elements, and the slots dealt to `shares` of them.
  int across = kWarp;
  while (across < value_dim && across < kThreads) across *= 2;
  const int shares = kThreads / across, share = threadIdx.x / across;

  for (int i = 0; i < group; ++i) {
    const storage* query = row_of<const storage>(p.query, batch, head * group + i, row);
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
      if (lse && lane == 0) lse[(batch * p.query_heads + head * group + i) * p.tokens + row] = top + log(total);
    }
    __syncthreads();
    storage* to = row_of<storage>(out, batch, head * group + i, row);
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

}  // namespace blurry_attn::cuda
