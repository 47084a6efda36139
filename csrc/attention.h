// Blurry window attention for LibTorch programs. Each function is the operator of the same name of the library
// `blurry_attn` (torch.ops.blurry_attn in Python): checked, differentiable where it says so, for every device built in.
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

// What a head keeps: `slots` slots over `window[h]` tokens (a multiple of slots), centred at multiples of
// window[h] / slots plus `phase[h]`, for every key/value head h. Kernel: "fejer" or "dirichlet", which ignores
// sharpness.
struct Window {
  int64_t slots;
  std::vector<int64_t> window;
  std::vector<int64_t> phase;
  std::string kernel = "fejer";
  double sharpness = 6.0;
};

// Slots after `position` tokens: key (sequences, kv_heads, slots, head_dim) and value (.., value_dim), float32
// (float64 for float64 inputs), position (sequences) int64; all on the inputs' device.
struct State {
  at::Tensor key, value, position;
};

struct Attention {
  at::Tensor out;  // (batch, heads, tokens, value_dim), the inputs' dtype; lies in memory as query does
  at::Tensor lse;  // (batch, heads, tokens), float32 (float64 for float64 inputs)
  State state;     // after the last token, where asked for; else empty tensors
};

struct Options {
  std::optional<double> scale;           // 1 / sqrt(head_dim) where absent
  std::optional<at::Tensor> cu_seqlens;  // (sequences + 1), int32 or int64: sequences packed along tokens, batch 1
  std::optional<State> state;            // what came before the first token of each sequence
  bool return_state = false;
};

// query (batch, heads, tokens, head_dim), key (batch, kv_heads, tokens, head_dim), value (.., value_dim); heads a
// multiple of kv_heads; float64, float32, bfloat16 or float16, any strides. Differentiable in query, key, value and the
// given state, through out, lse and the returned state. Throws c10::Error (ValueError, TypeError) naming the argument.
BLURRY_API Attention forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const Window& window, const Options& options = {});

// One token per sequence, (sequences, heads, 1, head_dim) and alike; updates `state` in place and returns
// (sequences, heads, 1, value_dim). Not differentiable; the tensors' version counters advance. The state's memory is
// shared by no other argument; inference tensors are updated inside c10::InferenceMode alone.
BLURRY_API at::Tensor step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const Window& window, State& state, std::optional<double> scale = std::nullopt);

// Rotary embedding, rotate-half form: of x (batch, heads, tokens, head_dim), head_dim even, the pairs (i, i + head_dim
// / 2) turn by position * base^(-2i / head_dim) radians; positions (tokens) or (batch, tokens), int64. Differentiable
// in x.
BLURRY_API at::Tensor rotary(const at::Tensor& x, const at::Tensor& positions, double base);

}  // namespace blurry_attn
