// CPU kernels on raw pointers and strides: what ops.cpp hands over and what the kernels offer.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "../law.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BLURRY_X86_LEVELS
#endif

namespace blurry_attn::cpu {

// A (batch, head, token, element) tensor, read or written through its strides (counted in elements).
template <typename storage>
struct View {
  storage* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, element = 0;

  storage* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// One sequence: its batch entry, its first token there, its tokens, and how many came before them.
struct Sequence {
  int64_t batch, begin, length, position;
};

// Runs body(i) for i in 0 .. count - 1, in any order and in parallel.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// One call's problem. `compute` is float, or double for double storage. States are contiguous (sequence, kv head,
// slot, element); lse and its gradient contiguous (batch, query head, token).
template <typename storage, typename compute>
struct Problem {
  std::vector<Sequence> sequences;
  std::vector<Cells> cells;  // per kv head
  // Per kv head: flux_gates ("fejer"), or period_gates (any kernel).
  std::vector<std::shared_ptr<const std::vector<compute>>> gates;
  bool of_period = false;  // whether the latter
  int64_t query_heads, tokens, key_dim, value_dim;
  compute scale;
  View<const storage> query, key, value;
  const compute* state_key = nullptr;  // null: no state given
  const compute* state_value = nullptr;
  Parallel parallel;
  int64_t threads;  // that parallel() runs on

  int64_t kv_heads() const { return static_cast<int64_t>(cells.size()); }
  int64_t group() const { return query_heads / kv_heads(); }
  int64_t slots() const { return cells.front().slots; }
};

template <typename storage, typename compute>
struct Outputs {
  View<storage> out;
  compute* lse;
  compute* state_key = nullptr;  // null: no state wanted
  compute* state_value = nullptr;
};

// Gradients: inputs first, results after. Null pointers: not given, or not wanted. The output is not among the inputs:
// where a softmax is sharp, its rounding in half precision would be larger than a gradient.
template <typename storage, typename compute>
struct Gradients {
  View<const storage> grad_out;
  const compute* lse;
  const compute* grad_lse = nullptr;
  const compute* grad_state_key = nullptr;
  const compute* grad_state_value = nullptr;
  View<storage> query, key, value;
  compute* state_key = nullptr;
  compute* state_value = nullptr;
};

// Scratch memory the kernels need, in elements of `compute`.
using Allocate = std::function<void*(int64_t elements)>;

// "fejer" in its parallel form (fejer.cpp) and any kernel as a scan over time (scan.cpp). `isa`: which of each_isa.h.
template <typename storage, typename compute>
void fejer_forward(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs,
                   const Allocate& allocate, int isa);
template <typename storage, typename compute>
void fejer_backward(const Problem<storage, compute>& problem, const Gradients<storage, compute>& gradients,
                    const Allocate& allocate, int isa);
template <typename storage, typename compute>
void scan_forward(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs,
                  const Allocate& allocate, int isa);
template <typename storage, typename compute>
void scan_backward(const Problem<storage, compute>& problem, const Gradients<storage, compute>& gradients,
                   const Allocate& allocate, int isa);

// One token per sequence (step.cpp): updates the slots in place, which are outputs.state_key and state_value; no lse.
template <typename storage, typename compute>
void step(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs, const Allocate& allocate,
          int isa);

// x turned into out (rotary.cpp), by the law of ../rotary.h; `back`: by minus the angles, which is the adjoint.
template <typename storage>
struct Rotary {
  View<const storage> x;
  View<storage> out;
  int64_t batch, heads, tokens, dim;
  const int64_t* position;  // of token t in batch entry b: [b * position_batch + t]
  int64_t position_batch;
  double base;
  bool back;
  Parallel parallel;
};
template <typename storage, typename compute>
void rotary(const Rotary<storage>& problem);

}  // namespace blurry_attn::cpu
