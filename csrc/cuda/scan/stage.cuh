// This header has what the scans share: rows on their way to shared memory, gates of a stretch, the place of a block.
#pragma once

#include <type_traits>

#include "common/law.cuh"
#include "common/shared.cuh"
#include "scan/plan.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSlotsPerThread = 4, kDimsPerThread = 16;  // tile of a thread in dot: 64 numbers
constexpr int kMixNumbers = 64;                          // tile of a thread in mix and adjoint: slots x dims
constexpr int kMaxChunk = 32;                            // rows of a chunk at most, which have a thread each

template <typename compute>
constexpr int kBlocksPerProcessor = sizeof(compute) == 4 ? 2 : 1;

// slot_at() is the offset of (stretch or sequence, kv head, slot, element 0) in tensors of slots.
__device__ __forceinline__ int64_t slot_at(const Problem& p, int64_t entry, int64_t head, int64_t slot, int64_t dim) {
  return ((entry * p.kv_heads + head) * p.slots + slot) * dim;
}

// given() is an element of a given tensor of slots, at a slot that is open at `token`; else it is 0.
template <typename compute>
__device__ __forceinline__ compute given(const Problem& p, const Law<compute>& law, const void* slots, int64_t token,
                                         int64_t sequence, int64_t head, int slot, int64_t dim, int d) {
  if (!slots || !law.is_open(slot, token)) return compute(0);
  return static_cast<const compute*>(slots)[slot_at(p, sequence, head, slot, dim) + d];
}
// given_content() is an element of a slot just before the first token of its sequence.
template <typename compute>
__device__ __forceinline__ compute given_content(const Problem& p, const Law<compute>& law, const void* state,
                                                 const Sequence& sequence, int64_t head, int slot, int64_t dim, int d) {
  return given(p, law, state, sequence.position - 1, sequence.index, head, slot, dim, d);
}
// given_gradient() is what the returned state's gradient gives to a slot at the end of its sequence.
template <typename compute>
__device__ __forceinline__ compute given_gradient(const Problem& p, const Law<compute>& law, const void* gradient,
                                                  const Sequence& sequence, int64_t head, int slot, int64_t dim,
                                                  int d) {
  return given(p, law, gradient, sequence.end() - 1, sequence.index, head, slot, dim, d);
}

// sum_over_threads() adds `values` over `threads` neighbouring threads (a power of two, at least `count`). Each of the
// first `count` then holds in values[0] the sum of the value numbered owned_value(). The order of the sums is fixed.
template <int count, typename compute>
__device__ __forceinline__ void sum_over_threads(compute (&values)[count], int thread, int threads) {
  int offset = 1;
#pragma unroll
  for (int n = count; n > 1; n /= 2, offset *= 2) {
    const bool upper = thread & offset;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const compute mine = upper ? values[i + n / 2] : values[i], theirs = upper ? values[i] : values[i + n / 2];
      values[i] = mine + __shfl_xor_sync(kAllLanes, theirs, offset);
    }
  }
  for (; offset < threads; offset *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
}
template <int count>
__device__ __forceinline__ int owned_value(int thread) {
  int index = 0;
#pragma unroll
  for (int n = count, offset = 1; n > 1; n /= 2, offset *= 2) index += thread & offset ? n / 2 : 0;
  return index;
}

// quotient() is x / by, where `by` is most often 1.
__device__ __forceinline__ int quotient(int x, int by) { return by == 1 ? x : x / by; }

// token_row() is row `i`, of (token, query head of the group) pairs, in a tensor of kv heads, null past the first head.
template <typename storage>
__device__ __forceinline__ storage* token_row(storage* first, const View& view, int i, int group) {
  const int token = quotient(i, group);
  return i == token * group ? first + token * view.token : nullptr;
}
// pair_row() is the same row in a tensor of query heads.
template <typename storage>
__device__ __forceinline__ storage* pair_row(storage* first, const View& view, int i, int group) {
  const int token = quotient(i, group), head = i - token * group;
  return first + token * view.token + head * view.head;
}

