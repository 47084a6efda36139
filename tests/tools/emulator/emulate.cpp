// Draws small problems, runs the CUDA kernels on them in the emulator and compares what they return with the law in
// float64. One line per case that fails; the exit status is 1 if there is one. `--help` lists the options.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "common/law.cuh"
#include "races.h"
#include "reference.h"

namespace {

using blurry_attn::Cells;
using blurry_attn::Kernel;
using blurry_attn::cuda::DType;
using blurry_attn::cuda::View;
using reference::Numbers;
namespace cuda = blurry_attn::cuda;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Options {
  int64_t first = 0, last = 100;
  std::string kind, dtype, kernel, range;
  int64_t slots = 0, resolution = 0, dim = 0, tokens = 0, stretch = 0, stop = 0;
  double sharpness = 0;
  bool verbose = false;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state(seed) { state = bits() * 0xd1342543de82ef95u; }
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(bits() % static_cast<uint64_t>(most - least + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  template <typename type>
  type one_of(std::initializer_list<type> list) {
    return list.begin()[between(0, static_cast<int64_t>(list.size()) - 1)];
  }
  double normal() {
    const double u = (static_cast<double>(bits() >> 11) + 1) * 0x1p-53, v = static_cast<double>(bits() >> 11) * 0x1p-53;
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
  Numbers normals(int64_t count) {
    Numbers x(count);
    for (double& y : x) y = normal();
    return x;
  }

 private:
  uint64_t state;
};

// Memory full of NaN between guards, which must stay as they are.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes(bytes), memory(bytes + 2 * kGuard + 256, 0xff) {
    emulator::races::know(data(), static_cast<size_t>(bytes));
  }
  ~Buffer() { emulator::races::forget(data()); }
  Buffer(const Buffer&) = delete;
  unsigned char* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data()) + kGuard;
    return reinterpret_cast<unsigned char*>((at + 255) / 256 * 256);
  }
  int64_t size() const { return bytes; }
  bool guarded() {
    unsigned char *const begin = data() - kGuard, *const end = data() + bytes;
    for (int i = 0; i < kGuard; ++i) {
      if (begin[i] != 0xff || end[i] != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr int kGuard = 4096;
  int64_t bytes;
  std::vector<unsigned char> memory;
};

// Memory that kernels may use, while this lives.
struct Known {
  const void* memory;

  template <typename type>
  explicit Known(const std::vector<type>& items) : memory(items.data()) {
    emulator::races::know(memory, items.size() * sizeof(type));
  }
  ~Known() { emulator::races::forget(memory); }
};

int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
double get(DType dtype, const unsigned char* at) {
  double x = 0;
  cuda::for_type(dtype, [&](auto storage, auto) {
    std::memcpy(&storage, at, sizeof(storage));
    x = static_cast<double>(storage);
  });
  return x;
}
void put(DType dtype, unsigned char* at, double x) {
  cuda::for_type(dtype, [&](auto storage, auto compute) {
    storage = cuda::to_storage<decltype(storage)>(static_cast<decltype(compute)>(x));
    std::memcpy(at, &storage, sizeof(storage));
  });
}

// How a tensor lies in memory: dense, (batch, token, head, element), with gaps between the rows or between elements.
enum class Order { dense, tokens_first, gaps, spread };

struct Tensor {
  DType dtype;
  int64_t shape[4];
  View view;
  Buffer buffer;

  Tensor(DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, Order order = Order::dense)
      : dtype(dtype),
        shape{batch, heads, tokens, dim},
        buffer(batch * heads * tokens * room(dim, order) * size_of(dtype)) {
    const int64_t row = room(dim, order);
    view = {buffer.data(), heads * tokens * row, tokens * row, row, order == Order::spread ? 2 : 1};
    if (order == Order::tokens_first) std::tie(view.head, view.token) = std::make_pair(row, heads * row);
  }
  static int64_t room(int64_t dim, Order order) {
    return order == Order::spread ? 2 * dim : order == Order::gaps ? dim + 8 : dim;
  }
  unsigned char* data() { return buffer.data(); }
  template <typename body_type>
  void each(const body_type& body) {
    int64_t i = 0;
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < shape[2]; ++t) {
          for (int64_t d = 0; d < shape[3]; ++d) {
            const int64_t at = b * view.batch + h * view.head + t * view.token + d * view.element;
            body(i++, data() + at * size_of(dtype));
          }
        }
      }
    }
  }
  void set(Numbers& x) {  // also rounds x to the dtype
    each([&](int64_t i, unsigned char* at) {
      put(dtype, at, x[i]);
      x[i] = get(dtype, at);
    });
  }
  Numbers numbers() {
    Numbers x(shape[0] * shape[1] * shape[2] * shape[3]);
    each([&](int64_t i, const unsigned char* at) { x[i] = get(dtype, at); });
    return x;
  }
};

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return "float64";
    case DType::float32: return "float32";
    case DType::bfloat16: return "bfloat16";
    default: return "float16";
  }
}

// What is drawn out of the ordinary.
enum class Range {
  none,
  sharp,      // large logits
  few,        // few open slots
  changes,    // numbers that grow or fall a thousandfold along a sequence
  beyond,     // a given state beyond what float16 holds
  positions,  // given positions out of range
  ends,       // cu_seqlens out of range, or not in order
  narrow,     // heads of a few elements with many slots
  cut,        // heads of different windows, cut in time
};
constexpr const char* kRanges[] = {"none", "sharp", "few", "changes", "beyond", "positions", "ends", "narrow", "cut"};

struct Case {
  std::string kind;
  Range range;
  DType dtype;
  reference::Problem p;
  bool packed, wide_ends, wants_state, with_grad_lse, with_grad_state, backward, bad_token, keeps;
  Order order[4];                        // query, key, value, grad_out
  std::vector<int64_t> ends, positions;  // as they are given
  bool in_order;                         // no sequence begins before another one ends

