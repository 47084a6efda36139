// This file builds the step (step.inl), which takes one token per sequence, once per instruction set of a CPU.
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#define BLURRY_BODY "step.inl"
#include "each_isa.h"

namespace blurry_attn::cpu {

template <typename storage, typename compute>
void step(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs, const Allocate& allocate,
          int isa) {
  BLURRY_AT_LEVEL(step_all(problem, outputs, allocate))
}
#define BLURRY_STEP(storage, compute) \
  template void step(const Problem<storage, compute>&, const Outputs<storage, compute>&, const Allocate&, int);
BLURRY_STEP(double, double)
BLURRY_STEP(float, float)
BLURRY_STEP(c10::BFloat16, float)
BLURRY_STEP(c10::Half, float)

}  // namespace blurry_attn::cpu