// stage_rows() sends elements first .. first + width - 1 of `count` rows to shared memory, with zeros past `dim`.
// row(i) may be null, which leaves a row out. `width` is a power of two, at least 4.
template <typename storage, typename row_type>
__device__ __forceinline__ void stage_rows(storage* to, int width, int count, int first, int dim, int64_t element,
                                           bool whole, const row_type& row) {
  const int quads = width / 4, shift = __ffs(quads) - 1;
  for (int i = threadIdx.x; i < count * quads; i += blockDim.x) {
    const storage* from = row(i >> shift);
    if (from) {
      copy_quad(reinterpret_cast<Quad<storage>*>(to) + i, from, element, first + 4 * (i & (quads - 1)), dim, whole);
    }
  }
}

// for_chunks() runs over `total` rows in chunks, in order or, if `reverse`, from the last chunk to the first. It calls
// stage(begin, count, buffer), then work(begin, count, buffer). A chunk is on its way while the one before is worked
// on: two buffers take turns, and one barrier per chunk is enough.
template <bool reverse, typename stage_type, typename work_type>
__device__ __forceinline__ void for_chunks(int total, int chunk, const stage_type& stage, const work_type& work) {
  const int chunks = (total + chunk - 1) / chunk, step = reverse ? -chunk : chunk;
  int begin = reverse ? (chunks - 1) * chunk : 0;
  for (int c = 0; c <= chunks; ++c, begin += step) {
    if (c < chunks) stage(begin, min(chunk, total - begin), c % 2);
    __pipeline_commit();
    if (c > 0) work(begin - step, min(chunk, total - (begin - step)), (c - 1) % 2);
    __pipeline_wait_prior(0);
    __syncthreads();
  }
}

// A Shape lays a scan's work on threads: `across` neighbours share the dimension that is summed over, and `along` go
// along the other one. A chunk has `chunk` rows.
struct Shape {
  int across, along, tiles, chunk;

  int threads() const { return across * along; }
};

// A Chunk is what a block keeps of a chunk of rows in shared memory: one of two buffers.
template <typename storage, typename compute>
struct Chunk {
  compute *gates, *weights;
  storage *tokens, *rows;
  TokenGates<compute>* info;

  // The arrays lie in the order of their alignment, with both buffers of each kind side by side.
  __device__ __forceinline__ Chunk(unsigned char* shared, int buffer, int rows_held, int gate_width, int weight_width,
                                   int token_width, int row_width) {
    const int numbers = rows_held * (gate_width + weight_width), elements = rows_held * (token_width + row_width);
    gates = reinterpret_cast<compute*>(shared) + buffer * numbers;
    weights = gates + rows_held * gate_width;
    storage* const all_elements = reinterpret_cast<storage*>(reinterpret_cast<compute*>(shared) + 2 * numbers);
    tokens = all_elements + buffer * elements;
    rows = tokens + rows_held * token_width;
    info = reinterpret_cast<TokenGates<compute>*>(all_elements + 2 * elements) + buffer * rows_held;
  }
  static int64_t bytes_per_row(int64_t numbers, int64_t elements) {
    return numbers * static_cast<int64_t>(sizeof(compute)) + elements * static_cast<int64_t>(sizeof(storage)) +
           static_cast<int64_t>(sizeof(TokenGates<compute>));
  }
};

// tokens_to() is how far `token` lies after `from`, in 32 bits, or -1 if it lies before.
__device__ __forceinline__ int tokens_to(int64_t token, int64_t from) {
  const int64_t left = token - from;
  return left < 0 ? -1 : left < INT32_MAX ? static_cast<int>(left) : INT32_MAX;
}

// A GateStage stages the gates of a stretch's tokens, from token `time` on, for the slots from `first_slot` on.
template <typename compute>
struct GateStage {
  const Law<compute>& law;
  int64_t time;
  int first_slot, group;
  int origin;  // offset of `time` in the period from the centre of slot 0; 0 for "fejer"