  DType compute() const { return dtype == DType::float64 ? DType::float64 : DType::float32; }
  std::string text() const {
    const auto list = [](const auto& items, const auto& number) {
      std::string text;
      for (const auto& item : items) text += (text.empty() ? "" : ",") + std::to_string(number(item));
      return text;
    };
    std::string s = kind + (p.kernel == Kernel::dirichlet ? " dirichlet " : " ") + name_of(dtype);
    s += " B=" + std::to_string(p.batch) + " H=" + std::to_string(p.query_heads) + "/" + std::to_string(p.kv_heads);
    s += " T=" + std::to_string(p.tokens) + " D=" + std::to_string(p.key_dim) + "/" + std::to_string(p.value_dim);
    s += " N=" + std::to_string(p.slots) + " r=" + list(p.cells, [](const Cells& c) { return c.resolution; });
    s += " sharpness=" + std::to_string(p.sharpness).substr(0, 3) +
         " phase=" + list(p.cells, [](const Cells& c) { return c.phase; });
    if (packed) s += " ends=" + list(ends, [](int64_t x) { return x; });
    if (p.given) s += " position=" + list(positions, [](int64_t x) { return x; });
    if (range != Range::none) s += std::string(" range=") + kRanges[static_cast<int>(range)];
    if (wants_state) s += " state";
    if (with_grad_lse) s += " grad_lse";
    if (with_grad_state) s += " grad_state";
    if (bad_token) s += " bad token";
    if (keeps) s += " keeps";
    if (kind == "window") s += " stretch=" + std::to_string(emulator::stretch);
    return s;
  }
};

Range draw_range(const Options& o, const std::string& kind, Random& random) {
  Range range = random.one_of({Range::sharp, Range::few, Range::changes, Range::beyond, Range::positions, Range::ends,
                               Range::narrow, Range::cut});
  if (random.chance(50) || kind == "rotary") range = Range::none;
  for (int i = 0; i < static_cast<int>(std::size(kRanges)); ++i) {
    if (o.range == kRanges[i]) range = static_cast<Range>(i);
  }
  if (kind == "step" && (range == Range::ends || range == Range::cut)) return Range::few;
  if (kind != "window" && range == Range::cut) return Range::narrow;
  if (kind == "window" && range == Range::narrow) return Range::cut;
  return range;
}

// Numbers of a sequence that were drawn alike, as large as the range wants them: a thousandth part from some token on,
// or up to it, at once or over a while.
void change(const reference::Problem& p, Numbers& numbers, int64_t heads, int64_t longest_window, Random& random) {
  const int64_t dim = static_cast<int64_t>(numbers.size()) / std::max<int64_t>(p.batch * heads * p.tokens, 1);
  for (const reference::Sequence& s : p.sequences) {
    const bool falls = random.chance(50);
    const int64_t from = random.between(0, s.length), over = random.chance(50) ? 1 : random.between(1, longest_window);
    for (int64_t t = 0; t < s.length; ++t) {
      const double part = std::clamp(static_cast<double>(t - from) / static_cast<double>(over), 0., 1.);
      for (int64_t h = 0; h < heads; ++h) {
        double* const row = &numbers[p.token_at(heads, s.batch, h, s.row + t) * dim];
        for (int64_t d = 0; d < dim; ++d) row[d] *= std::pow(1000, falls ? 1 - part : part);
      }
    }
  }
}

