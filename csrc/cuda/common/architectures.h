// What to say where a build has no code for a card. No CUDA here, so that it is tested anywhere.
#pragma once

#include <string>
#include <vector>

namespace blurry_attn::cuda {

// Capabilities count as in __CUDA_ARCH_LIST__: 900 is 9.0.
inline std::string capability(int x) { return std::to_string(x / 100) + "." + std::to_string(x % 100 / 10); }

constexpr int kLeastCapability = 800;

// `card`: its compute capability; `built`: those that the kernels were compiled for.
inline std::string no_code_for(int card, const std::vector<int>& built) {
  std::string list;
  for (const int x : built) list += (list.empty() ? "" : ", ") + capability(x);
  return "this build has code for compute capability " + list + ", and the card has " + capability(card) + "; " +
         (card < kLeastCapability ? "the kernels need " + capability(kLeastCapability) + " or newer"
                                  : "build again with TORCH_CUDA_ARCH_LIST=" + capability(card));
}

}  // namespace blurry_attn::cuda
