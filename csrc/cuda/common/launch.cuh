// This file launches kernels. It names the kernel in errors, allows dynamic shared memory, starts a grid before the
// previous one has ended, and runs two streams.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/architectures.h"

namespace blurry_attn::cuda {

// Lets the next grid of the stream start while this one runs, if launch_early() launched that grid.
__device__ __forceinline__ void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// Waits until the previous grid of the stream has ended and all that it wrote can be read.
__device__ __forceinline__ void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

inline std::string describe(cudaError_t error) {
  const std::string text = cudaGetErrorString(error);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) return text;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return text + ": " + no_code_for(100 * major + 10 * minor, {__CUDA_ARCH_LIST__});
}

// Throws the error of a CUDA runtime call, and clears CUDA's last error, so that no later call reports it again.
inline void check(cudaError_t error, const char* what, const char* name = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("blurry_attn: CUDA ") + what + name + ": " + describe(error));
}

// Returns what `ask` says (0 or more) of the current device. `ask` runs once for each device and place in the code.
template <typename ask_type>
int once_per_device(const ask_type& ask) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // the answer plus one; 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), "devices");
  if (device >= kDevices) return ask();
  if (known[device] == 0) known[device] = ask() + 1;
  return known[device] - 1;
}

// Returns the bytes of dynamic shared memory that a launch may give a block. A kernel's static variables, 1 KB at most,
// come on top.
inline int64_t shared_memory_limit() {
  return once_per_device([] {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "devices");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "devices");
    return bytes - 1024;
  });
}
template <auto kernel>
void allow_shared_memory() {
  once_per_device([] {
    const int bytes = static_cast<int>(shared_memory_limit());
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    return 0;
  });
}

template <typename... parameters, typename... arguments>
void launch_with(cudaLaunchConfig_t config, const char* name, void (*kernel)(parameters...), int64_t blocks,
                 int threads, int64_t shared_bytes, cudaStream_t stream, const arguments&... args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("blurry_attn: CUDA kernel ") + name + ": the problem needs " +
                             std::to_string(blocks) + " blocks, more than a grid holds");
  }
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, parameters(args)...), "kernel ", name);
}

// Launches a kernel; a failure throws an error that names it. All blocks lie in grid.x, which holds 2^31 - 1.
template <typename... parameters, typename... arguments>
void launch(const char* name, void (*kernel)(parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t stream, const arguments&... args) {
  launch_with({}, name, kernel, blocks, threads, shared_bytes, stream, args...);
}

// Launches a kernel that calls wait_for_grid_before(). From capability 9.0 on, it starts once every block of the
// previous grid has called start_next_grid() or ended. Every `cluster` consecutive blocks then run side by side, as a
// cluster. The number of blocks is rounded up to a multiple of `cluster`.
template <int cluster = 1, typename... parameters, typename... arguments>
void launch_early(const char* name, void (*kernel)(parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                  cudaStream_t stream, const arguments&... args) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  // Code compiled for an earlier card does not wait, whatever card it runs on, so its launch has no such attributes.
  config.numAttrs = once_per_device([&] {
    cudaFuncAttributes made{};
    check(cudaFuncGetAttributes(&made, kernel), "kernel ", name);
    return made.ptxVersion >= 90 ? 1 + (cluster > 1) : 0;
  });
  launch_with(config, name, kernel, (blocks + cluster - 1) / cluster * cluster, threads, shared_bytes, stream, args...);
}

// TwoStreams has two streams for work that may run at once: `main`, and a side stream of higher priority. Work with an
// even number goes to the side stream, the other work to `main`. The side stream begins where `main` is now, and at
// destruction `main` waits for it. Each host thread has a side stream for every device.
class TwoStreams {
 public:
  TwoStreams(cudaStream_t main, bool needed) : main_(main) {
    if (!needed) return;
    side_ = &of_device();
    check(cudaEventRecord(side_->begin.get(), main_), "streams");
    check(cudaStreamWaitEvent(side_->stream.get(), side_->begin.get(), 0), "streams");
  }
  cudaStream_t of(size_t number) const { return side_ && number % 2 == 0 ? side_->stream.get() : main_; }
  ~TwoStreams() {
    if (!side_) return;
    cudaEventRecord(side_->end.get(), side_->stream.get());
    cudaStreamWaitEvent(main_, side_->end.get(), 0);
  }
  TwoStreams(const TwoStreams&) = delete;
  TwoStreams& operator=(const TwoStreams&) = delete;

 private:
  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };
  using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy>;
  using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy>;
  // A side stream exists with both of its events or, where one of them cannot be made, not at all.
  struct Side {
    Stream stream = make_stream();
    Event begin = make_event(), end = make_event();
  };

  static Stream make_stream() {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "streams");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "streams");
    return Stream(stream);
  }
  static Event make_event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "streams");
    return Event(event);
  }
  static const Side& of_device() {
    static thread_local auto& known = *new std::map<int, Side>;  // lives as long as the process
    int device = 0;
    check(cudaGetDevice(&device), "devices");
    return known.try_emplace(device).first->second;
  }

  cudaStream_t main_;
  const Side* side_ = nullptr;
};

}  // namespace blurry_attn::cuda
