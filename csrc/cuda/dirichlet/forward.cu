// This file computes the forward of "dirichlet" on tensor cores, for bfloat16 and float16. A block walks over a stretch
// (a part of a sequence) in patches of 16 tokens, with the slots in registers.
#include "common/repair.cuh"
#include "dirichlet/patches.cuh"

namespace blurry_attn::cuda {
namespace {

template <typename storage_type, int dim, int warps>
struct Config {
  using storage = storage_type;
  static constexpr int kDim = dim, kWarps = warps, kThreads = warps * kWarp;
  static constexpr int kBlocks = (dim <= 64 ? 12 : 8) / warps;
};

// Layout gives offsets in shared memory, in bytes: two stages of what is fetched, then what warps exchange.
struct Layout {
  uint32_t queries, keys, values, rows, scores, parts, tops, bytes;

  template <typename config>
  BLURRY_HOST_DEVICE static constexpr Layout make() {
    constexpr uint32_t kTile = kPatch * Rows<config::kDim>::kBytes, count = config::kWarps;
    Layout l{};
    uint32_t at = 0;
    l.queries = at;
    at += 2 * kTile;
    l.keys = at;
    at += 2 * kTile;
    l.values = at;
    at += 2 * kTile;
    l.rows = at;  // [stage][slot]
    at += 2 * count * kWarpSlots * PatchRow::kWords * 4;
    l.scores = at;  // [warp]
    at += count * kScoreFloats * 4;
    l.parts = at;  // parts of the output, [warp][token][element]
    at += count * kPatch * (config::kDim + 8) * 4;
    l.tops = at;  // largest logit and sum over the slots of a warp, [warp][token]
    at += count * kPatch * 8;
    l.bytes = at;
    return l;
  }
};

// SlotColumns are the contents of a warp's 16 slots, as columns, in float32.
template <typename storage, int dim>
struct SlotColumns {
  float content[dim / 16][2][4];

  template <typename at_type>
  __device__ __forceinline__ void load(const at_type& at) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < dim / 16; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        content[m][e / 4][e % 4] = at(8 * (e / 4) + 2 * q + e % 2, 16 * m + g + 8 * (e % 4 / 2));
      }
    }
  }
  // mix() computes sums += weights * content, a product over slots, for the 8 elements from 16 m + 8 half on.
  __device__ __forceinline__ void mix(float (&sums)[4], const uint32_t (&weights)[4], int m, int half) const {
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split<storage>(content[m][i][2 * half], content[m][i][2 * half + 1], high[i], low[i]);
    }
    mma<storage>(sums, weights, high[0], high[1]);
    mma<storage>(sums, weights, low[0], low[1]);
  }
  __device__ __forceinline__ void write(const uint32_t* rows, const EndWeights& weights, uint32_t patch) {
    const PatchReader<dim> reader;
    float left[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int slot = c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
      left[c] = __uint_as_float(rows[slot * PatchRow::kWords + PatchRow::kLeft]);
    }
#pragma unroll
    for (int m = 0; m < dim / 16; ++m) {
      uint32_t x[4];
      reader.load_transposed(x, patch, m);
      const uint32_t tokens[4] = {x[0], x[2], x[1], x[3]};  // the left operand: elements are rows here
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&sums)[4] = content[m][half];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] *= left[2 * half + e % 2];
        mma<storage>(sums, tokens, weights.high[half], weights.high[2 + half]);
        mma<storage>(sums, tokens, weights.low[half], weights.low[2 + half]);
      }
    }
  }
};

