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
  static constexpr int kAddedStride = dim + 8;  // floats of a row of what a patch adds to its cells
};

// Shared memory of a walk, by offsets in bytes.
struct Layout {
  int ring_rows;
  uint32_t tiles, ring, started, carried, added, ends, gates, decays, table, cells, bytes;

  template <typename config>
  __host__ __device__ static Layout make(int slots, int resolution) {
    const auto rounded = [](int x) { return (x + 7) / 8 * 8; };
    Layout l;
    l.ring_rows = rounded(slots + config::kTile / resolution + 3 + (config::kMore ? config::kColumns : 0));
    if (l.ring_rows < config::kColumns) l.ring_rows = config::kColumns;
    uint32_t at = 0;
    l.tiles = at;  // tokens: [stage][side][token]
    at += config::kStages * 2 * config::kTile * config::kRow;
    l.ring = at;  // cells: [side][cell]
    at += 2 * l.ring_rows * config::kRow;
    l.started = at;  // cells at the beginning of a patch in which they go on: [side][warp][2]
    at += 2 * config::kWarps * 2 * config::kRow;
    l.carried = at;  // and at the end of a tile, for the next: [tile mod 2][side][cell mod 2]; neither permuted
    at += 2 * 2 * 2 * config::kRow;
    l.added = at;  // what patches add to cells, [warp][side][cell][element], float; later the rows of out, [warp][16]
    const uint32_t added = config::kWarps * 2 * config::kFlux * config::kAddedStride * 4;
    const uint32_t rows = config::kWarps * kPatch * config::kRow;
    at += added > rows ? added : rows;
    l.ends = at;  // weights of patches' ends: [warp][8 cells][lane]
    at += config::kWarps * ((config::kFlux + 8) / 8) * kWarp * 16;
    l.gates = at;  // [warp][cell][16]
    at += config::kWarps * config::kFlux * kPatch * 4;
    l.decays = at;  // of whole patches: [warp][cell]
    at += config::kWarps * config::kFlux * 4;
    l.cells = at;  // the trailing cells of patches: [warp]
    at += config::kWarps * 4;
    l.table = at;
    at += 2 * resolution * 4;
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
  const uint32_t ring_side = ring_rows * config::kRow, started_side = kWarps * 2 * config::kRow;
  float* const added = reinterpret_cast<float*>(shared_memory + layout.added);
  float* const gates = reinterpret_cast<float*>(shared_memory + layout.gates) + warp * kFlux * kPatch;
  uint4* const end_weights = reinterpret_cast<uint4*>(shared_memory + layout.ends) + warp * Weights::kFluxTiles * kWarp;
  float* const decays = reinterpret_cast<float*>(shared_memory + layout.decays);
  float* const table = reinterpret_cast<float*>(shared_memory + layout.table);
  int* const patch_cells = reinterpret_cast<int*>(shared_memory + layout.cells);

  for (int i = threadIdx.x; i < 2 * resolution; i += config::kThreads) {
    table[i] = static_cast<const float*>(p.gates)[p.laws[head].gates + i];
  }
  // Contents before the walk: as given, else zeros. Cell number c lies in row c mod ring_rows.
  for (uint32_t i = threadIdx.x; i < 2 * ring_side / 16; i += config::kThreads) {
    store_shared(shared + layout.ring + 16 * i, make_uint4(0, 0, 0, 0));
  }
  if (p.state_key && walk.from_begin) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * slots * kDim; i += config::kThreads) {
      const int d = i % kDim, back = i / kDim % slots, side = i / kDim / slots;
      const int slot = walk.given_slot(back, slots), row = (walk.given - 1 - back) % ring_rows;
      const int dim = static_cast<int>(side ? p.value_dim : p.key_dim);
      if (slot < 0 || d >= dim) continue;
      const float* const state = static_cast<const float*>(side ? p.state_value : p.state_key);
      *reinterpret_cast<storage*>(shared_memory + layout.ring + side * ring_side + Row::element(row, d)) =
          to_storage<storage>(state[((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d]);
    }
  }

  // A thread copies one chunk of every kRowsAtOnce-th row.
  constexpr int kRowsAtOnce = config::kThreads / Row::kChunks;
  const int copy_row = threadIdx.x / Row::kChunks, copy_chunk = threadIdx.x % Row::kChunks;
  const auto fetch = [&](int time, int stage) {
    const int from_row = max(walk.begin - time, 0), to_row = min(walk.end - time, kTile);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const View& view = side ? p.value : p.key;
      const storage* from = row_of<const storage>(view, walk.batch, head, walk.row + time + copy_row) + copy_chunk * 8;
      const int64_t step = kRowsAtOnce * view.token;
      uint32_t to = Row::at(shared + layout.tiles + (stage * 2 + side) * kTile * config::kRow, copy_row, copy_chunk);
      if (from_row == 0 && to_row == kTile && (side ? p.value_dim : p.key_dim) == kDim) {
#pragma unroll
        for (int i = 0; i < kTile / kRowsAtOnce; ++i) copy_async(to + i * kRowsAtOnce * config::kRow, from + i * step);
      } else {
        const bool exists = copy_chunk * 8 < (side ? p.value_dim : p.key_dim);
        for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
          const int row = copy_row + i * kRowsAtOnce;
          const bool valid = exists && row >= from_row && row < to_row;
          copy_async_or_zero(to + i * kRowsAtOnce * config::kRow, valid ? from + i * step : view.data, valid);
        }
      }
    }
    commit_copies();
  };

  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  const auto owns = [&](int time) { return time >= walk.own_begin && time < walk.own_end; };
  uint32_t query[kSteps][4];
  const auto load_query = [&](int i, int patch) {
    const uint32_t sign = p.scale < 0 ? 0x80008000u : 0u;  // the scale below is its absolute value
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int time = patch + g + 8 * half;
      const storage* from =
          row_of<const storage>(p.query, walk.batch, static_cast<int64_t>(head) * group + i, walk.row + time) + 16 * q;
#pragma unroll
      for (int w = 0; w < kWords / 4; ++w) {
        const int chunk = Row::chunk_of(q, w);
        uint4 words = make_uint4(0, 0, 0, 0);
        if (owns(time) && chunk * 8 < p.key_dim) words = load_global(from + (chunk - 2 * q) * 8);
        query[2 * w][half] = words.x ^ sign;
        query[2 * w][half + 2] = words.y ^ sign;
        query[2 * w + 1][half] = words.z ^ sign;
        query[2 * w + 1][half + 2] = words.w ^ sign;
      }
    }
  };

  Weights weights;
  int made_for = -1;  // the regular patch that `weights` are of: its offset from the trailing cell's centre
  bool sound = true;
  // Of the tile and of this warp's patch: the trailing cell, the offset from its centre.
  int tile_cell = 0, tile_offset = walk.offset, tile_row = 0;
  int cell = (walk.offset + warp * kPatch) / resolution, offset = (walk.offset + warp * kPatch) % resolution;
  // The ring counts cells from `slots` before the first: this row is that of the trailing cell's slot before the patch.
  int first_row = cell % ring_rows;
  const int cells_per_tile = kTile / resolution, tokens_left = kTile % resolution;

  fetch(0, 0);
  for (int time = 0, stage = 0; time < walk.own_end; time += kTile, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();  // the tile is there, and the one before is done with
    if (time + kTile < walk.own_end) fetch(time + kTile, stage ^ 1);

    const int patch = time + warp * kPatch;
    const bool irregular = cell - slots < walk.first || patch < walk.begin;
    if (irregular || made_for != offset) {
      weights.make(p.laws[head].cells, walk.time(walk.begin), walk.cell + cell, walk.time(patch), table, gates,
                   decays + warp * kFlux, end_weights);
      made_for = irregular ? -1 : offset;
    }
    if (lane == 0) patch_cells[warp] = cell;
    load_query(0, patch);

    // What the patch adds to its cells.
    const uint32_t tile_base = shared + layout.tiles + stage * 2 * kTile * config::kRow;
    uint4 ends[Weights::kFluxTiles];
#pragma unroll
    for (int tile = 0; tile < Weights::kFluxTiles; ++tile) ends[tile] = end_weights[tile * kWarp + lane];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t rows = tile_base + side * kTile * config::kRow;
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t a[4];
        load_matrices_transposed(a, Row::at(rows, warp * kPatch + (lane / 16) * 8 + lane % 8, 2 * m + (lane / 8) % 2));
#pragma unroll
        for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
          float sum[4] = {};
          mma<storage>(sum, a, ends[tile].x, ends[tile].y);
          mma<storage>(sum, a, ends[tile].z, ends[tile].w);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int j = 8 * tile + 2 * q + e % 2, d = 16 * m + g + 8 * (e / 2);
            if (j < kFlux) {
              added[((warp * 2 + side) * kFlux + j) * config::kAddedStride + d] = sum[e];
            } else if (sum[e] != 0.f) {
              sound = false;  // weights of zero, so a token is not finite
            }
          }
        }
      }
    }
    __syncthreads();

    // The cells that take tokens of this tile, each from patch to patch: a thread has one chunk of one cell. A cell may
    // need what the one before it in its slot left, so no more than `slots` at a time.
    const int further = tokens_left + tile_offset;
    const int cells_here = cells_per_tile + (further > resolution ? 3 : further > 0 ? 2 : 1);
    for (int lap = 0; lap < cells_here; lap += slots) {
      if (lap > 0) __syncthreads();
      const int items = min(slots, cells_here - lap) * 2 * Row::kChunks;
      for (int item = threadIdx.x; item < items; item += config::kThreads) {
        const int chunk = item % Row::kChunks, side = item / Row::kChunks % 2;
        const int number = lap + item / (2 * Row::kChunks), c = tile_cell + number;
        const int centre = c * resolution - walk.offset - time, last = centre + resolution - 1;
        const int lobe = centre - resolution + 1;
        const uint32_t ring = shared + layout.ring + side * ring_side;
        const uint32_t carried = shared + layout.carried + (2 * side + (c & 1)) * config::kRow + chunk * 16;
        const uint32_t carried_tile = 4 * config::kRow;
        const int before_row = wrap(tile_row + number, ring_rows), own_row = wrap(before_row + slots, ring_rows);
        const uint32_t own = Row::at(ring, own_row, chunk);
        uint32_t from = Row::at(ring, before_row, chunk);
        if (c < walk.given - slots) from = own;  // left by what came before the walk
        if (lobe < 0 && time > 0) from = carried + stage * carried_tile;
        uint4 words = load_shared(from);
        float content[8];
        const auto unpack_words = [&] {
          const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<storage>(w[i]);
            content[2 * i] = pair.x;
            content[2 * i + 1] = pair.y;
          }
        };
        unpack_words();
        const int end_patch = min(last / kPatch, kWarps - 1);
        const uint32_t started = shared + layout.started + side * started_side + chunk * 16;
        for (int w = max(lobe, 0) / kPatch; w <= end_patch; ++w) {
          const int j = c - patch_cells[w];
          if (lobe < w * kPatch) store_shared(started + (2 * w + j) * config::kRow, words);
          const float4* sums =
              reinterpret_cast<const float4*>(added + ((w * 2 + side) * kFlux + j) * config::kAddedStride + chunk * 8);
          const float decay = decays[w * kFlux + j];
          const float4 low = sums[0], high = sums[1];
          content[0] = decay * content[0] + low.x;
          content[1] = decay * content[1] + low.y;
          content[2] = decay * content[2] + low.z;
          content[3] = decay * content[3] + low.w;
          content[4] = decay * content[4] + high.x;
          content[5] = decay * content[5] + high.y;
          content[6] = decay * content[6] + high.z;
          content[7] = decay * content[7] + high.w;
          words = make_uint4(pack<storage>(content[0], content[1]), pack<storage>(content[2], content[3]),
                             pack<storage>(content[4], content[5]), pack<storage>(content[6], content[7]));
        }
        store_shared(last < kTile ? own : carried + (stage ^ 1) * carried_tile, words);
      }
    }
    __syncthreads();

    // Attend.
    const int here_cell = cell, here_row = first_row, here_offset = offset;
    tile_cell += cells_per_tile;
    tile_row += cells_per_tile;
    tile_offset += tokens_left;
    cell += cells_per_tile;
    offset += tokens_left;
    first_row += cells_per_tile;
    if (tile_offset >= resolution) {
      tile_offset -= resolution;
      ++tile_cell;
      ++tile_row;
    }
    if (offset >= resolution) {
      offset -= resolution;
      ++cell;
      ++first_row;
    }
    first_row = wrap(first_row, ring_rows);
    tile_row = wrap(tile_row, ring_rows);
    if (patch + kPatch <= walk.own_begin || patch >= walk.own_end) continue;
    const int masked = irregular ? min(walk.first - (here_cell - slots), slots) : 0;
    // Cells that go on in this patch lie apart from the ring.
    const int going_on = here_offset >= 2 ? 2 : 1;
    // And the slots of those that ended before the walk hold them, not what was before them.
    const int ended = irregular ? walk.given - slots - here_cell : 0;
    const uint32_t raw_keys = tile_base, raw_values = tile_base + kTile * config::kRow;
    const uint32_t ring_keys = shared + layout.ring, ring_values = ring_keys + ring_side;
    const uint32_t started_keys = shared + layout.started, started_values = started_keys + started_side;
    const float factor = fabsf(static_cast<float>(p.scale)) * 1.44269504f;  // exponentials to base 2
    for (int i = 0; i < group; ++i) {
      const int64_t query_head = static_cast<int64_t>(head) * group + i;
      if (i > 0) load_query(i, patch);
      // The products of the query rows with eight rows; this thread's is number `row` of its eight.
      const auto product = [&](float (&sum)[4], uint32_t row_address, int row) {
        const uint32_t even = row_address + (((2 * q) ^ (row & 7)) << 4), odd = even ^ 16;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = 0.f;
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) {
          const uint4 words = load_shared((w % 2 ? odd : even) + 128 * (w / 2));
          mma<storage>(sum, query[2 * w], words.x, words.y);
          mma<storage>(sum, query[2 * w + 1], words.z, words.w);
        }
      };
      float raw[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        product(raw[tile], raw_keys + (warp * kPatch + 8 * tile + g) * config::kRow, g);
      }

      float out[kDim / 8][4] = {};
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
      float shares[2][4] = {};  // of the patch's tokens
      for (int first = 0; first < (config::kMore ? slots : 1); first += config::kColumns) {
        float score[kColumnTiles][4];
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const int column = first + 8 * tile + g;
          int row = wrap(here_row + column, ring_rows);
          if (column < ended) row = wrap(row + slots, ring_rows);
          uint32_t address = ring_keys + row * config::kRow;
          if (tile == 0 && column < going_on) {
            row = 0;
            address = started_keys + (2 * warp + column) * config::kRow;
          }
          product(score[tile], address, row);
        }
        if (first == 0) {
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float sum = 0.f;
#pragma unroll
              for (int tile = 0; tile < 2; ++tile) {
                const float2 weight = __half22float2(weights.weight[j][tile][half]);
                sum += weight.x * raw[tile][2 * half];
                sum += weight.y * raw[tile][2 * half + 1];
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
            most = fmaxf(most, fmaxf(score[tile][2 * half], score[tile][2 * half + 1]));
          }
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
          const float shift = most == -INFINITY ? 0.f : most * factor;
          before[half] = exp2_fast(top[half] * factor - shift);
          top[half] = most;
          float sum = 0.f;
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              score[tile][e] = exp2_fast(score[tile][e] * factor - shift);
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
                const float2 weight = __half22float2(weights.weight[j][tile][half]);
                shares[tile][2 * half] += share * weight.x;
                shares[tile][2 * half + 1] += share * weight.y;
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
          int row = wrap(here_row + column, ring_rows);
          if (column < ended) row = wrap(row + slots, ring_rows);
          uint32_t address = ring_values + row * config::kRow;
          if (step == 0 && column < going_on) {
            row = 0;
            address = started_values + (2 * warp + column) * config::kRow;
          }
          address += ((lane / 16) ^ (row & 7)) << 4;
#pragma unroll
          for (int d = 0; d < kDim / 16; ++d) {
            uint32_t b[4];
            load_matrices_transposed(b, (address ^ ((d % 4) << 5)) + 128 * (d / 4));
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

      unsigned char* const staged = shared_memory + layout.added + warp * kPatch * config::kRow;
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
        if (q == 0 && owns(patch + g + 8 * half)) {
          static_cast<float*>(
              outputs.lse)[(walk.batch * p.query_heads + query_head) * p.tokens + walk.row + patch + g + 8 * half] =
              (top[half] * factor + log2_fast(sum)) * 0.693147181f;
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
    step_token<storage>(p, law, sequence.batch, head, sequence.row + t, sequence.position + t, keys, values,
                        outputs.out, static_cast<float*>(outputs.lse), shared_memory);
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

// How many cells are in flux in one patch at most: where patches begin is a multiple of both 16's and r's common
// divisor.
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
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int in_flux = cells_in_flux(p.cells[h].resolution);
        if (in_flux <= least || in_flux > flux) continue;
        heads.head[heads.count++] = static_cast<uint16_t>(h);
      }
      least = flux;
      if (heads.count == 0) continue;
      with_config(p, flux, [&](auto config_tag) {
        using config = decltype(config_tag);
        uint32_t bytes = 0;
        for (int i = 0; i < heads.count; ++i) {
          const int resolution = static_cast<int>(p.cells[heads.head[i]].resolution);
          bytes = std::max(bytes, Layout::make<config>(static_cast<int>(p.slots), resolution).bytes);
        }
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
