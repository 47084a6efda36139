// Any kernel as a scan over time, cut into stretches that run in parallel. What the slots hold at the beginning of each
// stretch is found first; then three scans serve both sides, keys and values, forward and backward:
//   dot:     z_t[m] = a_t . S_t[m]            logits (query, key) and their like (grad_out, value)
//   mix:     y_t = sum_m w_t[m] S_t[m]        out (probabilities, value) and grad_query (grad_logits, key)
//   adjoint: G_t[m] = w_t[m] a_t + (1 - g_{t+1}[m]) G_{t+1}[m],  y_t = sum_m g_t[m] G_t[m]     grad_key, grad_value
// Each keeps its share of the slots in registers. Logits and weights live for as many stretches at once as a bounded
// workspace holds. A stretch's rows are its (token, query head of the group) pairs; the heads of a group share the
// slots.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/launch.cuh"
#include "common/law.cuh"
#include "common/shared.cuh"
#include "common/tuning.h"

namespace blurry_attn::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSlotsPerThread = 4, kDimsPerThread = 16;  // of dot: a tile of 64 numbers
constexpr int kMixNumbers = 64;                          // of mix and adjoint: slots x dims of a tile
constexpr int kMaxChunk = 32;                            // rows of a chunk: at most a thread each

template <typename compute>
constexpr int kBlocksPerProcessor = sizeof(compute) == 4 ? 2 : 1;

// How time is cut. The cut of a sequence depends on its own length alone, so that a packed batch gives the bits that
// its sequences give alone.
struct ScanPlan {
  int64_t length;     // tokens of a stretch
  int64_t rows;       // tokens of the longest one that there can be
  int64_t per_batch;  // stretches of a batch entry; 0: sequences are packed
  int64_t count;      // of stretches, those included that hold no token

  explicit ScanPlan(const Problem& problem) {
    length = problem.slots * 4 > 512 ? problem.slots * 4 : 512;
    if (problem.kernel != Kernel::fejer && 2 * problem.longest_window > length) length = 2 * problem.longest_window;
    rows = length < problem.tokens ? length : problem.tokens;
    per_batch = 0;
    count = problem.tokens / length + problem.sequences;
    if (problem.sequences == 0) count = 0;
    if (!problem.cu_seqlens) {
      per_batch = problem.tokens > 0 ? (problem.tokens + length - 1) / length : 1;
      count = per_batch * problem.sequences;
    }
  }
  int64_t slot_elements(const Problem& p, int64_t dim) const { return count * p.kv_heads * p.slots * dim; }
  int64_t weights_per_stretch(const Problem& p) const { return rows * p.query_heads * p.slots; }
  // Stretches whose logits are held at once.
  int64_t at_once(const Problem& p) const {
    const int64_t each = weights_per_stretch(p), held = each < kScanWeights ? kScanWeights / (each > 0 ? each : 1) : 1;
    return held < count ? held : count;
  }
};

// ScanStretch number `x` of a plan.
struct ScanStretch {
  Sequence sequence;
  int64_t number;  // in its sequence
  int64_t time;    // of its first token
  int length;      // tokens; 0 only if the sequence is empty
  bool exists, last;

  __device__ ScanStretch(const Problem& problem, const ScanPlan& plan, int64_t x)
      : sequence(problem, find(problem, plan, x)) {
    number = x - first(problem, plan, sequence.index);
    const int64_t begin = number * plan.length, left = sequence.length - begin;
    exists = number == 0 || (number > 0 && left > 0);  // below zero only where cu_seqlens is wrong
    last = left <= plan.length;
    length = exists ? static_cast<int>(last ? left : plan.length) : 0;
    time = sequence.position + begin;
  }
  __device__ int64_t row() const { return sequence.row + time - sequence.position; }

  // Number of the first stretch of a sequence: later ones begin after the last one that an earlier one can need.
  __device__ static int64_t first(const Problem& problem, const ScanPlan& plan, int64_t i) {
    return plan.per_batch ? i * plan.per_batch : Sequence::boundary(problem, i) / plan.length + i;
  }
  __device__ static int64_t find(const Problem& problem, const ScanPlan& plan, int64_t x) {
    if (plan.per_batch) return x / plan.per_batch;
    int64_t low = 0, high = problem.sequences;  // first(low) <= x, and first(high) > x or high is past the last
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first(problem, plan, middle) <= x ? low : high) = middle;
    }
    return low;
  }
};

// Offset of (stretch or sequence, kv head, slot, element 0) in tensors of slots.
__device__ __forceinline__ int64_t slot_at(const Problem& p, int64_t entry, int64_t head, int64_t slot, int64_t dim) {
  return ((entry * p.kv_heads + head) * p.slots + slot) * dim;
}

// Element of a given tensor of slots, at a slot that is open at `token`; else 0.
template <typename compute>
__device__ __forceinline__ compute given(const Problem& p, const Law<compute>& law, const void* slots, int64_t token,
                                         int64_t sequence, int64_t head, int slot, int64_t dim, int d) {
  if (!slots || !law.is_open(slot, token)) return compute(0);
  return static_cast<const compute*>(slots)[slot_at(p, sequence, head, slot, dim) + d];
}
// What a slot holds just before the first token of its sequence.
template <typename compute>
__device__ __forceinline__ compute given_content(const Problem& p, const Law<compute>& law, const void* state,
                                                 const Sequence& sequence, int64_t head, int slot, int64_t dim, int d) {
  return given(p, law, state, sequence.position - 1, sequence.index, head, slot, dim, d);
}
// What the returned state's gradient gives to a slot at the end of its sequence.
template <typename compute>
__device__ __forceinline__ compute given_gradient(const Problem& p, const Law<compute>& law, const void* gradient,
                                                  const Sequence& sequence, int64_t head, int slot, int64_t dim,
                                                  int d) {
  return given(p, law, gradient, sequence.end() - 1, sequence.index, head, slot, dim, d);
}