template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    dirichlet_walk(Problem p, Outputs outputs, WalkPlan plan, RowTables tables, uint8_t* unsound) {
  using storage = typename config::storage;
  constexpr int kDim = config::kDim, kChunks = kDim / 8, kPartStride = kDim + 8;
  constexpr uint32_t kTile = kPatch * Rows<kDim>::kBytes;
  constexpr int kWarps = config::kWarps, kThreads = config::kThreads;
  constexpr Layout layout = Layout::make<config>();
  const int warp = threadIdx.x / kWarp;
  const int head = static_cast<int>(blockIdx.x % p.kv_heads);
  __shared__ PatchWalk walk;
  __shared__ int openings[kMaxPatchSlots];
  if (threadIdx.x == 0) {
    walk = PatchWalk(p, plan, blockIdx.x / p.kv_heads, head);
    unsound[walk.stretch * p.kv_heads + head] = 0;
  }
  __syncthreads();
  if (walk.own_begin >= walk.own_end) return;
  const int slots = static_cast<int>(p.slots);
  const int key_dim = static_cast<int>(p.key_dim), value_dim = static_cast<int>(p.value_dim);
  const uint32_t shared = shared_address(shared_memory);
  uint32_t* const all_rows = reinterpret_cast<uint32_t*>(shared_memory + layout.rows);
  constexpr int kStageWords = kWarps * kWarpSlots * PatchRow::kWords;

  const RowFetch<storage, true> row_fetch{p, tables, walk};
  row_fetch.clear(all_rows, kWarps * kWarpSlots);
  row_fetch.clear(all_rows + kStageWords, kWarps * kWarpSlots);
  for (int m = threadIdx.x; m < kWarps * kWarpSlots; m += kThreads) {
    openings[m] = m < slots ? walk.since(walk.cells.slot_opening(m)) : INT32_MAX;
  }
  SlotRows<storage, kDim> keys;
  SlotColumns<storage, kDim> values;
  const auto given = [&](const void* state, int dim) {
    return [&, state, dim](int i, int d) {
      const int slot = warp * kWarpSlots + i;
      if (!state || !walk.from_begin || slot >= slots || d >= dim || !walk.given_before(slot)) return 0.f;
      return static_cast<const float*>(state)[((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d];
    };
  };
  keys.load(given(p.state_key, key_dim));
  values.load(given(p.state_value, value_dim));

  const storage* const first_key = row_of<const storage>(p.key, walk.batch, head, walk.row);
  const storage* const first_value = row_of<const storage>(p.value, walk.batch, head, walk.row);
  const storage* const first_query = row_of<const storage>(p.query, walk.batch, walk.first_head, walk.row);
  const auto fetch = [&](int time, int stage) {
    fetch_patch<storage, kDim, kThreads>(shared + layout.keys + stage * kTile, p.key, first_key, time, walk.begin,
                                         walk.end, key_dim);
    fetch_patch<storage, kDim, kThreads>(shared + layout.values + stage * kTile, p.value, first_value, time, walk.begin,
                                         walk.end, value_dim);
    row_fetch.fetch(all_rows + stage * kStageWords, time);
  };
  const auto fetch_query = [&](int time, int i, int stage) {
    if (time + kPatch <= walk.own_begin) return;
    fetch_patch<storage, kDim, kThreads>(shared + layout.queries + stage * kTile, p.query,
                                         first_query + i * p.query.head, time, walk.own_begin, walk.own_end, key_dim);
  };
  bool sound = true;

  fetch(0, 0);
  fetch_query(0, 0, 0);
  commit_copies();
  for (int time = 0, stage = 0, query_stage = 0; time < walk.own_end; time += kPatch, stage ^= 1) {
    const bool attends = time + kPatch > walk.own_begin;
    const uint32_t* const rows = all_rows + stage * kStageWords + warp * kWarpSlots * PatchRow::kWords;
    const uint32_t key_patch = shared + layout.keys + stage * kTile;
    const uint32_t value_patch = shared + layout.values + stage * kTile;
    for (int i = 0; i < (attends ? walk.group : 1); ++i, query_stage ^= 1) {
      wait_copies<0>();
      __syncthreads();  // the fetched stage is there, and the one before is done with
      if (attends && i + 1 < walk.group) {
        fetch_query(time, i + 1, query_stage ^ 1);
      } else if (time + kPatch < walk.own_end) {
        fetch(time + kPatch, stage ^ 1);
        fetch_query(time + kPatch, 0, query_stage ^ 1);
      }
      commit_copies();
      if (!attends) continue;
      const int thread = hidden(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, q = lane % 4;
      float* const scores = reinterpret_cast<float*>(shared_memory + layout.scores) + warp * kScoreFloats;
      float* const parts = reinterpret_cast<float*>(shared_memory + layout.parts);
      float2* const tops = reinterpret_cast<float2*>(shared_memory + layout.tops);

      const PatchReader<kDim> reader;
      float z[1][2][4] = {}, raw[2][4] = {};
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t queries[4], tokens[4];
        reader.load(queries, shared + layout.queries + query_stage * kTile, m);
        reader.load(tokens, key_patch, m);
        keys.multiply(z[0], queries, m);
        mma<storage>(raw[0], queries, tokens[0], tokens[2]);
        mma<storage>(raw[1], queries, tokens[1], tokens[3]);
      }
      store_scores(scores, raw);
      __syncwarp();
      advance<1>(z, rows, scores);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = time + g + 8 * half;
        float top = -INFINITY, total = 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = z[0][c / 2][2 * half + c % 2];
          const bool open = token >= openings[warp * kWarpSlots + c / 2 * 8 + 2 * q + c % 2];
          x = open ? x * walk.factor : -INFINITY;
          top = fmaxf(top, x);
        }
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = z[0][c / 2][2 * half + c % 2];
          x = exp2_fast(x - shift);
          total += x;
        }
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (q == 0) tops[warp * kPatch + g + 8 * half] = make_float2(top, total);
      }
      float shares[1][2][4] = {};
      advance_back<storage, 1>(z, shares, rows);
      uint32_t slot_weights[4], token_weights[4];
      pack_left<storage>(slot_weights, z[0]);
      pack_left<storage>(token_weights, shares[0]);
      float* const part = parts + (warp * kPatch + g) * kPartStride + 2 * q;
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t tokens[4];
        reader.load_transposed(tokens, value_patch, m);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sums[4] = {};
          mma<storage>(sums, token_weights, tokens[2 * half], tokens[2 * half + 1]);
          values.mix(sums, slot_weights, m, half);
          float* const to = part + 16 * m + 8 * half;
          *reinterpret_cast<float2*>(to) = make_float2(sums[0], sums[1]);
          *reinterpret_cast<float2*>(to + 8 * kPartStride) = make_float2(sums[2], sums[3]);
        }
      }
      __syncthreads();  // all warps' parts are there

      const int64_t query_head = walk.first_head + i;
      for (int item = thread; item < kPatch * kChunks; item += kThreads) {
        const int token = item / kChunks, d = item % kChunks * 8;
        if (!walk.owns(time + token) || d >= value_dim) continue;
        float top = -INFINITY, total = 0.f, sums[8] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w * kPatch + token].x);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 own = tops[w * kPatch + token];
          const float weight = exp2_fast(own.x - top);
          const float4* const from = reinterpret_cast<const float4*>(parts + (w * kPatch + token) * kPartStride + d);
          const float4 low = from[0], high = from[1];
          total += weight * own.y;
          sums[0] += weight * low.x;
          sums[1] += weight * low.y;
          sums[2] += weight * low.z;
          sums[3] += weight * low.w;
          sums[4] += weight * high.x;
          sums[5] += weight * high.y;
          sums[6] += weight * high.z;
          sums[7] += weight * high.w;
        }
        const float inverse = 1.f / total;
        float check = 0.f;  // NaN if anything is not finite
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums[e] *= inverse;
          check += 0.f * sums[e];
        }
        sound = sound && check == 0.f;
        storage* const to = row_of<storage>(outputs.out, walk.batch, query_head, walk.row + time + token) + d;
        store_global(to, make_uint4(pack<storage>(sums[0], sums[1]), pack<storage>(sums[2], sums[3]),
                                    pack<storage>(sums[4], sums[5]), pack<storage>(sums[6], sums[7])));
        if (d == 0) {
          static_cast<float*>(
              outputs.lse)[(walk.batch * p.query_heads + query_head) * p.tokens + walk.row + time + token] =
              (top + log2_fast(total)) * 0.693147181f;
        }
      }
    }
    if (time + kPatch >= walk.own_end) break;
    const EndWeights weights(rows);
    keys.write(rows, weights, key_patch);
    values.write(rows, weights, value_patch);
  }
  if (!sound) unsound[walk.stretch * p.kv_heads + head] = 1;
}

