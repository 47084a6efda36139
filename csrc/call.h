// One call of an operator, checked: what the devices' implementations share.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "law.h"

namespace blurry_attn {

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

// A new (batch, heads, tokens, dim) tensor beside x, of x's kind: where x is (batch, tokens, heads, dim) in memory, so
// is it, and else in the order of its shape. On the current device.
at::Tensor empty_beside(const at::Tensor& x, int64_t dim);

// A table of gates as the kernels read it: flux_gates for "fejer", period_gates for the others.
template <typename compute>
using Gates = std::shared_ptr<const std::vector<compute>>;

struct Call {
  at::Tensor query, key, value;
  std::vector<Cells> cells;  // per kv head
  Kernel kernel;
  double sharpness, scale;
  OptionalTensor cu_seqlens;
  OptionalTensor state_key, state_value, position;  // contiguous

  int64_t batch() const { return query.size(0); }
  int64_t query_heads() const { return query.size(1); }
  int64_t kv_heads() const { return key.size(1); }
  int64_t tokens() const { return query.size(2); }
  int64_t key_dim() const { return key.size(3); }
  int64_t value_dim() const { return value.size(3); }
  int64_t slots() const { return cells.front().slots; }
  int64_t sequences() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : batch(); }
  // float64 for float64 inputs, float32 for all others: of the state, lse and all sums.
  at::ScalarType compute_type() const { return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  // Per kv head, in float or double; kept, within bounds, for other calls of the same law.
  template <typename compute>
  std::vector<Gates<compute>> gates() const;

  // As at::empty() where query is, on the current device: the way through the dispatcher takes longer than the rest.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const;
  at::Tensor empty_lse() const;
  at::Tensor empty_state_key() const;
  at::Tensor empty_state_value() const;
  // In place of a result that is not wanted: [0].
  at::Tensor none(at::ScalarType type) const { return empty({0}, type); }
  at::Tensor positions_after() const;
};

// Checks everything that needs no look at a tensor's values; raises ValueError, TypeError or NotImplementedError with
// a message that names the argument.
Call check_call(const CallArguments& given);
Call check_call(const BackendArguments& given);
// Of a step also that it is of one token, and check_is_writable().
Call check_step(const StepArguments& given);
// Of the backward's inputs: shapes, dtypes and devices against the call's.
void check_gradients(const Call& call, const BackwardArguments& given);
void check_rotary(const RotaryArguments& given);
// Of a law: its name, and the cells of one head.
Kernel checked_kernel(std::string_view name);
Cells checked_cells(Kernel kernel, int64_t slots, int64_t window, int64_t phase);
// An argument and its name.
struct Argument {
  std::string_view name;
  const at::Tensor& tensor;
};
// Of a step: every number of the tensors that it writes has a place of its own, which no tensor that it reads shares,
// and autograd can see the write. Tensors without memory, as those of a trace, share none.
void check_is_writable(c10::ArrayRef<Argument> written, c10::ArrayRef<Argument> read);
// Of a step, after it: the call's state is the given one, or a contiguous copy that goes back into it.
void write_back(const Call& call, const WrittenState& state);

// cu_seqlens and positions as numbers, their values checked. `cu_seqlens` on the host.
std::vector<int64_t> checked_cu_seqlens(const at::Tensor& cu_seqlens, int64_t tokens);
void check_positions(const at::Tensor& position);

}  // namespace blurry_attn
