// Differentiation and autocast of the operators, and the functions of attention.h, which call them.
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "attention.h"
#include "call.h"

namespace blurry_attn {

namespace {

using ForwardSignature = ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                       at::IntArrayRef, at::IntArrayRef, c10::string_view, double, double,
                                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, bool);
using KeptSignature = KeptResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, at::IntArrayRef,
                                 at::IntArrayRef, c10::string_view, double, double, const OptionalTensor&,
                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool);
using BackwardSignature = BackwardResult(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, const at::Tensor&, int64_t, at::IntArrayRef,
                                         at::IntArrayRef, c10::string_view, double, double, const OptionalTensor&,
                                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&);
using RotarySignature = at::Tensor(const at::Tensor&, const at::Tensor&, double, bool);
using StepSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&,
                                 at::Tensor&, int64_t, at::IntArrayRef, at::IntArrayRef, c10::string_view, double,
                                 double);

template <typename signature>
const c10::TypedOperatorHandle<signature>& find(const char* name) {
  static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<signature>();
  return handle;
}
const auto& forward_operator() { return find<ForwardSignature>("blurry_attn::forward"); }
const auto& keeping_operator() { return find<KeptSignature>("blurry_attn::forward_with_contents"); }
const auto& backward_operator() { return find<BackwardSignature>("blurry_attn::backward"); }
const auto& step_operator() { return find<StepSignature>("blurry_attn::step"); }
const auto& rotary_operator() { return find<RotarySignature>("blurry_attn::rotary"); }

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

// Whether autograd records a call that is given these.
template <typename... tensors>
bool is_recorded(const tensors&... given) {
  return at::GradMode::is_enabled() && (... || requires_grad(given));
}

bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

template <typename... tensors>
void refuse_forward_mode(const tensors&... given) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(... || has_tangent(given)),
                              "blurry_attn: forward-mode differentiation is not implemented; use reverse mode");
}

// Whether the backward shall find what the slots held. Not while a call is traced: how much that is only kernels know.
bool is_worth_keeping(const at::Tensor& query) {
  return query.is_cuda() && !query.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
}

OptionalTensor given(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Everything of a call that is no tensor.
struct Settings {
  int64_t slots;
  std::vector<int64_t> window, phase;
  std::string kernel;
  double sharpness, scale;
};

}  // namespace

// Profiles and grad_fn show the names of functions, here and below: as PyTorch's own, and with no unnamed namespace.
class AttentionBackward : public torch::autograd::Function<AttentionBackward> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& query,
                                                const at::Tensor& key, const at::Tensor& value,
                                                const OptionalTensor& state_key, const OptionalTensor& state_value,
                                                const OptionalTensor& cu_seqlens, const OptionalTensor& position,
                                                const Settings& settings, bool return_state) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto call = [&](const auto& forward) {
      return forward.call(query, key, value, settings.slots, settings.window, settings.phase, settings.kernel,
                          settings.sharpness, settings.scale, cu_seqlens, state_key, state_value, position,
                          return_state);
    };
    at::Tensor out, lse, end_key, end_value, end_position, contents;
    if (is_worth_keeping(query)) {
      std::tie(out, lse, end_key, end_value, end_position, contents) = call(keeping_operator());
    } else {
      std::tie(out, lse, end_key, end_value, end_position) = call(forward_operator());
    }
    const auto or_undefined = [](const OptionalTensor& t) { return t ? *t : at::Tensor(); };
    context->save_for_backward({query, key, value, out, lse, or_undefined(state_key), or_undefined(state_value),
                                or_undefined(cu_seqlens), or_undefined(position), contents});
    context->set_materialize_grads(false);
    context->saved_data["slots"] = settings.slots;
    context->saved_data["window"] = settings.window;
    context->saved_data["phase"] = settings.phase;
    context->saved_data["kernel"] = settings.kernel;
    context->saved_data["sharpness"] = settings.sharpness;
    context->saved_data["scale"] = settings.scale;
    if (return_state) {
      context->mark_non_differentiable({end_position});
    } else {
      context->mark_non_differentiable({end_key, end_value, end_position});
    }
    return {out, lse, end_key, end_value, end_position};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& out = saved[3];
    const at::Tensor grad_out = gradients[0].defined() ? gradients[0] : at::zeros_like(out);
    const std::vector<int64_t> window = context->saved_data["window"].toIntVector();
    const std::vector<int64_t> phase = context->saved_data["phase"].toIntVector();
    const std::string kernel = context->saved_data["kernel"].toStringRef();
    auto [query, key, value, state_key, state_value] = backward_operator().call(
        grad_out, given(gradients[1]), given(gradients[2]), given(gradients[3]), saved[0], saved[1], saved[2], out,
        saved[4], context->saved_data["slots"].toInt(), window, phase, kernel,
        context->saved_data["sharpness"].toDouble(), context->saved_data["scale"].toDouble(), given(saved[7]),
        given(saved[5]), given(saved[6]), given(saved[8]), given(saved[9]));
    const bool stated = saved[5].defined();
    const at::Tensor none;
    return {query, key, value, stated ? state_key : none, stated ? state_value : none, none, none, none, none};
  }
};

