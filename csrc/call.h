// One call of an operator, checked: what the devices' implementations share.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "law.h"

namespace blurry_attn {

using OptionalTensor = std::optional<at::Tensor>;
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// With what the slots held, for the backward.
using KeptResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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
Call check_call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t slots,
                at::IntArrayRef window, at::IntArrayRef phase, c10::string_view kernel, double sharpness, double scale,
                const OptionalTensor& cu_seqlens, const OptionalTensor& state_key, const OptionalTensor& state_value,
                const OptionalTensor& position);
// Of the backward's inputs: shapes, dtypes and devices against the call's.
void check_gradients(const Call& call, const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                     const OptionalTensor& grad_state_key, const OptionalTensor& grad_state_value,
                     const at::Tensor& out, const at::Tensor& lse, const OptionalTensor& contents);
// Of a rotary embedding.
void check_rotary(const at::Tensor& x, const at::Tensor& position, double base);
// Of a step: one token.
void check_step(const Call& call);
// An argument and its name.
struct Argument {
  std::string_view name;
  const at::Tensor& tensor;
};
// Of a step: every number of the tensors that it writes has a place of its own, which no tensor that it reads shares,
// and autograd can see the write. Tensors without memory, as those of a trace, share none.
void check_is_writable(c10::ArrayRef<Argument> written, c10::ArrayRef<Argument> read);
// Of a step, after it: the call's state is the given one, or a contiguous copy that goes back into it.
void write_back(const Call& call, at::Tensor& state_key, at::Tensor& state_value);

// cu_seqlens and positions as numbers, their values checked. `cu_seqlens` on the host.
std::vector<int64_t> checked_cu_seqlens(const at::Tensor& cu_seqlens, int64_t tokens);
void check_positions(const at::Tensor& position);

}  // namespace blurry_attn
