// The operators from C++ alone: forward, backward and step through blurry_attn/attention.h.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

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

template <typename call_type>
std::string message(const call_type& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

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

TEST_P(Operators, AutogradSeesASteppedState) {
  const Problem p(GetParam(), 1);
  State state = forward(p.query, p.key, p.value, p.window, {.return_state = true}).state;
  const auto versions = [&state] {
    return std::vector<int64_t>{state.key._version(), state.value._version(), state.position._version()};
  };
  const at::Tensor x = at::ones_like(state.key).requires_grad_();
  const at::Tensor loss = (x * state.key).sum();
  const std::vector<int64_t> before = versions();
  step(p.query, p.key, p.value, p.window, state);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_GT(versions()[i], before[i]) << "tensor " << i;
  EXPECT_ANY_THROW(loss.backward());
  const c10::InferenceMode guard;
  step(p.query, p.key, p.value, p.window, state);
  EXPECT_TRUE(state.position.eq(3).all().item<bool>());
}

TEST_P(Operators, InferenceTensorsAreSteppedInInferenceMode) {
  const Problem p(GetParam(), 1);
  State state;
  {
    const c10::InferenceMode guard;
    state = forward(p.query, p.key, p.value, p.window, {.return_state = true}).state;
    step(p.query, p.key, p.value, p.window, state);
  }
  const at::Tensor before = state.key.clone();
  EXPECT_NE(message([&] { step(p.query, p.key, p.value, p.window, state); }).find("state.key"), std::string::npos);
  EXPECT_TRUE(at::equal(state.key, before));
}

TEST_P(Operators, AStepRefusesWhatItsStateOverlaps) {
  const Problem p(GetParam(), 1);
  State state = forward(p.query, p.key, p.value, p.window, {.return_state = true}).state;
  const State good = state;
  const auto refusal = [&](const at::Tensor& query) {
    return message([&] { step(query, p.key, p.value, p.window, state); });
  };
  EXPECT_NE(refusal(state.key.as_strided(p.query.sizes(), p.query.strides())).find("query"), std::string::npos);
  state.key = good.key.as_strided(good.key.sizes(), {1, 5, 1, 1});
  EXPECT_NE(refusal(p.query).find("state.key"), std::string::npos);
  state = good;
  state.position = good.key.view(at::kLong).as_strided({2}, {1});
  EXPECT_NE(refusal(p.query).find("state.position"), std::string::npos);
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

TEST(Rotary, TurnsPairsByThePosition) {
  const at::Tensor x = at::randn({2, 3, 5, 6}, at::kDouble), positions = at::tensor({0, 1, 2, 70, 10000000}, at::kLong);
  const at::Tensor angles = positions.unsqueeze(1) * at::pow(50.0, at::arange(0, 6, 2, at::kDouble) / -6);
  const at::Tensor a = x.slice(3, 0, 3), b = x.slice(3, 3, 6), cos = angles.cos(), sin = angles.sin();
  EXPECT_LT(difference(rotary(x, positions, 50), at::cat({a * cos - b * sin, b * cos + a * sin}, 3)), 1e-8);
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

namespace {

// Four query heads on two key/value heads; sequences packed up to `ends`, the first after `positions[0]` tokens, ..
struct Shape {
  const char* name;
  int64_t slots;
  std::vector<int64_t> window, phase;
  int64_t key_dim, value_dim;
  std::vector<int64_t> ends, positions;

  int64_t tokens() const { return ends.back(); }
};

const Shape kShapes[] = {
    {"Least", 2, {2, 6}, {0, 2}, 1, 1, {0, 1}, {0}},
    {"Empty", 3, {3, 6}, {0, 1}, 5, 3, {0, 0, 0}, {0, 4}},
    {"Tails", 3, {3, 24}, {0, 5}, 5, 3, {0, 0, 29, 30, 71}, {7, 0, 1000, 3}},
    {"Stretches", 20, {40, 400}, {1, 13}, 17, 33, {0, 1100}, {50}},
};

struct Inputs {
  at::Tensor query, key, value, state_key, state_value;

  template <typename change_type>
  Inputs map(const change_type& change) const {
    return {change(query), change(key), change(value), change(state_key), change(state_value)};
  }
  std::vector<at::Tensor> list() const { return {query, key, value, state_key, state_value}; }
};

// The largest difference, in units of the largest number expected or of 1.
double error(const at::Tensor& actual, const at::Tensor& expected) {
  if (expected.numel() == 0) return 0;
  return difference(actual.to(at::kDouble), expected) / std::max(1.0, expected.abs().max().item<double>());
}

class Kernels : public testing::TestWithParam<std::tuple<const char*, at::ScalarType, Shape>> {
 protected:
  const Shape shape = std::get<2>(GetParam());
  const at::ScalarType type = std::get<1>(GetParam());
  const at::ScalarType compute_type = type == at::kDouble ? at::kDouble : at::kFloat;
  const Window window{shape.slots, shape.window, shape.phase, std::get<0>(GetParam())};
  const at::Tensor position = at::tensor(shape.positions, at::kLong);

  // Exact in every dtype.
  Inputs inputs() const {
    at::manual_seed(0);
    const int64_t tokens = shape.tokens(), sequences = static_cast<int64_t>(shape.positions.size());
    return Inputs{random({1, 4, tokens, shape.key_dim}), random({1, 2, tokens, shape.key_dim}),
                  random({1, 2, tokens, shape.value_dim}), random({sequences, 2, shape.slots, shape.key_dim}),
                  random({sequences, 2, shape.slots, shape.value_dim})}
        .map([this](const at::Tensor& x) { return x.to(at::kHalf).to(at::kBFloat16).to(at::kDouble); });
  }
  // The inputs in the dtype under test: a gap behind every element, tokens before heads, part of a larger tensor.
  Inputs strided(const Inputs& exact) const {
    const at::Tensor query = exact.query.to(type), key = exact.key.to(type), value = exact.value.to(type);
    return {at::stack({query, at::full_like(query, NAN)}, -1).flatten(-2).slice(3, 0, std::nullopt, 2),
            key.transpose(1, 2).contiguous().transpose(1, 2),
            at::constant_pad_nd(value, {1, 2}, NAN).narrow(3, 1, shape.value_dim), exact.state_key.to(compute_type),
            exact.state_value.to(compute_type)};
  }
  // Results and, through all of them, gradients of all inputs.
  std::vector<at::Tensor> run(const Inputs& given) const {
    const Inputs leaves = given.map([](const at::Tensor& x) { return x.detach().requires_grad_(); });
    const Attention result = forward(leaves.query, leaves.key, leaves.value, window,
                                     {.cu_seqlens = at::tensor(shape.ends, at::kInt),
                                      .state = State{leaves.state_key, leaves.state_value, position},
                                      .return_state = true});
    std::vector<at::Tensor> all{result.out, result.lse, result.state.key, result.state.value};
    at::Tensor sum = at::zeros({}, at::kDouble);
    for (const at::Tensor& x : all) sum = sum + (x * at::arange(x.numel()).sin().reshape(x.sizes()).to(x)).sum();
    sum.backward();
    for (const at::Tensor& leaf : leaves.list()) all.push_back(leaf.grad());
    return all;
  }
};

}  // namespace

TEST_P(Kernels, AgreeWithFloat64) {
  const Inputs exact = inputs();
  const std::vector<at::Tensor> expected = run(exact), actual = run(strided(exact));
  // Of half precision, what rounding the results costs.
  const double bound = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-4 : type == at::kHalf ? 5e-3 : 4e-2;
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_LE(error(actual[i], expected[i]), bound) << "result " << i;
}

TEST_P(Kernels, StepsEqualTheWhole) {
  const Inputs given = strided(inputs());
  const std::vector<at::Tensor> whole = run(given);
  const double bound = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-5 : type == at::kHalf ? 2e-3 : 1e-2;
  for (size_t s = 0; s < shape.positions.size(); ++s) {
    const auto own = [s](const at::Tensor& x) { return x.narrow(0, static_cast<int64_t>(s), 1).clone(); };
    State state{own(given.state_key), own(given.state_value), own(position)};
    if (shape.ends[s] == shape.ends[s + 1]) continue;
    for (int64_t t = shape.ends[s]; t < shape.ends[s + 1]; ++t) {
      const auto token = [t](const at::Tensor& x) { return x.narrow(2, t, 1); };
      const at::Tensor out = step(token(given.query), token(given.key), token(given.value), window, state);
      ASSERT_LE(error(out, token(whole[0]).to(at::kDouble)), bound) << "token " << t;
    }
    EXPECT_LE(error(state.key, own(whole[2]).to(at::kDouble)), bound);
    EXPECT_LE(error(state.value, own(whole[3]).to(at::kDouble)), bound);
    EXPECT_EQ(state.position.item<int64_t>(), shape.positions[s] + shape.ends[s + 1] - shape.ends[s]);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Kernels,
                         testing::Combine(testing::Values("fejer", "dirichlet"),
                                          testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf),
                                          testing::ValuesIn(kShapes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + at::toString(std::get<1>(info.param)) +
                                  std::get<2>(info.param).name;
                         });
