// One token per sequence, for one instruction set: slots are read where they lie, and written if they take of the
// token.
#include "vec.h"

namespace blurry_attn::cpu::BLURRY_ISA {
namespace {

// The slots of one sequence and head, on one side: as they lie in the state, or a padded copy for the loops over rows.
template <typename compute>
struct Slots {
  compute* state;
  int64_t count, dim, width;
  std::vector<compute> copy;

  Slots(compute* all, int64_t lane, int64_t slots, int64_t size)
      : state(all + lane * slots * size), count(slots), dim(size), width(padded<compute>(size)) {}
  bool is_copied() const { return width != dim; }
  // Slot m takes a share of the token, a padded row.
  void take(int64_t m, compute share, const compute* token) {
    compute* const row = state + m * dim;
    if (!is_copied()) return write_row(share, token, row, width, row);
    copy.resize(width);
    load_row(row, 1, dim, copy.data());
    write_row(share, token, copy.data(), width, copy.data());
    store_row(copy.data(), dim, row, 1);
  }
  void clear(int64_t m) { std::fill_n(state + m * dim, dim, compute(0)); }
  // To be called once all have taken: then rows are to be read.
  void settle() {
    if (!is_copied()) return;
    copy.resize(count * width);
    for (int64_t m = 0; m < count; ++m) load_row(state + m * dim, 1, dim, copy.data() + m * width);
  }
  const compute* row(int64_t m) const { return (is_copied() ? copy.data() : state) + m * width; }
};

template <typename storage, typename compute>
void step_lane(const Problem<storage, compute>& problem, int64_t lane, const Outputs<storage, compute>& outputs) {
  const int64_t head = lane % problem.kv_heads();
  const Sequence& sequence = problem.sequences[lane / problem.kv_heads()];
  const Cells& cells = problem.cells[head];
  const compute* const gates = problem.gates[head].data();
  const int64_t t = sequence.position, trailing = cells.trailing(t);
  Slots<compute> keys(outputs.state_key, lane, cells.slots, problem.key_dim);
  Slots<compute> values(outputs.state_value, lane, cells.slots, problem.value_dim);

  std::vector<compute> key(keys.width), value(values.width);
  load_row(problem.key.row(sequence.batch, head, sequence.begin), problem.key.element, problem.key_dim, key.data());
  load_row(problem.value.row(sequence.batch, head, sequence.begin), problem.value.element, problem.value_dim,
           value.data());
  const auto take = [&](int64_t m, compute share) {
    if (share == 0) return;
    keys.take(m, share, key.data());
    values.take(m, share, value.data());
  };
  std::vector<int64_t> open;
  for (int64_t m = 0; m < cells.slots; ++m) {
    const int64_t opening = cells.slot_opening(m);
    if (t < opening) {  // whatever it holds
      keys.clear(m);
      values.clear(m);
      continue;
    }
    open.push_back(m);
    if (problem.of_period) {
      const int64_t offset = (t - cells.centre(m)) % cells.window();
      take(m, t == opening ? compute(1) : gates[offset < 0 ? offset + cells.window() : offset]);
    }
  }
  if (!problem.of_period) {
    for (const int64_t cell : {trailing, trailing + 1}) {
      if (cells.is_open(cell, t)) take(cells.slot(cell), cells.gate(gates, cell, t));
    }
  }
  keys.settle();
  values.settle();

  const int64_t count = static_cast<int64_t>(open.size());
  std::vector<compute> query(keys.width), out(values.width), weights(padded<compute>(cells.slots));
  for (int64_t h = head * problem.group(); h < (head + 1) * problem.group(); ++h) {
    load_row(problem.query.row(sequence.batch, h, sequence.begin), problem.query.element, problem.key_dim, query.data(),
             problem.scale);
    for (int64_t i = 0; i < count; ++i) weights[i] = dot(query.data(), keys.row(open[i]), keys.width);
    const compute total = exponentials(weights.data(), count, largest(weights.data(), count, weights[0]));
    zero_row(out.data(), values.width);
    for (int64_t i = 0; i < count; ++i) add_scaled(weights[i] / total, values.row(open[i]), values.width, out.data());
    store_row(out.data(), problem.value_dim, outputs.out.row(sequence.batch, h, sequence.begin), outputs.out.element);
  }
}

template <typename storage, typename compute>
void step_all(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs) {
  problem.parallel(static_cast<int64_t>(problem.sequences.size()) * problem.kv_heads(),
                   [&](int64_t lane) { step_lane(problem, lane, outputs); });
}

}  // namespace
}  // namespace blurry_attn::cpu::BLURRY_ISA