// Adds `values` over the `threads` neighbouring threads (a power of two, at least `count`); each of the first `count`
// then holds in values[0] the sum of the one numbered owned_value(). The order of the sums is fixed.
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

// x / by, which is most often 1.
__device__ __forceinline__ int quotient(int x, int by) { return by == 1 ? x : x / by; }

// Row number `i`, of (token, query head of the group) pairs, in a tensor of kv heads: null but for the first head.
template <typename storage>
__device__ __forceinline__ storage* token_row(storage* first, const View& view, int i, int group) {
  const int token = quotient(i, group);
  return i == token * group ? first + token * view.token : nullptr;
}
// The same in a tensor of query heads.
template <typename storage>
__device__ __forceinline__ storage* pair_row(storage* first, const View& view, int i, int group) {
  const int token = quotient(i, group), head = i - token * group;
  return first + token * view.token + head * view.head;
}

// Sends elements first .. first + width - 1 of `count` rows to shared memory, zeros past `dim`; row(i) may be null,
// which leaves a row out. `width` is a power of two, at least 4.
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

// Runs over `total` rows in chunks, in order or, if `reverse`, from the last chunk to the first: stage(begin, count,
// buffer), then work(begin, count, buffer). A chunk is on its way while the one before is worked on: two buffers take
// turns, and one barrier per chunk is enough.
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

// How a scan's work lies on threads: `across` neighbours share the dimension that is summed over, `along` go along the
// other one; chunks of `chunk` rows.
struct Shape {
  int across, along, tiles, chunk;

  int threads() const { return across * along; }
};

// What a block keeps of a chunk of rows in shared memory: one of two buffers.
template <typename storage, typename compute>
struct Chunk {
  compute *gates, *weights;
  storage *tokens, *rows;
  TokenGates<compute>* info;

  // In the order of alignment, both buffers of each kind.
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

// How far `token` lies after `from`, in 32 bits: -1 for any before it.
__device__ __forceinline__ int tokens_to(int64_t token, int64_t from) {
  const int64_t left = token - from;
  return left < 0 ? -1 : left < INT32_MAX ? static_cast<int>(left) : INT32_MAX;
}

// What stages the gates of a stretch's tokens, from token `time` on, for the slots `first_slot` and after.
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
  // A token's gates lie at the row of the first head of its group; 0 past the last slot. Spread::few: only quads that
  // it touches are written.
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

// One of the blocks' three coordinates: stretch (or other entry), kv head, tile.
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
// Rows in shared memory are whole quads in both dimensions, and a block whole warps.
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

// The tokens of one side, key or value, and the slots that hold them.
struct Side {
  View tokens;
  bool whole;  // quads of elements are aligned
  int dim;
  const void* given;  // state
  void* boundaries;   // compute [stretch][kv head][slot][dim]: contents before the first token of a stretch
};

// A thread's tile in dot: slots slot0 .. slot0 + 3 by the dims (4 (j across + thread) + e).
template <typename compute>
struct DotTile {
  compute content[kSlotsPerThread][kDimsPerThread];
  int thread, across;

  __device__ __forceinline__ int dim(int j) const { return 4 * (j * across + thread); }

