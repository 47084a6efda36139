// What the CUDA kernels share: number types, launches, and the law as device code sees it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "architectures.h"
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

// Neighbours in memory, read and written at once.
template <typename type, int count>
struct alignas(count * sizeof(type)) Pack {
  type x[count];
};
template <typename type>
using Quad = Pack<type, 4>;

// The two numbers of a word, the first in its lower half.
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

// `count` neighbours at an aligned address, read at once.
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

// Copies elements d .. d + 3 of a row of `dim` to shared memory, zeros past its end; they are there once
// committed and waited for. `whole`: four neighbours are one aligned access.
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

// Whether so many neighbours are one aligned access anywhere in a tensor's rows.
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

// The law of one kv head on the device.
template <typename compute>
struct Law {
  Cells cells;
  const compute* gates;
  Kernel kernel;

  __device__ Law(const Problem& problem, int64_t head)
      : cells(problem.laws[head].cells),
        gates(static_cast<const compute*>(problem.gates) + problem.laws[head].gates),
        kernel(problem.kernel) {}

  __device__ bool is_open(int slot, int64_t token) const { return token >= cells.slot_opening(slot); }
};

// How a token's gates lie over the slots.
enum class Spread : int {
  few,    // at most two slots take a share; no other does
  all,    // every slot takes one, none of them 0 or 1
  mixed,  // anything
};

// What a token gives to the slots, made once per token: gate() is then cheap for every slot.
template <typename compute>
struct TokenGates {
  int64_t token;
  Spread spread;
  int slot[2];       // few: the slots in flux, or centred,
  compute share[2];  // and their gates
  int offset;        // else: offset in the period from the centre of slot 0

  __device__ void make(const Law<compute>& law, int64_t t) {
    const Cells& cells = law.cells;
    token = t;
    if (law.kernel == Kernel::fejer) {
      spread = Spread::few;
      const int64_t trailing = cells.trailing(t);
      slot[0] = static_cast<int>(cells.slot(trailing));
      slot[1] = slot[0] + 1 < cells.slots ? slot[0] + 1 : 0;
      for (int which = 0; which < 2; ++which) {
        const int64_t cell = trailing + which;
        share[which] = cells.gate(law.gates, cell, t);  // 0 where the slot is shut: only the lobe's first, not in it
      }
    } else {
      const int64_t from_centre = t - cells.centre(0), window = cells.window();
      offset = static_cast<int>(from_centre - floor_div(from_centre, window) * window);
      const int resolution = static_cast<int>(cells.resolution), centred = offset / resolution;
      const bool settled = t > cells.opening(cells.slots - 1);  // every slot was opened before
      spread = !settled ? Spread::mixed : offset == centred * resolution ? Spread::few : Spread::all;
      slot[0] = centred;
      slot[1] = -1;
      share[0] = 1;
      share[1] = 0;
    }
  }
  // The share of the token that `m` takes; 0 where it is shut.
  __device__ __forceinline__ compute gate(const Law<compute>& law, int m) const {
    if (spread == Spread::few) return m == slot[0] ? share[0] : m == slot[1] ? share[1] : compute(0);
    if (spread == Spread::mixed) {
      const int64_t opening = law.cells.slot_opening(m);
      if (token <= opening) return token == opening ? compute(1) : compute(0);
    }
    const int from_centre = offset - m * static_cast<int>(law.cells.resolution);
    return law.gates[from_centre < 0 ? from_centre + static_cast<int>(law.cells.window()) : from_centre];
  }
  // Whether one of the slots m .. m + 3 may take a share.
  __device__ __forceinline__ bool touches(int m) const {
    return spread != Spread::few || static_cast<unsigned>(slot[0] - m) < 4 || static_cast<unsigned>(slot[1] - m) < 4;
  }
};

// "fejer": runs body(begin, end, gates, opens) over the tokens from .. to - 1 of which an open slot takes a share, lobe
// by lobe: token begin + i takes gates[i], but the first one 1 if it `opens` the slot.
template <typename compute, typename body_type>
__device__ __forceinline__ void for_lobes(const Law<compute>& law, int slot, int64_t from, int64_t to,
                                          const body_type& body) {
  const Cells& cells = law.cells;
  const int64_t base = cells.trailing(from);
  const int64_t ahead = slot - cells.slot(base);
  for (int64_t cell = base + (ahead < 0 ? ahead + cells.slots : ahead); cells.flux_begin(cell) + 1 < to;
       cell += cells.slots) {
    int64_t begin = cells.flux_begin(cell) + 1, end = cells.flux_end(cell) + 1;
    if (cells.opens(cell) && cells.opening(cell) > begin) begin = cells.opening(cell);
    begin = begin > from ? begin : from;
    end = end < to ? end : to;
    if (begin < end) {
      body(begin, end, law.gates + (begin - cells.flux_begin(cell)), cells.opens(cell) && begin == cells.opening(cell));
    }
  }
}

