// Where a block of the walk forward is: its stretch, its tokens and its cells.
#pragma once

#include "common/plan.cuh"

namespace blurry_attn::cuda {

// One block's walk: a stretch of one sequence and head. Tokens ("times") are counted from the first tile's first, cells
// from the one that trails there, both as plain ints.
struct Walk {
  int64_t stretch, sequence, batch;
  int64_t sequence_row;  // of the sequence's first token
  int64_t row;           // of time 0, which may lie before the batch entry's first
  int64_t first_time;    // tokens of the sequence before time 0: below zero where the patch begins before the sequence
  int64_t cell;          // number of the first cell
  int64_t position;
  int64_t first_patch;        // number of the patch at time 0, from the sequence's first
  int64_t trailing_at_begin;  // the cell that trails at the sequence's first token
  int begin, end;             // the sequence's tokens of this call
  int own_begin, own_end;     // the stretch's
  int offset, resolution;     // of time 0 from the first cell's centre
  int first;                  // the first cell of all, or a bound below it
  int given_cell;             // the trailing cell when the contents that the walk begins with were left, in ring rows
  bool from_begin;
  // Whether another walk knows what this one warms up for, and the reverse.
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
  // The slot of the cell `back` before the newest given one, or -1 where none is open.
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
