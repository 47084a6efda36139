// Draws a call of the CPU kernels from bytes, runs it on memory without an element to spare, and compares all that it
// writes with the law in float64. A target for libFuzzer; without it (BLURRY_LIBFUZZER), a program that draws the bytes
// from seeds, for the compilers and sanitizers that libFuzzer does not come with: kernels [cases [first seed]].
#include "csrc/cpu/kernels.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "tests/tools/emulator/reference.h"

namespace {

using namespace blurry_attn;
using reference::Numbers;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What is drawn is decided by the bytes, one choice after the other; where they end, every choice is the first.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data(data), size(size) {}
  int64_t between(int64_t least, int64_t most) {
    uint64_t number = 0;
    for (uint64_t range = most - least; range && size; range >>= 8, ++data, --size) number = number << 8 | *data;
    return least + static_cast<int64_t>(number % static_cast<uint64_t>(most - least + 1));
  }
  bool one_in(int64_t n) { return between(0, n - 1) == n - 1; }
  template <typename type>
  type one_of(std::initializer_list<type> list) {
    return list.begin()[between(0, static_cast<int64_t>(list.size()) - 1)];
  }

 private:
  const uint8_t* data;
  size_t size;
};

using Generator = std::mt19937_64;
double normal(Generator& generator) { return std::normal_distribution<double>()(generator); }

// A tensor with any strides, 0 included where it is read only; its memory ends with its last element, and what lies
// between elements is NaN, or whatever 0xff bytes are, and must stay so.
template <typename storage>
class Tensor {
 public:
  Tensor(Bytes& bytes, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, bool writable)
      : shape{batch, heads, tokens, dim} {
    int order[4] = {0, 1, 2, 3};
    for (int i = 0; i < 3 && bytes.one_in(2); ++i) std::swap(order[i], order[bytes.between(i, 3)]);
    int64_t next = bytes.one_of<int64_t>({1, 1, 2, 3});
    for (int i = 3; i >= 0; --i) {
      const int64_t extent = shape[order[i]];
      stride[order[i]] = !writable && bytes.one_in(12) ? 0 : next;
      if (stride[order[i]]) next = next * std::max<int64_t>(extent, 1) + bytes.one_of<int64_t>({0, 0, 1, 5});
    }
    size = 1;
    for (int i = 0; i < 4; ++i) size = shape[i] ? size + (shape[i] - 1) * stride[i] : 0;
    for (int i = 0; i < 4; ++i) size = shape[i] ? size : 0;
    memory.reset(new storage[size]);
    std::memset(static_cast<void*>(memory.get()), 0xff, size * sizeof(storage));
  }
  // Fills it, and returns what it then holds, dense.
  Numbers fill(Generator& generator, int64_t poisoned = 0) {
    for_elements([&](int64_t at) { memory[at] = static_cast<storage>(static_cast<float>(normal(generator))); });
    for (; poisoned > 0 && size > 0; --poisoned) memory[generator() % size] = static_cast<storage>(NAN);
    return numbers();
  }
  Numbers numbers() const {
    Numbers all;
    for_elements([&](int64_t at) { all.push_back(static_cast<double>(memory[at])); });
    return all;
  }
  bool gaps_are_untouched() const {
    std::vector<bool> inside(size);
    for_elements([&](int64_t at) { inside[at] = true; });
    storage untouched;
    std::memset(static_cast<void*>(&untouched), 0xff, sizeof(storage));
    for (int64_t at = 0; at < size; ++at) {
      if (!inside[at] && std::memcmp(&memory[at], &untouched, sizeof(storage)) != 0) return false;
    }
    return true;
  }
  template <typename any = storage>
  cpu::View<any> view() const {
    return {memory.get(), stride[0], stride[1], stride[2], stride[3]};
  }

 private:
  template <typename body_type>
  void for_elements(const body_type& body) const {
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < shape[2]; ++t) {
          for (int64_t d = 0; d < shape[3]; ++d) {
            body(b * stride[0] + h * stride[1] + t * stride[2] + d * stride[3]);
          }
        }
      }
    }
  }
  int64_t shape[4], stride[4], size;
  std::unique_ptr<storage[]> memory;
};

// Dense numbers of `compute`, in memory of exactly their size.
template <typename compute>
struct Dense {
  int64_t size;
  std::unique_ptr<compute[]> memory;

