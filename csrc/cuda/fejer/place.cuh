// This file says where a block of the forward walk is: its stretch, its tokens and its cells.
#pragma once

#include "common/plan.cuh"

namespace blurry_attn::cuda {

// Walk is one block's walk over a stretch of one sequence and head. Tokens ("times") are counted from the begin of the
// walk's first patch, and cells from the cell that trails there. Both are plain ints.
struct Walk {
  int64_t stretch, sequence, batch;
  int64_t sequence_row;  // row of the sequence's first token
  int64_t row;           // row of time 0, which may lie before the batch entry's first
  int64_t first_time;    // token at time 0; below zero where the patch begins before the sequence
  int64_t cell;          // number of cell 0 in the law
  int64_t position;
  int64_t first_patch;        // patches of the sequence before time 0
  int64_t trailing_at_begin;  // cell that trails at the sequence's first token of this call
  int begin, end;             // times of the sequence's tokens of this call
  int own_begin, own_end;     // times of the stretch's tokens
  int offset, resolution;     // offset: tokens from cell 0's centre to time 0
  int first;                  // first cell that exists, or a bound below it
  int given_cell;             // slots + the cell that trails where the initial contents end
  bool from_begin;
  // At seam_before, another walk knows what this one warms up for; at seam_after, this walk knows it for another.
  bool seam_before, seam_after;

  Walk() = default;
  __device__ Walk(const Problem& p, const WalkPlan& plan, int64_t x, int head) : stretch(x) {
    const Cells cells = p.laws[head].cells;
    const Stretch own(p, plan, cells, x);
    const Sequence& s = own.sequence;
    sequence = s.index;
    batch = s.batch;
    position = s.position;
    from_begin = own.begin - s.position <= plan.warm_up;
    const int64_t from = from_begin ? s.position : own.begin - plan.warm_up;
    first_time = patch_begin(cells, from);
    sequence_row = s.row;
    row = s.row + first_time - s.position;
    cell = cells.trailing(first_time);
    const auto since = [&](int64_t t) {
      const int64_t least = -(int64_t(1) << 30);
      return static_cast<int>(t - first_time > least ? t - first_time : least);
    };
    begin = since(s.position);
    end = since(s.end());
    own_begin = since(own.begin);
    own_end = own.exists ? since(own.end) : own_begin;
    seam_before = !from_begin;
    seam_after = !own.last && own.end - s.position > plan.warm_up;
    first_patch = (first_time - own.grid) / kPatch;
    trailing_at_begin = cells.trailing(s.position) - cell;
    offset = static_cast<int>(first_time - cells.centre(cell));
    resolution = static_cast<int>(cells.resolution);
    const int64_t first_of_all = cells.first() - cell;
    first = static_cast<int>(first_of_all > -(int64_t(1) << 30) ? first_of_all : -(int64_t(1) << 30));
    given_cell = static_cast<int>((from_begin ? cells.trailing(s.position) : cell) - cell + cells.slots);
    cells_ = cells;
  }
  __device__ int64_t time(int t) const { return first_time + t; }
  // Returns the slot of the cell `back` before the newest given one, or -1 where that slot is not open.
  __device__ int given_slot(int back, int slots) const {
    if (back >= slots) return -1;
    const int64_t c = cell + given_cell - slots - 1 - back;
    const int64_t slot = cells_.slot(c);
    return position > cells_.slot_opening(slot) ? static_cast<int>(slot) : -1;
  }

 private:
  Cells cells_;
};

}  // namespace blurry_attn::cuda
