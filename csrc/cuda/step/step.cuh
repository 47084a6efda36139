// step_token() writes one token of one sequence and kv head into the slots, in place, and attends for the query heads.
//
// A block is kStepTeams teams of threads. A team takes whole slots, kRows at a time. Each of its threads holds four
// neighbouring elements of their keys and values (kChunks times four where heads are wide). So a block asks once for
// all that it needs of the state, for all query heads and before it knows the token's time. The softmax of a team runs
// over the team's own slots; the parts of the teams are merged at the end.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/law.cuh"

namespace blurry_attn::cuda {

constexpr int kStepTeams = 8;
constexpr int kStepThreads = kStepTeams * kWarp;  // threads of a block at most
constexpr int kStepSharedBytes = 48 << 10;        // bytes of shared memory of a block at most
constexpr int kStepChunk = 4 * kWarp;             // elements of a row that the largest team holds, times kChunks
constexpr int kShut = 2;                          // a shut slot's value in place of a gate; gates lie in -1 .. 1
constexpr double kLog2E = 1.4426950408889634;

// A StepShape deals slots and elements to the threads of a block. Sizes alone decide, so that a layout never changes a
// bit. kDim is the head_dim of key and value where it is known and the block holds slots without a remainder; else 0.
template <typename compute, int kChunks, int kDim = 0>
struct StepShape {
  using Number = compute;
  static constexpr int kRows = static_cast<int>(32 / sizeof(compute)) / kChunks;  // slots that a team holds at once
  static constexpr int kSlots = kStepTeams * kRows;                               // slots that a block holds at once
  static constexpr int kThreads = kDim ? kStepTeams * kDim / 4 : kStepThreads;    // threads of a block at most
  static constexpr bool kSmall = sizeof(compute) == 4 && kChunks < 4;             // whether a thread holds few numbers
  int slots, dims[2], lane_bits;
  int group, together;  // query heads per kv head, and how many of them go over the slots together
  compute scale;        // factor that gives logits to base 2

  BLURRY_HOST_DEVICE explicit StepShape(const Problem& p)
      : slots(static_cast<int>(p.slots)),
        dims{static_cast<int>(p.key_dim), static_cast<int>(p.value_dim)},
        lane_bits(3),
        group(static_cast<int>(p.query_heads / p.kv_heads)),
        scale(static_cast<compute>(p.scale * kLog2E)) {
    while (lane_bits < 5 && (4 << lane_bits < dims[0] || 4 << lane_bits < dims[1])) ++lane_bits;
    const int fit = (kStepSharedBytes - gate_bytes()) / query_bytes();
    together = group < fit ? group : fit;
  }
  BLURRY_HOST_DEVICE int key_dim() const { return kDim ? kDim : dims[0]; }
  BLURRY_HOST_DEVICE int value_dim() const { return kDim ? kDim : dims[1]; }
  BLURRY_HOST_DEVICE int lanes() const { return kDim ? kDim / 4 : 1 << lane_bits; }  // threads of a team
  BLURRY_HOST_DEVICE int threads() const { return kStepTeams * lanes(); }
  BLURRY_HOST_DEVICE bool has(int slot) const { return kDim || slot < slots; }
  // Shared memory holds the gates. For each query head and thread, it holds a part of the output, a top (largest logit)
  // and a total.
  BLURRY_HOST_DEVICE int gate_bytes() const { return slots * static_cast<int>(sizeof(compute)); }
  BLURRY_HOST_DEVICE int query_bytes() const {
    return threads() * (4 * kChunks + 2) * static_cast<int>(sizeof(compute));
  }
  int shared_bytes() const { return together * query_bytes() + gate_bytes(); }
};

// Words are four neighbouring numbers as they lie in memory. They are converted at their use, so a read does not wait.
template <typename storage>
struct Words {
  static constexpr bool kHalf = sizeof(storage) == 2;
  Pack<std::conditional_t<kHalf, unsigned, storage>, kHalf ? 2 : 4> words;