  explicit Dense(int64_t size) : size(size), memory(new compute[size]) { std::fill_n(memory.get(), size, kNaN); }
  explicit Dense(const Numbers& from) : Dense(static_cast<int64_t>(from.size())) {
    std::copy(from.begin(), from.end(), memory.get());
  }
  Numbers numbers() const { return {memory.get(), memory.get() + size}; }
};

reference::Problem draw_problem(Bytes& bytes, Kernel kernel) {
  reference::Problem p;
  p.kernel = kernel;
  const bool is_long = bytes.one_in(16), packed = bytes.one_in(2);
  p.kv_heads = is_long ? 1 : bytes.between(1, 3);
  p.query_heads = p.kv_heads * bytes.one_of<int64_t>({1, 1, 2, 3});
  p.slots = bytes.one_of<int64_t>({4, 2, 3, 5, 6, 8, 17, bytes.one_in(4) && !is_long ? 70 : 9});
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const int64_t most = kernel == Kernel::dirichlet ? 12 : bytes.one_in(8) && p.slots < 10 ? 300 : 40;
    const int64_t resolution = bytes.one_of<int64_t>({bytes.between(1, most), 1, 2, 8});
    p.cells.push_back({p.slots, resolution, bytes.between(0, resolution - 1)});
  }
  p.sharpness = bytes.one_in(2) ? 1 + static_cast<double>(bytes.between(0, 255)) / 8 : 6;
  const int64_t widest = is_long ? 4 : bytes.one_in(6) ? 70 : 9;
  p.key_dim = bytes.between(1, widest);
  p.value_dim = bytes.between(1, widest);
  p.scale = bytes.one_in(4) ? static_cast<double>(bytes.between(-16, 16)) / 8 : 1 / std::sqrt(p.key_dim);
  p.tokens = bytes.between(0, is_long ? 1100 : 60);
  p.given = bytes.one_in(2);
  const int64_t period = p.cells.front().window();
  const auto position = [&] {
    return p.given ? bytes.one_of<int64_t>({bytes.between(0, 3 * period), 0, (int64_t(1) << 40) + bytes.between(0, 255),
                                            (int64_t(1) << 61) + bytes.between(0, 255)})
                   : 0;
  };
  if (packed) {
    p.batch = 1;
    for (int64_t begin = 0, more = bytes.between(0, 3); more >= 0; --more) {
      const int64_t end = more ? bytes.between(begin, p.tokens) : p.tokens;
      p.sequences.push_back({0, begin, end - begin, position()});
      begin = end;
    }
  } else {
    p.batch = is_long ? 1 : bytes.one_of<int64_t>({1, 2, 0, 3});
    for (int64_t b = 0; b < p.batch; ++b) p.sequences.push_back({b, 0, p.tokens, position()});
  }
  return p;
}

// Slots of a state or of its gradient: numbers, and NaN in those that must not be read.
Numbers draw_slots(const reference::Problem& p, int64_t dim, bool at_end, Generator& generator) {
  Numbers slots;
  for (const reference::Sequence& sequence : p.sequences) {
    for (const Cells& cells : p.cells) {
      for (int64_t m = 0; m < p.slots; ++m) {
        const int64_t seen = sequence.position + (at_end ? sequence.length : 0);
        for (int64_t d = 0; d < dim; ++d) {
          const float x = static_cast<float>(normal(generator));
          slots.push_back(seen > cells.slot_opening(m) ? x : kNaN);
        }
      }
    }
  }
  return slots;
}

std::string describe(const reference::Problem& p) {
  std::string text = p.kernel == Kernel::fejer ? "fejer" : "dirichlet";
  const auto add = [&text](const char* name, auto number) { text += ' ' + (name + std::to_string(number)); };
  add("heads=", p.query_heads);
  add("tokens=", p.tokens);
  add("dim=", p.key_dim);
  add("value_dim=", p.value_dim);
  add("slots=", p.slots);
  add("sharpness=", p.sharpness);
  add("scale=", p.scale);
  for (const Cells& cells : p.cells) {
    add("r=", cells.resolution);
    add("phase=", cells.phase);
  }
  for (const reference::Sequence& s : p.sequences) {
    add("sequence:", s.row);
    add("+", s.length);
    add("@", s.position);
  }
  return text;
}

[[noreturn]] void fail(const char* name, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", name, what.c_str());
  std::abort();
}