// dirichlet_state computes the state after the last token. A gate of 1 replaces a content, so one period is enough.
template <typename storage>
__global__ void __launch_bounds__(256)
    dirichlet_state(Problem p, View tokens, int dim, const float* state, int tiles, float* end) {
  const int64_t element = blockIdx.x % tiles * 256 + threadIdx.x, head = blockIdx.x / tiles % p.kv_heads;
  const Sequence sequence(p, blockIdx.x / tiles / p.kv_heads);
  if (element >= p.slots * dim) return;
  const int slot = static_cast<int>(element / dim), d = static_cast<int>(element % dim);
  const Law<float> law(p, head);
  const int64_t at = ((sequence.index * p.kv_heads + head) * p.slots + slot) * dim + d;
  const int64_t period = law.cells.window(), opening = law.cells.slot_opening(slot);
  int64_t from = sequence.end() - period;
  float content = 0.f;
  if (from <= sequence.position) {
    from = sequence.position;
    if (state && from > opening) content = state[at];
  }
  const storage* row = row_of<const storage>(tokens, sequence.batch, head, sequence.row + from - sequence.position) + d;
  const int count = static_cast<int>(sequence.end() - from), window = static_cast<int>(period);
  const int64_t since = from - law.cells.centre(slot), left = opening - from;
  int offset = static_cast<int>(since - floor_div(since, period) * period);
  const int opens = left < 0 ? -1 : left < count ? static_cast<int>(left) : count;
#pragma unroll 4
  for (int t = 0; t < count; ++t, row += tokens.token) {
    const float gate = t > opens ? law.gates[offset] : t == opens ? 1.f : 0.f;
    content = written(content, to_compute<float>(*row), gate);
    offset = offset + 1 < window ? offset + 1 : 0;
  }
  end[at] = content;
}