Case draw(const Options& o, uint64_t seed) {
  Random random(seed);
  Random ranges(~seed);
  Case c{};
  reference::Problem& p = c.p;
  c.kind =
      !o.kind.empty() ? o.kind : random.one_of<const char*>({"window", "window", "window", "scan", "step", "rotary"});
  c.range = draw_range(o, c.kind, ranges);
  const bool long_walk = c.range == Range::cut || (c.range == Range::changes && c.kind == "window");
  const bool window = c.kind == "window", step = c.kind == "step", rotary = c.kind == "rotary";
  c.dtype = random.one_of({DType::bfloat16, DType::float16});
  if (!window) c.dtype = random.one_of({DType::bfloat16, DType::float16, DType::float32, DType::float64});
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32, DType::float64}) {
    if (o.dtype == name_of(dtype)) c.dtype = dtype;
  }
  p.kernel = random.chance(40) ? Kernel::dirichlet : Kernel::fejer;
  if (!o.kernel.empty()) p.kernel = o.kernel == "dirichlet" ? Kernel::dirichlet : Kernel::fejer;
  p.kv_heads = random.one_of({1, 1, 2, 3});
  p.query_heads = p.kv_heads * (step || rotary ? random.one_of({1, 1, 2, 3, 8, 33}) : random.one_of({1, 1, 2, 3}));
  p.slots = window
                ? random.one_of<int64_t>({16, 17, 24, 31, 32, 32, 33, 48, 63, 64, 64, 65, 80, random.between(16, 80)})
                : random.one_of<int64_t>({2, 3, 5, 16, 33, random.between(2, 40), random.between(41, 160)});
  if (window && p.kernel == Kernel::dirichlet) {
    p.slots = random.one_of<int64_t>({2, 7, 16, 16, 17, 32, 33, 48, 64, 64, random.between(2, 65)});
  }
  if (step && random.chance(50)) p.slots = random.one_of<int64_t>({32, 64, 64, 128, random.between(41, 300)});
  if (c.range == Range::narrow) p.slots = ranges.one_of<int64_t>({512, 513, 1024, ranges.between(257, 1024)});
  if (long_walk) {
    p.slots = ranges.between(16, 24);
    p.kv_heads = ranges.between(c.range == Range::cut ? 2 : 1, 3);
    p.query_heads = p.kv_heads;
  }
  if (o.slots) p.slots = o.slots;
  const bool mixed = random.chance(60);
  const bool staggered = random.chance(50);
  int64_t resolution = 0;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    if (h == 0 || mixed) resolution = random.one_of<int64_t>({1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 32, 40});
    if (long_walk) resolution = ranges.one_of<int64_t>({1, 2, 3, 4, 6, 8, 9});
    if (o.resolution) resolution = o.resolution;
    if (p.kernel == Kernel::dirichlet && resolution > blurry_attn::kMaxDirichletResolution) resolution = 32;
    p.cells.push_back(
        {p.slots, resolution, staggered ? h * resolution / p.kv_heads : random.between(0, resolution - 1)});
  }
  p.sharpness = random.one_of({6., 6., 6., 1., 2.5, 20.});
  if (o.sharpness > 0) p.sharpness = o.sharpness;
  const auto dim = [&] {
    if (o.dim) return o.dim;
    if (c.range == Range::narrow) return ranges.between(1, 4);
    if (long_walk) return int64_t(8);
    if (window) return random.one_of<int64_t>({8, 16, 64, 64, 72, 128, 8 * random.between(1, 16)});
    if (step && random.chance(50)) return random.one_of<int64_t>({64, 64, 128, 4 * random.between(1, 128), 511, 512});
    return random.one_of<int64_t>({1, 8, 16, 20, 33, 64, random.between(1, 100)});
  };
  p.key_dim = dim();
  if (rotary) p.key_dim = 2 * ((p.key_dim + 1) / 2);
  p.value_dim = random.chance(50) ? p.key_dim : dim();
  p.scale = (random.chance(20) ? -1 : 1) * random.one_of({1., 1., 2., .3, 0.}) / std::sqrt(p.key_dim);
  const int64_t longest = window ? 400 : 150;
  p.tokens = random.one_of<int64_t>({random.between(1, 40), random.between(1, longest), random.between(1, longest),
                                     longest, 128, random.chance(30) ? random.between(longest, 700) : 64});
  if (random.chance(2)) p.tokens = 0;
  if (c.kind == "scan" && random.chance(6)) {  // several stretches
    p.tokens = random.between(520, 1300);
    p.key_dim = std::min<int64_t>(p.key_dim, 12);
    p.value_dim = std::min<int64_t>(p.value_dim, 12);
  }
  if (step) p.tokens = random.between(1, 6);
  if (c.range == Range::few) p.tokens = ranges.between(1, step ? 6 : 20);
  if (c.range == Range::narrow) p.tokens = ranges.between(1, step ? 3 : 40);
  if (c.range == Range::positions && step) p.tokens = 1;
  if (long_walk) p.tokens = ranges.between(500, 1100);
  if (c.range == Range::sharp || c.range == Range::few) {
    p.scale = ranges.one_of({1., 4., 12.}) / std::sqrt(p.key_dim) * (c.range == Range::sharp ? 2 : 1);
  }
  if (o.tokens) p.tokens = o.tokens;
  c.packed = !step && (random.chance(30) || c.range == Range::ends);
  c.wide_ends = random.chance(50);
  p.batch = c.packed || p.tokens > 256 ? 1 : random.between(1, 2);
  p.given = step || random.chance(40) || c.range == Range::positions || c.range == Range::beyond;
  int64_t longest_window = 0;
  for (const Cells& cells : p.cells) longest_window = std::max(longest_window, cells.window());
  const auto add = [&](int64_t batch, int64_t row, int64_t length) {
    const int64_t position = random.one_of<int64_t>(
        {0, 1, random.between(0, 40), random.between(0, longest_window), random.between(0, 3 * longest_window),
         1000000 + random.between(0, 99), (int64_t(1) << 40) + random.between(0, 99)});
    p.sequences.push_back({batch, row, length, p.given ? position : 0});
    c.positions.push_back(p.sequences.back().position);
    const auto given = [&](int64_t x) {
      c.positions.back() = x;
      p.sequences.back().position = std::clamp<int64_t>(x, 0, blurry_attn::kMaxPosition);
    };
    if (c.range == Range::positions) {
      given(ranges.one_of<int64_t>({-1, -ranges.between(1, 1000), INT64_MIN, INT64_MIN + ranges.between(0, 99),
                                    blurry_attn::kMaxPosition - ranges.between(0, 99), blurry_attn::kMaxPosition,
                                    blurry_attn::kMaxPosition + ranges.between(1, 99), INT64_MAX,
                                    INT64_MAX - ranges.between(0, 2 * p.tokens)}));
    }
    if (!p.given) return;
    if (c.range == Range::few) given(ranges.between(0, 2 * p.cells[0].resolution));
    if (c.range == Range::beyond) given(longest_window + ranges.between(0, 1000));
  };
  c.in_order = true;
  if (c.packed) {
    c.ends.assign(random.between(1, 5), 0);
    for (int64_t& end : c.ends) end = random.between(0, p.tokens);
    if (random.chance(30)) c.ends.push_back(c.ends.back());
    c.ends.push_back(p.tokens);
    c.ends.push_back(0);
    std::sort(c.ends.begin(), c.ends.end());
    if (c.range == Range::ends) {
      const int64_t least = c.wide_ends ? INT64_MIN : INT32_MIN, most = c.wide_ends ? INT64_MAX : INT32_MAX;
      for (int64_t& end : c.ends) {
        if (ranges.chance(50)) continue;
        end = ranges.one_of<int64_t>({-1, least, p.tokens + 1, 2 * p.tokens, most, ranges.between(0, p.tokens)});
      }
      if (ranges.chance(50)) std::sort(c.ends.begin(), c.ends.end());
    }
    int64_t last = 0;
    for (size_t i = 0; i + 1 < c.ends.size(); ++i) {
      const int64_t begin = std::clamp<int64_t>(c.ends[i], 0, p.tokens);
      const int64_t end = std::clamp<int64_t>(c.ends[i + 1], begin, p.tokens);
      c.in_order = c.in_order && begin >= last;
      last = end;
      add(0, begin, end - begin);
    }
  } else {
    for (int64_t b = 0; b < p.batch; ++b) add(b, 0, p.tokens);
  }
  c.wants_state = step || random.chance(50);
  c.with_grad_lse = random.chance(50);
  c.with_grad_state = random.chance(50);
  c.bad_token = !step && p.tokens > 0 && (window || p.kernel == Kernel::fejer) &&
                random.chance(p.cells[0].resolution == 1 ? 30 : 8);
  c.bad_token = c.bad_token && c.range == Range::none;
  c.backward = !step && !c.bad_token;
  for (Order& order : c.order) {
    order = random.one_of({Order::dense, Order::dense, Order::tokens_first, Order::gaps});
    if (!window && random.chance(20)) order = Order::spread;
  }
  emulator::stretch = random.one_of({128, 256, 1024, 4096});
  if (long_walk) emulator::stretch = 128;
  if (o.stretch) emulator::stretch = o.stretch;

  const int64_t queries = p.batch * p.query_heads * p.tokens, tokens = p.batch * p.kv_heads * p.tokens;
  p.query = random.normals(queries * p.key_dim);
  p.key = random.normals(tokens * p.key_dim);
  p.value = random.normals(tokens * p.value_dim);
  p.grad_out = random.normals(queries * p.value_dim);
  if (c.with_grad_lse) p.grad_lse = random.normals(queries);
  if (p.given) {
    p.state_key = random.normals(p.states() * p.key_dim);
    p.state_value = random.normals(p.states() * p.value_dim);
    if (c.range == Range::beyond) {
      const bool of_keys = ranges.chance(50);
      for (double& x : of_keys ? p.state_key : p.state_value) x *= 2e5;
      if (of_keys) p.scale *= 1e-5;
    }
    for (size_t i = 0; i < p.sequences.size(); ++i) {
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        for (int64_t m = 0; m < p.slots; ++m) {
          if (p.sequences[i].position > p.cells[h].slot_opening(m)) continue;
          const int64_t at = p.slot_at(static_cast<int64_t>(i), h, m);  // shut: not to be read
          std::fill_n(p.state_key.begin() + at * p.key_dim, p.key_dim, kNaN);
          std::fill_n(p.state_value.begin() + at * p.value_dim, p.value_dim, kNaN);
        }
      }
    }
  }
  if (c.with_grad_state) {
    p.grad_state_key = random.normals(p.states() * p.key_dim);
    p.grad_state_value = random.normals(p.states() * p.value_dim);
  }
  if (c.bad_token) {
    Numbers& side = random.chance(50) ? p.key : p.value;
    side[random.between(0, static_cast<int64_t>(side.size()) - 1)] =
        random.one_of({kNaN, std::numeric_limits<double>::infinity()});
  }
  c.keeps = random.chance(50);
  if (c.range == Range::changes) {
    const int which = static_cast<int>(ranges.between(1, 7));
    if (which & 1) change(p, p.value, p.kv_heads, longest_window, ranges);
    if (which & 2) change(p, p.grad_out, p.query_heads, longest_window, ranges);
    if (which & 4 && size_of(c.dtype) == 2) {
      change(p, p.key, p.kv_heads, longest_window, ranges);
      p.scale *= .1;
    }
  }
  return c;
}

