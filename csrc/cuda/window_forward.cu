// "fejer" forward on tensor cores, bfloat16 and float16: one walk over time reads key and value once.
#include <algorithm>
#include <numeric>

#include "step.cuh"
#include "window.cuh"

namespace blurry_attn::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared_memory[];

// Shapes of a walk at compile time. kColumns: slots that are taken at once; kMore: there may be more of them.
template <typename storage_type, int dim, int flux, int columns, bool more>
struct Config {
  using storage = storage_type;
  static constexpr int kDim = dim, kFlux = flux, kColumns = columns;
  static constexpr bool kMore = more;
  static constexpr int kWarps = dim <= 64 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTile = kWarps * kPatch;
  static constexpr int kBlocks = dim <= 64 && flux <= 5 ? 2 : 1;
  static constexpr int kStages = 2;
  static constexpr int kRow = Rows<dim>::kBytes;
  static constexpr int kSideStride = dim + 8;  // floats of a row of what a patch adds to its cells
};

// Shared memory of a walk, by offsets in bytes.
struct Layout {
  int ring_rows;
  uint32_t tiles, ring, flux, patch, gates, table, meta, bytes;

  template <typename config>
  __host__ __device__ static Layout make(int slots, int resolution) {
    Layout l;
    l.ring_rows = (slots + config::kTile / resolution + 3 + 7) / 8 * 8;
    uint32_t at = 0;
    l.tiles = at;  // [stage][side][token]
    at += config::kStages * 2 * config::kTile * config::kRow;
    l.ring = at;  // [side][cell]
    at += 2 * l.ring_rows * config::kRow;
    l.flux = at;  // [side][warp][cell], rounded up to eight rows
    at += 2 * ((config::kWarps * config::kFlux + 7) / 8 * 8) * config::kRow;
    l.patch = at;  // what patches add, [warp][side][cell][element], float; later the rows of out, [warp][16]
    const uint32_t added = config::kWarps * 2 * config::kFlux * config::kSideStride * 4;
    const uint32_t rows = config::kWarps * kPatch * config::kRow;
    at += added > rows ? added : rows;
    l.gates = at;  // [warp][cell][16]
    at += config::kWarps * config::kFlux * kPatch * 4;
    l.table = at;
    at += 2 * resolution * 4;
    l.meta = at;
    at += config::kWarps * (config::kFlux + 4) * 4;
    l.bytes = (at + 15) / 16 * 16;
    return l;
  }
};

