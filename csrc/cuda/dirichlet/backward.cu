// This file computes the backward of "dirichlet" on tensor cores, for bfloat16 and float16. A walk forward in time
// attends again and gives the gradient of query. It leaves the rest as weights: of the contents when a patch begins,
// and of the patch's tokens. A walk back over time then carries the gradients of the slots. It has no softmax, so its
// warps share nothing but weights.
#include <algorithm>

#include "dirichlet/patches.cuh"

namespace blurry_attn::cuda {
namespace {

// Weights are what the first walk leaves for the second, for each patch, query head and side (key or value). They are
// 16 x 16 for each warp's 16 slots, then for the patch's tokens, as the lanes of an mma have them. Where slots amplify
// much, low parts of the key side's slot weights follow.
struct Weights {
  uint4* words;
  int warps;  // with 16 slots each
  bool two_parts;

  Weights(const Problem& p, void* memory)
      : words(static_cast<uint4*>(memory)), warps(patch_warps(p)), two_parts(p.longest_window > 12 * p.slots) {}
  __host__ __device__ int size(int side) const { return (warps + 1 + (side == 0 && two_parts ? warps : 0)) * kWarp; }
  int64_t bytes(const Problem& p) const {
    return PatchWalk::patches(p) * p.query_heads * (size(0) + size(1)) * static_cast<int64_t>(sizeof(uint4));
  }
  // at() finds the weights of patch number `patch` of the walk.
  __device__ uint4* at(const Problem& p, const PatchWalk& walk, int patch, int64_t query_head, int side) const {
    return words + ((walk.patch + patch) * p.query_heads + query_head) * (size(0) + size(1)) + (side ? size(0) : 0);
  }
};

template <typename storage_type, int dim>
struct BackConfig {
  using storage = storage_type;
  static constexpr int kDim = dim, kThreads = dim / 16 * kWarp;
  static constexpr int kBlocks = dim <= 64 ? 4 : 2;
};
template <typename storage_type, int dim, int warps>
struct Config {
  using storage = storage_type;
  static constexpr int kDim = dim;
  static constexpr int kWarps = warps, kThreads = warps * kWarp;  // threads of the walk forward
  static constexpr int kBlocks = (dim <= 64 ? 12 : 8) / warps;
  using Back = BackConfig<storage_type, dim>;
};

struct Layout {
  uint32_t queries, grads, keys, values, lses, rows, scores, parts, shares, sums, bytes;