namespace {

ForwardResult forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t slots,
                               at::IntArrayRef window, at::IntArrayRef phase, c10::string_view kernel, double sharpness,
                               double scale, const OptionalTensor& cu_seqlens, const OptionalTensor& state_key,
                               const OptionalTensor& state_value, const OptionalTensor& position, bool return_state) {
  refuse_forward_mode(query, key, value, state_key, state_value);
  if (!is_recorded(query, key, value, state_key, state_value)) {  // a function would cost a third of the call
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(query, key, value, slots, window, phase, kernel, sharpness, scale, cu_seqlens,
                                   state_key, state_value, position, return_state);
  }
  const Settings settings{slots, window.vec(), phase.vec(), std::string(kernel), sharpness, scale};
  auto results =
      AttentionBackward::apply(query, key, value, state_key, state_value, cu_seqlens, position, settings, return_state);
  return {results[0], results[1], results[2], results[3], results[4]};
}

BackwardResult backward_autograd(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                 const OptionalTensor& grad_state_key, const OptionalTensor& grad_state_value,
                                 const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& out, const at::Tensor& lse, int64_t slots, at::IntArrayRef window,
                                 at::IntArrayRef phase, c10::string_view kernel, double sharpness, double scale,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& state_key,
                                 const OptionalTensor& state_value, const OptionalTensor& position,
                                 const OptionalTensor& contents) {
  const bool wanted =
      is_recorded(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value, state_key, state_value);
  TORCH_CHECK_NOT_IMPLEMENTED(!wanted,
                              "blurry_attn: double backward is not implemented; call backward without create_graph");
  refuse_forward_mode(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value, out, lse, state_key,
                      state_value);
  at::AutoDispatchBelowADInplaceOrView guard;
  return backward_operator().call(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value, out, lse,
                                  slots, window, phase, kernel, sharpness, scale, cu_seqlens, state_key, state_value,
                                  position, contents);
}

KeptResult keeping_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t slots,
                            at::IntArrayRef window, at::IntArrayRef phase, c10::string_view kernel, double sharpness,
                            double scale, const OptionalTensor& cu_seqlens, const OptionalTensor& state_key,
                            const OptionalTensor& state_value, const OptionalTensor& position, bool return_state) {
  refuse_forward_mode(query, key, value, state_key, state_value);
  TORCH_CHECK_NOT_IMPLEMENTED(!is_recorded(query, key, value, state_key, state_value),
                              "blurry_attn: forward_with_contents has no gradient; forward has");
  at::AutoDispatchBelowADInplaceOrView guard;
  return keeping_operator().call(query, key, value, slots, window, phase, kernel, sharpness, scale, cu_seqlens,
                                 state_key, state_value, position, return_state);
}

at::Tensor step_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& state_key,
                         at::Tensor& state_value, at::Tensor& position, int64_t slots, at::IntArrayRef window,
                         at::IntArrayRef phase, c10::string_view kernel, double sharpness, double scale) {
  refuse_forward_mode(query, key, value, state_key, state_value);
  TORCH_CHECK_NOT_IMPLEMENTED(!is_recorded(query, key, value, state_key, state_value),
                              "blurry_attn: a step updates its state in place and has no gradient; call it under "
                              "torch.no_grad(), or use blurry_window_attention with state and return_state");
  at::AutoDispatchBelowAutograd guard;
  return step_operator().call(query, key, value, state_key, state_value, position, slots, window, phase, kernel,
                              sharpness, scale);
}

