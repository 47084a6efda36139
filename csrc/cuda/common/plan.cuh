// This file says how time is cut among blocks. A patch is 16 tokens, which one warp works on. A stretch is the run of
// tokens that one block owns, and a seam is where two stretches of a sequence meet. A block walks over its stretch in
// the order of time or, in a backward walk, against it. A plan cuts the sequences of a launch into stretches.
#pragma once

#include "common/law.cuh"

namespace blurry_attn::cuda {

constexpr int kPatch = 16;  // tokens of a patch
// A sequence has up to this many patches more than tokens / kPatch, since one begins before it and one ends after it.
constexpr int64_t kSparePatches = 2;

// HeadList names the key/value heads of a launch.
constexpr int kMostHeads = 256;
struct HeadList {
  int count;
  uint16_t head[kMostHeads];
  int64_t cell_rows[kMostHeads];  // rows of Kept::cells before the head's
};

// WalkPlan cuts each sequence of a call, by its length alone, into stretches of about the same work. A walk begins
// warm_up tokens before its stretch, except for the sequence's first stretch. A backward walk begins warm_up tokens
// after its stretch, except for the last one. The stretch without a warm-up therefore has `extra` tokens more than the
// others.
struct WalkPlan {
  int64_t length;  // tokens of a stretch at most
  int64_t halved;  // least tokens of a sequence that is cut in two; above `length`: none is
  int64_t warm_up;
  int64_t extra;
  int patches;  // stretches begin at multiples of this many patches
  bool backward;
  bool packed;
  int64_t count;       // numbers of stretches, including those without a token
  int64_t seam_count;  // numbers of seams, including those that name no seam

  __host__ __device__ int64_t stretches(int64_t tokens) const {
    return tokens > length ? (tokens + length - 1) / length : tokens >= halved ? 2 : 1;
  }
  // Returns the number, in a launch, of a sequence's i-th stretch. All first stretches come before all second ones, so
  // blocks with and without a warm-up run on a multiprocessor at once. With packed sequences, each sequence has numbers
  // set aside for its stretches(), and a few more.
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
  // seam() returns the number, in a launch, of the seam where a stretch begins that is not its sequence's first.
  // seam_after() returns the number of the seam where the stretch ends. sequence_of_seam() and number_of_seam() return
  // a seam's sequence, and which stretch of the sequence begins there.
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
  // Returns the same plan with one stretch for each sequence.
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
  // Returns the last sequence whose `first`(sequence), which grows with the sequence, is at most x.
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

// Returns where the patch of a token begins. Patches lie on a grid that begins at the head's phase.
__device__ __forceinline__ int64_t patch_begin(const Cells& cells, int64_t token) {
  return floor_div(token - cells.phase, kPatch) * kPatch + cells.phase;
}

// Stretch is stretch number x of a launch: its sequence, and the tokens begin .. end - 1 that it owns. A stretch begins
// on the grid of patches, except for the sequence's first one, whose first patch begins at `grid`.
struct Stretch {
  Sequence sequence;
  int64_t number;  // index among the sequence's stretches
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
    exists = number >= 0 && number < count && begin < end;  // a negative number: cu_seqlens is wrong
  }
};

}  // namespace blurry_attn::cuda
