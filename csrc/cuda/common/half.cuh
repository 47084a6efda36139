// What the kernels on tensor cores, for bfloat16 and float16, have in common on the host.
#pragma once

#include "common/launch.cuh"
#include "common/law.cuh"
#include "common/plan.cuh"

namespace blurry_attn::cuda {

// Whether the kernels for head sizes over 64 do it.
inline bool is_wide(const Problem& p) { return p.key_dim > 64 || p.value_dim > 64; }

// Calls body(storage{}) for bfloat16 or float16.
template <typename body_type>
void for_half(DType dtype, const body_type& body) {
  if (dtype == DType::bfloat16) return body(__nv_bfloat16());
  body(__half());
}

// Whether rows are runs of whole, aligned 16 bytes, eight elements each.
inline bool aligned(const View& view) { return in_packs(view, 8, 2); }

// Why a problem's backward is not for kernels that take what slots hold, and their gradients, in its dtype; or null. Of
// a forward, what is not finite is done again.
inline const char* range_refusal(const Problem& problem, const Gradients& gradients) {
  const bool given = problem.state_key || gradients.grad_state_key || gradients.grad_state_value;
  return problem.dtype == DType::float16 && given ? "backward: a state may hold more than float16 does" : nullptr;
}

// What a launch over heads has of shared memory: as much as bytes_for(resolution) says that one needs.
template <auto kernel, typename bytes_type>
uint32_t shared_memory_of(const Problem& p, const HeadList& heads, const bytes_type& bytes_for) {
  uint32_t bytes = 0;
  for (int i = 0; i < heads.count; ++i) {
    bytes = std::max<uint32_t>(bytes, bytes_for(static_cast<int>(p.host_laws[heads.head[i]].cells.resolution)));
  }
  allow_shared_memory<kernel>();
  return bytes;
}

// Why a problem is for no kernel on tensor cores, or null.
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