template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    window_forward(Problem p, Outputs outputs, WalkPlan plan, HeadList heads, uint8_t* unsound) {
  using storage = typename config::storage;
  using Row = Rows<config::kDim>;
  constexpr int kDim = config::kDim, kFlux = config::kFlux, kWarps = config::kWarps, kTile = config::kTile;
  constexpr int kSteps = kDim / 16, kWords = kDim / 8;
  constexpr int kColumnTiles = config::kColumns / 8;
  using Weights = PatchWeights<storage, kFlux>;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int head = heads.head[blockIdx.x % heads.count];
  __shared__ Walk walk;
  if (threadIdx.x == 0) {
    walk = Walk(p, plan, blockIdx.x / heads.count, head, kTile);
    unsound[walk.stretch * p.kv_heads + head] = 0;
  }
  __syncthreads();
  if (walk.own_begin >= walk.own_end) return;
  const int slots = static_cast<int>(p.slots), resolution = walk.resolution;
  const Layout layout = Layout::make<config>(slots, resolution);
  const int ring_rows = layout.ring_rows;

  const uint32_t shared = shared_address(shared_memory);
  const uint32_t ring_side = ring_rows * config::kRow;
  const uint32_t flux_side = ((kWarps * kFlux + 7) / 8 * 8) * config::kRow;
  float* const added = reinterpret_cast<float*>(shared_memory + layout.patch);
  float* const gates = reinterpret_cast<float*>(shared_memory + layout.gates) + warp * kFlux * kPatch;
  float* const table = reinterpret_cast<float*>(shared_memory + layout.table);
  float* const end_decays = reinterpret_cast<float*>(shared_memory + layout.meta);  // [warp][kFlux]
  int* const meta = reinterpret_cast<int*>(end_decays + kWarps * kFlux);            // [warp][4]

  for (int i = threadIdx.x; i < 2 * resolution; i += config::kThreads) {
    table[i] = static_cast<const float*>(p.gates)[p.laws[head].gates + i];
  }
  // Contents before the walk: as given, else zeros. Cell number c lies in row c mod ring_rows.
  for (int i = threadIdx.x; i < 2 * ring_rows * kDim; i += config::kThreads) {
    const int d = i % kDim, row = i / kDim % ring_rows, side = i / kDim / ring_rows;
    const void* const state = side ? p.state_value : p.state_key;
    const int dim = static_cast<int>(side ? p.value_dim : p.key_dim);
    float content = 0.f;
    if (state && walk.from_begin && d < dim) {
      const int back = static_cast<int>(static_cast<uint32_t>(walk.given - 1 - row + ring_rows) % ring_rows);
      const int slot = walk.given_slot(back, slots);
      if (slot >= 0) content = static_cast<const float*>(state)[((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d];
    }
    *reinterpret_cast<storage*>(shared_memory + layout.ring + side * ring_side + Row::element(row, d)) =
        to_storage<storage>(content);
  }

  const auto fetch = [&](int time, int stage) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const View& view = side ? p.value : p.key;
      const int chunks = static_cast<int>(side ? p.value_dim : p.key_dim) / 8;
      const storage* from = row_of<const storage>(view, walk.batch, head, walk.row);
      const uint32_t to = shared + layout.tiles + (stage * 2 + side) * kTile * config::kRow;
#pragma unroll
      for (int i = 0; i < kTile * Row::kChunks / config::kThreads; ++i) {
        const int at = threadIdx.x + i * config::kThreads, row = at / Row::kChunks, chunk = at % Row::kChunks;
        const int t = time + row;
        const bool valid = t >= walk.begin && t < walk.end && chunk < chunks;
        copy_async(Row::at(to, row, chunk), valid ? from + t * view.token + chunk * 8 : from, valid);
      }
    }
    commit_copies();
  };

  Weights weights;
  int made_for = -1;  // the regular patch that `weights` are of: its offset from the trailing cell's centre
  float content0[kDim * 2 / config::kThreads > 0 ? kDim * 2 / config::kThreads : 1];  // of the cells that are in flux
  float content1[kDim * 2 / config::kThreads > 0 ? kDim * 2 / config::kThreads : 1];  // when a tile begins
  int live = 0;
  bool sound = true;

  fetch(0, 0);
  for (int time = 0, stage = 0; time < walk.own_end; time += kTile, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();  // the tile is there, and the one before is done with
    if (time + kTile < walk.own_end) fetch(time + kTile, stage ^ 1);

    // This warp's patch.
    const int patch = time + warp * kPatch;
    const int cell = (walk.offset + patch) / resolution, offset = (walk.offset + patch) % resolution;
    const bool irregular = cell - slots < walk.first || patch < walk.begin;
    if (irregular || made_for != offset) {
      weights.make(p.laws[head].cells, walk.time(walk.begin), walk.cell + cell, walk.time(patch), table, gates,
                   end_decays + warp * kFlux);
      made_for = irregular ? -1 : offset;
    }
    // The ring counts cells from `slots` before the first.
    const int first_row = static_cast<int>(static_cast<uint32_t>(cell) % ring_rows);
    if (lane == 0) {
      meta[warp * 4] = first_row;
      meta[warp * 4 + 1] = (offset + kPatch) / resolution;  // cells that are finished when the patch ends
      meta[warp * 4 + 2] = min(max(walk.given - slots - cell, 0), kFlux);  // cells from before the walk's first token
    }

    // What the patch adds to its cells.
    const uint32_t tile_base = shared + layout.tiles + stage * 2 * kTile * config::kRow;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t rows = tile_base + side * kTile * config::kRow;
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t a[4];
        load_matrices_transposed(
            a, Row::at(rows, warp * kPatch + (lane / 16) * 8 + lane % 8, 2 * m + (lane / 8) % 2));
#pragma unroll
        for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
          float sum[4] = {};
          mma<storage>(sum, a, weights.last[tile][0][0], weights.last[tile][0][1]);
          mma<storage>(sum, a, weights.last[tile][1][0], weights.last[tile][1][1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int j = 8 * tile + 2 * q + e % 2, d = 16 * m + g + 8 * (e / 2);
            if (j < kFlux) {
              added[((warp * 2 + side) * kFlux + j) * config::kSideStride + d] = sum[e];
            } else if (sum[e] != 0.f) {
              sound = false;  // weights of zero, so a token is not finite
            }
          }
        }
      }
    }
    __syncthreads();

    // From patch to patch, each thread with its elements of all cells.