template <typename body_type>
void with_config(const Problem& p, const body_type& body) {
  for_half(p.dtype, [&](auto storage) {
    using type = decltype(storage);
    const bool narrow = p.key_dim <= 64 && p.value_dim <= 64, few = patch_warps(p) == 2;
    if (narrow && few) return body(Config<type, 64, 2>());
    if (narrow) return body(Config<type, 64, 4>());
    if (few) return body(Config<type, 128, 2>());
    body(Config<type, 128, 4>());
  });
}

Plans make_plans(const Problem& p) { return {{make_patch_plan(p, false)}, false}; }

}  // namespace

const char* dirichlet_refusal(const Problem& p) {
  if (p.kernel != Kernel::dirichlet) return "the kernel is not \"dirichlet\"";
  if (const char* const refusal = half_refusal(p)) return refusal;
  if (p.slots > kMaxPatchSlots) return "there are more than 64 slots";
  bool fits = true;
  with_config(p, [&](auto config) { fits = Layout::make<decltype(config)>().bytes <= shared_memory_limit(); });
  return fits ? nullptr : "a patch does not fit into shared memory";
}

int64_t dirichlet_forward_workspace(const Problem& p) {
  RowTables tables;
  return (repair_workspace(p, make_plans(p)) + 15) / 16 * 16 + tables.make(p, nullptr);
}

void dirichlet_forward(const Problem& p, const Outputs& outputs, void* workspace) {
  const Plans plans = make_plans(p);
  const WalkPlan& plan = plans.plan[0];
  uint8_t* const unsound = static_cast<uint8_t*>(workspace);
  RowTables tables;
  tables.make(p, unsound + (repair_workspace(p, plans) + 15) / 16 * 16);
  if (p.tokens > 0) {
    with_config(p, [&](auto config_tag) {
      using config = decltype(config_tag);
      launch_rows<typename config::storage>(p, tables);
      constexpr int kBytes = Layout::make<config>().bytes;
      allow_shared_memory<dirichlet_walk<config>>();
      launch("dirichlet_walk", dirichlet_walk<config>, plan.count * p.kv_heads, config::kThreads, kBytes, p.stream, p,
             outputs, plan, tables, unsound);
      launch_repair<typename config::storage>(p, outputs, plans, workspace);
    });
  }
  if (!outputs.state_key) return;
  for_half(p.dtype, [&](auto storage) {
    const auto state = [&](const View& tokens, int64_t dim, const void* given, void* end) {
      const int tiles = static_cast<int>((p.slots * dim + 255) / 256);
      launch("dirichlet_state", dirichlet_state<decltype(storage)>, p.sequences * p.kv_heads * tiles, 256, 0, p.stream,
             p, tokens, static_cast<int>(dim), static_cast<const float*>(given), tiles, static_cast<float*>(end));
    };
    state(p.key, p.key_dim, p.state_key, outputs.state_key);
    state(p.value, p.value_dim, p.state_value, outputs.state_value);
  });
}

}  // namespace blurry_attn::cuda