  __device__ __forceinline__ GateStage(const Law<compute>& law, int64_t time, int first_slot, int group)
      : law(law), time(time), first_slot(first_slot), group(group), origin(0) {
    if (law.kernel == Kernel::fejer) return;
    const int64_t from_centre = time - law.cells.centre(0), window = law.cells.window();
    origin = static_cast<int>(from_centre - floor_div(from_centre, window) * window);
  }
  // A token's gates lie at the row of the first head of its group, and are 0 past the last slot. With Spread::few, only
  // quads that the token touches are written.
  __device__ __forceinline__ void operator()(TokenGates<compute>* info, compute* gates, int width, int begin,
                                             int count) const {
    const int token0 = quotient(begin + group - 1, group), row0 = token0 * group - begin;
    const int row = row0 + static_cast<int>(threadIdx.x) * group;
    if (row < count) {
      TokenGates<compute> token;
      token.make(law, time + token0 + threadIdx.x);
      info[row] = token;
      if (law.kernel == Kernel::fejer) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int m = (token.slot[which] - first_slot) & ~3;
          if (m < 0 || m >= width) continue;
#pragma unroll
          for (int e = 0; e < 4; ++e) gates[row * width + m + e] = token.gate(law, first_slot + m + e);
        }
      }
    }
    if (law.kernel == Kernel::fejer) return;
    const Cells& cells = law.cells;
    const int window = static_cast<int>(cells.window()), resolution = static_cast<int>(cells.resolution);
    const int offset = (origin + token0) % window;
    for (int m = threadIdx.x; m < width; m += blockDim.x) {
      const int slot = first_slot + m;
      int at = 0, opening = INT32_MAX;
      if (slot < cells.slots) {
        at = offset - slot * resolution;
        at = at < 0 ? at + window : at;
        opening = tokens_to(cells.slot_opening(slot), time + token0);
      }
#pragma unroll 4
      for (int i = row0, t = 0; i < count; i += group, ++t) {
        const compute gate = law.gates[at];
        gates[i * width + m] = t > opening ? gate : compute(t == opening);
        at = at + 1 < window ? at + 1 : 0;
      }
    }
  }
};

// A BlockIndex has the three coordinates of a block: stretch (or other entry), kv head, tile.
struct BlockIndex {
  int64_t entry;
  int head, tile;

  __device__ BlockIndex(const Problem& p, int tiles) {
    const int64_t b = blockIdx.x;
    tile = static_cast<int>(b % tiles);
    head = static_cast<int>(b / tiles % p.kv_heads);
    entry = b / tiles / p.kv_heads;
  }
};

int power_of_two(int64_t at_least) {
  int n = 1;
  while (n < at_least) n *= 2;
  return n;
}
int between(int low, int x, int high) { return x < low ? low : x > high ? high : x; }
// make_shape() makes rows in shared memory whole quads in both dimensions, and a block whole warps.
Shape make_shape(int64_t summed, int per_thread_summed, int64_t other, int per_thread_other) {
  Shape shape;
  shape.across = between(4, power_of_two((summed + per_thread_summed - 1) / per_thread_summed), kWarp);
  const int least = std::max(kWarp / shape.across, 4 / per_thread_other);
  shape.along =
      between(least, power_of_two((other + per_thread_other - 1) / per_thread_other), kMaxThreads / shape.across);
  shape.tiles = static_cast<int>((other + shape.along * per_thread_other - 1) / (shape.along * per_thread_other));
  return shape;
}
int rows_that_fit(int64_t bytes_per_row) {
  return between(1, static_cast<int>(kScanChunkBytes / bytes_per_row), kMaxChunk);
}

// A Side has the tokens of one side, key or value, and the slots that hold them.
struct Side {
  View tokens;
  bool whole;  // whether quads of elements are aligned
  int dim;
  const void* given;  // the given state
  void* boundaries;   // compute [stretch][kv head][slot][dim]: contents before the first token of a stretch
};

}  // namespace
}  // namespace blurry_attn::cuda
