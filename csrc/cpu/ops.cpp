// This file implements the operators on a CPU: it gives raw pointers and strides of tensors to the kernels.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>

#include "../call.h"
#include "kernels.h"

namespace blurry_attn {

namespace {

template <typename storage>
cpu::View<storage> view(const at::Tensor& tensor) {
  return {const_cast<storage*>(tensor.const_data_ptr<std::remove_const_t<storage>>()), tensor.stride(0),
          tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
template <typename compute>
compute* data(const at::Tensor& tensor) {
  return const_cast<compute*>(tensor.const_data_ptr<compute>());
}

int instruction_set() {
  static const int level = [] {
    const std::string name = at::get_cpu_capability();
    return name.rfind("AVX512", 0) == 0 ? 2 : name == "AVX2" ? 1 : 0;
  }();
  return level;
}

// parallel() hands out items one by one, so that heads of unlike cost do not wait for each other.
void parallel(int64_t count, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

// for_type() calls body(storage{}, compute{}) for the dtype.
template <typename body_type>
void for_type(at::ScalarType type, const body_type& body) {
  switch (type) {
    case at::kDouble: return body(double{}, double{});
    case at::kFloat: return body(float{}, float{});
    case at::kBFloat16: return body(c10::BFloat16{}, float{});
    default: return body(c10::Half{}, float{});
  }
}

template <typename storage, typename compute>
cpu::Problem<storage, compute> make_problem(const Call& call) {
  cpu::Problem<storage, compute> problem;
  std::vector<int64_t> ends;
  if (call.cu_seqlens) ends = checked_cu_seqlens(*call.cu_seqlens, call.tokens());
  if (call.position) check_positions(*call.position);
  for (int64_t s = 0; s < call.sequences(); ++s) {
    const int64_t position = call.position ? call.position->const_data_ptr<int64_t>()[s] : 0;
    if (call.cu_seqlens) {
      problem.sequences.push_back({0, ends[s], ends[s + 1] - ends[s], position});
    } else {
      problem.sequences.push_back({s, 0, call.tokens(), position});
    }
  }
  problem.cells = call.cells;
  problem.gates = call.gates<compute>();
  problem.of_period = call.kernel != Kernel::fejer;
  problem.query_heads = call.query_heads();
  problem.tokens = call.tokens();
  problem.key_dim = call.key_dim();
  problem.value_dim = call.value_dim();
  problem.scale = static_cast<compute>(call.scale);
  problem.query = view<const storage>(call.query);
  problem.key = view<const storage>(call.key);
  problem.value = view<const storage>(call.value);
  if (call.state_key) {
    problem.state_key = data<compute>(*call.state_key);
    problem.state_value = data<compute>(*call.state_value);
  }
  problem.parallel = parallel;
  problem.threads = at::get_num_threads();
  return problem;
}

// A touch of fresh memory costs about as much as the kernels, unless it comes in huge pages. in_huge_pages() asks for
// them and has one thread touch each page: two that meet in a page would both clear it.
at::Tensor in_huge_pages(at::Tensor tensor) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), end = begin + tensor.nbytes();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0) {
    parallel((last - first) / kPage, [first](int64_t i) {
      reinterpret_cast<std::atomic<char>*>(first + i * kPage)->fetch_or(0, std::memory_order_relaxed);
    });
  }
#endif
  return tensor;
}

// Scratch allocates the scratch memory of one call.
struct Scratch {
  const Call& call;
  std::vector<at::Tensor> tensors;

