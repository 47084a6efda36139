// The scan `mix` gives sums over slots of a weight times the slot's content.
#pragma once

#include "scan/stage.cuh"

namespace blurry_attn::cuda {
namespace {

// A MixTile is a thread's tile in `mix` and `adjoint`: slots 4 (j across + thread) + e by `dims` elements from dim0 on.
template <typename compute, int dims>
struct MixTile {
  static constexpr int kSlots = kMixNumbers / dims;
  compute content[kSlots][dims];
  int thread, across;
  bool exist;  // whether all of the thread's slots exist

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
  // write() writes a token into the tile; `gates` is the token's row of gates. Slots that do not exist stay as they
  // are, whatever the token holds.
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
  // unwrite() is the adjoint of write(). It adds the token's part to `sums`, and keeps that of the content before.
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

// scan_mix runs `mix`. `results` has the shape of the query with the side's dim.
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

}  // namespace
}  // namespace blurry_attn::cuda
