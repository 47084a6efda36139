// The operators from C++ alone: forward, backward and step through blurry_attn/attention.h.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "attention.h"

using namespace blurry_attn;

namespace {

at::Tensor random(at::IntArrayRef shape, at::ScalarType type = at::kDouble) {
  return at::randn(shape, at::TensorOptions().dtype(type));
}

double difference(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

// Four query heads on two key/value heads of different windows.
struct Problem {
  at::Tensor query, key, value;
  Window window;

  explicit Problem(const std::string& kernel, int64_t tokens = 70)
      : query(random({2, 4, tokens, 6})),
        key(random({2, 2, tokens, 6})),
        value(random({2, 2, tokens, 5})),
        window{4, {12, 32}, {1, 0}, kernel, kernel == "fejer" ? 6.0 : 1.0} {}
};

class Operators : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

}  // namespace

TEST_P(Operators, OneTokenPerSlotIsSlidingWindowAttention) {
  const int64_t tokens = 40, slots = 8;
  const at::Tensor query = random({2, 3, tokens, 6}), key = random({2, 3, tokens, 6}),
                   value = random({2, 3, tokens, 5});
  const at::Tensor lag = at::arange(tokens).unsqueeze(1) - at::arange(tokens);
  const at::Tensor expected = at::scaled_dot_product_attention(query, key, value, lag.ge(0).logical_and(lag.lt(slots)));
  const Window window{slots, {slots, slots, slots}, {0, 0, 0}, GetParam(), 1.0};
  EXPECT_LT(difference(forward(query, key, value, window).out, expected), 1e-12);
}

TEST_P(Operators, ConstantValuesComeBack) {
  const Problem p(GetParam());
  const at::Tensor out = forward(p.query, p.key, at::ones_like(p.value), p.window).out;
  EXPECT_LT(difference(out, at::ones_like(out)), 1e-12);
}

TEST_P(Operators, PiecesEqualTheWhole) {
  const Problem p(GetParam());
  const auto [out, lse, state] = forward(p.query, p.key, p.value, p.window, {.return_state = true});
  Options options{.return_state = true};
  std::vector<at::Tensor> pieces;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 7}, {7, 7}, {7, 8}, {8, 53}, {53, 70}}) {
    const auto piece = [begin = begin, end = end](const at::Tensor& t) { return t.slice(2, begin, end); };
    const Attention result = forward(piece(p.query), piece(p.key), piece(p.value), p.window, options);
    pieces.push_back(result.out);
    options.state = result.state;
  }
  EXPECT_LT(difference(at::cat(pieces, 2), out), 1e-12);
  EXPECT_LT(difference(options.state->key, state.key), 1e-12);
  EXPECT_LT(difference(options.state->value, state.value), 1e-12);
  EXPECT_TRUE(at::equal(options.state->position, state.position));
}

TEST_P(Operators, StepsEqualTheWhole) {
  const Problem p(GetParam());
  const at::Tensor whole = forward(p.query, p.key, p.value, p.window).out;
  const auto first = [](const at::Tensor& tensor) { return tensor.slice(2, 0, 30); };
  State state = forward(first(p.query), first(p.key), first(p.value), p.window, {.return_state = true}).state;
  for (int64_t t = 30; t < whole.size(2); ++t) {
    const auto token = [t](const at::Tensor& tensor) { return tensor.narrow(2, t, 1); };
    const at::Tensor out = step(token(p.query), token(p.key), token(p.value), p.window, state);
    ASSERT_LT(difference(out, token(whole)), 1e-12) << "token " << t;
  }
  EXPECT_TRUE(state.position.eq(whole.size(2)).all().item<bool>());
}

TEST_P(Operators, PackedSequencesEqualSeparateOnes) {
  const Problem p(GetParam());
  const auto first = [](const at::Tensor& tensor) { return tensor.narrow(0, 0, 1); };
  const at::Tensor query = first(p.query), key = first(p.key), value = first(p.value);
  const at::Tensor packed =
      forward(query, key, value, p.window, {.cu_seqlens = at::tensor({0, 25, 25, 70}, at::kLong)}).out;
  std::vector<at::Tensor> separate;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 25}, {25, 70}}) {
    separate.push_back(
        forward(query.slice(2, begin, end), key.slice(2, begin, end), value.slice(2, begin, end), p.window).out);
  }
  EXPECT_TRUE(at::equal(packed, at::cat(separate, 2)));
}

// The derivative along a random direction, through every output and for every input.
TEST_P(Operators, GradientsAgreeWithFiniteDifferences) {
  const Problem p(GetParam());
  const int64_t history = 9, tokens = p.query.size(2) - history;
  const State state = forward(p.query.narrow(2, 0, history), p.key.narrow(2, 0, history), p.value.narrow(2, 0, history),
                              p.window, {.return_state = true})
                          .state;
  const auto later = [&](const at::Tensor& tensor) { return tensor.narrow(2, history, tokens).clone(); };
  const std::vector<at::Tensor> inputs{later(p.query), later(p.key), later(p.value), state.key, state.value};
  std::vector<at::Tensor> weights;
  const auto loss = [&](const std::vector<at::Tensor>& at_inputs) {
    const State given{at_inputs[3], at_inputs[4], state.position};
    const Attention result =
        forward(at_inputs[0], at_inputs[1], at_inputs[2], p.window, {.state = given, .return_state = true});
    const std::vector<at::Tensor> outputs{result.out, result.lse, result.state.key, result.state.value};
    if (weights.empty()) {
      for (const at::Tensor& output : outputs) weights.push_back(at::randn_like(output));
    }
    at::Tensor sum = at::zeros({}, at::kDouble);
    for (size_t i = 0; i < outputs.size(); ++i) sum = sum + (outputs[i] * weights[i]).sum();
    return sum;
  };
  std::vector<at::Tensor> leaves;
  for (const at::Tensor& input : inputs) leaves.push_back(input.detach().clone().requires_grad_());
  loss(leaves).backward();
  for (size_t i = 0; i < inputs.size(); ++i) {
    ASSERT_TRUE(leaves[i].grad().defined()) << "input " << i;
    const at::Tensor direction = at::randn_like(inputs[i]);
    const double step = 1e-6;
    std::vector<at::Tensor> ahead = inputs, behind = inputs;
    ahead[i] = inputs[i] + step * direction;
    behind[i] = inputs[i] - step * direction;
    const double expected = (loss(ahead) - loss(behind)).item<double>() / (2 * step);
    const double actual = (leaves[i].grad() * direction).sum().item<double>();
    EXPECT_NEAR(actual, expected, 1e-6 * (1 + std::abs(expected))) << "input " << i;
  }
}

TEST_P(Operators, BadInputNamesTheArgument) {
  const Problem p(GetParam());
  const auto message = [&](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  Window narrow = p.window;
  narrow.window = {12, 30};
  EXPECT_NE(message([&] { forward(p.query, p.key, p.value, narrow); }).find("window"), std::string::npos);
  EXPECT_NE(message([&] { forward(p.query[0], p.key, p.value, p.window); }).find("query"), std::string::npos);
  EXPECT_NE(message([&] { forward(p.query, p.key.narrow(2, 0, 3), p.value, p.window); }).find("key"),
            std::string::npos);
  EXPECT_NE(message([&] { forward(p.query, p.key, p.value.to(at::kFloat), p.window); }).find("value"),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Kernels, Operators, testing::Values("fejer", "dirichlet"),
                         [](const auto& info) { return std::string(info.param); });