  void* operator()(int64_t elements) {
    tensors.push_back(in_huge_pages(call.empty({elements}, call.compute_type())));
    return tensors.back().mutable_data_ptr();
  }
};

void run_forward(const Call& call, const at::Tensor& out, const at::Tensor& lse, const OptionalTensor& state_key,
                 const OptionalTensor& state_value) {
  Scratch scratch{call, {}};
  for_type(call.query.scalar_type(), [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    using compute = decltype(compute_tag);
    const auto problem = make_problem<storage, compute>(call);
    cpu::Outputs<storage, compute> outputs{view<storage>(out), data<compute>(lse)};
    if (state_key) {
      outputs.state_key = data<compute>(*state_key);
      outputs.state_value = data<compute>(*state_value);
    }
    const auto run =
        call.kernel == Kernel::fejer ? cpu::fejer_forward<storage, compute> : cpu::scan_forward<storage, compute>;
    run(problem, outputs, std::ref(scratch), instruction_set());
  });
}

ForwardResult forward_cpu(const ForwardArguments& given) {
  const Call call = check_call(given);
  const at::Tensor out = in_huge_pages(empty_beside(call.query, call.value_dim())), lse = call.empty_lse();
  const at::Tensor kept = call.none(at::kByte);
  if (!given.return_state) {
    run_forward(call, out, lse, {}, {});
    const at::Tensor none = call.none(call.compute_type());
    return {out, lse, none, call.none(call.compute_type()), call.none(at::kLong), kept};
  }
  const at::Tensor end_key = call.empty_state_key(), end_value = call.empty_state_value();
  run_forward(call, out, lse, end_key, end_value);
  return {out, lse, end_key, end_value, call.positions_after(), kept};
}

BackwardResult backward_cpu(const BackwardArguments& given) {
  const Call call = check_call(given);
  check_gradients(call, given);
  TORCH_CHECK_VALUE(given.kept.numel() == 0, "kept must be empty on the CPU");
  const at::Tensor grad_query = in_huge_pages(empty_beside(call.query, call.key_dim()));
  const at::Tensor grad_key = in_huge_pages(empty_beside(call.key, call.key_dim()));
  const at::Tensor grad_value = in_huge_pages(empty_beside(call.value, call.value_dim()));
  const at::Tensor grad_key_in = call.state_key ? call.empty_state_key() : call.none(call.compute_type());
  const at::Tensor grad_value_in = call.state_key ? call.empty_state_value() : call.none(call.compute_type());
  Scratch scratch{call, {}};
  const at::Tensor lse = given.lse.contiguous();
  const OptionalTensor grad_lse = dense(given.grad_lse);
  const OptionalTensor grad_key_end = dense(given.grad_state_key), grad_value_end = dense(given.grad_state_value);
  for_type(call.query.scalar_type(), [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    using compute = decltype(compute_tag);
    const auto problem = make_problem<storage, compute>(call);
    cpu::Gradients<storage, compute> gradients;
    gradients.grad_out = view<const storage>(given.grad_out);
    gradients.lse = data<compute>(lse);
    if (grad_lse) gradients.grad_lse = data<compute>(*grad_lse);
    if (grad_key_end) gradients.grad_state_key = data<compute>(*grad_key_end);
    if (grad_value_end) gradients.grad_state_value = data<compute>(*grad_value_end);
    gradients.query = view<storage>(grad_query);
    gradients.key = view<storage>(grad_key);
    gradients.value = view<storage>(grad_value);
    if (call.state_key) {
      gradients.state_key = data<compute>(grad_key_in);
      gradients.state_value = data<compute>(grad_value_in);
    }
    const auto run =
        call.kernel == Kernel::fejer ? cpu::fejer_backward<storage, compute> : cpu::scan_backward<storage, compute>;
    run(problem, gradients, std::ref(scratch), instruction_set());
  });
  return {grad_query, grad_key, grad_value, grad_key_in, grad_value_in};
}

std::string backend_cpu(const BackendArguments& given) {
  return check_call(given).kernel == Kernel::fejer ? "fejer" : "scan: the kernel is not \"fejer\"";
}

constexpr size_t kLeastForThreads = size_t(64) << 10;  // bytes of state that one thread steps through sooner than two

at::Tensor step_cpu(const StepArguments& given) {
  const Call call = check_step(given);
  const at::Tensor out = empty_beside(call.query, call.value_dim());
  Scratch scratch{call, {}};
  for_type(call.query.scalar_type(), [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    using compute = decltype(compute_tag);
    auto problem = make_problem<storage, compute>(call);
    if (call.state_key->nbytes() + call.state_value->nbytes() < kLeastForThreads) {
      problem.parallel = [](int64_t count, const std::function<void(int64_t)>& body) {
        for (int64_t i = 0; i < count; ++i) body(i);
      };
    }
    cpu::step(problem,
              {view<storage>(out), nullptr, call.state_key->mutable_data_ptr<compute>(),
               call.state_value->mutable_data_ptr<compute>()},
              std::ref(scratch), instruction_set());
  });
  write_back(call, given);
  given.position.add_(1);
  return out;
}

at::Tensor rotary_cpu(const RotaryArguments& given) {
  check_rotary(given);
  const at::Tensor &x = given.x, &positions = given.positions;
  const at::Tensor out = in_huge_pages(empty_beside(x, x.size(3))), dense = positions.contiguous();
  for_type(x.scalar_type(), [&](auto storage_tag, auto compute_tag) {
    using storage = decltype(storage_tag);
    const int64_t per_batch = positions.dim() == 2 ? x.size(2) : 0;
    cpu::rotary<storage, decltype(compute_tag)>({view<const storage>(x), view<storage>(out), x.size(0), x.size(1),
                                                 x.size(2), x.size(3), dense.const_data_ptr<int64_t>(), per_batch,
                                                 given.base, given.back, parallel});
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(blurry_attn, CPU, m) {
  m.impl("backend", flat<BackendArguments, backend_cpu>);
  m.impl("forward", flat<ForwardArguments, forward_cpu>);
  m.impl("backward", flat<BackwardArguments, backward_cpu>);
  m.impl("step", flat<StepArguments, step_cpu>);
  m.impl("rotary", flat<RotaryArguments, rotary_cpu>);
}

}  // namespace blurry_attn
