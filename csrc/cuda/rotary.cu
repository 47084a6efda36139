// Rotary embedding: a tensor is read and written once, angles are made on the way.
#include <algorithm>

#include "../rotary.h"
#include "device.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEnoughThreads = 1 << 17;  // where there are fewer, heads are divided among more
constexpr int kAtOnce = 4;                   // heads whose rows are on their way

// Cosine and sine of an angle in radians. The reduction is exact to a rounding, and has no slow path, whose table the
// compiler would keep in local memory.
__device__ __forceinline__ void turn_of(double angle, double* cos, double* sin) {
  constexpr double kTwoPi = 6.283185307179586, kTwoPiRest = 2.4492935982947064e-16, kPi = 3.141592653589793;
  const double turns = rint(angle / kTwoPi);
  sincospi(fma(-turns, kTwoPiRest, fma(-turns, kTwoPi, angle)) / kPi, sin, cos);
}

// A thread turns `count` neighbouring pairs of one token for `group` heads.
template <typename storage, typename compute, int count>
__global__ void __launch_bounds__(kThreads) rotary_turn(Rotary p, int64_t groups, int64_t group) {
  __shared__ double frequency[kMaxHeadDim / 2];
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
  const int64_t end = begin + group < p.heads ? begin + group : p.heads;
  const double position = static_cast<double>(p.position[batch * p.position_batch + token]);
  compute cos[count], sin[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    double c, s;
    turn_of(position * frequency[pair + i], &c, &s);
    cos[i] = static_cast<compute>(c);
    sin[i] = static_cast<compute>(p.back ? -s : s);
  }
  using Part = Pack<storage, count>;
  const int64_t second = half * p.x.element, to_second = half * p.out.element;
  for (int64_t h = begin; h < end; h += kAtOnce) {
    Part x[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (h + i >= end) break;
      const storage* const row = row_of<const storage>(p.x, batch, h + i, token) + pair * p.x.element;
      x[i][0] = *reinterpret_cast<const Part*>(row);
      x[i][1] = *reinterpret_cast<const Part*>(row + second);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (h + i >= end) break;
      Part turned[2];
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const auto a = to_compute<compute>(x[i][0].x[j]), b = to_compute<compute>(x[i][1].x[j]);
        turned[0].x[j] = to_storage<storage>(a * cos[j] - b * sin[j]);
        turned[1].x[j] = to_storage<storage>(b * cos[j] + a * sin[j]);
      }
      storage* const row = row_of<storage>(p.out, batch, h + i, token) + pair * p.out.element;
      *reinterpret_cast<Part*>(row) = turned[0];
      *reinterpret_cast<Part*>(row + to_second) = turned[1];
    }
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
      if (threads == 0) return;
      const int64_t wanted = std::clamp<int64_t>(kEnoughThreads / threads, 1, p.heads);
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