// Runs body(token, gate) over the tokens from .. to - 1 of which an open slot takes a share, in order.
template <typename compute, typename body_type>
__device__ void walk_slot(const Law<compute>& law, int slot, int64_t from, int64_t to, const body_type& body) {
  if (law.kernel == Kernel::fejer) {
    for_lobes(law, slot, from, to, [&](int64_t begin, int64_t end, const compute* gates, bool opens) {
#pragma unroll 4
      for (int64_t t = begin; t < end; ++t) body(t, opens && t == begin ? compute(1) : gates[t - begin]);
    });
    return;
  }
  for (int64_t t = from; t < to; ++t) {
    TokenGates<compute> gates;
    gates.make(law, t);
    body(t, gates.gate(law, slot));
  }
}

// A gate of 1 replaces and a gate of 0 leaves, unread.
template <typename compute>
__device__ __forceinline__ compute written(compute content, compute token, compute gate) {
  return gate == compute(1) ? token : gate == compute(0) ? content : content + gate * (token - content);
}

// A given position, brought into range: of a captured call nobody can check it.
__device__ __forceinline__ int64_t bounded_position(int64_t position) {
  return position < 0 ? 0 : position < kMaxPosition ? position : kMaxPosition;
}

// One sequence: its batch entry, its first row and its rows there, and its tokens before them.
struct Sequence {
  int64_t index, batch, row, length, position;

  __device__ Sequence(const Problem& problem, int64_t i) : index(i) {
    batch = problem.cu_seqlens ? 0 : i;
    row = problem.cu_seqlens ? boundary(problem, i) : 0;
    const int64_t end = problem.cu_seqlens ? boundary(problem, i + 1) : problem.tokens;
    length = end > row ? end - row : 0;
    position = problem.position ? bounded_position(problem.position[i]) : 0;
  }
  // cu_seqlens[i], brought into range.
  __device__ static int64_t boundary(const Problem& problem, int64_t i) {
    const int64_t x = problem.cu_seqlens_is_64 ? static_cast<const int64_t*>(problem.cu_seqlens)[i]
                                               : static_cast<const int32_t*>(problem.cu_seqlens)[i];
    return x < 0 ? 0 : x > problem.tokens ? problem.tokens : x;
  }
  __device__ int64_t end() const { return position + length; }
};

// Why a problem's backward is not for kernels that take what slots hold, and their gradients, in its dtype; or null. Of
// a forward, what is not finite is done again.
inline const char* range_refusal(const Problem& problem, const Gradients& gradients) {
  const bool given = problem.state_key || gradients.grad_state_key || gradients.grad_state_value;
  return problem.dtype == DType::float16 && given ? "backward: a state may hold more than float16 does" : nullptr;
}

// Lets the next grid of the stream start while this one runs, if launch_early() launched it.
__device__ __forceinline__ void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// Waits until the grid before has ended and all that it wrote can be read.
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

// What a call of CUDA's runtime reports, thrown; it shall not surface again elsewhere.
inline void check(cudaError_t error, const char* what, const char* name = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("blurry_attn: CUDA ") + what + name + ": " + describe(error));
}

// What `ask` says (0 or more) of the current device: asked once per device and place of the call.
template <typename ask_type>
int once_per_device(const ask_type& ask) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // the answer + 1
  int device = 0;
  check(cudaGetDevice(&device), "devices");
  if (device >= kDevices) return ask();
  if (known[device] == 0) known[device] = ask() + 1;
  return known[device] - 1;
}

// What a block can ask for at its launch; its own variables, 1 KB at most, come on top.
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

// Launches and names what cannot be launched. All blocks lie in grid.x, which holds 2^31 - 1.
template <typename... parameters, typename... arguments>
void launch(const char* name, void (*kernel)(parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t stream, const arguments&... args) {
  launch_with({}, name, kernel, blocks, threads, shared_bytes, stream, args...);
}

// The same for a kernel that calls wait_for_grid_before(): where cards and code can (from 9.0 on), it starts once every
// block of the grid before has called start_next_grid() or ended, and so many blocks in a row as `cluster` says run
// side by side. Their number is rounded up to a multiple of that.
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
  // Code made for an earlier card does not wait, on whatever card it runs.
  config.numAttrs = once_per_device([&] {
    cudaFuncAttributes made{};
    check(cudaFuncGetAttributes(&made, kernel), "kernel ", name);
    return made.ptxVersion >= 90 ? 1 + (cluster > 1) : 0;
  });
  launch_with(config, name, kernel, (blocks + cluster - 1) / cluster * cluster, threads, shared_bytes, stream, args...);
}

// Two streams for work that may run at once: `main`, and one of higher priority for what is begun first and every other
// one after it. Both begin where `main` is now, and when this is destroyed `main` waits for both. A host thread has its
// own for every device.
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
  // All of it or, where a part cannot be made, none.
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
    static thread_local auto& known = *new std::map<int, Side>;  // they live as long as the process
    int device = 0;
    check(cudaGetDevice(&device), "devices");
    return known.try_emplace(device).first->second;
  }

  cudaStream_t main_;
  const Side* side_ = nullptr;
};

// Calls body(storage{}, compute{}) for the dtype.
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