// Comparisons of one case, and the worst errors of all, as parts of what is allowed.
std::map<std::string, double> worst;

struct Checks {
  const Case& c;
  std::vector<std::string> failures;

  void fail(const std::string& text) { failures.push_back(text); }
  // Whether the dtype holds x; what it does not may be anything.
  bool fits(double x) const { return c.dtype != DType::float16 || std::fabs(x) < 65504; }

  // `count` rows from `first` on: one error for all, and a looser limit for each alone.
  void rows(const std::string& name, const Numbers& got, const Numbers& want, int64_t dim, int64_t first, int64_t count,
            double limit, double floor, const std::string& where) {
    limit *= 1 + 2 / std::sqrt(static_cast<double>(count));                   // few rows vary more
    if (c.dtype == DType::float16) floor = std::max(floor, 0x1p-24 / limit);  // its numbers next to zero
    double all_difference = 0, all_size = 0;
    std::vector<std::pair<double, double>> by_row;
    for (int64_t row = first; row < first + count; ++row) {
      double difference = 0, size = 0;
      for (int64_t i = row * dim; i < (row + 1) * dim; ++i) {
        if (std::isfinite(want[i]) && !fits(want[i])) continue;
        if (!std::isfinite(got[i]) || !std::isfinite(want[i])) {
          if (std::isfinite(got[i]) == std::isfinite(want[i])) continue;
          return fail(name + " is " + std::to_string(got[i]) + " for " + std::to_string(want[i]) + " at " + where +
                      " row " + std::to_string(row - first) + " element " + std::to_string(i - row * dim));
        }
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
      }
      by_row.emplace_back(difference, size);
      all_difference += difference;
      all_size += size;
    }
    const double least = floor * floor * static_cast<double>(dim);
    const double error = ratio(all_difference, std::max(all_size, least * static_cast<double>(count)));
    int64_t worst_row = 0;
    double row_error = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double mean = std::max(all_size / static_cast<double>(count), least);
      const double e = ratio(by_row[i].first, std::max(by_row[i].second, mean)) / 4;
      if (e > row_error) std::tie(row_error, worst_row) = std::make_pair(e, i);
    }
    double& most = worst[std::string(name_of(c.dtype)) + " " + name];
    most = std::max(most, std::max(error, row_error) / limit);
    if (error <= limit && row_error <= limit) return;
    char text[200];
    const int64_t at = (first + worst_row) * dim;
    std::snprintf(text, sizeof text, ": error %.3g, of one row %.3g, allowed %.3g; row %d: %.5g .. for %.5g ..", error,
                  4 * row_error, limit, static_cast<int>(worst_row), got[at], want[at]);
    fail(name + " at " + where + text);
  }
  static double ratio(double a, double b) { return a > 0 ? std::sqrt(a / b) : 0; }
  static double rms(const Numbers& x) {
    double sum = 0;
    int64_t count = 0;
    for (const double y : x) {
      if (std::isfinite(y)) sum += y * y, ++count;
    }
    return count ? std::sqrt(sum / static_cast<double>(count)) : 0;
  }
  // Calls body(dim, first row, rows, what they are) for every 64 tokens of a sequence and head.
  template <typename body_type>
  void each_block(const Numbers& numbers, int64_t heads, const body_type& body) {
    const reference::Problem& p = c.p;
    if (p.tokens == 0) return;
    const int64_t dim = static_cast<int64_t>(numbers.size()) / (p.batch * heads * p.tokens);
    for (size_t i = 0; i < p.sequences.size(); ++i) {
      const reference::Sequence& s = p.sequences[i];
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < s.length; t += 64) {
          body(dim, p.token_at(heads, s.batch, h, s.row + t), std::min<int64_t>(64, s.length - t),
               "sequence " + std::to_string(i) + " head " + std::to_string(h) + " token " + std::to_string(t));
          if (failures.size() > 4) return;
        }
      }
    }
  }
  // Half precision: an error is at most `times` that of plain PyTorch in the dtype, of the same tokens or as a part of
  // all, or what is nothing beside numbers of size 1. The elements of a token err alike, so few tokens vary more.
  void against_plain(const std::string& name, const Numbers& got, const Numbers& want, const Numbers& plain,
                     int64_t heads, double times) {
    const double part = part_of_all(want, plain);
    each_block(want, heads, [&](int64_t dim, int64_t first, int64_t count, const std::string& where) {
      block_against_plain(name, got, want, plain, first * dim, (first + count) * dim, part,
                          times * (1 + 1 / static_cast<double>(count)), 0, where);
    });
  }
  // The same of gradients of slots, for every sequence and head.
  void states_against_plain(const std::string& name, const Numbers& got, const Numbers& want, const Numbers& plain,
                            double times, double least) {
    const int64_t lanes = static_cast<int64_t>(c.p.sequences.size()) * c.p.kv_heads;
    const int64_t size = static_cast<int64_t>(want.size()) / std::max<int64_t>(lanes, 1);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      block_against_plain(
          name, got, want, plain, lane * size, (lane + 1) * size, part_of_all(want, plain), times, least,
          "sequence " + std::to_string(lane / c.p.kv_heads) + " head " + std::to_string(lane % c.p.kv_heads));
    }
  }
  // Of the elements that the dtype, and plain PyTorch, can hold.
  double distance(const Numbers& x, const Numbers* y, const Numbers& want, const Numbers& plain, int64_t from,
                  int64_t to) const {
    double sum = 0;
    for (int64_t i = from; i < to; ++i) {
      const double apart = y ? x[i] - (*y)[i] : x[i];
      if (std::isfinite(plain[i]) && fits(want[i])) sum += apart * apart;
    }
    return std::sqrt(sum);
  }
  double part_of_all(const Numbers& want, const Numbers& plain) const {
    const int64_t size = static_cast<int64_t>(want.size());
    const double all = distance(want, nullptr, want, plain, 0, size);
    return all > 0 ? distance(plain, &want, want, plain, 0, size) / all : 0;
  }
  void block_against_plain(const std::string& name, const Numbers& got, const Numbers& want, const Numbers& plain,
                           int64_t from, int64_t to, double part, double times, double least,
                           const std::string& where) {
    const double nothing = std::max(least, (c.dtype == DType::bfloat16 ? 0x1p-7 : 0x1p-10) / 100);
    const double error = distance(got, &want, want, plain, from, to),
                 own = distance(plain, &want, want, plain, from, to);
    const double norm = distance(want, nullptr, want, plain, from, to);
    const double allowed = times * std::max({own, part * norm, nothing * std::sqrt(static_cast<double>(to - from))});
    double& most = worst[std::string(name_of(c.dtype)) + " " + name + " against plain"];
    if (std::isfinite(error)) most = std::max(most, error / allowed);
    if (error <= allowed) return;
    char text[200];
    std::snprintf(text, sizeof text, ": error %.3g of %.3g, plain PyTorch's %.3g, allowed %.3g", error, norm, own,
                  allowed);
    fail(name + " at " + where + text);
  }
  // What belongs to no sequence is not written.
  void untouched(const std::string& name, const Numbers& got, int64_t heads) {
    std::vector<bool> known(got.size());
    each_block(got, heads, [&](int64_t dim, int64_t first, int64_t count, const std::string&) {
      std::fill_n(known.begin() + first * dim, count * dim, true);
    });
    for (size_t i = 0; i < got.size(); ++i) {
      if (!known[i] && !std::isnan(got[i])) return fail(name + " of a token of no sequence was written");
    }
  }
  void tokens(const std::string& name, const Numbers& got, const Numbers& want, int64_t heads, double limit,
              double floor) {
    each_block(want, heads, [&](int64_t dim, int64_t first, int64_t count, const std::string& where) {
      rows(name, got, want, dim, first, count, limit, floor, where);
    });
  }
  // `open`(sequence, head, slot): others must be exactly zero, or need not be anything.
  template <typename open_type>
  void states(const std::string& name, const Numbers& got, const Numbers& want, int64_t dim, double limit, double floor,
              bool zeros, const open_type& open) {
    const reference::Problem& p = c.p;
    Numbers compared = got;
    for (size_t i = 0; i < p.sequences.size(); ++i) {
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const std::string where = "sequence " + std::to_string(i) + " head " + std::to_string(h);
        for (int64_t m = 0; m < p.slots; ++m) {
          if (open(p.sequences[i], h, m)) continue;
          const int64_t at = p.slot_at(static_cast<int64_t>(i), h, m);
          for (int64_t d = at * dim; d < (at + 1) * dim; ++d) {
            if (zeros && got[d] != 0)
              return fail(name + " of slot " + std::to_string(m) + ", which is shut, at " + where);
            compared[d] = 0;
          }
        }
        rows(name, compared, want, dim, p.slot_at(static_cast<int64_t>(i), h, 0), p.slots, limit, floor, where);
      }
    }
  }
};

