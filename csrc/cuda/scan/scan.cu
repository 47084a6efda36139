// This file runs any kernel as a scan over time, cut into stretches (parts of a sequence) that run in parallel. It
// first finds the contents S of the slots at the beginning of each stretch. Then three scans serve both sides (key and
// value), forward and backward:
//     dot:     z_t[m] = a_t . S_t[m]            logits (query, key) and the same of (grad_out, value)
//     mix:     y_t = sum_m w_t[m] S_t[m]        out (probabilities, value) and grad_query (grad_logits, key)
//     adjoint: G_t[m] = w_t[m] a_t + (1 - g_{t+1}[m]) G_{t+1}[m],  y_t = sum_m g_t[m] G_t[m]     grad_key, grad_value
// Here g is the gate, the share of a token that a slot takes. Each scan keeps its slots in registers. Logits and
// weights live for as many stretches at once as a bounded workspace holds. The rows of a stretch are its (token, query
// head of the group) pairs; the heads of a group share the slots.
#include <algorithm>
#include <utility>

#include "common/launch.cuh"
#include "scan/adjoint.cuh"
#include "scan/boundaries.cuh"
#include "scan/dot.cuh"
#include "scan/mix.cuh"
#include "scan/softmax.cuh"

namespace blurry_attn::cuda {
namespace {

// A Scan launches the scans of one call.
template <typename storage, typename compute>
struct Scan {
  const Problem& p;
  ScanPlan plan;
  int64_t stretches;  // stretches whose logits are held at once

  explicit Scan(const Problem& problem) : p(problem), plan(problem), stretches(plan.at_once(problem)) {}

  bool whole(const View& view) const { return in_packs(view, 4, sizeof(storage)); }
  Side side(const View& tokens, int64_t dim, const void* given, compute* boundaries) const {
    return {tokens, whole(tokens), static_cast<int>(dim), given, boundaries};
  }
  // stage() completes the shape of a block that stages rows of `numbers` gates and weights and of `elements` of
  // tensors. It returns the bytes of its two buffers.
  static int64_t stage(Shape& shape, int numbers, int elements) {
    const int64_t bytes_per_row = Chunk<storage, compute>::bytes_per_row(numbers, elements);
    shape.chunk = rows_that_fit(bytes_per_row);
    return 2 * shape.chunk * bytes_per_row;
  }

  void boundaries(const Side& side, void* end_state) const {
    compute* end = static_cast<compute*>(end_state);
    if (p.kernel == Kernel::fejer) {
      const int tiles = tiles_of(p.slots * side.dim);
      launch("scan_chains", scan_chains<storage, compute>, p.sequences * p.kv_heads * tiles, kMaxThreads, 0, p.stream,
             p, plan, side, tiles, end);
      return;
    }
    Shape shape = make_shape(side.dim, kDimsPerThread, p.slots, kSlotsPerThread);
    const int64_t bytes = stage(shape, kSlotsPerThread * shape.along, kDimsPerThread * shape.across);
    launch("scan_boundaries", scan_boundaries<storage, compute>, plan.count * (end ? 2 : 1) * p.kv_heads * shape.tiles,
           shape.threads(), bytes, p.stream, p, plan, side, shape, plan.count, end);
  }
  void dot(const Side& side, const View& rows, double scale, int64_t first, int64_t count, compute* results) const {
    Shape shape = make_shape(side.dim, kDimsPerThread, p.slots, kSlotsPerThread);
    const int64_t bytes = stage(shape, kSlotsPerThread * shape.along, 2 * kDimsPerThread * shape.across);
    launch("scan_dot", scan_dot<storage, compute>, count * p.kv_heads * shape.tiles, shape.threads(), bytes, p.stream,
           p, plan, side, shape, first, rows, whole(rows), static_cast<compute>(scale), results);
  }
  // with_mix_shape() calls body(tile width as a type, shape, bytes) with the tile that holds all slots.
  template <typename body_type>
  void with_mix_shape(const Side& side, const body_type& body) const {
    const auto call = [&](auto dims) {
      constexpr int kDims = decltype(dims)::value, kSlots = kMixNumbers / kDims;
      Shape shape = make_shape(p.slots, kSlots, side.dim, kDims);
      const int64_t bytes = stage(shape, 2 * kSlots * shape.across, kDims * shape.along);
      body(dims, shape, bytes);
    };
    if (p.slots <= kMixNumbers / 4 * kWarp) return call(std::integral_constant<int, 4>());
    call(std::integral_constant<int, 2>());
  }
  void mix(const Side& side, int64_t first, int64_t count, const compute* weights, const View& results) const {
    with_mix_shape(side, [&](auto dims, const Shape& shape, int64_t shared_bytes) {
      launch("scan_mix", scan_mix<storage, compute, decltype(dims)::value>, count * p.kv_heads * shape.tiles,
             shape.threads(), shared_bytes, p.stream, p, plan, side, shape, first, weights, results);
    });
  }
  template <bool local>
  void adjoint(const Side& side, const Adjoint& adjoint, int64_t first, int64_t count) const {
    with_mix_shape(side, [&](auto dims, const Shape& shape, int64_t shared_bytes) {
      launch(local ? "scan_adjoint<local>" : "scan_adjoint",
             scan_adjoint<storage, compute, decltype(dims)::value, local>, count * p.kv_heads * shape.tiles,
             shape.threads(), shared_bytes, p.stream, p, plan, side, shape, first, adjoint);
    });
  }
  void carries(const Side& side, const Adjoint& adjoint, int64_t first, int64_t count, const compute* decays) const {
    const int tiles = tiles_of(p.slots * side.dim);
    launch("scan_carries", scan_carries<compute>, count * p.kv_heads * tiles, kMaxThreads, 0, p.stream, p, plan, tiles,
           first, first + count, decays, side, adjoint);
  }
  // with_slots_per_lane() calls body(slots per lane, as a type) for the kernels that hold a row in a warp.
  template <typename body_type>
  void with_slots_per_lane(const body_type& body) const {
    if (p.slots <= 2 * kWarp) return body(std::integral_constant<int, 2>());
    if (p.slots <= 8 * kWarp) return body(std::integral_constant<int, 8>());
    static_assert(kMostSlots == 32 * kWarp);
    body(std::integral_constant<int, 32>());
  }
  int row_tiles() const { return static_cast<int>((plan.rows * (p.query_heads / p.kv_heads) + 63) / 64); }