  template <typename at_type>
  __device__ __forceinline__ void load(int slot0, int64_t slots, int dims, const at_type& at) {
#pragma unroll
    for (int s = 0; s < kSlotsPerThread; ++s) {
#pragma unroll
      for (int i = 0; i < kDimsPerThread; ++i) {
        const int d = dim(i / 4) + i % 4;
        content[s][i] = slot0 + s < slots && d < dims ? at(slot0 + s, d) : compute(0);
      }
    }
  }
  // `slot` is that of content[0], `row` where its gate lies in a row of gates.
  template <typename storage>
  __device__ __forceinline__ void write(const storage* token, const TokenGates<compute>& info, const compute* row,
                                        int slot) {
    if (info.spread == Spread::all) {
      const Quad<compute> gate = read_pack<compute, 4>(row);
#pragma unroll
      for (int j = 0; j < kDimsPerThread / 4; ++j) {
        const Quad<compute> x = read_pack<compute, 4>(token + dim(j));
#pragma unroll
        for (int s = 0; s < kSlotsPerThread; ++s) {
#pragma unroll
          for (int e = 0; e < 4; ++e) content[s][4 * j + e] += gate.x[s] * (x.x[e] - content[s][4 * j + e]);
        }
      }
      return;
    }
    if (!info.touches(slot)) return;
    const Quad<compute> gate = read_pack<compute, 4>(row);
#pragma unroll
    for (int s = 0; s < kSlotsPerThread; ++s) {
      if (gate.x[s] == compute(0)) continue;
#pragma unroll
      for (int j = 0; j < kDimsPerThread / 4; ++j) {
        const Quad<compute> x = read_pack<compute, 4>(token + dim(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) content[s][4 * j + e] = written(content[s][4 * j + e], x.x[e], gate.x[s]);
      }
    }
  }
};

// "dirichlet": what the slots hold before each stretch, and at the end of each sequence if `end` is given. A gate of 1
// replaces what a slot held, so one period tells it all.
template <typename storage, typename compute>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor<compute>)
    scan_boundaries(Problem p, ScanPlan plan, Side side, Shape shape, int64_t stretches, compute* end) {
  const BlockIndex block(p, shape.tiles);
  const bool at_end = block.entry >= stretches;
  const int64_t x = at_end ? block.entry - stretches : block.entry;
  const ScanStretch stretch(p, plan, x);
  if (!stretch.exists || (at_end && !stretch.last)) return;
  const Law<compute> law(p, block.head);
  const Sequence& sequence = stretch.sequence;
  const int64_t to = at_end ? sequence.end() : stretch.time;
  const int64_t period = law.cells.window(), from = to - period > sequence.position ? to - period : sequence.position;

  const int slot_width = kSlotsPerThread * shape.along, dim_width = kDimsPerThread * shape.across;
  const int first_slot = block.tile * slot_width, slot0 = threadIdx.x / shape.across * kSlotsPerThread;
  const auto chunk_in = [&](int buffer) {
    return Chunk<storage, compute>(shared_memory, buffer, shape.chunk, slot_width, 0, dim_width, 0);
  };
  DotTile<compute> tile;
  tile.thread = threadIdx.x % shape.across;
  tile.across = shape.across;
  tile.load(first_slot + slot0, p.slots, side.dim, [&](int slot, int d) {
    return from == sequence.position ? given_content(p, law, side.given, sequence, block.head, slot, side.dim, d)
                                     : compute(0);
  });
  const storage* tokens =
      row_of<const storage>(side.tokens, sequence.batch, block.head, sequence.row + from - sequence.position);
  const GateStage<compute> stage_gates(law, from, first_slot, 1);
  for_chunks<false>(
      static_cast<int>(to - from), shape.chunk,
      [&](int begin, int count, int buffer) {
        const auto chunk = chunk_in(buffer);
        stage_rows(chunk.tokens, dim_width, count, 0, side.dim, side.tokens.element, side.whole,
                   [&](int i) { return tokens + (begin + i) * side.tokens.token; });
        stage_gates(chunk.info, chunk.gates, slot_width, begin, count);
      },
      [&](int, int count, int buffer) {
        auto chunk = chunk_in(buffer);
        const compute* gates = chunk.gates + slot0;
        for (int i = 0; i < count; ++i, ++chunk.info, chunk.tokens += dim_width, gates += slot_width) {
          tile.write(chunk.tokens, *chunk.info, gates, first_slot + slot0);
        }
      });
  compute* out = at_end ? end : static_cast<compute*>(side.boundaries);
#pragma unroll
  for (int s = 0; s < kSlotsPerThread; ++s) {
    const int slot = first_slot + slot0 + s;
    if (slot >= p.slots) continue;
#pragma unroll
    for (int i = 0; i < kDimsPerThread; ++i) {
      const int d = tile.dim(i / 4) + i % 4;
      if (d >= side.dim) continue;
      out[slot_at(p, at_end ? sequence.index : x, block.head, slot, side.dim) + d] = tile.content[s][i];
    }
  }
}

// "fejer": the same, each element of a slot going along the slot's cells through the whole sequence. Tokens between
// lobes cost nothing.
template <typename storage, typename compute>
__global__ void __launch_bounds__(kMaxThreads)
    scan_chains(Problem p, ScanPlan plan, Side side, int tiles, compute* end) {
  const BlockIndex block(p, tiles);
  const int64_t element = static_cast<int64_t>(block.tile) * blockDim.x + threadIdx.x;
  if (element >= p.slots * side.dim) return;
  const int slot = static_cast<int>(element / side.dim), d = static_cast<int>(element % side.dim);
  const Sequence sequence(p, block.entry);
  const Law<compute> law(p, block.head);
  const storage* tokens =
      row_of<const storage>(side.tokens, sequence.batch, block.head, sequence.row) + d * side.tokens.element;
  compute* boundaries = static_cast<compute*>(side.boundaries) +
                        slot_at(p, ScanStretch::first(p, plan, block.entry), block.head, slot, side.dim) + d;
  const int64_t step = slot_at(p, 1, 0, 0, side.dim);
  compute content = given_content(p, law, side.given, sequence, block.head, slot, side.dim, d);
  for (int64_t from = sequence.position; from < sequence.end(); from += plan.length, boundaries += step) {
    *boundaries = content;
    const int64_t to = from + plan.length < sequence.end() ? from + plan.length : sequence.end();
    for_lobes(law, slot, from, to, [&](int64_t begin, int64_t end, const compute* gates, bool opens) {
      const storage* token = tokens + (begin - sequence.position) * side.tokens.token;
      for (int64_t left = end - begin; left > 0; left -= kScanReadsAhead, gates += kScanReadsAhead, opens = false) {
        const int count = left < kScanReadsAhead ? static_cast<int>(left) : kScanReadsAhead;
        storage read[kScanReadsAhead];
        compute gate[kScanReadsAhead];
#pragma unroll
        for (int i = 0; i < kScanReadsAhead; ++i) {  // past the end: the last token again, its gate 0
          read[i] = *token;
          gate[i] = gates[min(i, count - 1)];
          token += i + 1 < left ? side.tokens.token : 0;
        }
        if (opens) gate[0] = 1;
#pragma unroll
        for (int i = 0; i < kScanReadsAhead; ++i) {
          content = written(content, to_compute<compute>(read[i]), i < count ? gate[i] : compute(0));
        }
      }
    });
  }
  if (end) end[slot_at(p, block.entry, block.head, slot, side.dim) + d] = content;
}

// dot. `rows` are the a_t, one per query head; results [stretch - first][kv head][row][slot], -inf for shut slots.
template <typename storage, typename compute>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor<compute>)
    scan_dot(Problem p, ScanPlan plan, Side side, Shape shape, int64_t first_stretch, View rows, bool rows_whole,
             compute scale, compute* results) {
  const BlockIndex block(p, shape.tiles);
  const ScanStretch stretch(p, plan, first_stretch + block.entry);
  if (stretch.length == 0) return;
  const Law<compute> law(p, block.head);
  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  const int64_t batch = stretch.sequence.batch, row0 = stretch.row();
  const int slot_width = kSlotsPerThread * shape.along, dim_width = kDimsPerThread * shape.across;
  const int first_slot = block.tile * slot_width, slot0 = threadIdx.x / shape.across * kSlotsPerThread;
  const auto chunk_in = [&](int buffer) {
    return Chunk<storage, compute>(shared_memory, buffer, shape.chunk, slot_width, 0, dim_width, dim_width);
  };
  DotTile<compute> tile;
  tile.thread = threadIdx.x % shape.across;
  tile.across = shape.across;
  tile.load(first_slot + slot0, p.slots, side.dim, [&](int slot, int d) {
    return static_cast<const compute*>(
        side.boundaries)[slot_at(p, first_stretch + block.entry, block.head, slot, side.dim) + d];
  });
  // After the sum over threads, this thread holds the result of one slot.
  const int mine = first_slot + slot0 + owned_value<kSlotsPerThread>(tile.thread);
  const bool holds = tile.thread < kSlotsPerThread && mine < p.slots;
  const int opening = tokens_to(law.cells.slot_opening(mine), stretch.time);
  results += (block.entry * p.kv_heads + block.head) * plan.rows * group * p.slots + mine;
  const storage* tokens = row_of<const storage>(side.tokens, batch, block.head, row0);
  const storage* first_row = row_of<const storage>(rows, batch, static_cast<int64_t>(block.head) * group, row0);
  const GateStage<compute> stage_gates(law, stretch.time, first_slot, group);
  for_chunks<false>(
      stretch.length * group, shape.chunk,
      [&](int begin, int count, int buffer) {
        const auto chunk = chunk_in(buffer);
        stage_rows(chunk.tokens, dim_width, count, 0, side.dim, side.tokens.element, side.whole,
                   [&](int i) { return token_row(tokens, side.tokens, begin + i, group); });
        stage_rows(chunk.rows, dim_width, count, 0, side.dim, rows.element, rows_whole,
                   [&](int i) { return pair_row(first_row, rows, begin + i, group); });
        stage_gates(chunk.info, chunk.gates, slot_width, begin, count);
      },
      [&](int begin, int count, int buffer) {
        auto chunk = chunk_in(buffer);
        const compute* gates = chunk.gates + slot0;
        compute* to = results + begin * p.slots;
        int token = quotient(begin, group), head = begin - token * group;
        for (int i = 0; i < count; ++i) {
          if (head == 0) tile.write(chunk.tokens, *chunk.info, gates, first_slot + slot0);
          compute sums[kSlotsPerThread] = {};
#pragma unroll
          for (int j = 0; j < kDimsPerThread / 4; ++j) {
            const Quad<compute> a = read_pack<compute, 4>(chunk.rows + tile.dim(j));
#pragma unroll
            for (int s = 0; s < kSlotsPerThread; ++s) {
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[s] += a.x[e] * tile.content[s][4 * j + e];
            }
          }
          sum_over_threads(sums, tile.thread, shape.across);
          if (holds) *to = token >= opening ? scale * sums[0] : -static_cast<compute>(INFINITY);
          to += p.slots;
          ++chunk.info;
          chunk.tokens += dim_width;
          chunk.rows += dim_width;
          gates += slot_width;
          if (++head == group) {
            head = 0;
            ++token;
          }
        }
      });
}