#pragma unroll
    for (int n = 0; n < (2 * kDim + config::kThreads - 1) / config::kThreads; ++n) {
      const int element = threadIdx.x + n * config::kThreads;
      if (element < 2 * kDim) {
        const int side = element / kDim, d = element % kDim;
        unsigned char* const ring = shared_memory + layout.ring + side * ring_side;
        unsigned char* const flux = shared_memory + layout.flux + side * flux_side;
        float start0 = content0[n], start1 = content1[n];
        int alive = live;
        for (int w = 0; w < kWarps; ++w) {
          const int row = meta[w * 4], finished = meta[w * 4 + 1], before = meta[w * 4 + 2];
          float content[kFlux];
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            float start;
            if (j == 0 && alive > 0) {
              start = start0;
            } else if (j == 1 && alive > 1) {
              start = start1;
            } else {
              const int from = wrap(row + (j < before ? slots + j : j), ring_rows);
              start = to_compute<float>(*reinterpret_cast<const storage*>(ring + Row::element(from, d)));
            }
            *reinterpret_cast<storage*>(flux + Row::element(w * kFlux + j, d)) = to_storage<storage>(start);
            content[j] = end_decays[w * kFlux + j] * start +
                         added[((w * 2 + side) * kFlux + j) * config::kSideStride + d];
          }
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            if (j < finished) {
              *reinterpret_cast<storage*>(ring + Row::element(wrap(row + slots + j, ring_rows), d)) =
                  to_storage<storage>(content[j]);
            }
            if (j == finished) start0 = content[j];
            if (j == finished + 1) start1 = content[j];
          }
          alive = finished + 1 < kFlux ? 2 : finished < kFlux ? 1 : 0;
        }
        content0[n] = start0;
        content1[n] = start1;
      }
    }
    {
      const int finished = meta[(kWarps - 1) * 4 + 1];
      live = finished + 1 < kFlux ? 2 : finished < kFlux ? 1 : 0;
    }
    __syncthreads();

    // Attend.
    if (patch + kPatch <= walk.own_begin || patch >= walk.own_end) continue;
    const int masked = irregular ? min(walk.first - (cell - slots), slots) : 0;
    const uint32_t raw_keys = tile_base, raw_values = tile_base + kTile * config::kRow;
    const uint32_t ring_keys = shared + layout.ring, ring_values = ring_keys + ring_side;
    const uint32_t flux_keys = shared + layout.flux, flux_values = flux_keys + flux_side;
    const float factor = static_cast<float>(p.scale) * 1.44269504f;  // exponentials to base 2
    const int group = static_cast<int>(p.query_heads / p.kv_heads);
    bool owned[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      owned[half] = patch + g + 8 * half >= walk.own_begin && patch + g + 8 * half < walk.own_end;
    }

    for (int i = 0; i < group; ++i) {
      const int64_t query_head = static_cast<int64_t>(head) * group + i;
      uint32_t query[kSteps][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const storage* from = row_of<const storage>(p.query, walk.batch, query_head, walk.row + patch + g + 8 * half);
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) {
          const int chunk = Row::chunk_of(q, w);
          uint4 words = make_uint4(0, 0, 0, 0);
          if (owned[half] && chunk * 8 < p.key_dim) words = *reinterpret_cast<const uint4*>(from + chunk * 8);
          query[2 * w][half] = words.x;
          query[2 * w][half + 2] = words.y;
          query[2 * w + 1][half] = words.z;
          query[2 * w + 1][half + 2] = words.w;
        }
      }

      const auto product = [&](float(&sum)[4], uint32_t rows, int row) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = 0.f;
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) {
          const uint4 words = load_shared(Row::at(rows, row, Row::chunk_of(q, w)));
          mma<storage>(sum, query[2 * w], words.x, words.y);
          mma<storage>(sum, query[2 * w + 1], words.z, words.w);
        }
      };
      float raw[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        product(raw[tile], raw_keys, warp * kPatch + 8 * tile + g);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * tile + 2 * q + e % 2 > g + 8 * (e / 2)) raw[tile][e] = 0.f;  // later tokens
        }
      }

      float out[kDim / 8][4] = {};
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
      float shares[2][4] = {};  // of the patch's tokens
      for (int first = 0; first < (config::kMore ? slots : 1); first += config::kColumns) {
        float score[kColumnTiles][4];
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const int column = first + 8 * tile + g;
          const bool in_flux = tile < Weights::kFluxTiles && column < kFlux;
          product(score[tile], in_flux ? flux_keys : ring_keys,
                  in_flux ? warp * kFlux + column : wrap(first_row + (column < slots ? column : 0), ring_rows));
        }
        if (first == 0) {
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float sum = 0.f;
#pragma unroll
              for (int tile = 0; tile < 2; ++tile) {
                sum += weights.weight[j][tile][2 * half] * raw[tile][2 * half];
                sum += weights.weight[j][tile][2 * half + 1] * raw[tile][2 * half + 1];
              }
              sum += __shfl_xor_sync(kAllLanes, sum, 1);
              sum += __shfl_xor_sync(kAllLanes, sum, 2);
              if (j % 8 / 2 == q) {
                float& s = score[j / 8][2 * half + j % 2];
                s = s * weights.decay[j / 8][2 * half + j % 2] + sum;
              }
            }
          }
        }
        if (masked > 0 || first + config::kColumns > slots) {
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int column = first + 8 * tile + 2 * q + e % 2;
              if (column >= slots || (column >= kFlux && column < masked)) score[tile][e] = -INFINITY;
            }
          }
        }
        if (irregular && first == 0) {
#pragma unroll
          for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (weights.decay[tile][e] < 0.f) score[tile][e] = -INFINITY;
            }
          }
        }
        float before[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = top[half];
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
            score[tile][2 * half] *= factor;
            score[tile][2 * half + 1] *= factor;
            most = fmaxf(most, fmaxf(score[tile][2 * half], score[tile][2 * half + 1]));
          }
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
          const float shift = most == -INFINITY ? 0.f : most;
          before[half] = exp2f(top[half] - shift);
          top[half] = most;
          float sum = 0.f;
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              score[tile][e] = exp2f(score[tile][e] - shift);
              sum += score[tile][e];
            }
          }
          total[half] = total[half] * before[half] + sum;
        }
        if (first > 0) {
#pragma unroll
          for (int tile = 0; tile < kDim / 8; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[tile][e] *= before[e / 2];
          }
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) shares[tile][e] *= before[e / 2];
          }
        } else {
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float share = __shfl_sync(kAllLanes, score[j / 8][2 * half + j % 2], (lane & ~3) | (j % 8 / 2));
#pragma unroll
              for (int tile = 0; tile < 2; ++tile) {
                shares[tile][2 * half] += share * weights.weight[j][tile][2 * half];
                shares[tile][2 * half + 1] += share * weights.weight[j][tile][2 * half + 1];
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) score[tile][e] *= fmaxf(weights.decay[tile][e], 0.f);
          }
        }