  void forward(const Outputs& outputs, compute* memory) const {
    compute* boundary_keys = memory;
    compute* boundary_values = boundary_keys + plan.slot_elements(p, p.key_dim);
    compute* weights = boundary_values + plan.slot_elements(p, p.value_dim);
    const Side keys = side(p.key, p.key_dim, p.state_key, boundary_keys);
    const Side values = side(p.value, p.value_dim, p.state_value, boundary_values);
    boundaries(keys, outputs.state_key);
    boundaries(values, outputs.state_value);
    if (p.tokens == 0) return;
    for (int64_t first = 0; first < plan.count; first += stretches) {
      const int64_t count = first + stretches < plan.count ? stretches : plan.count - first;
      dot(keys, p.query, p.scale, first, count, weights);
      with_slots_per_lane([&](auto per_lane) {
        launch("softmax_rows", softmax_rows<compute, decltype(per_lane)::value>, count * p.kv_heads * row_tiles(),
               kMaxThreads, 0, p.stream, p, plan, row_tiles(), first, weights, static_cast<compute*>(outputs.lse));
      });
      mix(values, first, count, weights, outputs.out);
    }
  }
  int64_t forward_elements() const {
    return plan.slot_elements(p, p.key_dim + p.value_dim) + stretches * plan.weights_per_stretch(p);
  }

  void backward(const Gradients& gradients, compute* memory) const {
    compute* boundary_keys = memory;
    compute* boundary_values = boundary_keys + plan.slot_elements(p, p.key_dim);
    compute* key_carries = boundary_values + plan.slot_elements(p, p.value_dim);
    compute* value_carries = key_carries + plan.slot_elements(p, p.key_dim);
    compute* probabilities = value_carries + plan.slot_elements(p, p.value_dim);
    compute* grad_logits = probabilities + stretches * plan.weights_per_stretch(p);
    compute* decays = grad_logits + stretches * plan.weights_per_stretch(p);
    const Side keys = side(p.key, p.key_dim, p.state_key, boundary_keys);
    const Side values = side(p.value, p.value_dim, p.state_value, boundary_values);
    const Adjoint key_adjoint{p.query,       whole(p.query),     grad_logits, key_carries, gradients.grad_state_key,
                              gradients.key, gradients.state_key};
    const Adjoint value_adjoint{gradients.grad_out,   whole(gradients.grad_out),  probabilities,
                                value_carries,        gradients.grad_state_value, gradients.value,
                                gradients.state_value};
    boundaries(keys, nullptr);
    boundaries(values, nullptr);
    launch("scan_decays", scan_decays<compute>, plan.count * p.kv_heads * tiles_of(p.slots), kMaxThreads, 0, p.stream,
           p, plan, tiles_of(p.slots), decays);
    for (int64_t end = plan.count; end > 0; end -= stretches) {
      const int64_t first = end > stretches ? end - stretches : 0, count = end - first;
      dot(keys, p.query, p.scale, first, count, probabilities);
      dot(values, gradients.grad_out, 1, first, count, grad_logits);
      with_slots_per_lane([&](auto per_lane) {
        launch("softmax_rows_backward", softmax_rows_backward<compute, decltype(per_lane)::value>,
               count * p.kv_heads * row_tiles(), kMaxThreads, 0, p.stream, p, plan, row_tiles(), first,
               static_cast<compute>(p.scale), static_cast<const compute*>(gradients.lse),
               static_cast<const compute*>(gradients.grad_lse), probabilities, grad_logits);
      });
      mix(keys, first, count, grad_logits, gradients.query);
      for (const auto& [side, gradient] : {std::pair(keys, key_adjoint), std::pair(values, value_adjoint)}) {
        adjoint<true>(side, gradient, first, count);
        carries(side, gradient, first, count, decays);
        adjoint<false>(side, gradient, first, count);
      }
    }
  }
  int64_t backward_elements() const {
    return 2 * plan.slot_elements(p, p.key_dim + p.value_dim) + 2 * stretches * plan.weights_per_stretch(p) +
           plan.slot_elements(p, 1);
  }
};

}  // namespace

int64_t forward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  for_type(problem.dtype, [&](auto storage, auto compute) {
    bytes = Scan<decltype(storage), decltype(compute)>(problem).forward_elements() * sizeof(compute);
  });
  return bytes;
}
int64_t backward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  for_type(problem.dtype, [&](auto storage, auto compute) {
    bytes = Scan<decltype(storage), decltype(compute)>(problem).backward_elements() * sizeof(compute);
  });
  return bytes;
}
void scan_forward(const Problem& problem, const Outputs& outputs, void* workspace) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    Scan<decltype(storage), number>(problem).forward(outputs, static_cast<number*>(workspace));
  });
}
void scan_backward(const Problem& problem, const Gradients& gradients, void* workspace) {
  for_type(problem.dtype, [&](auto storage, auto compute) {
    using number = decltype(compute);
    Scan<decltype(storage), number>(problem).backward(gradients, static_cast<number*>(workspace));
  });
}

}  // namespace blurry_attn::cuda
