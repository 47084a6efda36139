// This file says where a block of the backward walk is: its stretch, its tokens and its cells.
#pragma once

#include "common/plan.cuh"
#include "fejer/kept.cuh"

namespace blurry_attn::cuda {
namespace {

// WalkBack is one block's backward walk. Tokens are counted from the sequence's first of this call, and cells from one
// that lies before all that the walk meets. Tiles are counted from the stretch's first one. All are plain ints.
struct WalkBack {
  Cells cells;
  int64_t sequence, batch, row, position;
  int64_t base;                   // number of cell 0 in the law
  int64_t cell_row, started_row;  // rows of Kept: of cell 0 and of tile 0
  int head, group, slots, resolution;
  int lead;                          // token where tile 0, the stretch's first, begins
  int length;                        // tokens of the sequence
  int last_tile, tile;               // the tile where the walk begins; tokens of a tile
  int own_begin, own_end, walk_end;  // tokens: the stretch's, and where the walk begins
  int first_offset;                  // tokens from the trailing cell's centre to tile 0
  int given_cell;                    // cell that trails where the given state ends
  int given_last_token;              // last token of the lobe of given_cell
  int first;                         // first cell that exists
  int unended_cell;                  // first cell that does not end in this call
  int end_tile;                      // tile that begins where the stretch ends
  bool from_begin, to_end;           // the stretch is the sequence's first; the walk begins at its end

  WalkBack() = default;
  __device__ WalkBack(const Problem& p, const Kept& kept, const WalkPlan& plan, const HeadList& heads, int64_t stretch,
                      int tile_tokens)
      : tile(tile_tokens) {
    const int head_index = blockIdx.x % heads.count;
    head = heads.head[head_index];
    cells = p.laws[head].cells;
    const Stretch own(p, plan, cells, stretch);
    const Sequence& s = own.sequence;
    group = static_cast<int>(p.query_heads / p.kv_heads);
    slots = static_cast<int>(cells.slots);
    resolution = static_cast<int>(cells.resolution);
    sequence = s.index;
    batch = s.batch;
    row = s.row;
    position = s.position;
    length = static_cast<int>(s.length);
    from_begin = own.number == 0;
    to_end = begins_at_end(own, plan);
    const int64_t to = to_end ? s.end() : begin_of(own, plan);
    const int64_t first_patch = (own.begin - own.grid) / kPatch, token = own.grid + first_patch * kPatch;
    lead = static_cast<int>(token - position);
    last_tile = own.exists ? static_cast<int>((to - 1 - token) / tile) : -1;
    own_begin = static_cast<int>(own.begin - position);
    own_end = static_cast<int>(own.end - position);
    walk_end = static_cast<int>(to - position);
    end_tile = (own_end - lead) / tile;
    base = cells.trailing(token) - slots;
    first_offset = static_cast<int>(token - cells.centre(base + slots));
    const auto bounded = [](int64_t cell) { return static_cast<int>(cell > -(1 << 30) ? cell : -(1 << 30)); };
    given_cell = bounded(cells.trailing(position) - base);
    given_last_token = static_cast<int>(cells.centre(cells.trailing(position)) + resolution - 1 - position);
    first = bounded(cells.first() - base);
    unended_cell = bounded(cells.trailing(s.end()) - base);
    cell_row = heads.cell_rows[head_index] + kept.cell_row(p, s.index, batch, row, p.laws[head]) -
               (cells.trailing(position) - base);
    started_row = kept.started_row(p, s.index, batch, row, first_patch, head);
  }
  // begin_of() returns where a stretch's walk begins: after the stretch's end by warm_up, or at the sequence's end if
  // that is earlier (begins_at_end()).
  __device__ static int64_t begin_of(const Stretch& own, const WalkPlan& plan) {
    return own.end + (plan.warm_up + kPatch - 1) / kPatch * kPatch;
  }
  __device__ static bool begins_at_end(const Stretch& own, const WalkPlan& plan) {
    return own.last || begin_of(own, plan) >= own.sequence.end();
  }
  __device__ int64_t end() const { return position + length; }
  __device__ int tile_token(int i) const { return lead + i * tile; }
  // Returns the cell that trails where a patch begins, and how many tokens from its centre (`offset`).
  __device__ int trailing(int i, int patch, int* offset) const {
    const unsigned since = first_offset + i * tile + patch * kPatch, cell = since / resolution;
    if (offset) *offset = since - cell * resolution;
    return slots + cell;
  }
};

}  // namespace
}  // namespace blurry_attn::cuda