#pragma unroll
        for (int step = 0; step < kColumnTiles / 2; ++step) {
          const uint32_t a[4] = {pack<storage>(score[2 * step][0], score[2 * step][1]),
                                 pack<storage>(score[2 * step][2], score[2 * step][3]),
                                 pack<storage>(score[2 * step + 1][0], score[2 * step + 1][1]),
                                 pack<storage>(score[2 * step + 1][2], score[2 * step + 1][3])};
          const int column = first + 16 * step + lane % 16;
          const bool in_flux = step < (Weights::kFluxTiles + 1) / 2 && column < kFlux;
          const uint32_t rows = in_flux ? flux_values : ring_values;
          const int row = in_flux ? warp * kFlux + column : wrap(first_row + (column < slots ? column : 0), ring_rows);
#pragma unroll
          for (int d = 0; d < kDim / 16; ++d) {
            uint32_t b[4];
            load_matrices_transposed(b, Row::at(rows, row, 2 * d + lane / 16));
            mma<storage>(out[2 * d], a, b[0], b[1]);
            mma<storage>(out[2 * d + 1], a, b[2], b[3]);
          }
        }
      }
      {
        const uint32_t a[4] = {pack<storage>(shares[0][0], shares[0][1]), pack<storage>(shares[0][2], shares[0][3]),
                               pack<storage>(shares[1][0], shares[1][1]), pack<storage>(shares[1][2], shares[1][3])};
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          uint32_t b[4];
          load_matrices_transposed(b, Row::at(raw_values, warp * kPatch + lane % 16, 2 * d + lane / 16));
          mma<storage>(out[2 * d], a, b[0], b[1]);
          mma<storage>(out[2 * d + 1], a, b[2], b[3]);
        }
      }

      unsigned char* const staged = shared_memory + layout.patch + warp * kPatch * config::kRow;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const float inverse = 1.f / sum;
