// The law in float64, token by token, and its reverse: what the kernels are held to. Gates come from csrc/law.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/law.h"

namespace reference {

using blurry_attn::Cells;
using blurry_attn::Kernel;
using Numbers = std::vector<double>;

struct Sequence {
  int64_t batch, row, length, position;
};

// A problem and its results, dense: (batch, head, token, element) and (sequence, kv head, slot, element).
struct Problem {
  Kernel kernel;
  int64_t batch, query_heads, kv_heads, tokens, key_dim, value_dim, slots;
  std::vector<Cells> cells;  // per kv head
  double sharpness, scale;
  std::vector<Sequence> sequences;
  bool given = false;          // a state
  bool float32_gates = false;  // rounded: one next to 1 is then 1, and a NaN does not outlive it
  Numbers query, key, value, state_key, state_value;
  Numbers grad_out, grad_lse, grad_state_key, grad_state_value;
  Numbers out;                           // rounded, as a backward reads it; empty: as it is
  double (*rounding)(double) = nullptr;  // of every result, as plain PyTorch does it in a narrow dtype; null: none

  int64_t group() const { return query_heads / kv_heads; }
  int64_t token_at(int64_t heads, int64_t batch, int64_t head, int64_t row) const {
    return (batch * heads + head) * tokens + row;
  }
  int64_t slot_at(int64_t sequence, int64_t head, int64_t slot) const {
    return (sequence * kv_heads + head) * slots + slot;
  }
  int64_t states() const { return static_cast<int64_t>(sequences.size()) * kv_heads * slots; }
};
struct Results {
  Numbers out, lse, state_key, state_value;
  Numbers grad_query, grad_key, grad_value, grad_given_key, grad_given_value;
};

// One sequence and kv head. Contents are rows of slots; what a token overwrites is kept for the way back.
class Lane {
 public:
  Lane(const Problem& problem, int64_t sequence, int64_t head)
      : p(problem), s(p.sequences[sequence]), index(sequence), head(head), cells(p.cells[head]) {
    gates = blurry_attn::gates(p.kernel, cells, p.sharpness, s.position, s.length);
    if (p.float32_gates)
      std::transform(gates.begin(), gates.end(), gates.begin(), [](double gate) { return float(gate); });
    keys.assign(p.slots * p.key_dim, 0);
    values.assign(p.slots * p.value_dim, 0);
    for (int64_t m = 0; m < p.slots && p.given; ++m) {
      if (!was_open(m)) continue;
      const int64_t at = p.slot_at(index, head, m);
      for (int64_t d = 0; d < p.key_dim; ++d) keys[m * p.key_dim + d] = rounded(p.state_key[at * p.key_dim + d]);
      for (int64_t d = 0; d < p.value_dim; ++d) {
        values[m * p.value_dim + d] = rounded(p.state_value[at * p.value_dim + d]);
      }
    }
  }

  void forward(Results& r) {
    for (int64_t i = 0; i < s.length; ++i) {
      for (int64_t m = 0; m < p.slots; ++m) {
        const double gate = gates[i * p.slots + m];
        if (std::isnan(gate) || gate == 0) continue;
        write(m, gate, keys, p.key, p.key_dim, i);
        write(m, gate, values, p.value, p.value_dim, i);
      }
      for (int64_t j = 0; j < p.group(); ++j) {
        const int64_t at = query_at(i, j);
        attend(at, i);
        r.lse[at] = lse;
        for (int64_t d = 0; d < p.value_dim; ++d) {
          double sum = 0;
          for (int64_t m = 0; m < p.slots; ++m) {
            if (is_open(i, m)) sum += weights[m] * values[m * p.value_dim + d];
          }
          r.out[at * p.value_dim + d] = rounded(sum);
        }
      }
    }
    const int64_t end = s.position + s.length;
    for (int64_t m = 0; m < p.slots; ++m) {
      const int64_t at = p.slot_at(index, head, m);
      const bool open = end > cells.slot_opening(m);
      for (int64_t d = 0; d < p.key_dim; ++d) r.state_key[at * p.key_dim + d] = open ? keys[m * p.key_dim + d] : 0;
      for (int64_t d = 0; d < p.value_dim; ++d) {
        r.state_value[at * p.value_dim + d] = open ? values[m * p.value_dim + d] : 0;
      }
    }
  }