  template <typename compute>
  __device__ __forceinline__ Quad<compute> numbers() const {
    if constexpr (kHalf) {
      const float2 low = to_floats<storage>(words.x[0]), high = to_floats<storage>(words.x[1]);
      return {low.x, low.y, high.x, high.y};
    } else {
      return words;
    }
  }
};

// write_quad() stores four aligned numbers at once. An assignment would become single stores where they were computed.
template <typename number>
__device__ __forceinline__ void write_quad(number* to, const Quad<number>& quad) {
  if constexpr (sizeof(number) == 4) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]));
  } else {
    __stwb(reinterpret_cast<double2*>(to), make_double2(quad.x[0], quad.x[1]));
    __stwb(reinterpret_cast<double2*>(to) + 1, make_double2(quad.x[2], quad.x[3]));
  }
}

// Elements are a thread's part of one row: at .. at + 3, and again every kStepChunk, with zeros past the row's `dim`.
// `whole` says that four elements are one aligned access, and that a row has no remainder.
template <typename storage, int kChunks>
struct Elements {
  Words<storage> quad[kChunks];

  template <bool whole>
  __device__ __forceinline__ void read(const storage* row, int64_t element, int at, int dim) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c, at += kStepChunk) {
      quad[c] = {};
      if constexpr (whole) {
        if (at < dim) quad[c] = *reinterpret_cast<const Words<storage>*>(row + at);
      } else {
        Quad<storage> numbers;
#pragma unroll
        for (int e = 0; e < 4; ++e) numbers.x[e] = at + e < dim ? row[(at + e) * element] : storage{};
        memcpy(&quad[c], &numbers, sizeof(numbers));
      }
    }
  }
  template <bool whole>
  __device__ __forceinline__ void write(storage* row, int at, int dim) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c, at += kStepChunk) {
      if constexpr (whole) {
        if (at < dim) write_quad(row + at, quad[c].words);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (at + e < dim) row[at + e] = quad[c].words.x[e];
        }
      }
    }
  }
  // with() runs body(this element, the element of `other`).
  template <typename other_type, typename body_type>
  __device__ __forceinline__ void with(const Elements<other_type, kChunks>& other, const body_type& body) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Quad<storage> numbers = other.quad[c].template numbers<storage>();
#pragma unroll
      for (int e = 0; e < 4; ++e) body(quad[c].words.x[e], numbers.x[e]);
    }
  }
};