double to_bfloat16(double x) { return static_cast<float>(__nv_bfloat16(static_cast<float>(x))); }
double to_float16(double x) { return static_cast<float>(__half(static_cast<float>(x))); }

// What a relative error may be: forward, gradients.
std::pair<double, double> limits(const Case& c) {
  int64_t resolution = 0;
  for (const Cells& cells : c.p.cells) resolution = std::max(resolution, cells.resolution);
  const double grown = c.p.kernel == Kernel::dirichlet && resolution >= 8 ? 10 : 1;
  switch (c.dtype) {
    case DType::float64: return {1e-12 * grown, 1e-11 * grown};
    case DType::float32: return {1e-5 * grown, 1e-4 * grown};
    case DType::bfloat16: return {.01, .025};
    default: return {.0015, .006};
  }
}

void run_attention(Case& c, Checks& checks) {
  reference::Problem& p = c.p;
  const DType compute = c.compute();
  Tensor query(c.dtype, p.batch, p.query_heads, p.tokens, p.key_dim, c.order[0]);
  Tensor key(c.dtype, p.batch, p.kv_heads, p.tokens, p.key_dim, c.order[1]);
  Tensor value(c.dtype, p.batch, p.kv_heads, p.tokens, p.value_dim, c.order[2]);
  Tensor grad_out(c.dtype, p.batch, p.query_heads, p.tokens, p.value_dim, c.order[3]);
  // What is made beside a tensor lies as it does.
  const auto beside = [&](int i) { return c.order[i] == Order::tokens_first ? Order::tokens_first : Order::dense; };
  Tensor out(c.dtype, p.batch, p.query_heads, p.tokens, p.value_dim, beside(0));
  Tensor lse(compute, p.batch, p.query_heads, p.tokens, 1);
  Tensor grad_lse(compute, p.batch, p.query_heads, p.tokens, 1);
  const int64_t sequences = static_cast<int64_t>(p.sequences.size());
  const auto state = [&](int64_t dim) { return Tensor(compute, sequences, p.kv_heads, p.slots, dim); };
  Tensor state_key = state(p.key_dim), state_value = state(p.value_dim), end_key = state(p.key_dim),
         end_value = state(p.value_dim), grad_end_key = state(p.key_dim), grad_end_value = state(p.value_dim),
         grad_given_key = state(p.key_dim), grad_given_value = state(p.value_dim);
  Tensor grad_query(c.dtype, p.batch, p.query_heads, p.tokens, p.key_dim, beside(0));
  Tensor grad_key(c.dtype, p.batch, p.kv_heads, p.tokens, p.key_dim, beside(1));
  Tensor grad_value(c.dtype, p.batch, p.kv_heads, p.tokens, p.value_dim, beside(2));
  query.set(p.query);
  key.set(p.key);
  value.set(p.value);
  grad_out.set(p.grad_out);
  if (c.with_grad_lse) grad_lse.set(p.grad_lse);
  if (p.given) state_key.set(p.state_key), state_value.set(p.state_value);
  if (c.with_grad_state) grad_end_key.set(p.grad_state_key), grad_end_value.set(p.grad_state_value);

  std::vector<cuda::HeadLaw> laws;
  Numbers gates;
  for (const Cells& cells : p.cells) {
    laws.push_back({cells, static_cast<int64_t>(gates.size())});
    if (p.kernel == Kernel::fejer) {
      laws.back().echo = echo(cells, p.sharpness);
      laws.back().selects = selects(cells, p.sharpness);
    }
    const Numbers table = p.kernel == Kernel::fejer ? blurry_attn::flux_gates(cells, p.sharpness)
                                                    : blurry_attn::period_gates(p.kernel, cells, p.sharpness);
    gates.insert(gates.end(), table.begin(), table.end());
  }
  Tensor gate_table(compute, 1, 1, 1, static_cast<int64_t>(gates.size()));
  gate_table.set(gates);
  std::vector<int64_t> positions = c.positions;
  const std::vector<int32_t> narrow_ends(c.ends.begin(), c.ends.end());

  const Known known[] = {Known(laws), Known(positions), Known(c.ends), Known(narrow_ends)};

  cuda::Problem problem{};
  problem.dtype = c.dtype;
  problem.kernel = p.kernel;
  problem.batch = p.batch;
  problem.query_heads = p.query_heads;
  problem.kv_heads = p.kv_heads;
  problem.tokens = p.tokens;
  problem.key_dim = p.key_dim;
  problem.value_dim = p.value_dim;
  problem.slots = p.slots;
  problem.sequences = sequences;
  for (const Cells& cells : p.cells) problem.longest_window = std::max(problem.longest_window, cells.window());
  problem.scale = p.scale;
  problem.query = query.view;
  problem.key = key.view;
  problem.value = value.view;
  problem.laws = laws.data();
  problem.host_laws = laws.data();
  problem.gates = gate_table.data();
  if (c.packed) problem.cu_seqlens = c.wide_ends ? static_cast<const void*>(c.ends.data()) : narrow_ends.data();
  problem.cu_seqlens_is_64 = c.wide_ends;
  if (p.given) {
    problem.state_key = state_key.data();
    problem.state_value = state_value.data();
    problem.position = positions.data();
  }

  const reference::Results want = c.in_order ? reference::run(p, c.backward) : reference::Results();
  // Plain PyTorch in half precision, but where what it holds becomes infinite.
  const bool half = size_of(c.dtype) == 2, with_plain = half && c.in_order && !c.bad_token && c.range != Range::beyond;
  // Of numbers that differ much in size, an error says something beside plain PyTorch's alone.
  const bool plain_alone =
      with_plain && (c.range == Range::sharp || c.range == Range::few || c.range == Range::changes);
  reference::Results plain;
  if (with_plain) {
    reference::Problem rounded = p;
    rounded.rounding = c.dtype == DType::bfloat16 ? to_bfloat16 : to_float16;
    plain = reference::run(rounded, c.backward);
  }
  const auto [limit, grad_limit] = limits(c);
  const double state_limit = c.dtype == DType::float64 ? limit : limits(c).first < 1e-4 ? limit : 1e-5;
  const auto open_after = [&](const reference::Sequence& s, int64_t h, int64_t m) {
    return s.position + s.length > p.cells[h].slot_opening(m);
  };
  const auto open_before = [&](const reference::Sequence& s, int64_t h, int64_t m) {
    return s.position > p.cells[h].slot_opening(m);
  };

  if (c.kind == "step") {
    Tensor one(c.dtype, p.batch, p.query_heads, 1, p.value_dim);
    Numbers outs(p.batch * p.query_heads * p.tokens * p.value_dim);
    problem.tokens = 1;
    problem.position = positions.data();
    for (int64_t t = 0; t < p.tokens; ++t) {
      const auto row = [&](Tensor& tensor) {
        View view = tensor.view;
        view.data = tensor.data() + t * view.token * size_of(c.dtype);
        return view;
      };
      problem.query = row(query);
      problem.key = row(key);
      problem.value = row(value);
      cuda::step(problem, one.view, state_key.data(), state_value.data(), positions.data());
      const Numbers row_out = one.numbers();
      for (int64_t bh = 0; bh < p.batch * p.query_heads; ++bh) {
        std::copy_n(row_out.begin() + bh * p.value_dim, p.value_dim, outs.begin() + (bh * p.tokens + t) * p.value_dim);
      }
    }
    if (with_plain) checks.against_plain("out", outs, want.out, plain.out, p.query_heads, 2);
    if (!plain_alone) checks.tokens("out", outs, want.out, p.query_heads, limit, 0);
    checks.states("state key", state_key.numbers(), want.state_key, p.key_dim, state_limit, .1, false, open_after);
    checks.states("state value", state_value.numbers(), want.state_value, p.value_dim, state_limit, .1, false,
                  open_after);
    for (int64_t i = 0; i < sequences; ++i) {
      int64_t expected = p.sequences[i].position;
      for (int64_t t = 0; t < p.tokens; ++t) expected = std::min(expected, blurry_attn::kMaxPosition) + 1;
      if (positions[i] != expected) checks.fail("position");
    }
    for (Tensor* tensor : {&state_key, &state_value, &one}) {
      if (!tensor->buffer.guarded()) checks.fail("written out of bounds");
    }
    return;
  }

  cuda::Outputs outputs{out.view, lse.data(), nullptr, nullptr};
  if (c.wants_state) outputs.state_key = end_key.data(), outputs.state_value = end_value.data();
  const bool window = c.kind == "window", chunks = window && p.kernel == Kernel::dirichlet;
  const bool forward_window = window && !(chunks ? cuda::dirichlet_refusal : cuda::fejer_refusal)(problem);
  const auto forward_bytes = !forward_window ? cuda::forward_workspace
                             : chunks        ? cuda::dirichlet_forward_workspace
                                             : cuda::fejer_forward_workspace;
  const auto forward = !forward_window ? cuda::scan_forward : chunks ? cuda::dirichlet_forward : cuda::fejer_forward;
  Buffer contents(forward_window && !chunks && c.keeps ? cuda::fejer_kept(problem) : 0);
  if (contents.size() > 0) outputs.kept = contents.data();
  Buffer workspace(forward_bytes(problem));
  forward(problem, outputs, workspace.data());
  if (!workspace.guarded() || !contents.guarded()) checks.fail("forward: the workspace was written out of bounds");
  if (c.in_order) {
    const Numbers got_out = out.numbers(), got_lse = lse.numbers();
    if (with_plain) checks.against_plain("out", got_out, want.out, plain.out, p.query_heads, 2);
    if (!plain_alone) checks.tokens("out", got_out, want.out, p.query_heads, limit, .3 * Checks::rms(want.out));
    checks.tokens("lse", got_lse, want.lse, p.query_heads, limit, 1);
    checks.untouched("out", got_out, p.query_heads);
    checks.untouched("lse", got_lse, p.query_heads);
  }
  if (c.wants_state && c.in_order) {
    checks.states("state key", end_key.numbers(), want.state_key, p.key_dim, state_limit, .1, true, open_after);
    checks.states("state value", end_value.numbers(), want.state_value, p.value_dim, state_limit, .1, true, open_after);
  }
  for (Tensor* tensor : {&out, &lse, &end_key, &end_value}) {
    if (!tensor->buffer.guarded()) checks.fail("forward: an output was written out of bounds");
  }
  if (!c.backward) return;

  cuda::Gradients gradients{};
  gradients.grad_out = grad_out.view;
  gradients.lse = lse.data();
  if (c.with_grad_lse) gradients.grad_lse = grad_lse.data();
  if (c.with_grad_state)
    gradients.grad_state_key = grad_end_key.data(), gradients.grad_state_value = grad_end_value.data();
  gradients.query = grad_query.view;
  gradients.key = grad_key.view;
  gradients.value = grad_value.view;
  if (p.given) gradients.state_key = grad_given_key.data(), gradients.state_value = grad_given_value.data();
  const bool backward_window =
      window && !(chunks ? cuda::dirichlet_backward_refusal : cuda::fejer_backward_refusal)(problem, gradients);
  const auto backward_bytes = !backward_window ? cuda::backward_workspace
                              : chunks         ? cuda::dirichlet_backward_workspace
                                               : cuda::fejer_backward_workspace;
  const auto backward = !backward_window ? cuda::scan_backward
                        : chunks         ? cuda::dirichlet_backward
                                         : cuda::fejer_backward;
  if (backward_window && contents.size() > 0) gradients.kept = contents.data();
  Buffer memory((gradients.kept ? cuda::fejer_backward_workspace_with_kept : backward_bytes)(problem));
  backward(problem, gradients, memory.data());
  if (!memory.guarded()) checks.fail("backward: the workspace was written out of bounds");
  // Gradients of query and key are differences, which say nothing where they are much smaller than their parts.
  const double parts = .1 * std::fabs(p.scale) * std::sqrt(static_cast<double>(p.value_dim));
  // The scan's probabilities sum to one with its own lse only.
  const double backward_limit = (forward_window == backward_window ? 1 : 2) * grad_limit;
  const auto compare = [&](const char* name, Tensor& got, const Numbers& numbers, const Numbers& rounded,
                           int64_t heads) {
    if (!got.buffer.guarded()) checks.fail(std::string(name) + " was written out of bounds");
    if (!c.in_order) return;
    const Numbers found = got.numbers();
    checks.untouched(name, found, heads);
    if (with_plain) checks.against_plain(name, found, numbers, rounded, heads, 3);
    if (plain_alone) return;
    checks.tokens(name, found, numbers, heads, backward_limit, std::max(.3 * Checks::rms(numbers), parts));
  };
  compare("grad_query", grad_query, want.grad_query, plain.grad_query, p.query_heads);
  compare("grad_key", grad_key, want.grad_key, plain.grad_key, p.kv_heads);
  compare("grad_value", grad_value, want.grad_value, plain.grad_value, p.kv_heads);
  if (!p.given) return;
  // Of the gradient of the state at the end walks leave out what the echo makes less than a rounding.
  const double left_out = c.dtype == DType::bfloat16 ? 0x1p-11 : 0x1p-14;
  const auto compare_state = [&](const char* name, Tensor& got, const Numbers& numbers, const Numbers& rounded,
                                 const Numbers& end, int64_t dim) {
    if (!got.buffer.guarded()) checks.fail(std::string(name) + " was written out of bounds");
    if (!c.in_order) return;
    const double floor = backward_window && c.with_grad_state ? left_out * Checks::rms(end) : 0;
    const Numbers found = got.numbers();
    if (plain_alone) checks.states_against_plain(name, found, numbers, rounded, 3, floor);
    checks.states(name, found, numbers, dim, plain_alone ? INFINITY : backward_limit,
                  std::max({.3 * Checks::rms(numbers), parts, floor}), true, open_before);
  };
  compare_state("grad_state_key", grad_given_key, want.grad_given_key, plain.grad_given_key, p.grad_state_key,
                p.key_dim);
  compare_state("grad_state_value", grad_given_value, want.grad_given_value, plain.grad_given_value, p.grad_state_value,
                p.value_dim);
}

