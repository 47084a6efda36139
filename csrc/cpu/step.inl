// The step takes one token per sequence, for one instruction set. It reads slots where they lie, and writes those that
// take a share of the token.
#include "vec.h"

namespace blurry_attn::cpu::BLURRY_ISA {
namespace {

// Slots are the slots of one sequence and head on one side (key or value). `scratch` is a padded row for rows that are
// not whole vectors.
template <typename compute>
struct Slots {
  compute* state;
  int64_t dim, width;
  compute* scratch;

  compute* at(int64_t m) const { return state + m * dim; }
  // take() lets slot m take a share of the token, which is a padded row.
  void take(int64_t m, compute share, const compute* token) const {
    if (width == dim) return write_row(share, token, at(m), width, at(m));
    load_row(at(m), 1, dim, scratch);
    write_row(share, token, scratch, width, scratch);
    store_row(scratch, dim, at(m), 1);
  }
  void clear(int64_t m) const {
    for (int64_t i = 0; i < dim; ++i) at(m)[i] = 0;
  }
  const compute* row(int64_t m) const { return read_row(at(m), 1, dim, scratch); }
};

template <typename storage, typename compute>
int64_t scratch_of_lane(const Problem<storage, compute>& problem) {
  return 3 * (padded<compute>(problem.key_dim) + padded<compute>(problem.value_dim)) + padded<compute>(problem.slots());
}

template <typename storage, typename compute>
void step_lane(const Problem<storage, compute>& problem, int64_t lane, const Outputs<storage, compute>& outputs,
               compute* scratch) {
  const int64_t head = lane % problem.kv_heads(), key_dim = problem.key_dim, value_dim = problem.value_dim;
  const Sequence& sequence = problem.sequences[lane / problem.kv_heads()];
  const Cells& cells = problem.cells[head];
  const compute* const gates = problem.gates[head]->data();
  const int64_t t = sequence.position, slots = cells.slots;
  const int64_t key_width = padded<compute>(key_dim), value_width = padded<compute>(value_dim);
  compute *const key = scratch, *const query = key + key_width, *const value = query + 2 * key_width,
                 *const out = value + value_width, *const weights = out + 2 * value_width;
  const Slots<compute> keys{outputs.state_key + lane * slots * key_dim, key_dim, key_width, query + key_width};
  const Slots<compute> values{outputs.state_value + lane * slots * value_dim, value_dim, value_width,
                              out + value_width};
  const auto is_open = [&](int64_t m) { return t >= cells.slot_opening(m); };

  load_row(problem.key.row(sequence.batch, head, sequence.begin), problem.key.element, key_dim, key);
  load_row(problem.value.row(sequence.batch, head, sequence.begin), problem.value.element, value_dim, value);
  const auto take = [&](int64_t m, compute share) {
    if (share == 0) return;
    keys.take(m, share, key);
    values.take(m, share, value);
  };
  for (int64_t m = 0; m < slots; ++m) {
    if (!is_open(m)) {  // whatever the slot holds
      keys.clear(m);
      values.clear(m);
    } else if (problem.of_period) {
      take(m, t == cells.slot_opening(m) ? compute(1) : gates[cells.offset(m, t)]);
    }
  }
  if (!problem.of_period) {
    const int64_t trailing = cells.trailing(t);
    for (const int64_t cell : {trailing, trailing + 1}) {
      if (cells.is_open(cell, t)) take(cells.slot(cell), cells.gate(gates, cell, t));
    }
  }

  for (int64_t h = head * problem.group(); h < (head + 1) * problem.group(); ++h) {
    load_row(problem.query.row(sequence.batch, h, sequence.begin), problem.query.element, key_dim, query,
             problem.scale);
    int64_t open = 0;  // number of open slots, gathered to the front
    for (int64_t m = 0; m < slots; ++m) {
      if (is_open(m)) weights[open++] = dot(query, keys.row(m), key_width);
    }
    const compute total = exponentials(weights, open, largest(weights, open, weights[0]));
    zero_row(out, value_width);
    open = 0;
    for (int64_t m = 0; m < slots; ++m) {
      if (is_open(m)) add_scaled(weights[open++] / total, values.row(m), value_width, out);
    }
    store_row(out, value_dim, outputs.out.row(sequence.batch, h, sequence.begin), outputs.out.element);
  }
}

template <typename storage, typename compute>
void step_all(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs,
              const Allocate& allocate) {
  const int64_t lanes = static_cast<int64_t>(problem.sequences.size()) * problem.kv_heads();
  const int64_t size = scratch_of_lane(problem);
  // The scratch memory is allocated at once: if there is none, no slot has been touched.
  compute* const scratch = static_cast<compute*>(allocate(lanes * size));
  problem.parallel(lanes, [&](int64_t lane) { step_lane(problem, lane, outputs, scratch + lane * size); });
}

}  // namespace
}  // namespace blurry_attn::cpu::BLURRY_ISA
