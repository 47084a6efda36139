// This file has the host code that the tensor core kernels for bfloat16 and float16 share. It says which problems they
// take, and how much shared memory a launch needs.
#pragma once

#include "common/launch.cuh"
#include "common/law.cuh"
#include "common/plan.cuh"

namespace blurry_attn::cuda {

// Returns whether a head_dim is over 64, so that the kernels compiled for head_dim 128 run.
inline bool is_wide(const Problem& p) { return p.key_dim > 64 || p.value_dim > 64; }

// Calls body(storage{}) with the element type of bfloat16 or float16.
template <typename body_type>
void for_half(DType dtype, const body_type& body) {
  if (dtype == DType::bfloat16) return body(__nv_bfloat16());
  body(__half());
}

// Returns whether every row consists of aligned chunks of 16 bytes, which are eight elements.
inline bool aligned(const View& view) { return in_packs(view, 8, 2); }

// Returns why kernels that hold slots and their gradients in the problem's dtype cannot take its backward, or null. The
// forward needs no such check, since sequences that are not finite are computed again (repair.cuh).
inline const char* range_refusal(const Problem& problem, const Gradients& gradients) {
  const bool given = problem.state_key || gradients.grad_state_key || gradients.grad_state_value;
  return problem.dtype == DType::float16 && given ? "backward: a state may hold more than float16 does" : nullptr;
}

// Returns the dynamic shared memory of a launch over `heads`: the most that bytes_for(resolution) says for one of them.
template <auto kernel, typename bytes_type>
uint32_t shared_memory_of(const Problem& p, const HeadList& heads, const bytes_type& bytes_for) {
  uint32_t bytes = 0;
  for (int i = 0; i < heads.count; ++i) {
    bytes = std::max<uint32_t>(bytes, bytes_for(static_cast<int>(p.host_laws[heads.head[i]].cells.resolution)));
  }
  allow_shared_memory<kernel>();
  return bytes;
}

// Returns why no kernel on tensor cores takes a problem, or null.
inline const char* half_refusal(const Problem& p) {
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) return "the dtype is neither bfloat16 nor float16";
  if (p.key_dim > 128 || p.value_dim > 128) return "head sizes are over 128";
  if (p.key_dim % 8 || p.value_dim % 8) return "head sizes are no multiples of 8";
  if (!aligned(p.query) || !aligned(p.key) || !aligned(p.value)) return "rows are not aligned to 16 bytes";
  if (p.tokens > INT32_MAX / 2) return "there are more than 2^30 tokens";
  if (p.slots < 16) return "there are fewer than 16 slots";
  if (p.kv_heads > kMostHeads) return "there are more than 256 key/value heads";
  return nullptr;
}

}  // namespace blurry_attn::cuda
