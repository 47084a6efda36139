// This header declares the CPU kernels, which take raw pointers and strides from ops.cpp.
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

// A View is a (batch, head, token, element) tensor that is read or written through its strides, in elements.
template <typename storage>
struct View {
  storage* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, element = 0;

  storage* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// A Sequence has its batch entry, its first token there, its number of tokens, and how many tokens came before them.
struct Sequence {
  int64_t batch, begin, length, position;
};

// A Parallel runs body(i) for i in 0 .. count - 1, in any order and in parallel.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// A Problem is one call. `compute` is float, or double for double storage. States are contiguous (sequence, kv head,
// slot, element); lse and its gradient are contiguous (batch, query head, token).
template <typename storage, typename compute>
struct Problem {
  std::vector<Sequence> sequences;
  std::vector<Cells> cells;  // one per kv head
  // Each kv head has flux_gates() (for "fejer" only) or period_gates() (for any kernel).
  std::vector<std::shared_ptr<const std::vector<compute>>> gates;
  bool of_period = false;  // whether `gates` are period_gates()
  int64_t query_heads, tokens, key_dim, value_dim;
  compute scale;
  View<const storage> query, key, value;
  const compute* state_key = nullptr;  // null: no state given
  const compute* state_value = nullptr;
  Parallel parallel;
  int64_t threads;  // threads that parallel() runs on

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

// Gradients has the inputs of a backward first and its results after. A null pointer is not given, or not wanted. The
// output is not an input: where a softmax is sharp, its rounding in half precision would be larger than a gradient.
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

// Allocate returns scratch memory for so many elements of `compute`.
using Allocate = std::function<void*(int64_t elements)>;

// fejer_* compute "fejer" in its parallel form (fejer.cpp), and scan_* any kernel as a scan over time (scan.cpp). `isa`
// is a level of each_isa.h: 0 plain, 1 AVX2, 2 AVX-512.
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

// step() takes one token per sequence (step.cpp). It updates outputs.state_key and outputs.state_value in place, and
// gives no lse.
template <typename storage, typename compute>
void step(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs, const Allocate& allocate,
          int isa);

// rotary() turns x into out (rotary.cpp) by the law of ../rotary.h. `back` turns by the negated angles, which is the
// adjoint.
template <typename storage>
struct Rotary {
  View<const storage> x;
  View<storage> out;
  int64_t batch, heads, tokens, dim;
  const int64_t* position;  // that of token t in batch entry b is [b * position_batch + t]
  int64_t position_batch;
  double base;
  bool back;
  Parallel parallel;
};
template <typename storage, typename compute>
void rotary(const Rotary<storage>& problem);

}  // namespace blurry_attn::cpu
