// This file implements the operators on CUDA: it gives raw pointers, strides and the current stream to the kernels.
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "../call.h"
#include "kernels.h"

namespace blurry_attn {

namespace {

bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// Tables hold the laws and gates of a call's heads on its device.
struct Tables {
  c10::cuda::CUDAStream stream;  // the stream on which their memory was allocated
  at::ScalarType type;
  Kernel kernel;
  double sharpness;
  std::vector<Cells> cells;
  std::vector<cuda::HeadLaw> host_laws;
  at::Tensor laws, gates;

  bool serve(const Call& call) const {
    return laws.device() == call.query.device() && type == call.compute_type() && kernel == call.kernel &&
           sharpness == call.sharpness && cells == call.cells;
  }
  int64_t bytes() const { return static_cast<int64_t>(laws.nbytes() + gates.nbytes()); }
  // outlive_stream() keeps the memory until the current stream has done the work that it has so far.
  void outlive_stream() const {
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream();
    if (current == stream) return;
    for (const at::Tensor& table : {laws, gates}) {
      c10::cuda::CUDACachingAllocator::recordStream(table.storage().data_ptr(), current);
    }
  }
};
using SharedTables = std::shared_ptr<const Tables>;

SharedTables make_tables(const Call& call) {
  std::vector<cuda::HeadLaw> laws;
  std::vector<double> gates;
  std::map<int64_t, int64_t> offsets;  // heads of one resolution share a table
  const std::vector<Gates<double>> tables = call.gates<double>();
  for (size_t h = 0; h < tables.size(); ++h) {
    const auto [entry, is_new] = offsets.emplace(call.cells[h].resolution, static_cast<int64_t>(gates.size()));
    if (is_new) gates.insert(gates.end(), tables[h]->begin(), tables[h]->end());
    laws.push_back({call.cells[h], entry->second});
    if (call.kernel != Kernel::fejer) continue;
    laws.back().echo = echo(call.cells[h], call.sharpness);
    laws.back().selects = selects(call.cells[h], call.sharpness);
  }
  const at::Tensor law_bytes = at::empty({static_cast<int64_t>(laws.size() * sizeof(cuda::HeadLaw))}, at::kByte);
  std::memcpy(law_bytes.mutable_data_ptr(), laws.data(), laws.size() * sizeof(cuda::HeadLaw));
  const at::Tensor gate_numbers = at::empty({static_cast<int64_t>(gates.size())}, at::kDouble);
  std::copy(gates.begin(), gates.end(), gate_numbers.mutable_data_ptr<double>());
  const at::Device device = call.query.device();
  return std::make_shared<const Tables>(Tables{c10::cuda::getCurrentCUDAStream(), call.compute_type(), call.kernel,
                                               call.sharpness, call.cells, laws, law_bytes.to(device),
                                               gate_numbers.to(call.compute_type()).to(device)});
}

// Calls of the same laws share tables. The cache keeps those of the latest calls, within these bounds. Tables that a
// capture has met stay for good, since its graph holds their addresses.
constexpr int64_t kKeptTables = 256, kKeptBytes = int64_t(64) << 20;

class TableCache {
 public:
  // find() returns tables that serve the call, or null.
  SharedTables find(const Call& call, bool captured) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return find_locked(call, captured);
  }
  // put() returns what serves the call from here on: `made`, or what another thread has put here meanwhile.
  SharedTables put(const Call& call, const SharedTables& made) {
    std::list<Entry> dropped;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const SharedTables found = find_locked(call, /*captured=*/false)) return found;
    entries_.push_front({made});
    int64_t count = 0, bytes = 0;
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      const auto here = entry++;
      if (here->captured) continue;
      count += 1;
      bytes += here->tables->bytes();
      if (count > 1 && (count > kKeptTables || bytes > kKeptBytes)) dropped.splice(dropped.begin(), entries_, here);
    }
    return made;
  }

 private:
  struct Entry {
    SharedTables tables;
    bool captured = false;
  };

  SharedTables find_locked(const Call& call, bool captured) {
    const auto found =
        std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.tables->serve(call); });
    if (found == entries_.end()) return nullptr;
    found->captured |= captured;
    entries_.splice(entries_.begin(), entries_, found);
    return found->tables;
  }

  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
};

