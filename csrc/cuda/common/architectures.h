// This file words the error for a card that the build has no code for. It has no CUDA, so any host can test it.
#pragma once

#include <string>
#include <vector>

namespace blurry_attn::cuda {

// Capabilities are numbers as in __CUDA_ARCH_LIST__: 900 means 9.0.
inline std::string capability(int x) { return std::to_string(x / 100) + "." + std::to_string(x % 100 / 10); }

constexpr int kLeastCapability = 800;

// `card` is the card's compute capability, and `built` lists the capabilities that the kernels were compiled for.
inline std::string no_code_for(int card, const std::vector<int>& built) {
  std::string list;
  for (const int x : built) list += (list.empty() ? "" : ", ") + capability(x);
  return "this build has code for compute capability " + list + ", and the card has " + capability(card) + "; " +
         (card < kLeastCapability ? "the kernels need " + capability(kLeastCapability) + " or newer"
                                  : "build again with TORCH_CUDA_ARCH_LIST=" + capability(card));
}

}  // namespace blurry_attn::cuda
