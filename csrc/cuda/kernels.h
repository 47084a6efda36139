// This header declares the CUDA kernels, which take raw pointers and strides from cuda/ops.cpp, without torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "law.h"

namespace blurry_attn::cuda {

enum class DType : int { float64, float32, bfloat16, float16 };

constexpr int64_t kMostSlots = 1024;
constexpr int64_t kMostHeadDim = 512;

// A View is a (batch, head, token, element) tensor that is read or written through its strides, in elements.
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, element = 0;
};

// A HeadLaw is the law of one kv head: its cells, the offset of its table in Problem::gates and, for "fejer", its
// echo() and selects().
struct HeadLaw {
  Cells cells;
  int64_t gates;
  double echo = 0;
  bool selects = false;
};

// A Problem is one call. "compute" below is float, or double for DType::float64. Pointers are of the device.
struct Problem {
  DType dtype;
  Kernel kernel;
  int64_t batch, query_heads, kv_heads, tokens, key_dim, value_dim, slots, sequences;
  int64_t longest_window;  // the longest of the kv heads
  double scale;
  View query, key, value;
  const HeadLaw* laws;               // [kv_heads]
  const HeadLaw* host_laws;          // the same, on the host
  const void* gates;                 // compute: flux_gates ("fejer") or period_gates of the heads
  const void* cu_seqlens = nullptr;  // null: one sequence per batch entry; values out of range are clamped
  bool cu_seqlens_is_64 = false;
  const void* state_key = nullptr;  // compute (sequence, kv head, slot, element), contiguous; null: none given
  const void* state_value = nullptr;
  const int64_t* position = nullptr;  // [sequences]; null: 0
  cudaStream_t stream = nullptr;
};

struct Outputs {
  View out;
  void* lse;                  // compute (batch, query head, token), contiguous
  void* state_key = nullptr;  // compute, shaped as the given state; null: not wanted
  void* state_value = nullptr;
  void* kept = nullptr;  // fejer_kept() bytes for fejer_backward; null: not wanted
};

// Gradients has the inputs of a backward first and its results after. A null pointer is not given, or not wanted.
struct Gradients {
  View grad_out;
  const void* lse;
  const void* grad_lse = nullptr;
  const void* grad_state_key = nullptr;
  const void* grad_state_value = nullptr;
  const void* kept = nullptr;  // from fejer_forward; null: fejer_backward makes it in its workspace
  View query, key, value;
  void* state_key = nullptr;
  void* state_value = nullptr;
};

// These are the bytes of scratch memory that the scan needs for a call.
int64_t forward_workspace(const Problem& problem);
int64_t backward_workspace(const Problem& problem);

// The scan (scan/scan.cu) serves any kernel. It only launches; std::runtime_error names a kernel whose launch failed.
void scan_forward(const Problem& problem, const Outputs& outputs, void* workspace);
void scan_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// "fejer" in its parallel form (fejer/forward.cu) serves bfloat16 and float16. fejer_refusal() says why it does not
// take a problem, or is null.
const char* fejer_refusal(const Problem& problem);
int64_t fejer_forward_workspace(const Problem& problem);
void fejer_forward(const Problem& problem, const Outputs& outputs, void* workspace);

// The backward of "fejer" is in fejer/backward.cu. fejer_kept() is the size in bytes of the contents that the forward
// keeps for it. The problem must pass fejer_refusal(); the size is 0 where the backward would refuse.
int64_t fejer_kept(const Problem& problem);
const char* fejer_backward_refusal(const Problem& problem, const Gradients& gradients);
int64_t fejer_backward_workspace(const Problem& problem);
int64_t fejer_backward_workspace_with_kept(const Problem& problem);  // with `kept` from the forward
void fejer_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// "dirichlet" in patches of tokens (dirichlet/forward.cu) serves bfloat16 and float16 in the same way.
const char* dirichlet_refusal(const Problem& problem);
int64_t dirichlet_forward_workspace(const Problem& problem);
void dirichlet_forward(const Problem& problem, const Outputs& outputs, void* workspace);

// The backward of "dirichlet" is in dirichlet/backward.cu.
const char* dirichlet_backward_refusal(const Problem& problem, const Gradients& gradients);
int64_t dirichlet_backward_workspace(const Problem& problem);
void dirichlet_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// step() takes one token per sequence (step/step.cu); problem.tokens is 1. It updates slots and positions in place.
void step(const Problem& problem, const View& out, void* state_key, void* state_value, int64_t* position);

// rotary() turns x into out (rotary/rotary.cu) by the law of rotary.h. `back` negates the angles (the adjoint).
struct Rotary {
  DType dtype;
  View x, out;
  int64_t batch, heads, tokens, dim;  // dim is at most kMostHeadDim
  const int64_t* position;            // that of token t in batch entry b is [b * position_batch + t]
  int64_t position_batch;
  double base;
  bool back;
  cudaStream_t stream;
};
void rotary(const Rotary& problem);

}  // namespace blurry_attn::cuda
