// One token per sequence on the CPU: one build of step.inl per instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#define BLURRY_BODY "step.inl"
#include "each_isa.h"

namespace blurry_attn::cpu {

template <typename storage, typename compute>
void step(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs, int isa) {
  BLURRY_AT_LEVEL(step_all(problem, outputs))
}
template void step<double, double>(const Problem<double, double>&, const Outputs<double, double>&, int);
template void step<float, float>(const Problem<float, float>&, const Outputs<float, float>&, int);
template void step<c10::BFloat16, float>(const Problem<c10::BFloat16, float>&, const Outputs<c10::BFloat16, float>&,
                                         int);
template void step<c10::Half, float>(const Problem<c10::Half, float>&, const Outputs<c10::Half, float>&, int);

}  // namespace blurry_attn::cpu