// Goes over the rows of a workspace of logits, a warp per row: body(number of the row's (batch, query head, token),
// offset of its logits).
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

// A row of a workspace over the lanes of a warp, 32 * per_lane slots at most; `pad` past the last one.
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

// Logits to probabilities, in place, and their lse.
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

// Logits to probabilities and grad_out . values to scale times the gradients of the logits, in place. The lse may be
// that of other kernels, with their rounding: probabilities are brought to a sum of one.
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

// A thread's tile in mix and adjoint: the slots (4 (j across + thread) + e) by the dims dim0 .. dim0 + dims - 1.
template <typename compute, int dims>
struct MixTile {
  static constexpr int kSlots = kMixNumbers / dims;
  compute content[kSlots][dims];
  int thread, across;
  bool exist;  // all of the thread's slots

  __device__ __forceinline__ int slot(int j) const { return 4 * (j * across + thread); }

  template <typename at_type>
  __device__ __forceinline__ void load(int dim0, int64_t slots, int dim, const at_type& at) {
    exist = slot(kSlots / 4 - 1) + 4 <= slots;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int i = 0; i < dims; ++i) {
        const int m = slot(s / 4) + s % 4, d = dim0 + i;
        content[s][i] = m < slots && d < dim ? at(m, d) : compute(0);
      }
    }
  }
  // `gates` is the token's row of gates. Slots that do not exist stay as they are, whatever the token holds.
  template <typename storage>
  __device__ __forceinline__ void write(const storage* token, const TokenGates<compute>& info, const compute* gates) {
    const Pack<compute, dims> x = read_pack<compute, dims>(token);
    if (info.spread == Spread::all && exist) {
#pragma unroll
      for (int j = 0; j < kSlots / 4; ++j) {
        const Quad<compute> gate = read_pack<compute, 4>(gates + slot(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < dims; ++i) content[4 * j + e][i] += gate.x[e] * (x.x[i] - content[4 * j + e][i]);
        }
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kSlots / 4; ++j) {
      if (!info.touches(slot(j))) continue;
      const Quad<compute> gate = read_pack<compute, 4>(gates + slot(j));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (gate.x[e] == compute(0)) continue;
#pragma unroll
        for (int i = 0; i < dims; ++i) content[4 * j + e][i] = written(content[4 * j + e][i], x.x[i], gate.x[e]);
      }
    }
  }
  // The adjoint of write(): adds what goes to the token to `sums`, and keeps what goes to the content before.
  template <bool add>
  __device__ __forceinline__ void unwrite(const TokenGates<compute>& info, const compute* gates,
                                          compute (&sums)[dims]) {
    if (info.spread == Spread::all && exist) {
#pragma unroll
      for (int j = 0; j < kSlots / 4; ++j) {
        const Quad<compute> gate = read_pack<compute, 4>(gates + slot(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < dims; ++i) {
            if (add) sums[i] += gate.x[e] * content[4 * j + e][i];
            content[4 * j + e][i] -= gate.x[e] * content[4 * j + e][i];
          }
        }
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kSlots / 4; ++j) {
      if (!info.touches(slot(j))) continue;
      const Quad<compute> gate = read_pack<compute, 4>(gates + slot(j));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (gate.x[e] == compute(0)) continue;
        const bool replaced = gate.x[e] == compute(1);
#pragma unroll
        for (int i = 0; i < dims; ++i) {
          const compute share = gate.x[e] * content[4 * j + e][i];
          if (add) sums[i] += share;
          content[4 * j + e][i] = replaced ? compute(0) : content[4 * j + e][i] - share;
        }
      }
    }
  }
};