// How large the terms are that each result sums up, whatever they cancel to: what its rounding errors scale with.
// Scores of size L make weights that are wrong by L roundings.
struct Terms {
  double out, lse, state_key, state_value, grad_query, grad_key, grad_value;

  explicit Terms(const reference::Problem& p) {
    const auto longest = [](std::initializer_list<const Numbers*> all, int64_t dim) {
      double most = 0;
      for (const Numbers* numbers : all) {
        for (size_t row = 0; row < numbers->size(); row += dim) {
          double sum = 0;
          for (int64_t d = 0; d < dim; ++d) sum += (*numbers)[row + d] * (*numbers)[row + d];
          if (std::isfinite(sum)) most = std::max(most, sum);
        }
      }
      return std::sqrt(most);
    };
    const double scale = std::abs(p.scale), queries = static_cast<double>(p.tokens * p.group());  // per key
    const double weight = 1 + scale * longest({&p.query}, p.key_dim) * longest({&p.key, &p.state_key}, p.key_dim);
    const double grad_score = weight * scale *
                              (longest({&p.grad_out}, p.value_dim) * longest({&p.value, &p.state_value}, p.value_dim) +
                               longest({&p.grad_lse}, 1));
    lse = weight;
    state_key = longest({&p.key, &p.state_key}, 1);
    state_value = longest({&p.value, &p.state_value}, 1);
    out = weight * state_value;
    grad_query = grad_score * state_key;
    grad_key = queries * grad_score * longest({&p.query}, 1) + longest({&p.grad_state_key}, 1);
    grad_value = queries * weight * longest({&p.grad_out}, 1) + longest({&p.grad_state_value}, 1);
  }
};

// `rounding`: of the type stored, relative to the largest number expected; `bound`: of the arithmetic.
void compare(const char* name, const Numbers& actual, const Numbers& expected, double rounding, double bound,
             const reference::Problem& p) {
  double top = 0, error = 0;
  for (const double x : expected) top = std::isfinite(x) ? std::max(top, std::abs(x)) : top;
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool alike = std::isnan(expected[i]) ? std::isnan(actual[i]) : std::isfinite(actual[i]);
    if (!alike) error = INFINITY;
    if (!std::isnan(expected[i])) error = std::max(error, std::abs(actual[i] - expected[i]));
  }
  bound += rounding * top;
  if (!(error <= bound)) fail(name, std::to_string(error / bound) + " times the bound: " + describe(p));
}

// Items in an order of their own, on one thread or on several.
cpu::Parallel make_parallel(int64_t threads, int64_t first) {
  return [=](int64_t count, const std::function<void(int64_t)>& body) {
    const auto share = [&](int64_t thread) {
      for (int64_t i = thread; i < count; i += threads) body((i + first) % count);
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads && thread < count; ++thread) others.emplace_back(share, thread);
    share(0);
    for (std::thread& other : others) other.join();
  };
}

int64_t levels() {
#ifdef BLURRY_X86_LEVELS
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 1;
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? 3
             : 2;
#else
  return 1;
#endif
}

// The first tokens of all sequences once more, one by one from the given state.
template <typename storage, typename compute>
void check_steps(const reference::Problem& p, const reference::Results& r, cpu::Problem<storage, compute> problem,
                 const Tensor<storage>& out, const cpu::Allocate& allocate, double rounding, double epsilon, int isa) {
  int64_t steps = p.sequences.empty() ? 0 : 8;
  for (const reference::Sequence& s : p.sequences) steps = std::min(steps, s.length);
  const Dense<compute> key(p.state_key), value(p.state_value);
  for (int64_t t = 0; t < steps; ++t) {
    for (cpu::Sequence& s : problem.sequences) s = {s.batch, s.begin, 1, s.position};
    cpu::step(problem, {out.view(), nullptr, key.memory.get(), value.memory.get()}, allocate, isa);
    for (cpu::Sequence& s : problem.sequences) ++s.begin, ++s.position;
  }
  Numbers stepped, expected;
  const Numbers all = out.numbers();
  for (const reference::Sequence& s : p.sequences) {
    for (int64_t h = 0; h < p.query_heads; ++h) {
      const auto row = ((s.batch * p.query_heads + h) * p.tokens + s.row) * p.value_dim,
                 end = row + steps * p.value_dim;
      stepped.insert(stepped.end(), all.begin() + row, all.begin() + end);
      expected.insert(expected.end(), r.out.begin() + row, r.out.begin() + end);
    }
  }
  const Terms terms(p);
  compare("step: out", stepped, expected, rounding, epsilon * terms.out, p);
  if (!out.gaps_are_untouched()) fail("step: a gap between elements was written", describe(p));
  for (const reference::Sequence& s : p.sequences) {
    if (s.length != steps) return;
  }
  if (steps == 0) return;
  compare("step: state_key", key.numbers(), r.state_key, 0, epsilon * terms.state_key, p);
  compare("step: state_value", value.numbers(), r.state_value, 0, epsilon * terms.state_value, p);
}