  template <typename config>
  BLURRY_HOST_DEVICE static constexpr Layout make() {
    constexpr uint32_t kTile = kPatch * Rows<config::kDim>::kBytes, count = config::kWarps;
    Layout l{};
    uint32_t at = 0;
    l.queries = at;  // this and the next three are [stage]
    at += 2 * kTile;
    l.grads = at;
    at += 2 * kTile;
    l.keys = at;
    at += 2 * kTile;
    l.values = at;
    at += 2 * kTile;
    l.lses = at;  // [stage][lse, its gradient][token]
    at += 2 * 2 * kPatch * 4;
    l.rows = at;  // [stage][slot]
    at += 2 * count * kWarpSlots * PatchRow::kWords * 4;
    l.scores = at;  // [warp][side]
    at += count * 2 * kScoreFloats * 4;
    l.parts = at;  // parts of the gradient of query, [warp][token][element]
    at += count * kPatch * (config::kDim + 8) * 4;
    l.shares = at;  // parts of the tokens' weights, [warp][side][tile of 8 tokens][lane]
    at += count * 2 * 2 * kWarp * 16;
    l.sums = at;  // sums of probabilities and of probability * gradient, [warp][token]
    at += count * kPatch * 8;
    l.bytes = at;
    return l;
  }
};

template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    dirichlet_weights(Problem p, Gradients gradients, WalkPlan plan, RowTables tables, Weights left) {
  using storage = typename config::storage;
  constexpr int kDim = config::kDim, kChunks = kDim / 8, kPartStride = kDim + 8;
  constexpr uint32_t kTile = kPatch * Rows<kDim>::kBytes;
  constexpr int kWarps = config::kWarps, kThreads = config::kThreads;
  constexpr Layout layout = Layout::make<config>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int head = static_cast<int>(blockIdx.x % p.kv_heads);
  __shared__ PatchWalk walk;
  __shared__ int openings[kMaxPatchSlots];
  if (threadIdx.x == 0) walk = PatchWalk(p, plan, blockIdx.x / p.kv_heads, head);
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
  SlotRows<storage, kDim> keys, values;
  const auto given = [&](const void* state, int dim) {
    return [&, state, dim](int i, int d) {
      const int slot = warp * kWarpSlots + i;
      if (!state || !walk.from_begin || slot >= slots || d >= dim || !walk.given_before(slot)) return 0.f;
      return static_cast<const float*>(state)[((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d];
    };
  };
  keys.load(given(p.state_key, key_dim));
  values.load(given(p.state_value, value_dim));

  __shared__ const storage* first[4];  // rows of key, value, query and grad_out at time 0: here they cost no registers
  if (threadIdx.x == 0) {
    first[0] = row_of<const storage>(p.key, walk.batch, head, walk.row);
    first[1] = row_of<const storage>(p.value, walk.batch, head, walk.row);
    first[2] = row_of<const storage>(p.query, walk.batch, walk.first_head, walk.row);
    first[3] = row_of<const storage>(gradients.grad_out, walk.batch, walk.first_head, walk.row);
  }
  __syncthreads();
  const auto fetch = [&](int time) {
    const int stage = time / kPatch % 2;
    fetch_patch<storage, kDim, kThreads>(shared + layout.keys + stage * kTile, p.key, first[0], time, walk.begin,
                                         walk.end, key_dim);
    fetch_patch<storage, kDim, kThreads>(shared + layout.values + stage * kTile, p.value, first[1], time, walk.begin,
                                         walk.end, value_dim);
    row_fetch.fetch(all_rows + stage * kStageWords, time);
  };
  const auto fetch_query = [&](int time, int i, int stage) {
    if (time + kPatch <= walk.own_begin) return;
    fetch_patch<storage, kDim, kThreads>(shared + layout.queries + stage * kTile, p.query, first[2] + i * p.query.head,
                                         time, walk.own_begin, walk.own_end, key_dim);
    fetch_patch<storage, kDim, kThreads>(shared + layout.grads + stage * kTile, gradients.grad_out,
                                         first[3] + i * gradients.grad_out.head, time, walk.own_begin, walk.own_end,
                                         value_dim);
    const int token = time + lane % kPatch;
    const float* const from = static_cast<const float*>(lane < kPatch ? gradients.lse : gradients.grad_lse);
    if (warp == 0 && from) {
      const int64_t row = (walk.batch * p.query_heads + walk.first_head + i) * p.tokens + walk.row;
      float* const to = reinterpret_cast<float*>(shared_memory + layout.lses) + stage * 2 * kPatch + lane;
      if (walk.owns(token)) __pipeline_memcpy_async(to, from + row + token, sizeof(float));
    }
  };

  fetch(0);
  fetch_query(0, 0, 0);
  commit_copies();
  for (int time = 0, query_stage = 0; time < walk.own_end; time += kPatch) {
    const bool attends = time + kPatch > walk.own_begin;
    for (int i = 0; i < (attends ? walk.group : 1); ++i, query_stage ^= 1) {
      wait_copies<0>();
      __syncthreads();  // the fetched stage is there, and the one before is done with
      if (attends && i + 1 < walk.group) {
        fetch_query(time, i + 1, query_stage ^ 1);
      } else if (time + kPatch < walk.own_end) {
        fetch(time + kPatch);
        fetch_query(time + kPatch, 0, query_stage ^ 1);
      }
      commit_copies();
      if (!attends) continue;
      const int stage = hidden(time) / kPatch % 2;
      const uint32_t key_patch = shared + layout.keys + stage * kTile;
      const uint32_t value_patch = shared + layout.values + stage * kTile;
      const int thread = hidden(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, q = lane % 4;
      const uint32_t* const rows = all_rows + stage * kStageWords + warp * kWarpSlots * PatchRow::kWords;
      float* const parts = reinterpret_cast<float*>(shared_memory + layout.parts);
      float4* const share_parts = reinterpret_cast<float4*>(shared_memory + layout.shares) + lane;
      float2* const sums = reinterpret_cast<float2*>(shared_memory + layout.sums);
      float* const scores = reinterpret_cast<float*>(shared_memory + layout.scores) + warp * 2 * kScoreFloats;
      const int64_t query_head = walk.first_head + i;
      const float* const lses = reinterpret_cast<const float*>(shared_memory + layout.lses) + query_stage * 2 * kPatch;
      const PatchReader<kDim> reader;
      float z[2][2][4] = {};  // logits (query, key); the same of (grad_out, value)
      {
        float raw[2][4] = {};
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
      }
      {
        float raw[2][4] = {};
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
          uint32_t queries[4], tokens[4];
          reader.load(queries, shared + layout.grads + query_stage * kTile, m);
          reader.load(tokens, value_patch, m);
          values.multiply(z[1], queries, m);
          mma<storage>(raw[0], queries, tokens[0], tokens[2]);
          mma<storage>(raw[1], queries, tokens[1], tokens[3]);
        }
        store_scores(scores + kScoreFloats, raw);
      }
      __syncwarp();
      advance<2>(z, rows, scores);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = time + g + 8 * half;
        const float lse = lses[g + 8 * half] * 1.44269504f;
        float total = 0.f, sum = 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = z[0][c / 2][2 * half + c % 2];
          const bool open = token >= openings[warp * kWarpSlots + c / 2 * 8 + 2 * q + c % 2] && walk.owns(token);
          x = open ? exp2_fast(x * walk.factor - lse) : 0.f;
          total += x;
          sum += x * z[1][c / 2][2 * half + c % 2];
        }
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (q == 0) sums[warp * kPatch + g + 8 * half] = make_float2(total, sum);
      }
      __syncthreads();  // all warps' sums are there
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Probabilities are scaled to a sum of one, since lse is rounded: else gradients would not cancel.
        float total = 0.f, delta = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 sum = sums[w * kPatch + g + 8 * half];
          total += sum.x;
          delta += sum.y;
        }
        const bool owned = walk.owns(time + g + 8 * half);
        const float inverse = owned ? 1.f / total : 0.f;
        delta *= inverse;
        if (gradients.grad_lse && owned) delta -= lses[kPatch + g + 8 * half];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& probability = z[0][c / 2][2 * half + c % 2];
          float& grad = z[1][c / 2][2 * half + c % 2];
          if (probability != 0.f) probability *= inverse;  // shut slots stay 0, whatever the query is
          const float grad_logit = walk.scale * probability * (grad - delta);
          grad = probability;
          probability = grad_logit;
        }
      }
      // From here on z holds weights: gradients of logits on the key side, probabilities on the value side.
      float shares[2][2][4] = {};
      advance_back<storage, 2>(z, shares, rows);
      uint32_t slot_weights[4], token_weights[4];
#pragma unroll
      for (int side = 1; side >= 0; --side) {
        uint4* const to = left.at(p, walk, time / kPatch, query_head, side) + warp * kWarp + lane;
        uint32_t low_weights[4];
        split_left<storage>(slot_weights, low_weights, z[side]);
        store_global(to, transpose_all(slot_weights));
        if (side == 0 && left.two_parts) store_global(to + (kWarps + 1) * kWarp, transpose_all(low_weights));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float (&x)[4] = shares[side][n];
          share_parts[((warp * 2 + side) * 2 + n) * kWarp] = make_float4(x[0], x[1], x[2], x[3]);
        }
      }
      pack_left<storage>(token_weights, shares[0]);
      float* const part = parts + (warp * kPatch + g) * kPartStride + 2 * q;
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t tokens[4];
        reader.load_transposed(tokens, key_patch, m);
        float grads[2][4] = {};
        mma<storage>(grads[0], token_weights, tokens[0], tokens[1]);
        mma<storage>(grads[1], token_weights, tokens[2], tokens[3]);
        keys.mix(grads[0], grads[1], slot_weights, m);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = part + 16 * m + 8 * half;
          *reinterpret_cast<float2*>(to) = make_float2(grads[half][0], grads[half][1]);
          *reinterpret_cast<float2*>(to + 8 * kPartStride) = make_float2(grads[half][2], grads[half][3]);
        }
      }
      __syncthreads();  // all warps' parts are there

      if (const int side = warp; side < 2) {
        float total[2][4] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float4 x = share_parts[((w * 2 + side) * 2 + n) * kWarp];
            total[n][0] += x.x;
            total[n][1] += x.y;
            total[n][2] += x.z;
            total[n][3] += x.w;
          }
        }
        pack_left<storage>(token_weights, total);
        left.at(p, walk, time / kPatch, query_head, side)[kWarps * kWarp + lane] =
            make_uint4(transpose(token_weights[0]), transpose(token_weights[2]), transpose(token_weights[1]),
                       transpose(token_weights[3]));
      }
      for (int item = thread; item < kPatch * kChunks; item += kThreads) {
        const int token = item / kChunks, d = item % kChunks * 8;
        if (!walk.owns(time + token) || d >= key_dim) continue;
        float grads[8] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float4* const from = reinterpret_cast<const float4*>(parts + (w * kPatch + token) * kPartStride + d);
          const float4 low = from[0], high = from[1];
          grads[0] += low.x;
          grads[1] += low.y;
          grads[2] += low.z;
          grads[3] += low.w;
          grads[4] += high.x;
          grads[5] += high.y;
          grads[6] += high.z;
          grads[7] += high.w;
        }
        storage* const to = row_of<storage>(gradients.query, walk.batch, query_head, walk.row + time + token) + d;
        store_global(to, make_uint4(pack<storage>(grads[0], grads[1]), pack<storage>(grads[2], grads[3]),
                                    pack<storage>(grads[4], grads[5]), pack<storage>(grads[6], grads[7])));
      }
    }
    if (time + kPatch >= walk.own_end) break;
    const int stage = hidden(time) / kPatch % 2;
    const uint32_t* const rows = all_rows + stage * kStageWords + warp * kWarpSlots * PatchRow::kWords;
    const EndWeights weights(rows);
    keys.write(rows, weights, shared + layout.keys + stage * kTile);
    values.write(rows, weights, shared + layout.values + stage * kTile);
  }
}

