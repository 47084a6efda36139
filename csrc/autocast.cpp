// Under autocast the operators compute in its dtype, and states keep their own.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "arguments.h"

namespace blurry_attn {

namespace {

// with_cast() calls body(inputs) with query, key and value in the autocast dtype.
template <c10::DeviceType device, c10::DispatchKey dispatch_key, typename body_type>
auto with_cast(const Inputs& given, const body_type& body) {
  c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  const at::Tensor query = cast(given.query), key = cast(given.key), value = cast(given.value);
  return body(Inputs{query, key, value});
}

template <c10::DeviceType device, c10::DispatchKey dispatch_key>
ForwardResult forward_autocast(const ForwardArguments& given) {
  return with_cast<device, dispatch_key>(given, [&](const Inputs& cast) {
    const CallArguments call{cast,          given, given.scale, given.cu_seqlens, given.state_key, given.state_value,
                             given.position};
    return dispatch(ForwardArguments{call, given.return_state, given.keep});
  });
}
template <c10::DeviceType device, c10::DispatchKey dispatch_key>
at::Tensor step_autocast(const StepArguments& given) {
  return with_cast<device, dispatch_key>(
      given, [&](const Inputs& cast) { return dispatch(StepArguments{cast, given, given, given.scale}); });
}

template <c10::DeviceType device, c10::DispatchKey dispatch_key>
void register_for(torch::Library& m) {
  m.impl("forward", flat<ForwardArguments, forward_autocast<device, dispatch_key>>);
  m.impl("step", flat<StepArguments, step_autocast<device, dispatch_key>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(blurry_attn, AutocastCPU, m) {
  register_for<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(m);
}
TORCH_LIBRARY_IMPL(blurry_attn, AutocastCUDA, m) {
  register_for<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>(m);
}

}  // namespace blurry_attn