// The case's query, turned by positions of each batch entry or of all, or back.
void run_rotary(Case& c, Checks& checks) {
  reference::Problem& p = c.p;
  const int64_t half = p.key_dim / 2;
  const double base = c.wants_state ? 10000 : 50;
  Tensor x(c.dtype, p.batch, p.query_heads, p.tokens, p.key_dim, c.order[0]);
  Tensor out(c.dtype, p.batch, p.query_heads, p.tokens, p.key_dim, c.order[1]);
  x.set(p.query);
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < (c.with_grad_lse ? p.batch : 1) * p.tokens; ++i)
    positions.push_back(c.wide_ends ? 1000000 + 7 * i : i);
  const Known known(positions);
  cuda::rotary({c.dtype, x.view, out.view, p.batch, p.query_heads, p.tokens, p.key_dim, positions.data(),
                c.with_grad_lse ? p.tokens : 0, base, c.with_grad_state, nullptr});
  Numbers want(p.query.size());
  for (int64_t row = 0; row < p.batch * p.query_heads * p.tokens; ++row) {
    const int64_t b = row / p.tokens / p.query_heads, t = row % p.tokens;
    const double position = static_cast<double>(positions[(c.with_grad_lse ? b * p.tokens : 0) + t]);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = (c.with_grad_state ? -1 : 1) * position * std::pow(base, -2. * i / p.key_dim);
      const double first = p.query[row * p.key_dim + i], second = p.query[row * p.key_dim + i + half];
      want[row * p.key_dim + i] = first * std::cos(angle) - second * std::sin(angle);
      want[row * p.key_dim + i + half] = second * std::cos(angle) + first * std::sin(angle);
    }
  }
  const double rounding = c.dtype == DType::float64    ? 1e-12
                          : c.dtype == DType::float32  ? 1e-6
                          : c.dtype == DType::bfloat16 ? 0x1p-9
                                                       : 0x1p-12;
  checks.tokens("rotary", out.numbers(), want, p.query_heads, rounding, .3);
  if (!out.buffer.guarded()) checks.fail("rotary: written out of bounds");
}

