// This is the public C++ header of blurry window attention, for LibTorch programs. Each function calls the operator of
// the same name of the library `blurry_attn` (torch.ops.blurry_attn in Python). It checks its arguments, runs on every
// device that the library was built for, and is differentiable where its comment says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#if defined(_WIN32)
#define BLURRY_API
#else
#define BLURRY_API __attribute__((visibility("default")))
#endif

namespace blurry_attn {

// A Window describes the slots of every key/value head h. The head keeps `slots` slots over window[h] tokens, a
// multiple of `slots`. Slots are centred at multiples of window[h] / slots plus phase[h], less than window[h] / slots.
// `kernel` is "fejer" or "dirichlet"; "dirichlet" ignores `sharpness`.
struct Window {
  int64_t slots;
  std::vector<int64_t> window;
  std::vector<int64_t> phase;
  std::string kernel = "fejer";
  double sharpness = 6.0;
};

// A State holds the slots of each sequence after `position` tokens. key is (sequences, kv_heads, slots, head_dim) and
// value (sequences, kv_heads, slots, value_dim), in float32 (float64 for float64 inputs). position is (sequences),
// int64. All three are on the inputs' device.
struct State {
  at::Tensor key, value, position;
};

struct Attention {
  at::Tensor out;  // (batch, heads, tokens, value_dim), the inputs' dtype; it lies in memory as query does
  at::Tensor lse;  // log-sum-exp of the logits, (batch, heads, tokens), float32 (float64 for float64 inputs)
  State state;     // the state after the last token, where asked for; else empty tensors
};

struct Options {
  std::optional<double> scale;           // factor of the logits; 1 / sqrt(head_dim) where absent
  std::optional<at::Tensor> cu_seqlens;  // (sequences + 1), int32 or int64: sequences packed along tokens, batch 1
  std::optional<State> state;            // the state before the first token of each sequence
  bool return_state = false;
};

// forward() attends over whole sequences. query is (batch, heads, tokens, head_dim), key (batch, kv_heads, tokens,
// head_dim) and value (batch, kv_heads, tokens, value_dim). heads is a multiple of kv_heads. The dtype is float64,
// float32, bfloat16 or float16; strides are free. The call is differentiable in query, key, value and the given state,
// through out, lse and the returned state. Errors (ValueError, TypeError or NotImplementedError, all c10::Error) name
// the argument.
BLURRY_API Attention forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const Window& window, const Options& options = {});

// step() appends one token to each sequence: it updates `state` in place and returns (sequences, heads, 1, value_dim).
// query is (sequences, heads, 1, head_dim), and key and value are alike. The step is not differentiable; the version
// counters of the state's tensors advance. No other argument may share the state's memory. Inference tensors are
// updated inside c10::InferenceMode alone.
BLURRY_API at::Tensor step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const Window& window, State& state, std::optional<double> scale = std::nullopt);

// rotary() turns x (batch, heads, tokens, head_dim), head_dim even, by a rotary embedding in the rotate-half form. The
// pair (i, i + head_dim / 2) turns by position * base^(-2i / head_dim) radians. positions is (tokens) or (batch,
// tokens), int64. The call is differentiable in x.
BLURRY_API at::Tensor rotary(const at::Tensor& x, const at::Tensor& positions, double base);

}  // namespace blurry_attn