// `rounding`: half a step of `storage`, relative; 0 where it is `compute`.
template <typename storage, typename compute>
void run(Bytes& bytes, double rounding) {
  const int which = bytes.one_of({0, 1, 2});
  const bool window = which == 0;
  reference::Problem p = draw_problem(bytes, which == 2 ? Kernel::dirichlet : Kernel::fejer);
  p.float32_gates = sizeof(compute) == sizeof(float);
  const int isa = static_cast<int>(bytes.between(0, levels() - 1));
#ifdef BLURRY_THREADS
  const int64_t threads = bytes.between(2, 4);
#else
  const int64_t threads = bytes.one_of<int64_t>({1, 1, 1, 3});
#endif
  const bool wants_state = bytes.one_in(2), wants_lse = bytes.one_in(2), poisoned = bytes.one_in(8);
  Generator generator(static_cast<uint64_t>(bytes.between(0, 65535)));

  const auto tensor = [&](int64_t heads, int64_t dim, bool writable) {
    return Tensor<storage>(bytes, p.batch, heads, p.tokens, dim, writable);
  };
  auto query = tensor(p.query_heads, p.key_dim, false), key = tensor(p.kv_heads, p.key_dim, false),
       value = tensor(p.kv_heads, p.value_dim, false);
  p.query = query.fill(generator, poisoned && bytes.one_in(2));
  p.key = key.fill(generator, poisoned && bytes.one_in(2));
  p.value = value.fill(generator, poisoned ? bytes.between(0, 3) : 0);
  if (p.given) {
    p.state_key = draw_slots(p, p.key_dim, false, generator);
    p.state_value = draw_slots(p, p.value_dim, false, generator);
  }
  const Dense<compute> given_key(p.state_key), given_value(p.state_value);
  auto grad_out = tensor(p.query_heads, p.value_dim, false);
  p.grad_out = grad_out.fill(generator);
  const int64_t scalars = p.batch * p.query_heads * p.tokens;
  for (int64_t i = 0; i < scalars && wants_lse; ++i) p.grad_lse.push_back(static_cast<float>(normal(generator)));
  if (wants_state) {
    p.grad_state_key = draw_slots(p, p.key_dim, true, generator);
    p.grad_state_value = draw_slots(p, p.value_dim, true, generator);
  }
  const Dense<compute> grad_lse(p.grad_lse), grad_end_key(p.grad_state_key), grad_end_value(p.grad_state_value);

  cpu::Problem<storage, compute> problem;
  for (const reference::Sequence& s : p.sequences) problem.sequences.push_back({s.batch, s.row, s.length, s.position});
  problem.cells = p.cells;
  for (const Cells& cells : p.cells) {
    const auto table = window ? flux_gates(cells, p.sharpness) : period_gates(p.kernel, cells, p.sharpness);
    problem.gates.push_back(std::make_shared<const std::vector<compute>>(table.begin(), table.end()));
  }
  problem.of_period = !window;
  problem.query_heads = p.query_heads;
  problem.tokens = p.tokens;
  problem.key_dim = p.key_dim;
  problem.value_dim = p.value_dim;
  problem.scale = static_cast<compute>(p.scale);
  problem.query = query.template view<const storage>();
  problem.key = key.template view<const storage>();
  problem.value = value.template view<const storage>();
  if (p.given) {
    problem.state_key = given_key.memory.get();
    problem.state_value = given_value.memory.get();
  }
  problem.parallel = make_parallel(threads, bytes.between(0, 3));
  problem.threads = threads;

  std::vector<std::unique_ptr<Dense<compute>>> scratch;
  const cpu::Allocate allocate = [&scratch](int64_t elements) {
    scratch.push_back(std::make_unique<Dense<compute>>(elements));
    return static_cast<void*>(scratch.back()->memory.get());
  };
  auto out = tensor(p.query_heads, p.value_dim, true);
  const Dense<compute> lse(scalars), end_key(wants_state ? p.states() * p.key_dim : 0),
      end_value(wants_state ? p.states() * p.value_dim : 0);
  cpu::Outputs<storage, compute> outputs{out.view(), lse.memory.get()};
  if (wants_state) {
    outputs.state_key = end_key.memory.get();
    outputs.state_value = end_value.memory.get();
  }
  (window ? cpu::fejer_forward<storage, compute> : cpu::scan_forward<storage, compute>)(problem, outputs, allocate,
                                                                                        isa);
  scratch.clear();

  auto grad_query = tensor(p.query_heads, p.key_dim, true), grad_key = tensor(p.kv_heads, p.key_dim, true),
       grad_value = tensor(p.kv_heads, p.value_dim, true);
  const Dense<compute> grad_given_key(p.given ? p.states() * p.key_dim : 0),
      grad_given_value(p.given ? p.states() * p.value_dim : 0);
  cpu::Gradients<storage, compute> gradients;
  gradients.grad_out = grad_out.template view<const storage>();
  gradients.lse = lse.memory.get();
  if (wants_lse) gradients.grad_lse = grad_lse.memory.get();
  if (wants_state) {
    gradients.grad_state_key = grad_end_key.memory.get();
    gradients.grad_state_value = grad_end_value.memory.get();
  }
  gradients.query = grad_query.view();
  gradients.key = grad_key.view();
  gradients.value = grad_value.view();
  if (p.given) {
    gradients.state_key = grad_given_key.memory.get();
    gradients.state_value = grad_given_value.memory.get();
  }
  (window ? cpu::fejer_backward<storage, compute> : cpu::scan_backward<storage, compute>)(problem, gradients, allocate,
                                                                                          isa);

  const reference::Results r = reference::run(p, true);
  const double epsilon = 32 * static_cast<double>(std::numeric_limits<compute>::epsilon());
  const Terms terms(p);
  compare("out", out.numbers(), r.out, rounding, epsilon * terms.out, p);
  compare("lse", lse.numbers(), r.lse, 0, epsilon * terms.lse, p);
  if (wants_state) {
    compare("state_key", end_key.numbers(), r.state_key, 0, epsilon * terms.state_key, p);
    compare("state_value", end_value.numbers(), r.state_value, 0, epsilon * terms.state_value, p);
  }
  for (const auto* written : {&out, &grad_query, &grad_key, &grad_value}) {
    if (!written->gaps_are_untouched()) fail("a gap between elements was written", describe(p));
  }
  if (p.given && !poisoned)
    check_steps(p, r, problem, tensor(p.query_heads, p.value_dim, true), allocate, rounding, epsilon, isa);
  if (poisoned) return;  // what a gradient makes of NaN depends on the order of its sums
  compare("grad_query", grad_query.numbers(), r.grad_query, rounding, epsilon * terms.grad_query, p);
  compare("grad_key", grad_key.numbers(), r.grad_key, rounding, epsilon * terms.grad_key, p);
  compare("grad_value", grad_value.numbers(), r.grad_value, rounding, epsilon * terms.grad_value, p);
  if (p.given) {
    compare("grad_state_key", grad_given_key.numbers(), r.grad_given_key, 0, epsilon * terms.grad_key, p);
    compare("grad_state_value", grad_given_value.numbers(), r.grad_given_value, 0, epsilon * terms.grad_value, p);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.between(0, 4)) {  // float64 more often: it tells best
    case 0: run<float, float>(bytes, 0); break;
    case 1: run<c10::BFloat16, float>(bytes, 0x1p-8); break;
    case 2: run<c10::Half, float>(bytes, 0x1p-11); break;
    default: run<double, double>(bytes, 0); break;
  }
  return 0;
}

#ifndef BLURRY_LIBFUZZER
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());

namespace {
uint64_t seed = 0;
void tell() { std::fprintf(stderr, "to repeat: kernels 1 %llu\n", static_cast<unsigned long long>(seed)); }
}  // namespace

int main(int count, char** arguments) {
  const uint64_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000;
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::signal(SIGABRT, [](int) { tell(); });
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(tell);
  for (seed = first; seed < first + cases; ++seed) {
    Generator generator(seed);
    uint8_t bytes[256];
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
    LLVMFuzzerTestOneInput(bytes, sizeof(bytes));
  }
  std::printf("%llu cases agree with the law\n", static_cast<unsigned long long>(cases));
}
#endif