// mix. `results` has the shape of the query with the side's dim.
template <typename storage, typename compute, int dims>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor<compute>)
    scan_mix(Problem p, ScanPlan plan, Side side, Shape shape, int64_t first_stretch, const compute* weights,
             View results) {
  using Tile = MixTile<compute, dims>;
  const BlockIndex block(p, shape.tiles);
  const ScanStretch stretch(p, plan, first_stretch + block.entry);
  if (stretch.length == 0) return;
  const Law<compute> law(p, block.head);
  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  const int64_t batch = stretch.sequence.batch, row0 = stretch.row();
  const int slot_width = Tile::kSlots * shape.across, dim_width = dims * shape.along;
  const int first_dim = block.tile * dim_width, dim0 = threadIdx.x / shape.across * dims;
  const auto chunk_in = [&](int buffer) {
    return Chunk<storage, compute>(shared_memory, buffer, shape.chunk, slot_width, slot_width, dim_width, 0);
  };
  Tile tile;
  tile.thread = threadIdx.x % shape.across;
  tile.across = shape.across;
  tile.load(first_dim + dim0, p.slots, side.dim, [&](int slot, int d) {
    return static_cast<const compute*>(
        side.boundaries)[slot_at(p, first_stretch + block.entry, block.head, slot, side.dim) + d];
  });
  const int mine = first_dim + dim0 + owned_value<dims>(tile.thread);
  const bool holds = tile.thread < dims && mine < side.dim;
  storage* to =
      row_of<storage>(results, batch, static_cast<int64_t>(block.head) * group, row0) + mine * results.element;
  const int slots = static_cast<int>(p.slots);
  weights += (block.entry * p.kv_heads + block.head) * plan.rows * group * p.slots;
  const storage* tokens = row_of<const storage>(side.tokens, batch, block.head, row0);
  const GateStage<compute> stage_gates(law, stretch.time, 0, group);
  for_chunks<false>(
      stretch.length * group, shape.chunk,
      [&](int begin, int count, int buffer) {
        const auto chunk = chunk_in(buffer);
        stage_rows(chunk.weights, slot_width, count, 0, slots, 1, slots % 4 == 0,
                   [&](int i) { return weights + (begin + i) * p.slots; });
        stage_rows(chunk.tokens, dim_width, count, first_dim, side.dim, side.tokens.element, side.whole,
                   [&](int i) { return token_row(tokens, side.tokens, begin + i, group); });
        stage_gates(chunk.info, chunk.gates, slot_width, begin, count);
      },
      [&](int begin, int count, int buffer) {
        auto chunk = chunk_in(buffer);
        int token = quotient(begin, group), head = begin - token * group;
        const storage* x = chunk.tokens + dim0;
        for (int i = 0; i < count; ++i) {
          if (head == 0) tile.write(x, *chunk.info, chunk.gates);
          compute sums[dims] = {};
#pragma unroll
          for (int j = 0; j < Tile::kSlots / 4; ++j) {
            const Quad<compute> w = read_pack<compute, 4>(chunk.weights + tile.slot(j));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
#pragma unroll
              for (int d = 0; d < dims; ++d) sums[d] += w.x[e] * tile.content[4 * j + e][d];
            }
          }
          sum_over_threads(sums, tile.thread, shape.across);
          if (holds) to[token * results.token + head * results.head] = to_storage<storage>(sums[0]);
          ++chunk.info;
          x += dim_width;
          chunk.weights += slot_width;
          chunk.gates += slot_width;
          if (++head == group) {
            head = 0;
            ++token;
          }
        }
      });
}

// The gradients of one side.
struct Adjoint {
  View rows;  // the a_t: query or grad_out
  bool rows_whole;
  const void* weights;     // of the stretches in hand
  void* carries;           // compute [stretch][kv head][slot][dim]: G at the first token, its write undone
  const void* grad_state;  // of the returned state; null: not given
  View grad_tokens;
  void* grad_given;  // of the given state; null: not wanted
};

