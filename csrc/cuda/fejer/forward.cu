// This file is the forward of "fejer" on tensor cores, for bfloat16 and float16. One walk over time (walk.cuh) reads
// key and value once and computes the output. A block has one stretch of a sequence and key/value head. Heads are
// launched by classes (classes.cuh). Each launch of walks may be followed by a comparison at seams, where stretches
// meet, and a second walk. Then one launch computes the final state, and one repairs sequences with numbers that are
// not finite (common/repair.cuh). docs/design/glossary.md defines cell, lobe, lap, patch, walk and seam.
#include <algorithm>
#include <numeric>

#include "common/repair.cuh"
#include "fejer/walk.cuh"

namespace blurry_attn::cuda {
namespace {

// fejer_state computes the state after the last token, in float32, with a thread for each element of a slot.
template <typename storage>
__global__ void __launch_bounds__(256)
    fejer_state(Problem p, View tokens, int dim, const float* state, int tiles, float* end) {
  const int64_t element = blockIdx.x % tiles * 256 + threadIdx.x, head = blockIdx.x / tiles % p.kv_heads;
  const Sequence sequence(p, blockIdx.x / tiles / p.kv_heads);
  if (element >= p.slots * dim) return;
  const int slot = static_cast<int>(element / dim), d = static_cast<int>(element % dim);
  const Law<float> law(p, head);
  const int64_t at = ((sequence.index * p.kv_heads + head) * p.slots + slot) * dim + d;
  // Where no echo is left, a slot holds nothing from before its last whole lobe.
  const int64_t lap = sequence.end() - law.cells.window() - 2 * law.cells.resolution;
  const int64_t from = p.laws[head].echo == 0 && lap > sequence.position ? lap : sequence.position;
  float content = 0.f;
  if (state && law.is_open(slot, sequence.position - 1)) content = state[at];
  const storage* rows = row_of<const storage>(tokens, sequence.batch, head, sequence.row) + d * tokens.element;
  walk_slot(law, slot, from, sequence.end(), [&](int64_t t, float gate) {
    content = written(content, to_compute<float>(rows[(t - sequence.position) * tokens.token]), gate);
  });
  end[at] = content;
}

// Calls body(config{}) with the shapes for one class of heads.
template <typename storage, int dim, int flux, typename body_type>
void with_columns(const Problem& p, const body_type& body) {
  if (p.slots <= 32) return body(Config<storage, dim, flux, 32, false>());
  if (p.slots <= 64) return body(Config<storage, dim, flux, 64, false>());
  return body(Config<storage, dim, flux, 64, true>());
}
template <typename storage, int dim, typename body_type>
void with_flux(const Problem& p, int flux, const body_type& body) {
  if (flux <= 3) return with_columns<storage, dim, 3>(p, body);
  if (flux <= 5) return with_columns<storage, dim, 5>(p, body);
  if (flux == kEveryOther) return with_columns<storage, dim, kEveryOther>(p, body);
  if (flux <= 9) return with_columns<storage, dim, 9>(p, body);
  return with_columns<storage, dim, kPatch>(p, body);
}
template <typename body_type>
void with_config(const Problem& p, int flux, const body_type& body) {
  if (p.dtype == DType::bfloat16) {
    if (is_wide(p)) return with_flux<__nv_bfloat16, 128>(p, flux, body);
    return with_flux<__nv_bfloat16, 64>(p, flux, body);
  }
  if (is_wide(p)) return with_flux<__half, 128>(p, flux, body);
  return with_flux<__half, 64>(p, flux, body);
}

Plans make_plans(const Problem& p, const std::vector<HeadClass>& classes) {
  Plans plans{};
  for (const HeadClass& c : classes) {
    plans.plan[c.number] = make_plan(p, c);
    for (int i = 0; i < c.heads.count; ++i) plans.of_head[c.heads.head[i]] = static_cast<uint8_t>(c.number);
  }
  return plans;
}

}  // namespace

const char* fejer_refusal(const Problem& p) {
  if (p.kernel != Kernel::fejer) return "the kernel is not \"fejer\"";
  if (const char* const refusal = half_refusal(p)) return refusal;
  if (p.query_heads > INT32_MAX) return "there are more than 2^31 query heads";
  const int64_t limit = shared_memory_limit();
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const int64_t r = p.host_laws[h].cells.resolution;
    bool fits = true;
    with_config(p, flux_of(head_class(p.host_laws[h])), [&](auto config) {
      fits = Layout::make<decltype(config)>(static_cast<int>(p.slots), static_cast<int>(r)).bytes <= limit;
    });
    if (!fits) return "the slots do not fit into shared memory";
  }
  return nullptr;
}

int64_t fejer_forward_workspace(const Problem& p) {
  const std::vector<HeadClass> classes = head_classes(p, Kept(), Task::forward);
  const Plans plans = make_plans(p, classes);
  int64_t bytes = repair_workspace(p, plans);
  for (const HeadClass& c : classes) bytes += cell_seam_bytes(p, plans.plan[c.number], c);
  return bytes;
}

void fejer_forward(const Problem& p, const Outputs& outputs, void* workspace) {
  const Kept kept = outputs.kept ? Kept(p, outputs.kept) : Kept();
  const std::vector<HeadClass> classes = head_classes(p, kept, Task::forward);
  const Plans plans = make_plans(p, classes);
  uint8_t* const unsound = static_cast<uint8_t*>(workspace);
  uint8_t* seam_rows = unsound + repair_workspace(p, plans);
  if (p.tokens > 0) {
    two_at_once(p, classes, [&](const HeadClass& c, const Problem& problem) {
      const WalkPlan& plan = plans.plan[c.number];
      with_config(p, flux_of(c.number), [&](auto config) {
        if (outputs.kept && p.state_key) launch_given<decltype(config)>(problem, kept, c.heads);
        launch_walk<decltype(config)>("fejer_walk", problem, outputs, kept, plan, c, seam_rows, unsound);
      });
      seam_rows += cell_seam_bytes(p, plan, c);
    });
  }
  for_half(p.dtype, [&](auto storage_tag) {
    using storage = decltype(storage_tag);
    if (outputs.state_key) {
      const auto state = [&](const View& tokens, int64_t dim, const void* given, void* end) {
        const int tiles = static_cast<int>((p.slots * dim + 255) / 256);
        launch("fejer_state", fejer_state<storage>, p.sequences * p.kv_heads * tiles, 256, 0, p.stream, p, tokens,
               static_cast<int>(dim), static_cast<const float*>(given), tiles, static_cast<float*>(end));
      };
      state(p.key, p.key_dim, p.state_key, outputs.state_key);
      state(p.value, p.value_dim, p.state_value, outputs.state_value);
    }
    if (p.tokens > 0) launch_repair<storage>(p, outputs, plans, workspace);
  });
}

}  // namespace blurry_attn::cuda