#pragma unroll
        for (int tile = 0; tile < kDim / 8; ++tile) {
          *reinterpret_cast<uint32_t*>(staged + Row::element(g + 8 * half, 8 * tile + 2 * q)) =
              pack<storage>(out[tile][2 * half] * inverse, out[tile][2 * half + 1] * inverse);
        }
        if (q == 0 && owned[half]) {
          static_cast<float*>(outputs.lse)[(walk.batch * p.query_heads + query_head) * p.tokens + walk.row + patch + g +
                                           8 * half] = (top[half] + log2f(sum)) * 0.693147181f;
        }
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kPatch * Row::kChunks / kWarp; ++n) {
        const int at = lane + n * kWarp, row = at / Row::kChunks, chunk = at % Row::kChunks;
        const int t = patch + row;
        if (t >= walk.own_begin && t < walk.own_end && chunk * 8 < p.value_dim) {
          *reinterpret_cast<uint4*>(row_of<storage>(outputs.out, walk.batch, query_head, walk.row + t) + chunk * 8) =
              *reinterpret_cast<const uint4*>(staged + Row::element(row, chunk * 8));
        }
      }
      __syncwarp();
    }
  }
  if (!sound) unsound[walk.stretch * p.kv_heads + head] = 1;
}

// A walk cannot keep a token that is not finite from its neighbours in a patch: such sequences are done again, token by
// token.
template <typename storage>
__global__ void __launch_bounds__(kStepThreads)
    window_repair(Problem p, Outputs outputs, WalkPlan plan, const uint8_t* unsound, float* contents) {
  const Sequence sequence(p, blockIdx.x / p.kv_heads);
  const int64_t head = blockIdx.x % p.kv_heads;
  bool sound = true;
  for (int64_t x = plan.first(p, sequence.index), i = 0; i * plan.length < sequence.length; ++i) {
    sound = sound && !unsound[(x + i) * p.kv_heads + head];
  }
  if (sound) return;
  const Law<float> law(p, head);
  const int64_t lane = sequence.index * p.kv_heads + head;
  float* const keys = contents + lane * p.slots * (p.key_dim + p.value_dim);
  float* const values = keys + p.slots * p.key_dim;
  if (p.state_key) {
    const float* const from_key = static_cast<const float*>(p.state_key) + lane * p.slots * p.key_dim;
    const float* const from_value = static_cast<const float*>(p.state_value) + lane * p.slots * p.value_dim;
    for (int64_t i = threadIdx.x; i < p.slots * p.key_dim; i += kStepThreads) keys[i] = from_key[i];
    for (int64_t i = threadIdx.x; i < p.slots * p.value_dim; i += kStepThreads) values[i] = from_value[i];
    __syncthreads();
  }
  for (int64_t t = 0; t < sequence.length; ++t) {
    step_token<storage>(p, law, sequence.batch, head, sequence.row + t, sequence.position + t, keys, values, outputs.out,
                        static_cast<float*>(outputs.lse), shared_memory);
  }
}