// tables_of() returns the tables of a call, which the caller holds until its kernels have been launched.
SharedTables tables_of(const Call& call) {
  static TableCache& cache = *new TableCache;  // never freed: it outlives the CUDA context
  const bool captured = capturing();
  SharedTables tables = cache.find(call, captured);
  TORCH_CHECK(tables || !captured,
              "blurry_attn: the first call with this window on this device copies its tables there, "
              "which a CUDA graph cannot capture; make one call before the capture");
  if (!tables) tables = cache.put(call, make_tables(call));
  if (!captured) tables->outlive_stream();
  return tables;
}

cuda::View view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}
const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

cuda::DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return cuda::DType::float64;
    case at::kFloat: return cuda::DType::float32;
    case at::kBFloat16: return cuda::DType::bfloat16;
    default: return cuda::DType::float16;
  }
}

void check_limits(const Call& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(call.slots() <= cuda::kMostSlots, "slots must be at most ", cuda::kMostSlots,
                              " on CUDA, got ", call.slots());
  TORCH_CHECK_NOT_IMPLEMENTED(call.key_dim() <= cuda::kMostHeadDim, "query must have a head_dim of at most ",
                              cuda::kMostHeadDim, " on CUDA, got ", call.key_dim());
  TORCH_CHECK_NOT_IMPLEMENTED(call.value_dim() <= cuda::kMostHeadDim, "value must have a head_dim of at most ",
                              cuda::kMostHeadDim, " on CUDA, got ", call.value_dim());
}

// Reading values of device tensors waits for the device, so a captured call goes without. The kernels clamp the values.
void check_values(const Call& call) {
  if ((!call.cu_seqlens && !call.position) || capturing()) return;
  if (call.cu_seqlens) checked_cu_seqlens(call.cu_seqlens->cpu(), call.tokens());
  if (call.position) check_positions(call.position->cpu());
}

// The kernels on tensor cores read rows in aligned 16-byte units. in_rows() copies other tensors for them, so that a
// layout never changes a bit.
at::Tensor in_rows(const at::Tensor& tensor, bool wanted) {
  const int64_t size = 16 / tensor.element_size();
  const bool aligned = (tensor.stride(3) == 1 || tensor.size(3) == 1) && tensor.stride(0) % size == 0 &&
                       tensor.stride(1) % size == 0 && tensor.stride(2) % size == 0 &&
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  return aligned || !wanted ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}
bool wants_rows(const Call& call) {
  return call.query.scalar_type() == at::kBFloat16 || call.query.scalar_type() == at::kHalf;
}
Call with_rows(Call call) {
  const bool wanted = wants_rows(call);
  call.query = in_rows(call.query, wanted);
  call.key = in_rows(call.key, wanted);
  call.value = in_rows(call.value, wanted);
  return call;
}

// make_problem() needs a contiguous `cu_seqlens`.
cuda::Problem make_problem(const Call& call, const Tables& tables) {
  cuda::Problem problem{};
  problem.dtype = dtype_of(call.query.scalar_type());
  problem.kernel = call.kernel;
  problem.batch = call.batch();
  problem.query_heads = call.query_heads();
  problem.kv_heads = call.kv_heads();
  problem.tokens = call.tokens();
  problem.key_dim = call.key_dim();
  problem.value_dim = call.value_dim();
  problem.slots = call.slots();
  problem.sequences = call.sequences();
  for (const Cells& cells : call.cells) problem.longest_window = std::max(problem.longest_window, cells.window());
  problem.scale = call.scale;
  problem.query = view(call.query);
  problem.key = view(call.key);
  problem.value = view(call.value);
  problem.laws = static_cast<const cuda::HeadLaw*>(tables.laws.const_data_ptr());
  problem.host_laws = tables.host_laws.data();
  problem.gates = tables.gates.const_data_ptr();
  problem.cu_seqlens = data(call.cu_seqlens);
  problem.cu_seqlens_is_64 = call.cu_seqlens && call.cu_seqlens->scalar_type() == at::kLong;
  problem.state_key = data(call.state_key);
  problem.state_value = data(call.state_value);
  problem.position = static_cast<const int64_t*>(data(call.position));
  problem.stream = c10::cuda::getCurrentCUDAStream().stream();
  return problem;
}