// adjoint, from the last token of a stretch to the first. `local`: from zero, for what the stretch adds to its carry
// (for "dirichlet", one period tells it all); else from the next stretch's carry, for the gradients of its tokens.
template <typename storage, typename compute, int dims, bool local>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor<compute>)
    scan_adjoint(Problem p, ScanPlan plan, Side side, Shape shape, int64_t first_stretch, Adjoint adjoint) {
  using Tile = MixTile<compute, dims>;
  const BlockIndex block(p, shape.tiles);
  const int64_t x = first_stretch + block.entry;
  const ScanStretch stretch(p, plan, x);
  if (!stretch.exists || (local && stretch.number == 0)) return;
  const Law<compute> law(p, block.head);
  const Sequence& sequence = stretch.sequence;
  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  const int64_t batch = sequence.batch, row0 = stretch.row();
  const int slot_width = Tile::kSlots * shape.across, dim_width = dims * shape.along;
  const int first_dim = block.tile * dim_width, dim0 = threadIdx.x / shape.across * dims;
  const auto chunk_in = [&](int buffer) {
    return Chunk<storage, compute>(shared_memory, buffer, shape.chunk, slot_width, slot_width, 0, dim_width);
  };
  compute* carries = static_cast<compute*>(adjoint.carries);
  Tile tile;
  tile.thread = threadIdx.x % shape.across;
  tile.across = shape.across;
  tile.load(first_dim + dim0, p.slots, side.dim, [&](int slot, int d) {
    if (local) return compute(0);
    return stretch.last ? given_gradient(p, law, adjoint.grad_state, sequence, block.head, slot, side.dim, d)
                        : carries[slot_at(p, x + 1, block.head, slot, side.dim) + d];
  });
  const int mine = first_dim + dim0 + owned_value<dims>(tile.thread);
  const bool holds = tile.thread < dims && mine < side.dim;
  storage* to = row_of<storage>(adjoint.grad_tokens, batch, block.head, row0) + mine * adjoint.grad_tokens.element;
  int length = stretch.length;
  if (local && law.kernel != Kernel::fejer && law.cells.window() < length) {
    length = static_cast<int>(law.cells.window());
  }
  const int slots = static_cast<int>(p.slots);
  const compute* weights = static_cast<const compute*>(adjoint.weights) +
                           (block.entry * p.kv_heads + block.head) * plan.rows * group * p.slots;
  const storage* first_row = row_of<const storage>(adjoint.rows, batch, static_cast<int64_t>(block.head) * group, row0);
  const GateStage<compute> stage_gates(law, stretch.time, 0, group);
  for_chunks<true>(
      length * group, shape.chunk,
      [&](int begin, int count, int buffer) {
        const auto chunk = chunk_in(buffer);
        stage_rows(chunk.weights, slot_width, count, 0, slots, 1, slots % 4 == 0,
                   [&](int i) { return weights + (begin + i) * p.slots; });
        stage_rows(chunk.rows, dim_width, count, first_dim, side.dim, adjoint.rows.element, adjoint.rows_whole,
                   [&](int i) { return pair_row(first_row, adjoint.rows, begin + i, group); });
        stage_gates(chunk.info, chunk.gates, slot_width, begin, count);
      },
      [&](int begin, int count, int buffer) {
        auto chunk = chunk_in(buffer);
        int token = quotient(begin + count - 1, group), head = begin + count - 1 - token * group;
        const storage* row = chunk.rows + count * dim_width + dim0;
        chunk.weights += count * slot_width;
        chunk.gates += count * slot_width;
        chunk.info += count;
        for (int i = 0; i < count; ++i) {
          row -= dim_width;
          chunk.weights -= slot_width;
          chunk.gates -= slot_width;
          --chunk.info;
          const Pack<compute, dims> a = read_pack<compute, dims>(row);
#pragma unroll
          for (int j = 0; j < Tile::kSlots / 4; ++j) {
            const Quad<compute> w = read_pack<compute, 4>(chunk.weights + tile.slot(j));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
#pragma unroll
              for (int d = 0; d < dims; ++d) tile.content[4 * j + e][d] += w.x[e] * a.x[d];
            }
          }
          if (head-- > 0) continue;
          // All heads of the group are in: now the token's write, backwards.
          compute sums[dims] = {};
          tile.template unwrite<!local>(*chunk.info, chunk.gates, sums);
          if (!local) {
            sum_over_threads(sums, tile.thread, shape.across);
            if (holds) to[token * adjoint.grad_tokens.token] = to_storage<storage>(sums[0]);
          }
          head = group - 1;
          --token;
        }
      });
  compute* out = local
                     ? carries + slot_at(p, x, block.head, 0, side.dim)
                     : static_cast<compute*>(adjoint.grad_given) + slot_at(p, sequence.index, block.head, 0, side.dim);
  if (!local && (stretch.number > 0 || !adjoint.grad_given)) return;
#pragma unroll
  for (int s = 0; s < Tile::kSlots; ++s) {
    const int slot = tile.slot(s / 4) + s % 4;
    if (slot >= p.slots) continue;
    // A slot that was shut was not read: its gradient is zero.
    const bool read = local || law.is_open(slot, sequence.position - 1);
#pragma unroll
    for (int i = 0; i < dims; ++i) {
      const int d = first_dim + dim0 + i;
      if (d < side.dim) out[static_cast<int64_t>(slot) * side.dim + d] = read ? tile.content[s][i] : compute(0);
    }
  }
}

// What is left after each stretch of what a slot held before it: [stretch][kv head][slot].
template <typename compute>
__global__ void __launch_bounds__(kMaxThreads) scan_decays(Problem p, ScanPlan plan, int tiles, compute* decays) {
  const BlockIndex block(p, tiles);
  const ScanStretch stretch(p, plan, block.entry);
  const int slot = block.tile * blockDim.x + threadIdx.x;
  if (slot >= p.slots || !stretch.exists) return;
  const Law<compute> law(p, block.head);
  compute decay = 1;
  if (law.kernel != Kernel::fejer && stretch.length >= law.cells.window()) {
    decay = 0;  // the slot was centred within the stretch
  } else {
    walk_slot(law, slot, stretch.time, stretch.time + stretch.length,
              [&](int64_t, compute gate) { decay = gate == compute(1) ? compute(0) : decay * (compute(1) - gate); });
  }
  decays[slot_at(p, block.entry, block.head, slot, 1)] = decay;
}

