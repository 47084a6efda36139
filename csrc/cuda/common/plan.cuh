// How time is cut: patches of tokens, stretches of a sequence, the plan of a launch.
#pragma once

#include "common/law.cuh"

namespace blurry_attn::cuda {

constexpr int kPatch = 16;  // tokens
// Of a sequence: patches that begin before it or end later.
constexpr int64_t kSparePatches = 2;

// Which heads a launch takes.
constexpr int kMostHeads = 256;
struct HeadList {
  int count;
  uint16_t head[kMostHeads];
  int64_t cell_rows[kMostHeads];  // of Kept, before the head's
};

// How time is cut for the walks. A sequence of this call is cut by its own length alone, into stretches of about the
// same work: the walk of one begins warm_up tokens before it, but for the sequence's first, or in a walk backward after
// it, but for the last, which therefore has `extra` tokens more than the others.
struct WalkPlan {
  int64_t length;  // tokens of a stretch at most
  int64_t halved;  // a sequence of so many tokens is cut in two, though it is not longer than `length`; above: none is
  int64_t warm_up;
  int64_t extra;
  int patches;  // stretches begin at multiples of so many
  bool backward;
  bool packed;
  int64_t count;       // of stretches, those included that hold no token
  int64_t seam_count;  // of numbers of seams, those included that are none

  __host__ __device__ int64_t stretches(int64_t tokens) const {
    return tokens > length ? (tokens + length - 1) / length : tokens >= halved ? 2 : 1;
  }
  // Number, in a launch, of a sequence's i-th stretch. The first of all sequences come before the second of any, so
  // that what runs at once on a multiprocessor is of both kinds, with a warm-up and without. Where sequences are
  // packed, numbers are set aside for stretches() of every one, and some more.
  __device__ int64_t index(const Problem& problem, int64_t sequence, int64_t i) const {
    if (!packed) return i * problem.sequences + sequence;
    return Sequence::boundary(problem, sequence) / unit() + sequence + i;
  }
  __device__ int64_t sequence_of(const Problem& problem, int64_t x) const {
    return packed ? last_up_to(problem, x, [&](int64_t s) { return index(problem, s, 0); }) : x % problem.sequences;
  }
  __device__ int64_t number_of(const Problem& problem, int64_t sequence, int64_t x) const {
    return packed ? x - index(problem, sequence, 0) : x / problem.sequences;
  }
  // Number, in a launch, of the seam where a sequence's stretch begins that is not its first, and of the one where the
  // stretch ends; whose seam a number is, and which of the sequence's.
  __device__ int64_t seam(const Problem& problem, int64_t sequence, int64_t stretch) const {
    return stretch - (packed ? sequence + 1 : problem.sequences);
  }
  __device__ int64_t seam_after(const Problem& problem, int64_t sequence, int64_t stretch) const {
    return seam(problem, sequence, stretch) + (packed ? 1 : problem.sequences);
  }
  __device__ int64_t sequence_of_seam(const Problem& problem, int64_t x) const {
    return packed ? last_up_to(problem, x, [&](int64_t s) { return index(problem, s, 0) - s; }) : x % problem.sequences;
  }
  __device__ int64_t number_of_seam(const Problem& problem, int64_t sequence, int64_t x) const {
    return packed ? x - index(problem, sequence, 0) + sequence + 1 : x / problem.sequences + 1;
  }
  // The same walk with one stretch for each sequence.
  WalkPlan whole(const Problem& problem) const {
    WalkPlan plan = *this;
    plan.length = plan.halved = INT64_MAX;
    plan.count_stretches(problem);
    return plan;
  }
  void count_stretches(const Problem& problem) {
    packed = problem.cu_seqlens;
    count = packed ? problem.tokens / unit() + problem.sequences : stretches(problem.tokens) * problem.sequences;
    seam_count = packed ? problem.tokens / unit() : (stretches(problem.tokens) - 1) * problem.sequences;
    if (problem.sequences == 0) count = seam_count = 0;
  }

 private:
  // The last sequence of which `first`(sequence) is at most x; it grows with the sequence.
  template <typename first_type>
  __device__ static int64_t last_up_to(const Problem& problem, int64_t x, const first_type& first) {
    int64_t low = 0, high = problem.sequences;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first(middle) <= x ? low : high) = middle;
    }
    return low;
  }
  __host__ __device__ int64_t unit() const { return length < halved ? length : halved; }
};

// Where the patch of a token begins: patches lie on a grid that begins at the head's phase.
__device__ __forceinline__ int64_t patch_begin(const Cells& cells, int64_t token) {
  return floor_div(token - cells.phase, kPatch) * kPatch + cells.phase;
}

// Stretch number x of a launch: which sequence's, and the tokens begin .. end - 1 that it owns. Stretches begin on the
// grid of patches, but for a sequence's first, whose first patch begins at `grid`.
struct Stretch {
  Sequence sequence;
  int64_t number;  // of the sequence's
  int64_t grid, begin, end;
  bool exists, last;

  __device__ Stretch(const Problem& p, const WalkPlan& plan, const Cells& cells, int64_t x)
      : sequence(p, plan.sequence_of(p, x)), number(plan.number_of(p, sequence.index, x)) {
    grid = patch_begin(cells, sequence.position);
    const int64_t count = plan.stretches(sequence.length), extra = plan.extra < sequence.length ? plan.extra : 0;
    const auto begin_of = [&](int64_t i) {
      const int64_t even = (plan.backward ? 0 : extra) + i * (sequence.length - extra) / count;
      const int unit = plan.patches * kPatch, units = static_cast<int>(sequence.position - grid + even) / unit;
      return grid + (units > i ? units : i) * unit;
    };
    last = number + 1 >= count;
    begin = number == 0 ? sequence.position : begin_of(number);
    end = last ? sequence.end() : begin_of(number + 1);
    exists = number >= 0 && number < count && begin < end;  // below zero only where cu_seqlens is wrong
  }
};

}  // namespace blurry_attn::cuda
