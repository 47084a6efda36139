// The scan `dot` gives logits: products of a row with the content of every slot.
#pragma once

#include "scan/stage.cuh"

namespace blurry_attn::cuda {
namespace {

// A DotTile is a thread's tile of contents in `dot`: slots slot0 .. slot0 + 3 by elements 4 (j across + thread) + e.
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
  // write() writes a token into the tile. `slot` is that of content[0], and `row` points at its gate in a row of gates.
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

// scan_dot runs `dot` with `rows` as the a_t. `results` are [stretch - first][kv head][row][slot], -inf for shut slots.
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

}  // namespace
}  // namespace blurry_attn::cuda
