// These kernels find the contents of the slots before each stretch.
#pragma once

#include "scan/dot.cuh"

namespace blurry_attn::cuda {
namespace {

// scan_boundaries finds for "dirichlet" the contents before each stretch and, if `end` is given, at the end of each
// sequence. A gate of 1 replaces what a slot held, so one period is enough.
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

// scan_chains does the same for "fejer". Each thread takes one element of a slot through the whole sequence, from cell
// (visit) to cell. Tokens outside of their lobes, of which the slot takes nothing, cost nothing.
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

}  // namespace
}  // namespace blurry_attn::cuda
