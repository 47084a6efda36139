// This file makes the operators differentiable: forward and rotary get a backward; backward and step refuse one.
#include <ATen/Functions.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "arguments.h"

namespace blurry_attn {

namespace {

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

// is_recorded() says whether autograd records a call that is given these tensors.
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

// is_worth_keeping() says whether the forward shall keep contents of slots for the backward. It is false while a call
// is traced: only the kernels know how much that is.
bool is_worth_keeping(const at::Tensor& query) {
  return query.is_cuda() && !query.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
}

OptionalTensor given(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); }

// KeptLaw is the law as a node of the graph keeps it: values that PyTorch's own tools can read, by the members' names.
struct KeptLaw {
  int64_t slots;
  std::vector<int64_t> window, phase;
  std::string kernel;
  double sharpness;

  explicit KeptLaw(const ska::flat_hash_map<std::string, at::IValue>& from)
      : slots(from.at("slots").toInt()),
        window(from.at("window").toIntVector()),
        phase(from.at("phase").toIntVector()),
        kernel(from.at("kernel").toStringRef()),
        sharpness(from.at("sharpness").toDouble()) {}
  static void save(const LawArguments& law, ska::flat_hash_map<std::string, at::IValue>& to) {
    to["slots"] = law.slots;
    to["window"] = law.window.vec();
    to["phase"] = law.phase.vec();
    to["kernel"] = std::string(law.kernel);
    to["sharpness"] = law.sharpness;
  }
  operator LawArguments() const { return {slots, window, phase, kernel, sharpness}; }
};

}  // namespace

// Profiles and grad_fn show the names of the classes here and below. They look like PyTorch's own, so
// they lie in no unnamed namespace.
class AttentionBackward : public torch::autograd::Function<AttentionBackward> {
 public:
  // Tensors are arguments of their own, because apply() looks among its arguments for those that need a gradient.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& query,
                                                const at::Tensor& key, const at::Tensor& value,
                                                const OptionalTensor& state_key, const OptionalTensor& state_value,
                                                const ForwardArguments& given) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const CallArguments call{{query, key, value}, given,       given.scale,   given.cu_seqlens,
                             state_key,           state_value, given.position};
    auto [out, lse, end_key, end_value, end_position, kept] =
        dispatch(ForwardArguments{call, given.return_state, is_worth_keeping(query)});
    context->save_for_backward({query, key, value, or_undefined(given.cu_seqlens), or_undefined(state_key),
                                or_undefined(state_value), or_undefined(given.position), out, lse, kept});
    context->set_materialize_grads(false);
    KeptLaw::save(given, context->saved_data);
    context->saved_data["scale"] = given.scale;
    if (given.return_state) {
      context->mark_non_differentiable({end_position, kept});
    } else {
      context->mark_non_differentiable({end_key, end_value, end_position, kept});
    }
    return {out, lse, end_key, end_value, end_position, kept};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const OptionalTensor cu_seqlens = given(saved[3]), state_key = given(saved[4]), state_value = given(saved[5]),
                         position = given(saved[6]);
    const at::Tensor &out = saved[7], &lse = saved[8], &kept = saved[9];
    const at::Tensor grad_out = gradients[0].defined() ? gradients[0] : at::zeros_like(out);
    const OptionalTensor grad_lse = given(gradients[1]), grad_key = given(gradients[2]),
                         grad_value = given(gradients[3]);
    const KeptLaw law(context->saved_data);
    const CallArguments call{{saved[0], saved[1], saved[2]},
                             law,
                             context->saved_data["scale"].toDouble(),
                             cu_seqlens,
                             state_key,
                             state_value,
                             position};
    auto [query, key, value, given_key, given_value] =
        dispatch(BackwardArguments{{grad_out, grad_lse, grad_key, grad_value}, call, out, lse, kept});
    const at::Tensor none;
    return {query, key, value, state_key ? given_key : none, state_key ? given_value : none, none};
  }
};

namespace {

ForwardResult forward_autograd(const ForwardArguments& given) {
  const auto& [query, key, value] = static_cast<const Inputs&>(given);
  refuse_forward_mode(query, key, value, given.state_key, given.state_value);
  if (!is_recorded(query, key, value, given.state_key, given.state_value)) {  // a node would cost a third of the call
    at::AutoDispatchBelowADInplaceOrView guard;
    return dispatch(given);
  }
  auto results = AttentionBackward::apply(query, key, value, given.state_key, given.state_value, given);
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

BackwardResult backward_autograd(const BackwardArguments& given) {
  const auto& [grad_out, grad_lse, grad_state_key, grad_state_value] = static_cast<const IncomingGradients&>(given);
  const auto& [query, key, value] = static_cast<const Inputs&>(given);
  const bool wanted = is_recorded(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value,
                                  given.state_key, given.state_value);
  TORCH_CHECK_NOT_IMPLEMENTED(!wanted,
                              "blurry_attn: double backward is not implemented; call backward without create_graph");
  refuse_forward_mode(grad_out, grad_lse, grad_state_key, grad_state_value, query, key, value, given.out, given.lse,
                      given.state_key, given.state_value);
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch(given);
}

at::Tensor step_autograd(const StepArguments& given) {
  const auto& [query, key, value] = static_cast<const Inputs&>(given);
  refuse_forward_mode(query, key, value, given.state_key, given.state_value);
  TORCH_CHECK_NOT_IMPLEMENTED(!is_recorded(query, key, value, given.state_key, given.state_value),
                              "blurry_attn: a step updates its state in place and has no gradient; call it under "
                              "torch.no_grad(), or use blurry_window_attention with state and return_state");
  at::AutoDispatchBelowAutograd guard;
  return dispatch(given);
}

// step_in_place() tells autograd of the write, so that a backward that saved a tensor of the state raises an error.
at::Tensor step_in_place(const StepArguments& given) {
  at::Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = dispatch(given);
  }
  for (const at::Tensor& written : {given.state_key, given.state_value, given.position}) {
    written.unsafeGetTensorImpl()->bump_version();
  }
  return out;
}

}  // namespace

// The rotary embedding is linear in x. Its adjoint turns back, and is differentiable, too.
class RotaryBackward : public torch::autograd::Function<RotaryBackward> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& positions,
                            double base, bool back) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({positions});
    context->saved_data["base"] = base;
    context->saved_data["back"] = back;
    return dispatch(RotaryArguments{x, positions, base, back});
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const at::Tensor none;
    if (!gradients[0].defined()) return {none, none, none, none};
    const at::Tensor positions = context->get_saved_variables()[0];
    const bool back = context->saved_data["back"].toBool();
    return {dispatch(RotaryArguments{gradients[0], positions, context->saved_data["base"].toDouble(), !back}), none,
            none, none};
  }
};

namespace {

at::Tensor rotary_autograd(const RotaryArguments& given) {
  refuse_forward_mode(given.x);
  if (is_recorded(given.x)) return RotaryBackward::apply(given.x, given.positions, given.base, given.back);
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch(given);
}

}  // namespace

TORCH_LIBRARY_IMPL(blurry_attn, Autograd, m) {
  m.impl("forward", flat<ForwardArguments, forward_autograd>);
  m.impl("backward", flat<BackwardArguments, backward_autograd>);
  m.impl("step", flat<StepArguments, step_autograd>);
  m.impl("rotary", flat<RotaryArguments, rotary_autograd>);
}
TORCH_LIBRARY_IMPL(blurry_attn, ADInplaceOrView, m) { m.impl("step", flat<StepArguments, step_in_place>); }

}  // namespace blurry_attn