at::Tensor workspace(const Call& call, int64_t bytes) { return call.empty({bytes}, at::kByte); }

// A Path is a family of kernels that takes a problem.
struct Path {
  const char* name;
  const char* (*backward_refusal)(const cuda::Problem&, const cuda::Gradients&);
  int64_t (*forward_workspace)(const cuda::Problem&);
  void (*forward)(const cuda::Problem&, const cuda::Outputs&, void*);
  int64_t (*backward_workspace)(const cuda::Problem&);
  void (*backward)(const cuda::Problem&, const cuda::Gradients&, void*);
  int64_t (*kept)(const cuda::Problem&) = nullptr;            // bytes that the forward can leave for the backward
  int64_t (*kept_workspace)(const cuda::Problem&) = nullptr;  // that of a backward that is given `kept`
  const char* refusal = nullptr;                              // why only the scan takes the problem

  int64_t kept_bytes_of(const cuda::Problem& problem) const { return kept ? kept(problem) : 0; }
};
constexpr Path kScan{
    "scan", nullptr, cuda::forward_workspace, cuda::scan_forward, cuda::backward_workspace, cuda::scan_backward};
constexpr Path kFejer{"fejer",
                      cuda::fejer_backward_refusal,
                      cuda::fejer_forward_workspace,
                      cuda::fejer_forward,
                      cuda::fejer_backward_workspace,
                      cuda::fejer_backward,
                      cuda::fejer_kept,
                      cuda::fejer_backward_workspace_with_kept};
constexpr Path kDirichlet{"dirichlet",
                          cuda::dirichlet_backward_refusal,
                          cuda::dirichlet_forward_workspace,
                          cuda::dirichlet_forward,
                          cuda::dirichlet_backward_workspace,
                          cuda::dirichlet_backward};
Path path_of(const cuda::Problem& problem) {
  const bool fejer = problem.kernel == Kernel::fejer;
  Path path = fejer ? kFejer : kDirichlet;
  if (const char* const refusal = (fejer ? cuda::fejer_refusal : cuda::dirichlet_refusal)(problem)) {
    path = kScan;
    path.refusal = refusal;
  }
  return path;
}

// ready_call() checks a call and the limits of CUDA, and lays out tensors as the kernels read them.
template <typename arguments>
Call ready_call(const arguments& given) {
  Call call = with_rows(check_call(given));
  call.cu_seqlens = dense(call.cu_seqlens);
  check_limits(call);
  return call;
}

ForwardResult forward_cuda(const ForwardArguments& given) {
  const Call call = ready_call(given);
  const c10::DeviceGuard guard(call.query.device());
  check_values(call);
  const bool return_state = given.return_state;
  const at::Tensor out = empty_beside(given.query, call.value_dim()), lse = call.empty_lse();
  const at::Tensor end_key = return_state ? call.empty_state_key() : call.none(call.compute_type());
  const at::Tensor end_value = return_state ? call.empty_state_value() : call.none(call.compute_type());
  const SharedTables tables = tables_of(call);
  const cuda::Problem problem = make_problem(call, *tables);
  cuda::Outputs outputs{view(out), lse.mutable_data_ptr()};
  if (return_state) {
    outputs.state_key = end_key.mutable_data_ptr();
    outputs.state_value = end_value.mutable_data_ptr();
  }
  const Path path = path_of(problem);
  const at::Tensor kept = workspace(call, given.keep ? path.kept_bytes_of(problem) : 0);
  if (kept.numel() > 0) outputs.kept = kept.mutable_data_ptr();
  const at::Tensor memory = workspace(call, path.forward_workspace(problem));
  path.forward(problem, outputs, memory.mutable_data_ptr());
  return {out, lse, end_key, end_value, return_state ? call.positions_after() : call.none(at::kLong), kept};
}