// Tells autograd of the write: a backward that saved a tensor of the state finds that it is no longer as it was.
at::Tensor step_in_place(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& state_key,
                         at::Tensor& state_value, at::Tensor& position, int64_t slots, at::IntArrayRef window,
                         at::IntArrayRef phase, c10::string_view kernel, double sharpness, double scale) {
  at::Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = step_operator().call(query, key, value, state_key, state_value, position, slots, window, phase, kernel,
                               sharpness, scale);
  }
  for (const at::Tensor& written : {state_key, state_value, position}) written.unsafeGetTensorImpl()->bump_version();
  return out;
}

}  // namespace

// Linear in x; its adjoint turns back, and is differentiable, too.
class RotaryBackward : public torch::autograd::Function<RotaryBackward> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& positions,
                            double base, bool back) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({positions});
    context->saved_data["base"] = base;
    context->saved_data["back"] = back;
    return rotary_operator().call(x, positions, base, back);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const at::Tensor none;
    if (!gradients[0].defined()) return {none, none, none, none};
    return {rotary_operator().call(gradients[0], context->get_saved_variables()[0],
                                   context->saved_data["base"].toDouble(), !context->saved_data["back"].toBool()),
            none, none, none};
  }
};

namespace {

at::Tensor rotary_autograd(const at::Tensor& x, const at::Tensor& positions, double base, bool back) {
  refuse_forward_mode(x);
  if (is_recorded(x)) return RotaryBackward::apply(x, positions, base, back);
  at::AutoDispatchBelowADInplaceOrView guard;
  return rotary_operator().call(x, positions, base, back);
}

// Autocast computes in the autocast dtype; states stay as they are.
template <c10::DeviceType device, c10::DispatchKey dispatch_key>
ForwardResult forward_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t slots,
                               at::IntArrayRef window, at::IntArrayRef phase, c10::string_view kernel, double sharpness,
                               double scale, const OptionalTensor& cu_seqlens, const OptionalTensor& state_key,
                               const OptionalTensor& state_value, const OptionalTensor& position, bool return_state) {
  c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return forward_operator().call(cast(query), cast(key), cast(value), slots, window, phase, kernel, sharpness, scale,
                                 cu_seqlens, state_key, state_value, position, return_state);
}
template <c10::DeviceType device, c10::DispatchKey dispatch_key>
at::Tensor step_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& state_key,
                         at::Tensor& state_value, at::Tensor& position, int64_t slots, at::IntArrayRef window,
                         at::IntArrayRef phase, c10::string_view kernel, double sharpness, double scale) {
  c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return step_operator().call(cast(query), cast(key), cast(value), state_key, state_value, position, slots, window,
                              phase, kernel, sharpness, scale);
}

double default_scale(const at::Tensor& query, std::optional<double> scale) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(query.size(-1)));
}

}  // namespace

TORCH_LIBRARY_IMPL(blurry_attn, Autograd, m) {
  m.impl("forward", forward_autograd);
  m.impl("forward_with_contents", keeping_autograd);
  m.impl("backward", backward_autograd);
  m.impl("step", step_autograd);
  m.impl("rotary", rotary_autograd);
}
TORCH_LIBRARY_IMPL(blurry_attn, ADInplaceOrView, m) { m.impl("step", step_in_place); }
TORCH_LIBRARY_IMPL(blurry_attn, AutocastCPU, m) {
  m.impl("forward", forward_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("step", step_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(blurry_attn, AutocastCUDA, m) {
  m.impl("forward", forward_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("step", step_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

Attention forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Window& window,
                  const Options& options) {
  OptionalTensor state_key, state_value, position;
  if (options.state) {
    state_key = options.state->key;
    state_value = options.state->value;
    position = options.state->position;
  }
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions (batch, heads, tokens, head_dim), got ",
                    query.dim());
  auto [out, lse, end_key, end_value, end_position] = forward_operator().call(
      query, key, value, window.slots, window.window, window.phase, window.kernel, window.sharpness,
      default_scale(query, options.scale), options.cu_seqlens, state_key, state_value, position, options.return_state);
  return {out, lse, {end_key, end_value, end_position}};
}

at::Tensor step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Window& window,
                State& state, std::optional<double> scale) {
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions (batch, heads, 1, head_dim), got ", query.dim());
  return step_operator().call(query, key, value, state.key, state.value, state.position, window.slots, window.window,
                              window.phase, window.kernel, window.sharpness, default_scale(query, scale));
}

at::Tensor rotary(const at::Tensor& x, const at::Tensor& positions, double base) {
  return rotary_operator().call(x, positions, base, /*back=*/false);
}

}  // namespace blurry_attn
