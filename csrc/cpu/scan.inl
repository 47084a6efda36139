// This file runs any kernel as a scan over time, for one instruction set. It carries the content of every slot as a
// row, for each lane (one sequence and kv head). The backward keeps the contents at the beginning of each stretch of
// time, and runs through the stretch again from there.
#include "vec.h"

namespace blurry_attn::cpu::BLURRY_ISA {
namespace {

template <typename storage, typename compute>
struct Scan {
  const Problem<storage, compute>& problem;
  const Sequence& sequence;
  const Cells& cells;
  int64_t entry, head, slots, key_width, value_width;  // entry: index of the sequence in states
  const compute* gates;
  std::vector<int64_t> openings;
  std::vector<compute> keys, values, key, value;  // keys, values: contents of all slots; key, value: the token

  Scan(const Problem<storage, compute>& p, int64_t lane)
      : problem(p),
        sequence(p.sequences[lane / p.kv_heads()]),
        cells(p.cells[lane % p.kv_heads()]),
        entry(lane / p.kv_heads()),
        head(lane % p.kv_heads()),
        slots(cells.slots),
        key_width(padded<compute>(p.key_dim)),
        value_width(padded<compute>(p.value_dim)),
        gates(p.gates[head]->data()),
        keys(slots * key_width),
        values(slots * value_width),
        key(key_width),
        value(value_width) {
    for (int64_t m = 0; m < slots; ++m) openings.push_back(cells.slot_opening(m));
  }

  int64_t begin() const { return sequence.position; }
  int64_t end() const { return sequence.position + sequence.length; }
  bool is_open(int64_t m, int64_t t) const { return t >= openings[m]; }
  compute share(int64_t m, int64_t t) const {
    if (t == openings[m]) return 1;
    return gates[cells.offset(m, t)];
  }
  compute* slot_key(int64_t m) { return keys.data() + m * key_width; }
  compute* slot_value(int64_t m) { return values.data() + m * value_width; }
  template <typename any>
  any* at(const View<any>& view, int64_t any_head, int64_t t) const {
    return view.row(sequence.batch, any_head, sequence.begin + t - begin());
  }
  void load_query(int64_t query_head, int64_t t, compute* to) const {
    load_row(at(problem.query, query_head, t), problem.query.element, problem.key_dim, to, problem.scale);
  }
  int64_t scalar_at(int64_t query_head, int64_t t) const {
    return (sequence.batch * problem.query_heads + query_head) * problem.tokens + sequence.begin + t - begin();
  }
  int64_t slot_at(int64_t m) const { return (entry * problem.kv_heads() + head) * slots + m; }