BackwardResult backward_cuda(const BackwardArguments& given) {
  const Call call = ready_call(given);
  check_gradients(call, given);
  const c10::DeviceGuard guard(call.query.device());
  const at::Tensor grad_query = empty_beside(given.query, call.key_dim());
  const at::Tensor grad_key = empty_beside(given.key, call.key_dim());
  const at::Tensor grad_value = empty_beside(given.value, call.value_dim());
  const at::Tensor grad_key_in = call.state_key ? call.empty_state_key() : call.none(call.compute_type());
  const at::Tensor grad_value_in = call.state_key ? call.empty_state_value() : call.none(call.compute_type());
  const at::Tensor lse = given.lse.contiguous();
  const OptionalTensor grad_lse = dense(given.grad_lse);
  const OptionalTensor grad_key_end = dense(given.grad_state_key), grad_value_end = dense(given.grad_state_value);
  const SharedTables tables = tables_of(call);
  const cuda::Problem problem = make_problem(call, *tables);
  cuda::Gradients gradients{};
  const at::Tensor grad_out_rows = in_rows(given.grad_out, wants_rows(call));
  gradients.grad_out = view(grad_out_rows);
  gradients.lse = lse.const_data_ptr();
  gradients.grad_lse = data(grad_lse);
  gradients.grad_state_key = data(grad_key_end);
  gradients.grad_state_value = data(grad_value_end);
  gradients.query = view(grad_query);
  gradients.key = view(grad_key);
  gradients.value = view(grad_value);
  if (call.state_key) {
    gradients.state_key = grad_key_in.mutable_data_ptr();
    gradients.state_value = grad_value_in.mutable_data_ptr();
  }
  Path path = path_of(problem);
  const int64_t kept_bytes = given.kept.numel();
  TORCH_CHECK_VALUE(kept_bytes == 0 || kept_bytes == path.kept_bytes_of(problem),
                    "kept must be what forward returned for the same arguments");
  if (!path.refusal && path.backward_refusal(problem, gradients)) path = kScan;
  if (kept_bytes > 0 && path.kept) gradients.kept = given.kept.const_data_ptr();
  const auto bytes = gradients.kept ? path.kept_workspace : path.backward_workspace;
  const at::Tensor memory = workspace(call, bytes(problem));
  path.backward(problem, gradients, memory.mutable_data_ptr());
  return {grad_query, grad_key, grad_value, grad_key_in, grad_value_in};
}

std::string backend_cuda(const BackendArguments& given) {
  const Call call = ready_call(given);
  const c10::DeviceGuard guard(call.query.device());
  const SharedTables tables = tables_of(call);
  const Path path = path_of(make_problem(call, *tables));
  return path.refusal ? std::string("scan: ") + path.refusal : path.name;
}

at::Tensor step_cuda(const StepArguments& given) {
  const Call call = check_step(given);
  check_limits(call);
  const c10::DeviceGuard guard(call.query.device());
  const at::Tensor out = empty_beside(call.query, call.value_dim());
  void *const state_key_data = call.state_key->mutable_data_ptr(), *const state_value_data =
                                                                       call.state_value->mutable_data_ptr();
  int64_t* const position_data = call.position->mutable_data_ptr<int64_t>();
  const SharedTables tables = tables_of(call);
  cuda::step(make_problem(call, *tables), view(out), state_key_data, state_value_data, position_data);
  write_back(call, given);
  if (!call.position->is_same(given.position)) given.position.copy_(*call.position);
  return out;
}

at::Tensor rotary_cuda(const RotaryArguments& given) {
  check_rotary(given);
  const at::Tensor &x = given.x, &positions = given.positions;
  TORCH_CHECK_NOT_IMPLEMENTED(x.size(3) <= cuda::kMostHeadDim, "x must have a head_dim of at most ", cuda::kMostHeadDim,
                              " on CUDA, got ", x.size(3));
  const c10::DeviceGuard guard(x.device());
  const at::Tensor out = empty_beside(x, x.size(3)), dense = positions.contiguous();
  cuda::rotary({dtype_of(x.scalar_type()), view(x), view(out), x.size(0), x.size(1), x.size(2), x.size(3),
                dense.const_data_ptr<int64_t>(), positions.dim() == 2 ? x.size(2) : 0, given.base, given.back,
                c10::cuda::getCurrentCUDAStream().stream()});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(blurry_attn, CUDA, m) {
  m.impl("backend", flat<BackendArguments, backend_cuda>);
  m.impl("forward", flat<ForwardArguments, forward_cuda>);
  m.impl("backward", flat<BackwardArguments, backward_cuda>);
  m.impl("step", flat<StepArguments, step_cuda>);
  m.impl("rotary", flat<RotaryArguments, rotary_cuda>);
}

}  // namespace blurry_attn
