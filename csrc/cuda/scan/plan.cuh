// This header cuts time into the stretches of the scan.
#pragma once

#include "common/law.cuh"
#include "common/tuning.h"

namespace blurry_attn::cuda {
namespace {

// A ScanPlan cuts each sequence by its own length alone, so that packed sequences have the bits that each has alone.
struct ScanPlan {
  int64_t length;     // tokens of a stretch
  int64_t rows;       // tokens of the longest stretch that there can be
  int64_t per_batch;  // stretches of a batch entry; 0: sequences are packed
  int64_t count;      // stretches, with those that hold no token

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
  // at_once() is the number of stretches whose logits are held at once.
  int64_t at_once(const Problem& p) const {
    const int64_t each = weights_per_stretch(p), held = each < kScanWeights ? kScanWeights / (each > 0 ? each : 1) : 1;
    return held < count ? held : count;
  }
};

// A ScanStretch is stretch number `x` of a plan.
struct ScanStretch {
  Sequence sequence;
  int64_t number;  // its number in its sequence
  int64_t time;    // time of its first token
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

  // first() is the number of a sequence's first stretch. It comes after all numbers that the sequences before can need.
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

}  // namespace
}  // namespace blurry_attn::cuda
