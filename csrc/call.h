// A Call is one call of an operator after the checks of its arguments. The CPU and CUDA implementations share it.
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

// empty_beside() returns a new (batch, heads, tokens, dim) tensor of x's dtype on x's device, which must be the current
// one. It lies in memory as (batch, tokens, heads, dim) where x does, and else in the order of its shape.
at::Tensor empty_beside(const at::Tensor& x, int64_t dim);

// Gates is a table of gates as the kernels read it: flux_gates() for "fejer", period_gates() for the others.
template <typename compute>
using Gates = std::shared_ptr<const std::vector<compute>>;

struct Call {
  at::Tensor query, key, value;
  std::vector<Cells> cells;  // one per kv head
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
  // compute_type() is the dtype of the state, lse and all sums: float64 for float64 inputs, float32 for all others.
  at::ScalarType compute_type() const { return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  // gates() returns a table per kv head, in float or double. A bounded cache keeps them for later calls.
  template <typename compute>
  std::vector<Gates<compute>> gates() const;

  // empty() is at::empty() on query's device, which must be the current one. It skips the dispatcher, the slowest part.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const;
  at::Tensor empty_lse() const;
  at::Tensor empty_state_key() const;
  at::Tensor empty_state_value() const;
  // none() is an empty tensor of shape [0] in place of a result that is not wanted.
  at::Tensor none(at::ScalarType type) const { return empty({0}, type); }
  at::Tensor positions_after() const;
};

// check_call() checks everything that does not depend on the values of tensors. It raises ValueError, TypeError or
// NotImplementedError with a message that names the argument.
Call check_call(const CallArguments& given);
Call check_call(const BackendArguments& given);
// check_step() also checks that there is one token, and calls check_is_writable().
Call check_step(const StepArguments& given);
// check_gradients() checks the shapes, dtypes and devices of the backward's inputs against the call's.
void check_gradients(const Call& call, const BackwardArguments& given);
void check_rotary(const RotaryArguments& given);
// These two check the name of a law and the cells of one head, and return them.
Kernel checked_kernel(std::string_view name);
Cells checked_cells(Kernel kernel, int64_t slots, int64_t window, int64_t phase);
// An Argument is a tensor and its name in error messages.
struct Argument {
  std::string_view name;
  const at::Tensor& tensor;
};
// check_is_writable() checks the tensors that a step writes. Each of their elements needs memory of its own, which no
// tensor in `read` shares, and autograd must see the write. Tensors without memory, as in a trace, share none.
void check_is_writable(c10::ArrayRef<Argument> written, c10::ArrayRef<Argument> read);
// write_back() ends a step: where the call's state is a contiguous copy of the given one, it copies the slots back.
void write_back(const Call& call, const WrittenState& state);

// These two check the values of tensors on the host; the first returns the numbers of cu_seqlens.
std::vector<int64_t> checked_cu_seqlens(const at::Tensor& cu_seqlens, int64_t tokens);
void check_positions(const at::Tensor& position);

}  // namespace blurry_attn
