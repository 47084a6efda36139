// This file implements the public C++ header: each function calls the operator of its name.
#include "attention.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "arguments.h"

namespace blurry_attn {

namespace {

LawArguments law_of(const Window& window) {
  return {window.slots, window.window, window.phase, window.kernel, window.sharpness};
}
void check_rank(const at::Tensor& query, const char* tokens) {
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions (batch, heads, ", tokens, ", head_dim), got ",
                    query.dim());
}
double or_default(std::optional<double> scale, const at::Tensor& query) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(query.size(-1)));
}

}  // namespace

Attention forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Window& window,
                  const Options& options) {
  OptionalTensor state_key, state_value, position;
  if (options.state) {
    state_key = options.state->key;
    state_value = options.state->value;
    position = options.state->position;
  }
  check_rank(query, "tokens");
  const CallArguments call{
      {query, key, value}, law_of(window), or_default(options.scale, query), options.cu_seqlens, state_key,
      state_value,         position};
  auto [out, lse, end_key, end_value, end_position, kept] =
      dispatch(ForwardArguments{call, options.return_state, /*keep=*/false});
  return {out, lse, {end_key, end_value, end_position}};
}

at::Tensor step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Window& window,
                State& state, std::optional<double> scale) {
  check_rank(query, "1");
  return dispatch(StepArguments{
      {query, key, value}, {state.key, state.value, state.position}, law_of(window), or_default(scale, query)});
}

at::Tensor rotary(const at::Tensor& x, const at::Tensor& positions, double base) {
  return dispatch(RotaryArguments{x, positions, base, /*back=*/false});
}

}  // namespace blurry_attn