// The state after the last token, in float32. What is left of a slot after four laps is less than float32 shows.
template <typename storage>
__global__ void __launch_bounds__(256)
    window_state(Problem p, View tokens, int dim, const float* state, int tiles, float* end) {
  const int64_t element = blockIdx.x % tiles * 256 + threadIdx.x, head = blockIdx.x / tiles % p.kv_heads;
  const Sequence sequence(p, blockIdx.x / tiles / p.kv_heads);
  if (element >= p.slots * dim) return;
  const int slot = static_cast<int>(element / dim), d = static_cast<int>(element % dim);
  const Law<float> law(p, head);
  const int64_t at = ((sequence.index * p.kv_heads + head) * p.slots + slot) * dim + d;
  const int64_t from = sequence.end() - 4 * law.cells.window();
  float content = 0.f;
  if (from <= sequence.position && state && law.is_open(slot, sequence.position - 1)) content = state[at];
  const storage* rows = row_of<const storage>(tokens, sequence.batch, head, sequence.row) + d * tokens.element;
  walk_slot(law, slot, from > sequence.position ? from : sequence.position, sequence.end(), [&](int64_t t, float gate) {
    content = written(content, to_compute<float>(rows[(t - sequence.position) * tokens.token]), gate);
  });
  end[at] = content;
}

// How many cells are in flux in one patch at most: where patches begin is a multiple of both 16's and r's common divisor.
int cells_in_flux(int64_t resolution) {
  const int64_t step = std::gcd(resolution, int64_t(kPatch));
  return static_cast<int>((resolution - step + kPatch - 1) / resolution + 2);
}
constexpr int kFluxClasses[] = {3, 5, 9};

WalkPlan make_plan(const Problem& problem) {
  WalkPlan plan;
  const int64_t least = 4 * problem.longest_window;
  plan.length = least > 4096 ? least : 4096;
  plan.warm_up = 2 * problem.longest_window + 2 * problem.longest_window / problem.slots;
  plan.per_batch = 0;
  plan.count = problem.sequences ? problem.tokens / plan.length + problem.sequences : 0;
  if (!problem.cu_seqlens) {
    plan.per_batch = problem.tokens > 0 ? (problem.tokens + plan.length - 1) / plan.length : 1;
    plan.count = plan.per_batch * problem.sequences;
  }
  return plan;
}

// Calls body(config{}) with the shapes for heads of one class.
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
  return body(Config<storage, dim, 9, 64, true>());
}
template <typename body_type>
void with_config(const Problem& p, int flux, const body_type& body) {
  const bool wide = p.key_dim > 64 || p.value_dim > 64;
  if (p.dtype == DType::bfloat16) {
    if (wide) return with_flux<__nv_bfloat16, 128>(p, flux, body);
    return with_flux<__nv_bfloat16, 64>(p, flux, body);
  }
  if (wide) return with_flux<__half, 128>(p, flux, body);
  return with_flux<__half, 64>(p, flux, body);
}

int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}
bool aligned(const View& view) {
  return view.element == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % 8 == 0 &&
         view.head % 8 == 0 && view.token % 8 == 0;
}

}  // namespace