// Streams that cannot be made leave nothing behind, and are made the next time.
bool streams_are_sound() {
  for (int calls = 0; calls <= 3; ++calls) {
    emulator::until_failure = calls;
    bool failed = false;
    try {
      cuda::TwoStreams streams(nullptr, true);
    } catch (const std::runtime_error&) {
      failed = true;
    }
    if (failed != (calls < 3) || emulator::objects != (failed ? 0 : 3)) return false;
  }
  emulator::until_failure = -1;
  return true;
}

constexpr unsigned kSeconds = 200;  // that a case may take
std::string running;                // for a crash
void crashed(int signal) {
  running = "FAIL " + running + (signal == SIGALRM ? ": it does not end\n" : ": the program crashed\n");
  if (write(1, running.data(), running.size()) < 0) _exit(3);
  _exit(2);
}

constexpr char kUsage[] =
    "emulate [--seeds FIRST:END] [--kind window|scan|step|rotary] [--dtype bfloat16|float16|float32|float64]\n"
    "        [--kernel fejer|dirichlet] [--slots N] [--resolution R] [--dim D] [--tokens T]\n"
    "        [--sharpness S] [--stretch TOKENS] [--stop FAILURES] [--verbose]\n"
    "        [--range none|sharp|few|changes|beyond|positions|ends|narrow|cut]\n"
    "Runs the problems of seeds FIRST .. END - 1; what an option sets is not drawn.\n";