// In the walk back, a block has one side, and a warp 16 of its elements with the gradients of all slots. What is
// fetched lies in three stages, each of one patch and query head.
template <typename config>
struct BackLayout {
  static constexpr int kStages = 3;
  static constexpr uint32_t kTile = kPatch * Rows<config::kDim>::kBytes;
  using Fetch = RowFetch<typename config::storage, false>;
  uint32_t weights, rows, stage, row_stage, bytes;

  BLURRY_HOST_DEVICE explicit BackLayout(const Weights& left) {
    stage = kTile + static_cast<uint32_t>(left.size(0)) * 16;  // a stage: rows of query or grad_out, then weights
    weights = kTile;
    rows = kStages * stage;
    row_stage = static_cast<uint32_t>(left.warps) * kWarpSlots * Fetch::kStride * 4;
    bytes = rows + kStages * row_stage;
  }
};

template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    dirichlet_back(Problem p, Gradients gradients, WalkPlan plan, RowTables tables, Weights left) {
  using storage = typename config::storage;
  using Back = BackLayout<config>;
  constexpr int kDim = config::kDim, kGroups = kMaxPatchSlots / kWarpSlots, kStages = Back::kStages;
  constexpr int kStride = Back::Fetch::kStride, kFirst = Back::Fetch::kFirst;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4, slice = threadIdx.x / kWarp;
  const int side = static_cast<int>(blockIdx.x % 2), head = static_cast<int>(blockIdx.x / 2 % p.kv_heads);
  __shared__ PatchWalk walk;
  if (threadIdx.x == 0) walk = PatchWalk(p, plan, blockIdx.x / 2 / p.kv_heads, head);
  __syncthreads();
  const bool empty = walk.own_begin >= walk.own_end;
  if (empty && !walk.from_begin) return;
  const int slots = static_cast<int>(p.slots);
  const int dim = static_cast<int>(side ? p.value_dim : p.key_dim);
  const Back layout(left);
  const uint32_t shared = shared_address(shared_memory);

  // Lane (g, q) has elements g and g + 8 of the slice, for slots 2 q and 2 q + 1 of every eight.
  float grads[kGroups][2][4];
  const auto each = [&](const auto& body) {  // runs body(grad, slot, offset in a tensor of slots) where there is one
#pragma unroll
    for (int i = 0; i < kGroups * 8; ++i) {
      const int slot = i / 4 * 8 + 2 * q + i % 2, d = 16 * slice + g + 8 * (i % 4 / 2);
      if (slot >= slots || d >= dim) continue;
      body(grads[i / 8][i / 4 % 2][i % 4], slot, ((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d);
    }
  };
#pragma unroll
  for (int i = 0; i < kGroups * 8; ++i) grads[i / 8][i / 4 % 2][i % 4] = 0.f;
  const float* const grad_state =
      static_cast<const float*>(side ? gradients.grad_state_value : gradients.grad_state_key);
  if (walk.to_end && grad_state) {
    each([&](float& grad, int slot, int64_t at) {
      if (walk.open_at_end(slot)) grad = grad_state[at];
    });
  }

  if (!empty) {
    const View& view = side ? gradients.grad_out : p.query;
    const storage* const first_row = row_of<const storage>(view, walk.batch, walk.first_head, walk.row);
    const View& to_view = side ? gradients.value : gradients.key;
    storage* const first_to = row_of<storage>(to_view, walk.batch, head, walk.row) + 16 * slice + 2 * q;
    const int last = (walk.walk_end - 1) / kPatch * kPatch;
    const typename Back::Fetch row_fetch{p, tables, walk};
    for (int i = 0; i < kStages; ++i) {
      row_fetch.clear(reinterpret_cast<uint32_t*>(shared_memory + layout.rows + i * layout.row_stage),
                      left.warps * kWarpSlots);
    }
    // fetch() brings the patch and query head that these name, and moves them on.
    int next_time = last, next_head = 0, next_stage = 0, next_row_stage = 0;
    const auto fetch = [&] {
      if (next_time >= 0) {
        const uint32_t to = shared + next_stage * layout.stage;
        fetch_patch<storage, kDim, config::kThreads>(to, view, first_row + next_head * view.head, next_time, walk.begin,
                                                     walk.end, dim);
        const uint4* const from = left.at(p, walk, next_time / kPatch, walk.first_head + next_head, side);
        for (int i = threadIdx.x; i < left.size(side); i += config::kThreads) {
          copy_async(to + layout.weights + i * 16, from + i);
        }
        if (next_head == 0) {
          row_fetch.fetch(reinterpret_cast<uint32_t*>(shared_memory + layout.rows + next_row_stage * layout.row_stage),
                          next_time);
          next_row_stage = next_row_stage + 1 < kStages ? next_row_stage + 1 : 0;
        }
        next_stage = next_stage + 1 < kStages ? next_stage + 1 : 0;
        if (++next_head == walk.group) {
          next_head = 0;
          next_time -= kPatch;
        }
      }
      commit_copies();
    };
    fetch();
    fetch();
    for (int time = last, stage = 0, row_stage = 0; time >= 0; time -= kPatch) {
      const uint32_t* const rows =
          reinterpret_cast<const uint32_t*>(shared_memory + layout.rows + row_stage * layout.row_stage);
      row_stage = row_stage + 1 < kStages ? row_stage + 1 : 0;
      float sums[2][4] = {};
      for (int i = 0; i < walk.group; ++i) {
        wait_copies<1>();
        __syncthreads();  // the fetched stage is there, and the one before is done with
        fetch();
        const unsigned char* const here = shared_memory + stage * layout.stage;
        const uint4* const weights = reinterpret_cast<const uint4*>(here + layout.weights) + lane;
        uint32_t x[4];
        PatchReader<kDim>().load_transposed(x, shared + stage * layout.stage, slice);
        stage = stage + 1 < kStages ? stage + 1 : 0;
        const bool owned = time < walk.own_end;
        if (i == 0) {
          // The gradients of the slots at the patch's end go to its tokens, and then to the contents before it.
          const uint32_t at = shared_address(rows) + (lane % 8 + lane / 16 * 8) * (kStride * 4) + lane / 8 % 2 * 16;
          const uint32_t* const lefts = rows + 2 * q * kStride + PatchRow::kLeft - kFirst;
#pragma unroll
          for (int n = 0; n < kGroups; ++n) {
            if (n >= left.warps) break;
            if (owned) {
              uint32_t high[4], low[4];
              load_matrices_transposed(high, at + n * kWarpSlots * kStride * 4 + (PatchRow::kHigh - kFirst) * 4);
              load_matrices_transposed(low, at + n * kWarpSlots * kStride * 4 + (PatchRow::kLow - kFirst) * 4);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                uint32_t grad_high[2], grad_low[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  split<storage>(grads[n][j][2 * half], grads[n][j][2 * half + 1], grad_high[j], grad_low[j]);
                }
                mma<storage>(sums[half], high, grad_high[0], grad_high[1]);
                mma<storage>(sums[half], high, grad_low[0], grad_low[1]);
                mma<storage>(sums[half], low, grad_high[0], grad_high[1]);
              }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float decay = __uint_as_float(lefts[(n * kWarpSlots + j / 2 * 8 + j % 2) * kStride]);
              grads[n][j / 2][j % 2] *= decay;
              grads[n][j / 2][2 + j % 2] *= decay;
            }
          }
        }
        if (owned) {
          const uint4 tokens = weights[left.warps * kWarp];
          const uint32_t a[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
          mma<storage>(sums[0], a, x[0], x[1]);
          mma<storage>(sums[1], a, x[2], x[3]);
        }
        const uint32_t columns[4] = {x[0], x[2], x[1], x[3]};
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          if (n >= left.warps) break;
          const uint4 w = weights[n * kWarp];
          mma<storage>(grads[n][0], columns, w.x, w.y);
          mma<storage>(grads[n][1], columns, w.z, w.w);
          if (side == 0 && left.two_parts) {
            const uint4 low = weights[(left.warps + 1 + n) * kWarp];
            mma<storage>(grads[n][0], columns, low.x, low.y);
            mma<storage>(grads[n][1], columns, low.z, low.w);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = time + g + 8 * half;
        if (!walk.owns(token)) continue;
        storage* const to = first_to + token * to_view.token;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (16 * slice + 8 * n < dim) {
            *reinterpret_cast<uint32_t*>(to + 8 * n) = pack<storage>(sums[n][2 * half], sums[n][2 * half + 1]);
          }
        }
      }
    }
  }

  float* const grad_given = static_cast<float*>(side ? gradients.state_value : gradients.state_key);
  if (!walk.from_begin || !grad_given) return;
  // A shut slot was not read, so its gradient is zero.
  each([&](float& grad, int slot, int64_t at) { grad_given[at] = walk.given_before(slot) ? grad : 0.f; });
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

}  // namespace

const char* dirichlet_backward_refusal(const Problem& p, const Gradients& gradients) {
  if (const char* const refusal = dirichlet_refusal(p)) return refusal;
  if (const char* const refusal = range_refusal(p, gradients)) return refusal;
  if (!aligned(gradients.grad_out)) return "backward: rows are not aligned to 16 bytes";
  bool fits = true;
  with_config(p, [&](auto config) { fits = Layout::make<decltype(config)>().bytes <= shared_memory_limit(); });
  return fits ? nullptr : "backward: a patch does not fit into shared memory";
}

int64_t dirichlet_backward_workspace(const Problem& p) {
  RowTables tables;
  return Weights(p, nullptr).bytes(p) + tables.make(p, nullptr);
}

void dirichlet_backward(const Problem& p, const Gradients& gradients, void* workspace) {
  const WalkPlan plan = make_patch_plan(p, false), back_plan = make_patch_plan(p, true);
  const Weights left(p, workspace);
  RowTables tables;
  tables.make(p, static_cast<unsigned char*>(workspace) + left.bytes(p));
  with_config(p, [&](auto config_tag) {
    using config = decltype(config_tag);
    launch_rows<typename config::storage>(p, tables);
    if (p.tokens > 0) {
      constexpr int kBytes = Layout::make<config>().bytes;
      allow_shared_memory<dirichlet_weights<config>>();
      launch("dirichlet_weights", dirichlet_weights<config>, plan.count * p.kv_heads, config::kThreads, kBytes,
             p.stream, p, gradients, plan, tables, left);
    }
    using back = typename config::Back;
    const int64_t bytes = BackLayout<back>(left).bytes;
    allow_shared_memory<dirichlet_back<back>>();
    launch("dirichlet_back", dirichlet_back<back>, back_plan.count * p.kv_heads * 2, back::kThreads, bytes, p.stream, p,
           gradients, back_plan, tables, left);
  });
}

}  // namespace blurry_attn::cuda