const char* window_refusal(const Problem& p) {
  if (p.kernel != Kernel::fejer) return "the kernel is not \"fejer\"";
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) return "the dtype is neither bfloat16 nor float16";
  if (p.key_dim > 128 || p.value_dim > 128) return "head sizes are over 128";
  if (p.key_dim % 8 || p.value_dim % 8) return "head sizes are no multiples of 8";
  if (!aligned(p.query) || !aligned(p.key) || !aligned(p.value)) return "rows are not aligned to 16 bytes";
  if (p.tokens > INT32_MAX / 2) return "there are more than 2^30 tokens";
  if (p.slots < 16) return "there are fewer than 16 slots";
  if (p.kv_heads > kMaxWindowHeads) return "there are more than 256 key/value heads";
  const int64_t limit = shared_memory_limit();
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const int64_t r = p.cells[h].resolution;
    if (r < 2) return "a window has resolution 1";
    bool fits = true;
    with_config(p, cells_in_flux(r), [&](auto config) {
      fits = Layout::make<decltype(config)>(static_cast<int>(p.slots), static_cast<int>(r)).bytes <= limit;
    });
    if (!fits) return "the slots do not fit into shared memory";
  }
  return nullptr;
}

int64_t window_forward_workspace(const Problem& p) {
  return (make_plan(p).count * p.kv_heads + 15) / 16 * 16 +
         p.sequences * p.kv_heads * p.slots * (p.key_dim + p.value_dim) * static_cast<int64_t>(sizeof(float));
}

void window_forward(const Problem& p, const Outputs& outputs, void* workspace) {
  const WalkPlan plan = make_plan(p);
  uint8_t* const unsound = static_cast<uint8_t*>(workspace);
  float* const contents = reinterpret_cast<float*>(unsound + (plan.count * p.kv_heads + 15) / 16 * 16);
  if (p.tokens > 0) {
    int least = 0;
    for (const int flux : kFluxClasses) {
      HeadList heads{};
      int longest = 1, finest = INT32_MAX;
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int in_flux = cells_in_flux(p.cells[h].resolution);
        if (in_flux <= least || in_flux > flux) continue;
        heads.head[heads.count++] = static_cast<uint16_t>(h);
        longest = std::max(longest, static_cast<int>(p.cells[h].resolution));
        finest = std::min(finest, static_cast<int>(p.cells[h].resolution));
      }
      least = flux;
      if (heads.count == 0) continue;
      with_config(p, flux, [&](auto config_tag) {
        using config = decltype(config_tag);
        const int slots = static_cast<int>(p.slots);
        const uint32_t bytes =
            std::max(Layout::make<config>(slots, finest).bytes, Layout::make<config>(slots, longest).bytes);
        cudaFuncSetAttribute(window_forward<config>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes));
        launch("window_forward", window_forward<config>, plan.count * heads.count, config::kThreads, bytes, p.stream, p,
               outputs, plan, heads, unsound);
      });
    }
  }
  for_half(p.dtype, [&](auto storage_tag) {
    using storage = decltype(storage_tag);
    if (p.tokens > 0) {
      launch("window_repair", window_repair<storage>, p.sequences * p.kv_heads, kStepThreads,
             step_shared_bytes<float>(p.slots), p.stream, p, outputs, plan, unsound, contents);
    }
    if (!outputs.state_key) return;
    const auto state = [&](const View& tokens, int64_t dim, const void* given, void* end) {
      const int tiles = static_cast<int>((p.slots * dim + 255) / 256);
      launch("window_state", window_state<storage>, p.sequences * p.kv_heads * tiles, 256, 0, p.stream, p, tokens,
             static_cast<int>(dim), static_cast<const float*>(given), tiles, static_cast<float*>(end));
    };
    state(p.key, p.key_dim, p.state_key, outputs.state_key);
    state(p.value, p.value_dim, p.state_value, outputs.state_value);
  });
}

}  // namespace blurry_attn::cuda