// Adds to each stretch's carry what the next one's leaves, from the last of the sequence, or of those in hand, to the
// first.
template <typename compute>
__global__ void __launch_bounds__(kMaxThreads)
    scan_carries(Problem p, ScanPlan plan, int tiles, int64_t first_stretch, int64_t end_stretch, const compute* decays,
                 Side side, Adjoint adjoint) {
  const BlockIndex block(p, tiles);
  const int64_t x = first_stretch + block.entry;
  const ScanStretch stretch(p, plan, x);
  const int64_t element = static_cast<int64_t>(block.tile) * blockDim.x + threadIdx.x;
  if (!stretch.exists || !(stretch.last || x == end_stretch - 1) || element >= p.slots * side.dim) return;
  const Law<compute> law(p, block.head);
  const int slot = static_cast<int>(element / side.dim), d = static_cast<int>(element % side.dim);
  compute* carries = static_cast<compute*>(adjoint.carries);
  compute next = stretch.last
                     ? given_gradient(p, law, adjoint.grad_state, stretch.sequence, block.head, slot, side.dim, d)
                     : carries[slot_at(p, x + 1, block.head, slot, side.dim) + d];
  // The first stretch of a sequence carries nothing on.
  const int64_t left = x - first_stretch + 1, count = stretch.number < left ? stretch.number : left;
  for (int64_t y = x; y > x - count; --y) {
    compute& carry = carries[slot_at(p, y, block.head, slot, side.dim) + d];
    const compute decay = decays[slot_at(p, y, block.head, slot, 1)];
    next = decay == compute(0) ? carry : carry + decay * next;
    carry = next;
  }
}

int tiles_of(int64_t elements) { return static_cast<int>((elements + kMaxThreads - 1) / kMaxThreads); }

// Launches the scans of one call.
template <typename storage, typename compute>
struct Scan {
  const Problem& p;
  ScanPlan plan;
  int64_t stretches;  // whose logits are held at once

  explicit Scan(const Problem& problem) : p(problem), plan(problem), stretches(plan.at_once(problem)) {}

  bool whole(const View& view) const { return in_packs(view, 4, sizeof(storage)); }
  Side side(const View& tokens, int64_t dim, const void* given, compute* boundaries) const {
    return {tokens, whole(tokens), static_cast<int>(dim), given, boundaries};
  }
  // Completes the shape of a block that stages rows of `numbers` gates and weights and of `elements` of tensors;
  // returns the bytes of its two buffers.
  static int64_t stage(Shape& shape, int numbers, int elements) {
    const int64_t bytes_per_row = Chunk<storage, compute>::bytes_per_row(numbers, elements);
    shape.chunk = rows_that_fit(bytes_per_row);
    return 2 * shape.chunk * bytes_per_row;
  }

  void boundaries(const Side& side, void* end_state) const {
    compute* end = static_cast<compute*>(end_state);
    if (p.kernel == Kernel::fejer) {
      const int tiles = tiles_of(p.slots * side.dim);
      launch("scan_chains", scan_chains<storage, compute>, p.sequences * p.kv_heads * tiles, kMaxThreads, 0, p.stream,
             p, plan, side, tiles, end);
      return;
    }
    Shape shape = make_shape(side.dim, kDimsPerThread, p.slots, kSlotsPerThread);
    const int64_t bytes = stage(shape, kSlotsPerThread * shape.along, kDimsPerThread * shape.across);
    launch("scan_boundaries", scan_boundaries<storage, compute>, plan.count * (end ? 2 : 1) * p.kv_heads * shape.tiles,
           shape.threads(), bytes, p.stream, p, plan, side, shape, plan.count, end);
  }
  void dot(const Side& side, const View& rows, double scale, int64_t first, int64_t count, compute* results) const {
    Shape shape = make_shape(side.dim, kDimsPerThread, p.slots, kSlotsPerThread);
    const int64_t bytes = stage(shape, kSlotsPerThread * shape.along, 2 * kDimsPerThread * shape.across);
    launch("scan_dot", scan_dot<storage, compute>, count * p.kv_heads * shape.tiles, shape.threads(), bytes, p.stream,
           p, plan, side, shape, first, rows, whole(rows), static_cast<compute>(scale), results);
  }
  // Calls body(tile width as a type, shape, bytes) with the tile that holds all slots.
  template <typename body_type>
  void with_mix_shape(const Side& side, const body_type& body) const {
    const auto call = [&](auto dims) {
      constexpr int kDims = decltype(dims)::value, kSlots = kMixNumbers / kDims;
      Shape shape = make_shape(p.slots, kSlots, side.dim, kDims);
      const int64_t bytes = stage(shape, 2 * kSlots * shape.across, kDims * shape.along);
      body(dims, shape, bytes);
    };
    if (p.slots <= kMixNumbers / 4 * kWarp) return call(std::integral_constant<int, 4>());
    call(std::integral_constant<int, 2>());
  }
  void mix(const Side& side, int64_t first, int64_t count, const compute* weights, const View& results) const {
    with_mix_shape(side, [&](auto dims, const Shape& shape, int64_t shared_bytes) {
      launch("scan_mix", scan_mix<storage, compute, decltype(dims)::value>, count * p.kv_heads * shape.tiles,
             shape.threads(), shared_bytes, p.stream, p, plan, side, shape, first, weights, results);
    });
  }
  template <bool local>
  void adjoint(const Side& side, const Adjoint& adjoint, int64_t first, int64_t count) const {
    with_mix_shape(side, [&](auto dims, const Shape& shape, int64_t shared_bytes) {
      launch(local ? "scan_adjoint<local>" : "scan_adjoint",
             scan_adjoint<storage, compute, decltype(dims)::value, local>, count * p.kv_heads * shape.tiles,
             shape.threads(), shared_bytes, p.stream, p, plan, side, shape, first, adjoint);
    });
  }
  void carries(const Side& side, const Adjoint& adjoint, int64_t first, int64_t count, const compute* decays) const {
    const int tiles = tiles_of(p.slots * side.dim);
    launch("scan_carries", scan_carries<compute>, count * p.kv_heads * tiles, kMaxThreads, 0, p.stream, p, plan, tiles,
           first, first + count, decays, side, adjoint);
  }
  // Calls body(slots per lane, as a type) for the kernels that hold a row in a warp.
  template <typename body_type>
  void with_slots_per_lane(const body_type& body) const {
    if (p.slots <= 2 * kWarp) return body(std::integral_constant<int, 2>());
    if (p.slots <= 8 * kWarp) return body(std::integral_constant<int, 8>());
    static_assert(kMostSlots == 32 * kWarp);
    body(std::integral_constant<int, 32>());
  }
  int row_tiles() const { return static_cast<int>((plan.rows * (p.query_heads / p.kv_heads) + 63) / 64); }