// step_token() is called by a block of shape.threads(). It reads and writes row `row` of the batch entry. when() gives
// the time of the token, and is called after the slots were asked for. The slots are those of this head; `lse` may be
// null.
template <typename storage, bool whole, typename compute, int kChunks, int kDim, typename when_type>
__device__ __forceinline__ void step_token(const Problem& p, const StepShape<compute, kChunks, kDim>& shape,
                                           const when_type& when, int64_t batch, int64_t head, int64_t row,
                                           compute* state_key, compute* state_value, const View& out, compute* lse,
                                           unsigned char* shared) {
  using Shape = StepShape<compute, kChunks, kDim>;
  using Slot = Elements<compute, kChunks>;
  using Row = Elements<storage, kChunks>;
  constexpr int kRows = Shape::kRows;
  constexpr compute kNone = -static_cast<compute>(INFINITY);
  const int threads = shape.threads(), lanes = shape.lanes(), key_dim = shape.key_dim(), value_dim = shape.value_dim();
  const int team = threadIdx.x / lanes, at = 4 * (threadIdx.x % lanes), together = shape.together;

  Slot* const sums = reinterpret_cast<Slot*>(shared);                           // [together][threads]
  compute* const tops = reinterpret_cast<compute*>(sums + together * threads);  // [together][threads]
  compute* const totals = tops + together * threads;                            // [together][threads]
  compute* const gates = totals + together * threads;                           // [slots]

  Slot keys[kRows], values[kRows];
  const auto hold = [&](int first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int m = first + r * kStepTeams;
      keys[r].template read<whole>(state_key + m * key_dim, 1, at, shape.has(m) ? key_dim : 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int m = first + r * kStepTeams;
      values[r].template read<whole>(state_value + m * value_dim, 1, at, shape.has(m) ? value_dim : 0);
    }
  };
  const auto input = [&](const View& view, int64_t of_head, int dim) {
    Row numbers;
    numbers.template read<whole>(row_of<const storage>(view, batch, of_head, row), view.element, at, dim);
    return numbers;
  };

  hold(team);
  const Row key = input(p.key, head, key_dim), value = input(p.value, head, value_dim);
  Row query = input(p.query, head * shape.group, key_dim);
  if (static_cast<int>(threadIdx.x) < shape.slots) {
    const Law<compute> law(p, head);
    const int64_t token = when();
    TokenGates<compute> shares;
    shares.make(law, token);
#pragma unroll 1
    for (int m = threadIdx.x; m < shape.slots; m += threads) {
      gates[m] = law.is_open(m, token) ? shares.gate(law, m) : compute(kShut);
    }
  }
  __syncthreads();

  for (int done = 0; done < shape.group; done += together) {
    const int64_t query_head = head * shape.group + done;
    const int queries = shape.group - done < together ? shape.group - done : together;
    for (int first = team; first < shape.slots + team; first += Shape::kSlots) {
      if (done > 0 || first > team) {
        hold(first);
        query = input(p.query, query_head, key_dim);
      }
      unsigned open = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int m = first + r * kStepTeams;
        const compute gate = shape.has(m) ? gates[m] : compute(kShut);
        open |= (gate == compute(kShut) ? 0u : 1u) << r;
        if (done > 0 || !shape.has(m) || gate == compute(0)) continue;
        const auto write = [gate](compute& content, compute number) {
          content = gate == compute(kShut) ? compute(0) : written(content, number, gate);
        };
        keys[r].with(key, write);
        values[r].with(value, write);
        keys[r].template write<whole>(state_key + m * key_dim, at, key_dim);
        values[r].template write<whole>(state_value + m * value_dim, at, value_dim);
      }

      for (int i = 0; i < queries; ++i) {
        compute logits[kRows] = {};  // to base 2
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          keys[r].with(query, [&](compute k, compute q) { logits[r] = fma(q, k, logits[r]); });
        }
        if (i + 1 < queries) query = input(p.query, query_head + i + 1, key_dim);
#pragma unroll
        for (int other = kWarp / 2; other > 0; other /= 2) {
          if (other >= lanes) continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) logits[r] += __shfl_xor_sync(kAllLanes, logits[r], other);
        }

        const int mine = i * threads + threadIdx.x;
        const compute before = first > team ? tops[mine] : kNone;
        compute top = before, total = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          logits[r] = open >> r & 1 ? shape.scale * logits[r] : kNone;
          top = logits[r] > top ? logits[r] : top;
        }
        const compute base = top == kNone ? compute(0) : top;
        Slot sum = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const compute weight = exp2(logits[r] - base);
          total += weight;
          sum.with(values[r], [weight](compute& x, compute v) { x = fma(weight, v, x); });
        }
        if (first > team) {
          const compute kept = exp2(before - base);
          total = fma(kept, totals[mine], total);
          sum.with(sums[mine], [kept](compute& x, compute earlier) { x = fma(kept, earlier, x); });
        }
        tops[mine] = top;
        totals[mine] = total;
        sums[mine] = sum;
      }
    }

    __syncthreads();
    for (int j = threadIdx.x; j < queries * value_dim; j += threads) {
      const int i = j / value_dim, element = j % value_dim, first = i * threads;
      const int chunk = element / kStepChunk, lane = element / 4 % lanes;
      compute top = kNone, total = 0, sum = 0;
#pragma unroll
      for (int t = 0; t < kStepTeams; ++t) {
        const compute other = tops[first + t * lanes];
        top = other > top ? other : top;
      }
#pragma unroll
      for (int t = 0; t < kStepTeams; ++t) {
        const compute share = exp2(tops[first + t * lanes] - top);
        total = fma(share, totals[first + t * lanes], total);
        sum = fma(share, sums[first + t * lanes + lane].quad[chunk].words.x[element % 4], sum);
      }
      storage* const to = row_of<storage>(out, batch, query_head + i, row);
      to[element * out.element] = to_storage<storage>(sum / total);
      if (lse && element == 0) {
        lse[(batch * p.query_heads + query_head + i) * p.tokens + row] = (top + log2(total)) / compute(kLog2E);
      }
    }
    __syncthreads();
  }
}

}  // namespace blurry_attn::cuda
