// This file converts between number types, and reads rows of numbers in global memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace blurry_attn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename compute, typename storage>
__device__ __forceinline__ compute to_compute(storage x) {
  return static_cast<compute>(x);
}
template <>
__device__ __forceinline__ float to_compute<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_compute<float, __half>(__half x) {
  return __half2float(x);
}
template <typename storage, typename compute>
__device__ __forceinline__ storage to_storage(compute x) {
  return static_cast<storage>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_storage<__nv_bfloat16, float>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half to_storage<__half, float>(float x) {
  return __float2half(x);
}

// Pack has neighbours in memory that one instruction reads or writes.
template <typename type, int count>
struct alignas(count * sizeof(type)) Pack {
  type x[count];
};
template <typename type>
using Quad = Pack<type, 4>;

// Returns the two numbers of a 32-bit word, of which the first is in the lower half.
template <typename storage>
__device__ __forceinline__ float2 to_floats(unsigned word);
template <>
__device__ __forceinline__ float2 to_floats<__nv_bfloat16>(unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 to_floats<__half>(unsigned word) {
  __half2_raw raw;
  raw.x = static_cast<unsigned short>(word);
  raw.y = static_cast<unsigned short>(word >> 16);
  return __half22float2(raw);
}

// Reads `count` neighbours at an aligned address with one access.
template <typename compute, int count, typename storage>
__device__ __forceinline__ Pack<compute, count> read_pack(const storage* from) {
  if constexpr (sizeof(storage) == 2) {
    const auto words = *reinterpret_cast<const Pack<unsigned, count / 2>*>(from);
    Pack<compute, count> pack;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float2 two = to_floats<storage>(words.x[i]);
      pack.x[2 * i] = two.x;
      pack.x[2 * i + 1] = two.y;
    }
    return pack;
  } else {
    return *reinterpret_cast<const Pack<compute, count>*>(from);
  }
}

// Copies elements d .. d + 3 of a row of `dim` to shared memory, with zeros past the row's end. The caller commits the
// copy and waits for it. `whole` says that four neighbours are one aligned access.
template <typename storage>
__device__ __forceinline__ void copy_quad(Quad<storage>* to, const storage* row, int64_t element, int d, int dim,
                                          bool whole) {
  if (whole && d + 4 <= dim) {
    constexpr int kBytes = sizeof(Quad<storage>), kCopy = kBytes < 16 ? kBytes : 16;
#pragma unroll
    for (int i = 0; i < kBytes; i += kCopy) {
      __pipeline_memcpy_async(reinterpret_cast<char*>(to) + i, reinterpret_cast<const char*>(row + d) + i, kCopy);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) to->x[e] = d + e < dim ? row[(d + e) * element] : storage{};
}

// Returns whether `count` neighbours are one aligned access anywhere in a tensor's rows.
BLURRY_HOST_DEVICE inline bool in_packs(const View& view, int64_t count, int64_t element_size) {
  return view.element == 1 && reinterpret_cast<uintptr_t>(view.data) % (count * element_size) == 0 &&
         view.batch % count == 0 && view.head % count == 0 && view.token % count == 0;
}

template <typename storage>
__device__ __forceinline__ storage* row_of(const View& view, int64_t batch, int64_t head, int64_t token) {
  return static_cast<storage*>(view.data) + batch * view.batch + head * view.head + token * view.token;
}

template <typename compute>
__device__ __forceinline__ compute warp_sum(compute x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
template <typename compute>
__device__ __forceinline__ compute warp_max(compute x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const compute other = __shfl_xor_sync(kAllLanes, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Calls body(storage{}, compute{}) with the dtype's element type and the type that kernels compute in.
template <typename body_type>
void for_type(DType dtype, const body_type& body) {
  switch (dtype) {
    case DType::float64: return body(double(), double());
    case DType::float32: return body(float(), float());
    case DType::bfloat16: return body(__nv_bfloat16(), float());
    case DType::float16: return body(__half(), float());
  }
}

}  // namespace blurry_attn::cuda
