// This file applies a rotary embedding on the CPU.
#include "../rotary.h"

#include <algorithm>

#include "kernels.h"

namespace blurry_attn::cpu {

template <typename storage, typename compute>
void rotary(const Rotary<storage>& problem) {
  constexpr int64_t kTokens = 16;  // tokens of a work item
  const int64_t half = problem.dim / 2, items = (problem.tokens + kTokens - 1) / kTokens;
  std::vector<double> frequency;
  for (int64_t i = 0; i < half; ++i) frequency.push_back(rotary_frequency(i, problem.dim, problem.base));
  problem.parallel(problem.batch * items, [&](int64_t item) {
    const int64_t b = item / items, begin = item % items * kTokens, end = std::min(begin + kTokens, problem.tokens);
    const View<const storage>& x = problem.x;
    const View<storage>& out = problem.out;
    std::vector<compute> cos(half), sin(half);
    for (int64_t t = begin; t < end; ++t) {
      const double position = static_cast<double>(problem.position[b * problem.position_batch + t]);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * frequency[i];
        cos[i] = static_cast<compute>(std::cos(angle));
        sin[i] = static_cast<compute>(std::sin(problem.back ? -angle : angle));
      }
      for (int64_t h = 0; h < problem.heads; ++h) {
        const storage *const first = x.row(b, h, t), *const second = first + half * x.element;
        storage *const to_first = out.row(b, h, t), *const to_second = to_first + half * out.element;
        for (int64_t i = 0; i < half; ++i) {
          const auto a = static_cast<compute>(first[i * x.element]), c = static_cast<compute>(second[i * x.element]);
          to_first[i * out.element] = static_cast<storage>(a * cos[i] - c * sin[i]);
          to_second[i * out.element] = static_cast<storage>(c * cos[i] + a * sin[i]);
        }
      }
    }
  });
}
template void rotary<double, double>(const Rotary<double>&);
template void rotary<float, float>(const Rotary<float>&);
template void rotary<c10::BFloat16, float>(const Rotary<c10::BFloat16>&);
template void rotary<c10::Half, float>(const Rotary<c10::Half>&);

}  // namespace blurry_attn::cpu