  void forward(const Outputs& outputs, compute* memory) const {
    compute* boundary_keys = memory;
    compute* boundary_values = boundary_keys + plan.slot_elements(p, p.key_dim);
    compute* weights = boundary_values + plan.slot_elements(p, p.value_dim);
    const Side keys = side(p.key, p.key_dim, p.state_key, boundary_keys);
    const Side values = side(p.value, p.value_dim, p.state_value, boundary_values);
    boundaries(keys, outputs.state_key);
    boundaries(values, outputs.state_value);
    if (p.tokens == 0) return;
    for (int64_t first = 0; first < plan.count; first += stretches) {
      const int64_t count = first + stretches < plan.count ? stretches : plan.count - first;
      dot(keys, p.query, p.scale, first, count, weights);
      with_slots_per_lane([&](auto per_lane) {
        launch("softmax_rows", softmax_rows<compute, decltype(per_lane)::value>, count * p.kv_heads * row_tiles(),
               kMaxThreads, 0, p.stream, p, plan, row_tiles(), first, weights, static_cast<compute*>(outputs.lse));
      });
      mix(values, first, count, weights, outputs.out);
    }
  }
  int64_t forward_elements() const {
    return plan.slot_elements(p, p.key_dim + p.value_dim) + stretches * plan.weights_per_stretch(p);
  }

  void backward(const Gradients& gradients, compute* memory) const {
    compute* boundary_keys = memory;
    compute* boundary_values = boundary_keys + plan.slot_elements(p, p.key_dim);
    compute* key_carries = boundary_values + plan.slot_elements(p, p.value_dim);
    compute* value_carries = key_carries + plan.slot_elements(p, p.key_dim);
    compute* probabilities = value_carries + plan.slot_elements(p, p.value_dim);
    compute* grad_logits = probabilities + stretches * plan.weights_per_stretch(p);
    compute* decays = grad_logits + stretches * plan.weights_per_stretch(p);
    const Side keys = side(p.key, p.key_dim, p.state_key, boundary_keys);
    const Side values = side(p.value, p.value_dim, p.state_value, boundary_values);
    const Adjoint key_adjoint{p.query,       whole(p.query),     grad_logits, key_carries, gradients.grad_state_key,
                              gradients.key, gradients.state_key};
    const Adjoint value_adjoint{gradients.grad_out,   whole(gradients.grad_out),  probabilities,
                                value_carries,        gradients.grad_state_value, gradients.value,
                                gradients.state_value};
    boundaries(keys, nullptr);
    boundaries(values, nullptr);
    launch("scan_decays", scan_decays<compute>, plan.count * p.kv_heads * tiles_of(p.slots), kMaxThreads, 0, p.stream,
           p, plan, tiles_of(p.slots), decays);
    for (int64_t end = plan.count; end > 0; end -= stretches) {
      const int64_t first = end > stretches ? end - stretches : 0, count = end - first;
      dot(keys, p.query, p.scale, first, count, probabilities);
      dot(values, gradients.grad_out, 1, first, count, grad_logits);
      with_slots_per_lane([&](auto per_lane) {
        launch("softmax_rows_backward", softmax_rows_backward<compute, decltype(per_lane)::value>,
               count * p.kv_heads * row_tiles(), kMaxThreads, 0, p.stream, p, plan, row_tiles(), first,
               static_cast<compute>(p.scale), static_cast<const compute*>(gradients.lse),
               static_cast<const compute*>(gradients.grad_lse), probabilities, grad_logits);
      });
      mix(keys, first, count, grad_logits, gradients.query);
      for (const auto& [side, gradient] : {std::pair(keys, key_adjoint), std::pair(values, value_adjoint)}) {
        adjoint<true>(side, gradient, first, count);
        carries(side, gradient, first, count, decays);
        adjoint<false>(side, gradient, first, count);
      }
    }
  }
  int64_t backward_elements() const {
    return 2 * plan.slot_elements(p, p.key_dim + p.value_dim) + 2 * stretches * plan.weights_per_stretch(p) +
           plan.slot_elements(p, 1);
  }
};

}  // namespace

int64_t forward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  for_type(problem.dtype, [&](auto storage, auto compute) {
    bytes = Scan<decltype(storage), decltype(compute)>(problem).forward_elements() * sizeof(compute);
  });
  return bytes;
}
int64_t backward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  for_type(problem.dtype, [&](auto storage, auto compute) {
    bytes = Scan<decltype(storage), decltype(compute)>(problem).backward_elements() * sizeof(compute);
  });
  return bytes;
}
void scan_forward(const Problem& problem, const Outputs& outputs, void* workspace) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    Scan<decltype(storage), number>(problem).forward(outputs, static_cast<number*>(workspace));
  });
}
void scan_backward(const Problem& problem, const Gradients& gradients, void* workspace) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    Scan<decltype(storage), number>(problem).backward(gradients, static_cast<number*>(workspace));
  });
}

}  // namespace blurry_attn::cuda
