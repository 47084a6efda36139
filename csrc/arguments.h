// The argument and result lists of the operators stand here once each, as structs of references. `fields()` of a struct
// returns its members in the order of the schema. A new argument is a member here and a word in schema.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace blurry_attn {

using OptionalTensor = std::optional<at::Tensor>;

// The forward returns (out, lse, state_key, state_value, position, kept). A result that was not asked for is empty.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// The backward returns the gradients of (query, key, value, state_key, state_value).
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Inputs {
  const at::Tensor &query, &key, &value;

  auto fields() const { return std::tuple<const at::Tensor&, const at::Tensor&, const at::Tensor&>(query, key, value); }
};

// LawArguments give the law of all key/value heads; `window` and `phase` have one entry per head.
struct LawArguments {
  int64_t slots;
  at::IntArrayRef window, phase;
  c10::string_view kernel;
  double sharpness;

  auto fields() const {
    return std::tuple<int64_t, at::IntArrayRef, at::IntArrayRef, c10::string_view, double>(slots, window, phase, kernel,
                                                                                           sharpness);
  }
};

// CallArguments are given to a forward and to its backward.
struct CallArguments : Inputs, LawArguments {
  double scale;
  const OptionalTensor &cu_seqlens, &state_key, &state_value, &position;

  auto fields() const {
    return std::tuple_cat(
        Inputs::fields(), LawArguments::fields(),
        std::tuple<double, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>(
            scale, cu_seqlens, state_key, state_value, position));
  }
};

struct ForwardArguments : CallArguments {
  static constexpr const char* kOperator = "blurry_attn::forward";
  using Result = ForwardResult;
  bool return_state;
  bool keep;  // whether to return `kept` for the backward, where the kernels have it

  auto fields() const { return std::tuple_cat(CallArguments::fields(), std::tuple<bool, bool>(return_state, keep)); }
};

struct IncomingGradients {
  const at::Tensor& grad_out;
  const OptionalTensor &grad_lse, &grad_state_key, &grad_state_value;

  auto fields() const {
    return std::tuple<const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>(
        grad_out, grad_lse, grad_state_key, grad_state_value);
  }
};

struct BackwardArguments : IncomingGradients, CallArguments {
  static constexpr const char* kOperator = "blurry_attn::backward";
  using Result = BackwardResult;
  const at::Tensor &out, &lse, &kept;  // results of the forward

  auto fields() const {
    return std::tuple_cat(IncomingGradients::fields(), CallArguments::fields(),
                          std::tuple<const at::Tensor&, const at::Tensor&, const at::Tensor&>(out, lse, kept));
  }
};

struct WrittenState {
  at::Tensor &state_key, &state_value, &position;

  auto fields() const { return std::tuple<at::Tensor&, at::Tensor&, at::Tensor&>(state_key, state_value, position); }
};

struct StepArguments : Inputs, WrittenState, LawArguments {
  static constexpr const char* kOperator = "blurry_attn::step";
  using Result = at::Tensor;
  double scale;

  auto fields() const {
    return std::tuple_cat(Inputs::fields(), WrittenState::fields(), LawArguments::fields(), std::tuple<double>(scale));
  }
};

struct BackendArguments : Inputs, LawArguments {
  using Result = std::string;

  auto fields() const { return std::tuple_cat(Inputs::fields(), LawArguments::fields()); }
};

struct RotaryArguments {
  static constexpr const char* kOperator = "blurry_attn::rotary";
  using Result = at::Tensor;
  const at::Tensor &x, &positions;
  double base;
  bool back;  // whether to turn by the negated angles, which is the adjoint

  auto fields() const {
    return std::tuple<const at::Tensor&, const at::Tensor&, double, bool>(x, positions, base, back);
  }
};

// PyTorch calls operators with flat argument lists. Between those and the structs stand `flat` and dispatch() alone.
template <typename result, typename fields>
struct FlatOf;
template <typename result, typename... types>
struct FlatOf<result, std::tuple<types...>> {
  using Signature = result(types...);

  template <typename arguments, result (*body)(const arguments&)>
  static result call(types... fields) {
    return body(arguments{fields...});
  }
};
template <typename arguments>
using Flat = FlatOf<typename arguments::Result, decltype(std::declval<arguments>().fields())>;

// `flat` is the function to register with TORCH_LIBRARY_IMPL for `body`, which takes a struct.
template <typename arguments, typename arguments::Result (*body)(const arguments&)>
constexpr auto flat = &Flat<arguments>::template call<arguments, body>;

// dispatch() calls the operator through PyTorch's dispatcher.
template <typename arguments>
typename arguments::Result dispatch(const arguments& given) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(arguments::kOperator, "")
                                 .template typed<typename Flat<arguments>::Signature>();
  return std::apply([](auto&&... fields) { return handle.call(std::forward<decltype(fields)>(fields)...); },
                    given.fields());
}

}  // namespace blurry_attn
