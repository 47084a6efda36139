// What the kernels use of CUDA's language and runtime.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "../emulator.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __noinline__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // dynamic shared memory: see the Makefile

struct dim3 : emulator::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : emulator::Index{x, y, z} {}
};

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __fdividef(float a, float b) { return a / b; }
// Not instrumented: it orders what other blocks do.
__attribute__((no_sanitize("thread"), noinline)) inline int atomicExch(int* at, int x) {
  const int before = *at;
  *at = x;
  return before;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <typename number>
void sincospi(number x, number* sin_of, number* cos_of) {
  *sin_of = static_cast<number>(std::sin(3.141592653589793 * x));
  *cos_of = static_cast<number>(std::cos(3.141592653589793 * x));
}

template <typename to_type, typename from_type>
to_type emulator_bits(const from_type& from) {
  static_assert(sizeof(to_type) == sizeof(from_type));
  to_type to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <typename type>
type __ldg(const type* from) {
  return *from;
}
template <typename type>
void __stwb(type* to, type x) {
  *to = x;
}
template <typename type>
type min(type a, type b) {
  return b < a ? b : a;
}
template <typename type>
type max(type a, type b) {
  return a < b ? b : a;
}

// Barriers.
#define __syncthreads() static_cast<void>(::emulator::wait_at_barrier(0, 0, false, {__FILE__, __LINE__}))
#define __syncthreads_or(x) static_cast<int>(::emulator::wait_at_barrier(0, 0, (x) != 0, {__FILE__, __LINE__}))
#define __syncthreads_and(x) static_cast<int>(!::emulator::wait_at_barrier(0, 0, (x) == 0, {__FILE__, __LINE__}))
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int none = 0;
  emulator::together(mask, "__syncwarp", none, [](int* const*) {});
}

// What lanes give each other: `from(lane)` is the lane that is read, or one out of range for the own number.
template <typename type, typename from_type>
type emulator_shuffle(unsigned mask, const char* name, type x, const from_type& from) {
  struct Lane {
    type given, taken;
    int from;
  } mine{x, x, from(emulator::lane())};
  emulator::together(mask, name, mine, [](Lane* const* lanes) {
    for (int l = 0; l < emulator::kLanes; ++l) {
      if (!lanes[l] || lanes[l]->from < 0 || lanes[l]->from >= emulator::kLanes) continue;
      if (!lanes[lanes[l]->from]) emulator::fail("a shuffle reads a lane that takes no part");
      lanes[l]->taken = lanes[lanes[l]->from]->given;
    }
  });
  return mine.taken;
}
template <typename type>
type __shfl_sync(unsigned mask, type x, int from, int width = 32) {
  return emulator_shuffle(mask, "__shfl_sync", x, [=](int l) { return (l & -width) | (from & (width - 1)); });
}
template <typename type>
type __shfl_xor_sync(unsigned mask, type x, int with, int width = 32) {
  return emulator_shuffle(mask, "__shfl_xor_sync", x,
                          [=](int l) { return (l ^ with) / width <= l / width ? l ^ with : -1; });
}
template <typename type>
type __shfl_up_sync(unsigned mask, type x, int by, int width = 32) {
  return emulator_shuffle(mask, "__shfl_up_sync", x, [=](int l) { return l % width >= by ? l - by : -1; });
}
template <typename type>
type __shfl_down_sync(unsigned mask, type x, int by, int width = 32) {
  return emulator_shuffle(mask, "__shfl_down_sync", x, [=](int l) { return l % width + by < width ? l + by : -1; });
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  struct Lane {
    bool given;
    unsigned all;
  } mine{x != 0, 0};
  emulator::together(mask, "a vote", mine, [](Lane* const* lanes) {
    unsigned all = 0;
    for (int l = 0; l < emulator::kLanes; ++l) all |= lanes[l] && lanes[l]->given ? 1u << l : 0u;
    for (int l = 0; l < emulator::kLanes; ++l) {
      if (lanes[l]) lanes[l]->all = all;
    }
  });
  return mine.all;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == mask; }

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - emulator::shared_memory + emulator::kSharedBase;
}

// The runtime, of a device like an H100.
#define __CUDA_ARCH_LIST__ 900
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;  // grids run one after another, and blocks, whatever they allow or ask for
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::kMaxSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emulator::kMaxSharedBytes + 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// Streams run one after another.
using cudaEvent_t = struct CUevent_st*;
constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;
template <typename handle>
cudaError_t emulator_make(handle* made) {
  if (emulator::until_failure-- == 0) return cudaErrorInvalidValue;
  ++emulator::objects;
  *made = reinterpret_cast<handle>(new char);
  return cudaSuccess;
}
template <typename handle>
cudaError_t emulator_destroy(handle made) {
  --emulator::objects;
  delete reinterpret_cast<char*>(made);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return emulator_make(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return emulator_destroy(event); }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return emulator_make(stream); }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return emulator_destroy(stream); }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

template <typename... parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > emulator::kMaxSharedBytes) return cudaErrorInvalidValue;
  emulator::shared_limit(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(value);
  return cudaSuccess;
}
template <typename... parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(parameters...)) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename... parameters, typename... argument_types>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(parameters...),
                               argument_types&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (config->dynamicSmemBytes > emulator::shared_limit(reinterpret_cast<const void*>(kernel)))
    return cudaErrorInvalidValue;
  if (threads == 0 || threads > 1024 || grid.x * grid.y * grid.z == 0) return cudaErrorInvalidConfiguration;
  struct Call {
    void (*kernel)(parameters...);
    std::tuple<parameters...> arguments;
  } call{kernel, {arguments...}};
  emulator::run_grid(
      grid, block, config->dynamicSmemBytes,
      [](const void* of) {
        const Call& call = *static_cast<const Call*>(of);
        std::apply(call.kernel, call.arguments);
      },
      &call, sizeof call);
  return cudaSuccess;
}
