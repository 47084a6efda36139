// A LibTorch program that uses the library: reads a prompt, then decodes, with a state of constant size.
#include <ATen/ATen.h>
#include <blurry_attn/attention.h>

#include <iostream>

int main() {
  const int64_t heads = 4, kv_heads = 2, prompt = 200, tokens = 232, head_dim = 16;
  const at::Tensor query = at::randn({1, heads, tokens, head_dim});
  const at::Tensor key = at::randn({1, kv_heads, tokens, head_dim});
  const at::Tensor value = at::randn({1, kv_heads, tokens, head_dim});
  const blurry_attn::Window window{.slots = 8, .window = {32, 64}, .phase = {0, 0}};
  const at::Tensor whole = blurry_attn::forward(query, key, value, window).out;

  const auto read = [](const at::Tensor& tensor) { return tensor.narrow(2, 0, prompt); };
  auto [out, lse, state] = blurry_attn::forward(read(query), read(key), read(value), window, {.return_state = true});
  std::vector<at::Tensor> pieces{out};
  for (int64_t t = prompt; t < tokens; ++t) {
    const auto token = [t](const at::Tensor& tensor) { return tensor.narrow(2, t, 1); };
    pieces.push_back(blurry_attn::step(token(query), token(key), token(value), window, state));
  }
  const double difference = (at::cat(pieces, 2) - whole).abs().max().item<double>();
  std::cout << tokens << " tokens at once and one by one differ by " << difference << "\n";
  return difference < 1e-5 ? 0 : 1;
}
