// This file applies a rotary embedding: it reads and writes a tensor once and computes the angles on the way.
#include <algorithm>

#include "common/launch.cuh"
#include "common/numbers.cuh"
#include "common/tuning.h"
#include "rotary.h"

namespace blurry_attn::cuda {
namespace {

constexpr int kThreads = 256;

// turn_of() computes cosine and sine of an angle in radians, correct to about one rounding. The reduction to half turns
// is exact to a few roundings of float64. It has no slow path, whose table the compiler would keep in local memory. The
// rest is in `compute`, since float64 is slow on most cards.
template <typename compute>
__device__ __forceinline__ void turn_of(double angle, compute* cos, compute* sin) {
  constexpr double kPi = 3.141592653589793, kTwoPi = 2 * kPi, kTwoPiRest = 2.4492935982947064e-16;
  const double turns = rint(angle * (1 / kTwoPi));
  const double halves = fma(-turns, kTwoPiRest, fma(-turns, kTwoPi, angle)) * (1 / kPi);
  const compute rounded = static_cast<compute>(halves);
  sincospi(rounded, sin, cos);
  if constexpr (sizeof(compute) < sizeof(double)) {
    const compute rest = static_cast<compute>((halves - rounded) * kPi), rounded_sin = *sin;
    *sin = fma(rest, *cos, rounded_sin);
    *cos = fma(-rest, rounded_sin, *cos);
  }
}

// rotary_turn lets a thread turn `count` neighbouring pairs of one token for `group` heads.
template <typename storage, typename compute, int count>
__global__ void __launch_bounds__(kThreads, kRotaryBlocks) rotary_turn(Rotary p, int64_t groups, int64_t group) {
  __shared__ double frequency[kMostHeadDim / 2];
  __shared__ compute angles[2][count][kThreads];
  const int64_t half = p.dim / 2, packs = half / count;
  for (int64_t i = threadIdx.x; i < half; i += kThreads) frequency[i] = rotary_frequency(i, p.dim, p.base);
  __syncthreads();
  int64_t rest = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pair = rest % packs * count;
  rest /= packs;
  const int64_t token = rest % p.tokens;
  rest /= p.tokens;
  const int64_t begin = rest % groups * group, batch = rest / groups;
  if (batch >= p.batch) return;
  const int64_t heads = begin + group < p.heads ? group : p.heads - begin;
  const double position = static_cast<double>(p.position[batch * p.position_batch + token]);
  // Angles pass through shared memory one by one: at once they would take the registers of half the blocks.
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    turn_of(position * frequency[pair + i], &angles[0][i][threadIdx.x], &angles[1][i][threadIdx.x]);
  }
  compute cos[count], sin[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    cos[i] = angles[0][i][threadIdx.x];
    sin[i] = p.back ? -angles[1][i][threadIdx.x] : angles[1][i][threadIdx.x];
  }
  using Part = Pack<storage, count>;
  const storage* from = row_of<const storage>(p.x, batch, begin, token) + pair * p.x.element;
  storage* to = row_of<storage>(p.out, batch, begin, token) + pair * p.out.element;
  const int64_t second = half * p.x.element, to_second = half * p.out.element;
  for (int64_t h = 0; h < heads; ++h, from += p.x.head, to += p.out.head) {
    const Part x[2] = {*reinterpret_cast<const Part*>(from), *reinterpret_cast<const Part*>(from + second)};
    Part turned[2];
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const auto a = to_compute<compute>(x[0].x[j]), b = to_compute<compute>(x[1].x[j]);
      // fma() fixes which product is rounded. A choice of the compiler could make a layout change a bit.
      turned[0].x[j] = to_storage<storage>(fma(a, cos[j], -b * sin[j]));
      turned[1].x[j] = to_storage<storage>(fma(b, cos[j], a * sin[j]));
    }
    *reinterpret_cast<Part*>(to) = turned[0];
    *reinterpret_cast<Part*>(to + to_second) = turned[1];
  }
}

}  // namespace

void rotary(const Rotary& p) {
  for_type(p.dtype, [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    using compute = decltype(compute_tag);
    constexpr int kCount = 16 / sizeof(storage);
    const auto launch_with_count = [&](auto count_tag) {
      constexpr int count = decltype(count_tag)::value;
      const int64_t threads = p.batch * p.tokens * (p.dim / 2 / count);
      if (threads == 0 || p.heads == 0) return;
      const int64_t wanted = std::clamp<int64_t>(kRotaryThreads / threads, 1, p.heads);
      const int64_t group = (p.heads + wanted - 1) / wanted, groups = (p.heads + group - 1) / group;
      launch("rotary_turn", rotary_turn<storage, compute, count>, (threads * groups + kThreads - 1) / kThreads,
             kThreads, 0, p.stream, p, groups, group);
    };
    if (p.dim / 2 % kCount == 0 && in_packs(p.x, kCount, sizeof(storage)) && in_packs(p.out, kCount, sizeof(storage))) {
      launch_with_count(std::integral_constant<int, kCount>());
    } else {
      launch_with_count(std::integral_constant<int, 1>());
    }
  });
}

}  // namespace blurry_attn::cuda
