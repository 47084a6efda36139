// The scan `adjoint` goes back over time. It computes gradients of tokens, and of the contents before a stretch.
#pragma once

#include "scan/mix.cuh"

namespace blurry_attn::cuda {
namespace {

// An Adjoint has the inputs and results of `adjoint` on one side.
struct Adjoint {
  View rows;  // the a_t: query or grad_out
  bool rows_whole;
  const void* weights;     // weights of the stretches in hand
  void* carries;           // compute [stretch][kv head][slot][dim]: G before the first token was written
  const void* grad_state;  // gradient of the returned state; null: not given
  View grad_tokens;
  void* grad_given;  // gradient of the given state; null: not wanted
};

// scan_adjoint runs `adjoint` from the last token of a stretch to the first. If `local`, it starts from zero and finds
// what the stretch adds to its carry; for "dirichlet", one period is enough. Else it starts from the next stretch's
// carry and finds the gradients of tokens.
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
          // All heads of the group are in, so the token's write is undone.
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
    // A shut slot was not read, so its gradient is zero.
    const bool read = local || law.is_open(slot, sequence.position - 1);
#pragma unroll
    for (int i = 0; i < dims; ++i) {
      const int d = first_dim + dim0 + i;
      if (d < side.dim) out[static_cast<int64_t>(slot) * side.dim + d] = read ? tile.content[s][i] : compute(0);
    }
  }
}

// scan_decays computes what a stretch leaves of what a slot held before it: [stretch][kv head][slot].
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

// scan_carries adds to each stretch's carry what the next one's leaves. It goes from the last stretch of the sequence,
// or of those in hand, to the first.
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

}  // namespace
}  // namespace blurry_attn::cuda
