// This file makes the plans of walks, which say how long stretches and warm-ups are.
#pragma once

#include "fejer/classes.cuh"

namespace blurry_attn::cuda {

constexpr int64_t kSeamPatches = 4;  // stretches of backward walks begin at multiples: where a tile does

// Returns after how many laps (windows) a slot has less left of what it held than a rounding of what it holds. `echo`
// is the part that one lap leaves, which is under a half.
inline int laps_until(double rounding, double echo) {
  int laps = 1;
  for (double left = echo; left > rounding; left *= echo) ++laps;
  return laps;
}

inline bool is_alone(const Problem& problem, const HeadClass& c) { return c.heads.count == problem.kv_heads; }

// Returns the plan with what all plans of a class of heads have in common.
inline WalkPlan plan_of(const Problem& problem, const HeadClass& c) {
  WalkPlan plan{};
  plan.patches = 1;
  // Walks begin with empty slots this many tokens before the tokens they own.
  const int laps = laps_until(problem.dtype == DType::bfloat16 ? 0x1p-11 : 0x1p-14, c.echo);
  plan.warm_up = laps * c.longest_window + 2 * c.longest_window / problem.slots;
  // Where classes share the card, their stretches are shorter, so that all launches end together.
  const bool alone = is_alone(problem, c);
  plan.length = std::max<int64_t>((alone ? kAloneWarmUps : kSharedWarmUps) * plan.warm_up,
                                  alone ? kAloneStretch : kSharedStretch);
  return plan;
}

// Returns the plan of the walk for the output, which cuts each sequence by its own length alone.
inline WalkPlan make_plan(const Problem& problem, const HeadClass& c) {
  WalkPlan plan = plan_of(problem, c);
  plan.extra = plan.warm_up / 3;  // a token of the warm-up takes a third of the work
  plan.halved = std::max<int64_t>(plan.warm_up + plan.warm_up / 2, kHalvedStretch);
  plan.count_stretches(problem);
  return plan;
}

// Returns the plan of the backward walk, or of the forward walk that keeps what it needs (Task::keep). `at_once` blocks
// of it fit on a multiprocessor.
inline WalkPlan make_back_plan(const Problem& problem, const HeadClass& c, Task task, int64_t at_once) {
  WalkPlan plan = plan_of(problem, c);
  plan.backward = task == Task::backward;
  plan.patches = kSeamPatches;
  plan.extra = plan.backward ? plan.warm_up - plan.warm_up / 8 : plan.warm_up;  // backward: without query gradients
  int64_t tokens = 0, count = 1;
  if (problem.sequences > 0) {
    const int64_t tracks = problem.sequences * problem.kv_heads;
    tokens = problem.cu_seqlens ? problem.tokens / problem.sequences : problem.tokens;
    const int64_t finest = tokens / (std::max(plan.warm_up / 2, kLeastStretch) + 1);
    if (is_alone(problem, c)) {
      // The count of stretches is 1, or it fills the card once or a few times, whichever ends first.
      const int64_t blocks = at_once * kMultiprocessors;
      const auto time = [&](int64_t n) {
        const int64_t own = (tokens - plan.warm_up) / n;
        return (tracks * n + blocks - 1) / blocks * (n > 1 ? own + plan.warm_up : tokens);
      };
      for (int64_t times = 1; times <= 8; ++times) {
        const int64_t n = std::min(times * blocks / tracks, finest);
        if (n > 1 && time(n) < time(count)) count = n;
      }
    } else {
      // Sequences that could stay whole are cut in two, unless they are short.
      const int64_t even = (kSharedBlocks + tracks / 2) / tracks;
      const int64_t least = problem.cu_seqlens || tokens < plan.length ? 1 : 2;
      count = std::max(least, std::min(even * kHalves[is_wide(problem)][c.number] / 2, finest));
    }
  }
  plan.length = count > 1 ? (tokens + count - 1) / count : std::max(tokens, plan.length);
  plan.halved = plan.length + 1;
  plan.count_stretches(problem);
  return plan;
}

}  // namespace blurry_attn::cuda