  void load_state() {
    if (!problem.state_key) return;
    for (int64_t m = 0; m < slots; ++m) {
      if (!is_open(m, begin() - 1)) continue;
      load_row(problem.state_key + slot_at(m) * problem.key_dim, 1, problem.key_dim, slot_key(m));
      load_row(problem.state_value + slot_at(m) * problem.value_dim, 1, problem.value_dim, slot_value(m));
    }
  }
  void write(int64_t t) {
    load_row(at(problem.key, head, t), problem.key.element, problem.key_dim, key.data());
    load_row(at(problem.value, head, t), problem.value.element, problem.value_dim, value.data());
    for (int64_t m = 0; m < slots; ++m) {
      if (!is_open(m, t)) continue;
      const compute g = share(m, t);
      if (g == 0) continue;
      write_row(g, key.data(), slot_key(m), key_width, slot_key(m));
      write_row(g, value.data(), slot_value(m), value_width, slot_value(m));
    }
  }
};

// read_out() computes the softmax over open slots as weights[m], 0 where slot m is shut, and returns the lse.
template <typename storage, typename compute>
compute read_out(Scan<storage, compute>& scan, const compute* query, int64_t t, compute* weights) {
  // Logits of open slots are gathered to the front. A shut slot is left out, whatever it holds.
  int64_t open = 0;
  for (int64_t m = 0; m < scan.slots; ++m) {
    if (scan.is_open(m, t)) weights[open++] = dot(query, scan.slot_key(m), scan.key_width);
  }
  const compute top = largest(weights, open, weights[0]);
  const compute total = exponentials(weights, open, top);
  for (int64_t m = scan.slots - 1; m >= 0; --m) weights[m] = scan.is_open(m, t) ? weights[--open] / total : compute(0);
  return top + std::log(total);
}

template <typename storage, typename compute>
void scan_lane(const Problem<storage, compute>& problem, int64_t lane, const Outputs<storage, compute>& outputs) {
  Scan<storage, compute> scan(problem, lane);
  std::vector<compute> query(scan.key_width), out(scan.value_width), weights(padded<compute>(scan.slots));
  scan.load_state();
  for (int64_t t = scan.begin(); t < scan.end(); ++t) {
    scan.write(t);
    for (int64_t head = scan.head * problem.group(), end = head + problem.group(); head < end; ++head) {
      scan.load_query(head, t, query.data());
      outputs.lse[scan.scalar_at(head, t)] = read_out(scan, query.data(), t, weights.data());
      zero_row(out.data(), scan.value_width);
      for (int64_t m = 0; m < scan.slots; ++m) {
        if (scan.is_open(m, t)) add_scaled(weights[m], scan.slot_value(m), scan.value_width, out.data());
      }
      store_row(out.data(), problem.value_dim, scan.at(outputs.out, head, t), outputs.out.element);
    }
  }
  if (!outputs.state_key) return;
  for (int64_t m = 0; m < scan.slots; ++m) {
    store_row(scan.slot_key(m), problem.key_dim, outputs.state_key + scan.slot_at(m) * problem.key_dim, 1);
    store_row(scan.slot_value(m), problem.value_dim, outputs.state_value + scan.slot_at(m) * problem.value_dim, 1);
  }
}

template <typename storage, typename compute>
void forward(const Problem<storage, compute>& problem, const Outputs<storage, compute>& outputs, const Allocate&) {
  problem.parallel(static_cast<int64_t>(problem.sequences.size()) * problem.kv_heads(),
                   [&](int64_t lane) { scan_lane(problem, lane, outputs); });
}

template <typename storage, typename compute>
void scan_lane_backward(const Problem<storage, compute>& problem, int64_t lane,
                        const Gradients<storage, compute>& gradients) {
  Scan<storage, compute> scan(problem, lane);
  const int64_t slots = scan.slots, kw = scan.key_width, vw = scan.value_width, group = problem.group();
  const int64_t length = 2 * slots > 256 ? 2 * slots : 256;  // tokens of a stretch
  std::vector<compute> kept;                                 // contents before each stretch
  scan.load_state();
  for (int64_t t = scan.begin(); t < scan.end(); ++t) {
    if ((t - scan.begin()) % length == 0) {
      kept.insert(kept.end(), scan.keys.begin(), scan.keys.end());
      kept.insert(kept.end(), scan.values.begin(), scan.values.end());
    }
    scan.write(t);
  }
  // Gradients of the contents start with the returned state's and end as the given state's.
  std::vector<compute> grad_keys(slots * kw), grad_values(slots * vw);
  for (int64_t m = 0; m < slots; ++m) {
    if (!scan.is_open(m, scan.end() - 1)) continue;
    if (gradients.grad_state_key) {
      load_row(gradients.grad_state_key + scan.slot_at(m) * problem.key_dim, 1, problem.key_dim,
               grad_keys.data() + m * kw);
    }
    if (gradients.grad_state_value) {
      load_row(gradients.grad_state_value + scan.slot_at(m) * problem.value_dim, 1, problem.value_dim,
               grad_values.data() + m * vw);
    }
  }
  // `weights` are probabilities and `logits` gradients of logits, by token of the stretch, head of the group and slot.
  std::vector<compute> weights(length * group * slots), logits(length * group * slots);
  std::vector<compute> query(kw), grad_query(kw), grad_out(vw), row(padded<compute>(slots));
  for (int64_t stretch = (scan.sequence.length + length - 1) / length - 1; stretch >= 0; --stretch) {
    const int64_t begin = scan.begin() + stretch * length;
    const int64_t end = begin + length < scan.end() ? begin + length : scan.end();
    const compute* from = kept.data() + stretch * slots * (kw + vw);
    std::copy(from, from + slots * kw, scan.keys.begin());
    std::copy(from + slots * kw, from + slots * (kw + vw), scan.values.begin());
    for (int64_t t = begin; t < end; ++t) {
      scan.write(t);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t head = scan.head * group + i, at = ((t - begin) * group + i) * slots;
        compute *p = weights.data() + at, *dz = logits.data() + at;
        scan.load_query(head, t, query.data());
        load_row(scan.at(gradients.grad_out, head, t), gradients.grad_out.element, problem.value_dim, grad_out.data());
        read_out(scan, query.data(), t, row.data());
        std::copy(row.begin(), row.begin() + slots, p);
        for (int64_t m = 0; m < slots; ++m) {
          dz[m] = scan.is_open(m, t) ? dot(grad_out.data(), scan.slot_value(m), vw) : compute(0);
        }
        softmax_backward(p, slots, compute(1),
                         gradients.grad_lse ? gradients.grad_lse[scan.scalar_at(head, t)] : compute(0), dz);
        zero_row(grad_query.data(), kw);
        for (int64_t m = 0; m < slots; ++m) {
          if (scan.is_open(m, t)) add_scaled(dz[m], scan.slot_key(m), kw, grad_query.data());
        }
        scale_row(problem.scale, kw, grad_query.data());
        store_row(grad_query.data(), problem.key_dim, scan.at(gradients.query, head, t), gradients.query.element);
      }
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      for (int64_t i = 0; i < group; ++i) {
        const int64_t head = scan.head * group + i, at = ((t - begin) * group + i) * slots;
        scan.load_query(head, t, query.data());
        load_row(scan.at(gradients.grad_out, head, t), gradients.grad_out.element, problem.value_dim, grad_out.data());
        for (int64_t m = 0; m < slots; ++m) {
          if (!scan.is_open(m, t)) continue;
          add_scaled(logits[at + m], query.data(), kw, grad_keys.data() + m * kw);
          add_scaled(weights[at + m], grad_out.data(), vw, grad_values.data() + m * vw);
        }
      }
      zero_row(scan.key.data(), kw);
      zero_row(scan.value.data(), vw);
      for (int64_t m = 0; m < slots; ++m) {
        const compute g = scan.is_open(m, t) ? scan.share(m, t) : compute(0);
        if (g == 0) continue;
        add_scaled(g, grad_keys.data() + m * kw, kw, scan.key.data());
        add_scaled(g, grad_values.data() + m * vw, vw, scan.value.data());
        keep_row(g, kw, grad_keys.data() + m * kw);
        keep_row(g, vw, grad_values.data() + m * vw);
      }
      store_row(scan.key.data(), problem.key_dim, scan.at(gradients.key, scan.head, t), gradients.key.element);
      store_row(scan.value.data(), problem.value_dim, scan.at(gradients.value, scan.head, t), gradients.value.element);
    }
  }
  if (!gradients.state_key) return;
  for (int64_t m = 0; m < slots; ++m) {
    store_row(grad_keys.data() + m * kw, problem.key_dim, gradients.state_key + scan.slot_at(m) * problem.key_dim, 1);
    store_row(grad_values.data() + m * vw, problem.value_dim,
              gradients.state_value + scan.slot_at(m) * problem.value_dim, 1);
  }
}

template <typename storage, typename compute>
void backward(const Problem<storage, compute>& problem, const Gradients<storage, compute>& gradients, const Allocate&) {
  problem.parallel(static_cast<int64_t>(problem.sequences.size()) * problem.kv_heads(),
                   [&](int64_t lane) { scan_lane_backward(problem, lane, gradients); });
}

}  // namespace
}  // namespace blurry_attn::cpu::BLURRY_ISA
