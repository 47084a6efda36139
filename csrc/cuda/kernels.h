// CUDA kernels on raw pointers and strides: what cuda/ops.cpp hands over and what the kernels offer. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "law.h"

namespace blurry_attn::cuda {

enum class DType : int { float64, float32, bfloat16, float16 };

constexpr int64_t kMostSlots = 1024;
constexpr int64_t kMostHeadDim = 512;

// A (batch, head, token, element) tensor, read or written through its strides (counted in elements).
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, element = 0;
};

// One kv head's law: its cells, and where its table lies in Problem::gates. "fejer": its echo(), whether it selects().
struct HeadLaw {
  Cells cells;
  int64_t gates;
  double echo = 0;
  bool selects = false;
};

// One call's problem. "compute" below is float, or double for DType::float64. All pointers are of the device.
struct Problem {
  DType dtype;
  Kernel kernel;
  int64_t batch, query_heads, kv_heads, tokens, key_dim, value_dim, slots, sequences;
  int64_t longest_window;  // over the kv heads
  double scale;
  View query, key, value;
  const HeadLaw* laws;               // [kv_heads]
  const HeadLaw* host_laws;          // the same on the host
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
  void* state_key = nullptr;  // compute, as the given one; null: not wanted
  void* state_value = nullptr;
  void* kept = nullptr;  // fejer_kept() bytes for fejer_backward; null: not wanted
};

// Gradients: inputs first, results after. Null pointers: not given, or not wanted.
struct Gradients {
  View grad_out;
  const void* lse;
  const void* grad_lse = nullptr;
  const void* grad_state_key = nullptr;
  const void* grad_state_value = nullptr;
  const void* kept = nullptr;  // what fejer_forward left; else fejer_backward makes it in its workspace
  View query, key, value;
  void* state_key = nullptr;
  void* state_value = nullptr;
};

// Bytes of scratch memory that a call needs.
int64_t forward_workspace(const Problem& problem);
int64_t backward_workspace(const Problem& problem);

// The scan (scan/scan.cu). Launches only; throws std::runtime_error naming the kernel whose launch failed.
void scan_forward(const Problem& problem, const Outputs& outputs, void* workspace);
void scan_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// "fejer" in its parallel form (fejer_forward.cu), for bfloat16 and float16. fejer_refusal: why a problem is not for
// it, or null.
const char* fejer_refusal(const Problem& problem);
int64_t fejer_forward_workspace(const Problem& problem);
void fejer_forward(const Problem& problem, const Outputs& outputs, void* workspace);

// Its backward (fejer_backward.cu). fejer_kept: what slots held, in bytes, of a problem that fejer_refusal()
// takes; 0 where the backward would refuse.
int64_t fejer_kept(const Problem& problem);
const char* fejer_backward_refusal(const Problem& problem, const Gradients& gradients);
int64_t fejer_backward_workspace(const Problem& problem);
int64_t fejer_backward_workspace_with_kept(const Problem& problem);  // the same where the forward kept some
void fejer_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// "dirichlet" in chunks (dirichlet/forward.cu), for bfloat16 and float16, in the same way.
const char* dirichlet_refusal(const Problem& problem);
int64_t dirichlet_forward_workspace(const Problem& problem);
void dirichlet_forward(const Problem& problem, const Outputs& outputs, void* workspace);

// Its backward (dirichlet/backward.cu).
const char* dirichlet_backward_refusal(const Problem& problem, const Gradients& gradients);
int64_t dirichlet_backward_workspace(const Problem& problem);
void dirichlet_backward(const Problem& problem, const Gradients& gradients, void* workspace);

// One token per sequence (step/step.cu): problem.tokens is 1; updates the slots and the positions in place.
void step(const Problem& problem, const View& out, void* state_key, void* state_value, int64_t* position);

// x turned into out (rotary/rotary.cu), by the law of rotary.h; `back`: by minus the angles, which is the adjoint.
struct Rotary {
  DType dtype;
  View x, out;
  int64_t batch, heads, tokens, dim;  // dim at most kMostHeadDim
  const int64_t* position;            // of token t in batch entry b: [b * position_batch + t]
  int64_t position_batch;
  double base;
  bool back;
  cudaStream_t stream;
};
void rotary(const Rotary& problem);

}  // namespace blurry_attn::cuda