Options parse(int count, char** words) {
  Options o;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--verbose") {
      o.verbose = true;
      continue;
    }
    const std::string text = i + 1 < count ? words[++i] : "";
    std::map<std::string, int64_t*> numbers{{"--slots", &o.slots},     {"--resolution", &o.resolution},
                                            {"--dim", &o.dim},         {"--tokens", &o.tokens},
                                            {"--stretch", &o.stretch}, {"--stop", &o.stop}};
    std::map<std::string, std::string*> texts{
        {"--kind", &o.kind}, {"--dtype", &o.dtype}, {"--kernel", &o.kernel}, {"--range", &o.range}};
    if (numbers.count(word) && !text.empty()) {
      *numbers[word] = std::stoll(text);
    } else if (texts.count(word) && !text.empty()) {
      *texts[word] = text;
    } else if (word == "--sharpness" && !text.empty()) {
      o.sharpness = std::stod(text);
    } else if (word == "--seeds" && !text.empty()) {
      const size_t colon = text.find(':');
      o.first = std::stoll(text);
      o.last = colon == std::string::npos ? o.first + 1 : std::stoll(text.substr(colon + 1));
    } else {
      std::fputs(kUsage, word == "--help" ? stdout : stderr);
      std::exit(word == "--help" ? 0 : 2);
    }
  }
  return o;
}

}  // namespace

int main(int count, char** words) {
  const Options options = parse(count, words);
  static char stack[64 * 1024];
  stack_t other{};
  other.ss_sp = stack;
  other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action{};
  action.sa_handler = crashed;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM}) sigaction(signal, &action, nullptr);
  int64_t failed = 0;
  if (!streams_are_sound()) {
    std::printf("FAIL streams: what cannot be made leaves something behind\n");
    ++failed;
  }
  for (int64_t seed = options.first; seed < options.last; ++seed) {
    running = "seed " + std::to_string(seed);
    Case c = draw(options, static_cast<uint64_t>(seed));
    emulator::seed(static_cast<uint64_t>(seed));
    running = "seed " + std::to_string(seed) + ": " + c.text();
    if (options.verbose) std::printf("%s\n", running.c_str());
    Checks checks{c, {}};
    alarm(kSeconds);
    try {
      c.kind == "rotary" ? run_rotary(c, checks) : run_attention(c, checks);
    } catch (const std::runtime_error& error) {
      // Sequences that overlap are written by several blocks, whatever comes of it.
      if (c.in_order || !std::strstr(error.what(), "of another block")) checks.fail(error.what());
    }
    if (checks.failures.empty()) continue;
    ++failed;
    std::string text;
    for (const std::string& failure : checks.failures) text += (text.empty() ? "" : "; ") + failure;
    std::printf("FAIL %s: %s\n", running.c_str(), text.c_str());
    std::fflush(stdout);
    if (failed == options.stop) break;
  }
  if (options.verbose) {
    for (const auto& [name, part] : worst) std::printf("worst %-28s %.2f of what is allowed\n", name.c_str(), part);
  }
  std::printf("%lld cases, %lld failed\n", static_cast<long long>(options.last - options.first),
              static_cast<long long>(failed));
  return failed ? 1 : 0;
}