  // After forward().
  void backward(Results& r) {
    Numbers grad_keys(p.slots * p.key_dim), grad_values(p.slots * p.value_dim);
    const int64_t first = p.slot_at(index, head, 0), end = s.position + s.length;
    for (int64_t m = 0; m < p.slots; ++m) {
      if (end <= cells.slot_opening(m)) continue;
      for (int64_t d = 0; d < p.key_dim && !p.grad_state_key.empty(); ++d) {
        grad_keys[m * p.key_dim + d] = p.grad_state_key[(first + m) * p.key_dim + d];
      }
      for (int64_t d = 0; d < p.value_dim && !p.grad_state_value.empty(); ++d) {
        grad_values[m * p.value_dim + d] = p.grad_state_value[(first + m) * p.value_dim + d];
      }
    }
    for (int64_t i = s.length - 1; i >= 0; --i) {
      for (int64_t j = 0; j < p.group(); ++j) {
        const int64_t at = query_at(i, j);
        const double* const query = &p.query[at * p.key_dim];
        const double* const grad_out = &p.grad_out[at * p.value_dim];
        attend(at, i);
        Numbers grad(p.slots);
        double delta = p.grad_lse.empty() ? 0 : -p.grad_lse[at];
        for (int64_t m = 0; m < p.slots; ++m) {
          if (!is_open(i, m)) continue;
          for (int64_t d = 0; d < p.value_dim; ++d) {
            grad[m] += grad_out[d] * values[m * p.value_dim + d];
            add(grad_values[m * p.value_dim + d], weights[m] * grad_out[d]);
          }
          grad[m] = rounded(grad[m]);
          if (p.out.empty()) delta += weights[m] * grad[m];
        }
        for (int64_t d = 0; d < p.value_dim && !p.out.empty(); ++d) delta += grad_out[d] * p.out[at * p.value_dim + d];
        for (int64_t m = 0; m < p.slots; ++m) {
          if (!is_open(i, m)) continue;
          const double grad_logit = rounded(p.scale * rounded(weights[m] * (grad[m] - delta)));
          for (int64_t d = 0; d < p.key_dim; ++d) {
            r.grad_query[at * p.key_dim + d] += grad_logit * keys[m * p.key_dim + d];
            add(grad_keys[m * p.key_dim + d], grad_logit * query[d]);
          }
        }
        for (int64_t d = 0; d < p.key_dim; ++d) {
          r.grad_query[at * p.key_dim + d] = rounded(r.grad_query[at * p.key_dim + d]);
        }
      }
      for (int64_t m = p.slots - 1; m >= 0; --m) {
        const double gate = gates[i * p.slots + m];
        if (std::isnan(gate) || gate == 0) continue;
        take_back(m, gate, values, grad_values, r.grad_value, p.value_dim, i);
        take_back(m, gate, keys, grad_keys, r.grad_key, p.key_dim, i);
      }
    }
    for (int64_t m = 0; m < p.slots && p.given; ++m) {
      for (int64_t d = 0; d < p.key_dim; ++d) {
        r.grad_given_key[(first + m) * p.key_dim + d] = was_open(m) ? grad_keys[m * p.key_dim + d] : 0;
      }
      for (int64_t d = 0; d < p.value_dim; ++d) {
        r.grad_given_value[(first + m) * p.value_dim + d] = was_open(m) ? grad_values[m * p.value_dim + d] : 0;
      }
    }
  }

 private:
  double rounded(double x) const { return p.rounding ? p.rounding(x) : x; }
  void add(double& to, double x) const { to = rounded(to + rounded(x)); }
  bool was_open(int64_t m) const { return s.position > cells.slot_opening(m); }
  bool is_open(int64_t i, int64_t m) const { return !std::isnan(gates[i * p.slots + m]); }
  int64_t query_at(int64_t i, int64_t j) const {
    return p.token_at(p.query_heads, s.batch, head * p.group() + j, s.row + i);
  }
  int64_t key_at(int64_t i) const { return p.token_at(p.kv_heads, s.batch, head, s.row + i); }

  void write(int64_t m, double gate, Numbers& contents, const Numbers& tokens, int64_t dim, int64_t i) {
    for (int64_t d = 0; d < dim; ++d) {
      double& content = contents[m * dim + d];
      const double token = tokens[key_at(i) * dim + d];
      before.push_back(content);
      content = gate == 1 ? token : rounded(content + rounded(rounded(gate) * rounded(token - content)));
    }
  }
  void take_back(int64_t m, double gate, Numbers& contents, Numbers& grads, Numbers& grad_tokens, int64_t dim,
                 int64_t i) {
    for (int64_t d = dim - 1; d >= 0; --d) {
      contents[m * dim + d] = before.back();
      before.pop_back();
      double& grad = grads[m * dim + d];
      const double share = rounded(rounded(gate) * grad);
      add(grad_tokens[key_at(i) * dim + d], share);
      grad = gate == 1 ? 0 : rounded(grad - share);
    }
  }
  // Sets `weights` of the open slots, and lse.
  void attend(int64_t at, int64_t i) {
    weights.assign(p.slots, 0);
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t m = 0; m < p.slots; ++m) {
      if (!is_open(i, m)) continue;
      for (int64_t d = 0; d < p.key_dim; ++d) weights[m] += p.query[at * p.key_dim + d] * keys[m * p.key_dim + d];
      weights[m] = rounded(p.scale * rounded(weights[m]));
      top = std::fmax(top, weights[m]);
    }
    for (int64_t m = 0; m < p.slots; ++m) {
      if (is_open(i, m)) total += weights[m] = std::exp(weights[m] - top);
    }
    for (double& weight : weights) weight = rounded(weight / total);
    lse = top + std::log(total);
  }

  const Problem& p;
  const Sequence& s;
  const int64_t index, head;
  const Cells& cells;
  Numbers gates, keys, values, before, weights;
  double lse = 0;
};

inline Results run(const Problem& p, bool backward) {
  Results r;
  const int64_t queries = p.batch * p.query_heads * p.tokens, tokens = p.batch * p.kv_heads * p.tokens;
  r.out.assign(queries * p.value_dim, 0);
  r.lse.assign(queries, 0);
  r.state_key.assign(p.states() * p.key_dim, 0);
  r.state_value.assign(p.states() * p.value_dim, 0);
  if (backward) {
    r.grad_query.assign(queries * p.key_dim, 0);
    r.grad_key.assign(tokens * p.key_dim, 0);
    r.grad_value.assign(tokens * p.value_dim, 0);
    r.grad_given_key.assign(p.states() * p.key_dim, 0);
    r.grad_given_value.assign(p.states() * p.value_dim, 0);
  }
  for (size_t i = 0; i < p.sequences.size(); ++i) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      Lane lane(p, static_cast<int64_t>(i), head);
      lane.forward(r);
      if (backward) lane.backward(r);
    }
  }
  return r;
}

}  // namespace reference
