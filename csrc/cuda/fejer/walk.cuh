// This file has the walk forward over time of "fejer" in its parallel form on tensor cores. It serves one of two tasks:
// the output, or what the slots hold for the backward walk.
//
// A cell is what a slot gathers around one centre token, and its lobe is the tokens that it takes a share of. A block
// walks over a stretch of tokens in tiles of kTile, on a grid that begins at the head's phase. Each of its warps has 16
// of a tile's tokens, its patch. When a patch begins, every slot holds a finished cell, which lies in a ring in shared
// memory, or an unfinished one. At most two unfinished cells go on in a patch, and they lie in rows of their own. A
// token of the patch sees a slot in flux, one of the first kFlux from the trailing cell's on, as
//     decay * (what it held at the beginning of the patch) + sum over the patch's tokens s <= t of weight * token s.
// Decays and weights are the same in every patch that lies alike between two cells. docs/design/glossary.md defines
// cell, lobe, lap, patch, walk and seam.
#pragma once

#include "common/shared.cuh"
#include "fejer/attend.cuh"
#include "fejer/place.cuh"
#include "fejer/plans.cuh"
#include "fejer/walk_seams.cuh"

namespace blurry_attn::cuda {
namespace {

// Config has the shapes of a walk at compile time. kColumns slots are taken at once, and with kMore there may be more.
template <typename storage_type, int dim, int flux, int columns, bool more, bool keeps_only = false>
struct Config {
  using storage = storage_type;
  static constexpr int kDim = dim, kFlux = flux, kColumns = columns;
  static constexpr bool kMore = more, kKeepsOnly = keeps_only;
  static constexpr bool kSelecting = is_selecting(flux);
  static constexpr int kStride = stride_of(flux);
  static constexpr int kWarps = dim <= 64 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTile = kWarps * kPatch;
  // Two blocks on a multiprocessor hide each other's waits, so shared memory is kept small.
  static constexpr int kBlocks = dim > 64 || flux != 9 ? 2 : 1;
  // kStages tiles of tokens lie in shared memory. With one, a warp fetches its next patch as soon as it is done with
  // this one.
  static constexpr int kStages = dim <= 64 && flux != 5 && !kSelecting ? 2 : 1;
  static constexpr int kSidesAtOnce = dim > 64 && flux == 9 ? 1 : 2;  // of key and value, those advanced at once
  // kAhead says whether there are registers for query rows while they are on their way.
  static constexpr bool kAhead = !more && (dim > 64 || flux != kEveryOther);
  static constexpr int kRow = Rows<dim>::kBytes;
  static constexpr int kAddedStride = dim + 4;  // floats of a row of what a patch adds to its cells
  static constexpr int kAdded = kSelecting ? 0 : kSidesAtOnce * flux * kAddedStride * 4, kStaged = kPatch * kRow;
  static constexpr int kScratch = ((kAdded > kStaged ? kAdded : kStaged) + 127) / 128 * 128;  // bytes of a warp
};

// Layout is the shared memory of a walk, as offsets in bytes.
struct Layout {
  int ring_rows;
  uint32_t tiles, ring, started_rows, side_bytes, carried, scratch, ends, decays, table, cells, bytes;

  template <typename config>
  __host__ __device__ static Layout make(int slots, int resolution) {
    Layout l;
    l.ring_rows =
        slots + config::kTile / resolution + (config::kSelecting ? 0 : 3) + (config::kMore ? config::kColumns : 0);
    if (l.ring_rows < config::kColumns) l.ring_rows = config::kColumns;
    uint32_t at = 0;
    l.tiles = at;  // tokens: [stage][side][token]
    at += config::kStages * 2 * config::kTile * config::kRow;
    const int in_flux = config::kSelecting ? 0 : config::kFlux;
    l.ring = at;                                       // cells of each side: [ring row]
    l.started_rows = at + l.ring_rows * config::kRow;  // cells that go on in a patch, at its beginning: [warp][2]
    l.side_bytes = (l.ring_rows + (config::kSelecting ? 0 : 2 * config::kWarps)) * config::kRow;
    at += 2 * l.side_bytes;
    // These are cells at the end of a tile, for the next one, not permuted: [tile mod 2][side][cell mod 2].
    l.carried = at;
    at += config::kSelecting ? 0 : 2 * 2 * 2 * config::kRow;
    // A warp's scratch has gates, [cell][16], then what its patch adds to cells, float [side][cell][element], then rows
    // of the output.
    l.scratch = at;
    at += config::kWarps * config::kScratch;
    l.ends = at;  // weights at patches' ends: [warp][8 cells][lane]
    at += config::kSelecting ? 0 : config::kWarps * ((config::kFlux + 8) / 8) * kWarp * 16;
    l.decays = at;  // decays over whole patches: [warp][cell]
    at += config::kWarps * in_flux * 4;
    l.cells = at;  // trailing cells of patches: [warp]
    at += config::kWarps * 4;
    l.table = at;
    at += 2 * resolution * 4;
    l.bytes = (at + 15) / 16 * 16;
    return l;
  }
};

// Clears the ring and fetches the table of gates.
template <typename config>
__device__ __forceinline__ void prepare(const Problem& p, int head) {
  const int resolution = static_cast<int>(p.laws[head].cells.resolution);
  const Layout layout = Layout::make<config>(static_cast<int>(p.slots), resolution);
  float* const table = reinterpret_cast<float*>(shared_memory + layout.table);
  for (int i = threadIdx.x; i < 2 * resolution; i += config::kThreads) {
    table[i] = static_cast<const float*>(p.gates)[p.laws[head].gates + i];
  }
  const uint32_t ring = shared_address(shared_memory) + layout.ring;
  for (uint32_t i = threadIdx.x; i < 2 * layout.side_bytes / 16; i += config::kThreads) {
    store_shared(ring + 16 * i, make_uint4(0, 0, 0, 0));
  }
}

// WalkMarks says where a walk leaves the cells of its seams, and where it marks a number that is not finite; null:
// nowhere.
struct WalkMarks {
  uint4 *at_begin = nullptr, *at_end = nullptr;
  uint8_t* unsound = nullptr;

  WalkMarks() = default;
  __device__ WalkMarks(const Problem& p, const Walk& walk, const HeadList& heads, const Seams& seams, int chunks,
                       uint8_t* marks) {
    const int head_index = blockIdx.x % heads.count;
    if (seams.is_again) {  // the first walk saw what is not finite; nobody reads this
      unsound = reinterpret_cast<uint8_t*>(seams.found + blockIdx.x);
    } else if (marks) {
      unsound = marks + walk.stretch * p.kv_heads + heads.head[head_index];
      *unsound = 0;
    }
    if (!seams.rows) return;
    if (walk.own_begin == walk.begin) seams.found[walk.sequence * heads.count + head_index] = 0;  // its first stretch
    const auto rows = [&](int64_t seam, bool warmed_up) {
      return static_cast<uint4*>(seams.rows) + seams.row(seam, heads.count, head_index, warmed_up, 0) * chunks;
    };
    if (walk.seam_before) at_begin = rows(seams.plan.seam(p, walk.sequence, walk.stretch), true);
    if (walk.seam_after) at_end = rows(seams.plan.seam_after(p, walk.sequence, walk.stretch), false);
  }
};

// Leaves the cells of both sides that ended in the lap before time `until`, the last one first. It is a call, so that
// the walk has no registers in use for what is done once or twice.
template <typename config>
__device__ __noinline__ void leave_cells(const Walk& walk, int slots, int until, uint4* to) {
  using Row = Rows<config::kDim>;
  const Layout layout = Layout::make<config>(slots, walk.resolution);
  const int newest = ((until + walk.offset) / walk.resolution - 1 + slots) % layout.ring_rows;
  for (int item = threadIdx.x; item < 2 * slots * Row::kChunks; item += config::kThreads) {
    const int chunk = item % Row::kChunks, n = item / Row::kChunks, side = n >= slots, back = n - side * slots;
    const int row = newest - back < 0 ? newest - back + layout.ring_rows : newest - back;
    const uint32_t ring = shared_address(shared_memory) + layout.ring + side * layout.side_bytes;
    store_global(to + item, load_shared(Row::at(ring, row, chunk)));
  }
}

template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    fejer_walk(Problem p, Outputs outputs, Kept kept, WalkPlan plan, HeadList heads, Seams seams, uint8_t* unsound) {
  wait_for_grid_before();
  if (blockIdx.x >= plan.count * heads.count) return;  // the grid is rounded up to pairs
  if (!config::kSelecting && seams.is_again && !seams.found[blockIdx.x]) return;
  using storage = typename config::storage;
  using Row = Rows<config::kDim>;
  constexpr int kDim = config::kDim, kFlux = config::kFlux, kWarps = config::kWarps, kTile = config::kTile;
  constexpr int kStride = config::kStride;
  using Weights = PatchWeights<storage, kFlux>;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int head_index = blockIdx.x % heads.count, head = heads.head[head_index];
  __shared__ Walk walk;
  __shared__ WalkMarks marks;
  // These are rows of Kept, of both sides: of the walk's cell 0, and of the patch at time 0.
  __shared__ int64_t cell_row, started_row;
  const bool keeps = config::kKeepsOnly || (!config::kMore && kept.cells);
  if (threadIdx.x == 0) {
    walk = Walk(p, plan, blockIdx.x / heads.count, head);
    if constexpr (config::kSelecting) {
      unsound[walk.stretch * p.kv_heads + head] = 0;
    } else {
      marks = WalkMarks(p, walk, heads, seams, Row::kChunks, unsound);
    }
    if (keeps) {
      cell_row = heads.cell_rows[head_index] - walk.trailing_at_begin +
                 kept.cell_row(p, walk.sequence, walk.batch, walk.sequence_row, p.laws[head]);
      started_row = kept.started_row(p, walk.sequence, walk.batch, walk.sequence_row, walk.first_patch, head);
    }
  }
  prepare<config>(p, head);  // thread 0 finds the walk meanwhile
  __syncthreads();
  if (walk.own_begin >= walk.own_end) return;
  const int slots = static_cast<int>(p.slots), resolution = walk.resolution;
  const Layout layout = Layout::make<config>(slots, resolution);
  const int ring_rows = layout.ring_rows;

  const uint32_t shared = shared_address(shared_memory);
  const uint32_t side_bytes = layout.side_bytes;
  const auto added = [&](int warp, int side, int cell) {
    return reinterpret_cast<float*>(shared_memory + layout.scratch + warp * config::kScratch) +
           (side % config::kSidesAtOnce * kFlux + cell) * config::kAddedStride;
  };
  float* const gates = added(warp, 0, 0);  // until `added` has something
  static_assert(config::kSelecting || config::kScratch >= 2 * kFlux * kPatch * 4, "gates and logarithms");
  uint4* const end_weights = reinterpret_cast<uint4*>(shared_memory + layout.ends) + warp * Weights::kFluxTiles * kWarp;
  float* const decays = reinterpret_cast<float*>(shared_memory + layout.decays);
  float* const table = reinterpret_cast<float*>(shared_memory + layout.table);
  int* const patch_cells = reinterpret_cast<int*>(shared_memory + layout.cells);

  const auto report = [&] {  // a number is not finite
    if constexpr (config::kSelecting) {
      unsound[walk.stretch * p.kv_heads + head] = 1;
    } else if constexpr (!config::kKeepsOnly) {
      *marks.unsound = 1;
    }
  };

  // A given state goes into the ring first. Cell number c lies in row c mod ring_rows.
  if (p.state_key && walk.from_begin) {
    for (int i = threadIdx.x; i < 2 * slots * kDim; i += config::kThreads) {
      const int d = i % kDim, back = i / kDim % slots, side = i / kDim / slots;
      const int slot = walk.given_slot(back, slots), row = (walk.given_cell - 1 - back) % ring_rows;
      const int dim = static_cast<int>(side ? p.value_dim : p.key_dim);
      if (slot < 0 || d >= dim) continue;
      const float* const state = static_cast<const float*>(side ? p.state_value : p.state_key);
      const storage content =
          to_storage<storage>(state[((walk.sequence * p.kv_heads + head) * slots + slot) * dim + d]);
      if (!isfinite(to_compute<float>(content))) report();
      *reinterpret_cast<storage*>(shared_memory + layout.ring + side * side_bytes + Row::element(row, d)) = content;
    }
  }

  // A warp fetches the tokens of its own patch, and a lane copies one chunk of every kRowsAtOnce-th row.
  constexpr int kRowsAtOnce = kWarp / Row::kChunks;
  const auto fetch = [&](int patch, int stage, int side) {
    const int thread = hidden(lane), copy_row = thread / Row::kChunks, copy_chunk = thread % Row::kChunks;
    const View& view = side ? p.value : p.key;
    const int first = max(walk.begin - patch, 0), last = min(walk.end - patch, kPatch);
    const storage* from = row_of<const storage>(view, walk.batch, head, walk.row + patch + copy_row) + copy_chunk * 8;
    const int64_t step = kRowsAtOnce * view.token;
    const uint32_t to = Row::at(shared + layout.tiles + ((stage * 2 + side) * kTile + warp * kPatch) * config::kRow,
                                copy_row, copy_chunk);
    const auto place = [&](int i) { return (to ^ (i * kRowsAtOnce % 8 << 4)) + i * kRowsAtOnce * config::kRow; };
    if (first == 0 && last == kPatch && (side ? p.value_dim : p.key_dim) == kDim) {
#pragma unroll
      for (int i = 0; i < kPatch / kRowsAtOnce; ++i) copy_async(place(i), from + i * step);
    } else {
      const bool exists = copy_chunk * 8 < (side ? p.value_dim : p.key_dim);
      for (int i = 0; i < kPatch / kRowsAtOnce; ++i) {
        const int row = copy_row + i * kRowsAtOnce;
        const bool valid = exists && row >= first && row < last;
        copy_async_or_zero(place(i), valid ? from + i * step : view.data, valid);
      }
    }
    commit_copies();
  };

  const uint32_t query_sign = p.scale < 0 ? 0x80008000u : 0u;  // score_factor() has the absolute value
  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  Attend<config> attend(slots, ring_rows);
  [[maybe_unused]] typename Attend<config>::Fetched query_rows;
  const auto fetch_query = [&](int patch, int i) {
    attend.fetch_rows(query_rows, row_of<const storage>(p.query, walk.batch, head * group + i, walk.row + patch),
                      p.query.token, walk.own_begin - patch, walk.own_end - patch, static_cast<int>(p.key_dim));
  };
  const auto take_query = [&] { attend.take_rows(query_rows, query_sign); };
  attend.ring = shared + layout.ring;
  attend.started_rows = shared + layout.started_rows + 2 * warp * config::kRow;
  attend.side_bytes = side_bytes;
  int made_for = -1;  // the likeness of the patch that the weights are of
  // tile_cell trails at the tile's beginning, tile_offset tokens after its centre. The ring counts cells from `slots`
  // before cell 0, so tile_row is the row of what the trailing cell's slot held before.
  int tile_cell = 0, tile_offset = walk.offset, tile_row = 0;
  const int cells_per_tile = kTile / resolution, tokens_left = kTile % resolution;

  const auto owns = [&](int time) { return time >= walk.own_begin && time < walk.own_end; };
  const auto store_row = [](void* rows, int64_t row, int chunk, const uint4& words) {
    store_global(static_cast<uint4*>(rows) + row * Row::kChunks + chunk, words);
  };
  for (int side = 0; side < 2; ++side) fetch(warp * kPatch, 0, side);
  __syncthreads();  // the ring and the table are complete
  for (int time = 0, odd = 0; time < walk.own_end; time += kTile, odd ^= 1) {
    const int patch = time + warp * kPatch, stage = odd % config::kStages;
    // Fetches the next patch's tokens, once those of this one are done with or there is room for both.
    const auto fetch_next = [&](int side) {
      __syncwarp();
      if (time + kTile < walk.own_end) fetch(patch + kTile, stage ^ (config::kStages - 1), side);
    };
    wait_copies<0>();
    __syncwarp();
    if constexpr (config::kStages == 2) {
      for (int side = 0; side < 2; ++side) fetch_next(side);
    }

    int offset = tile_offset + warp * kPatch % resolution, cell = tile_cell + warp * kPatch / resolution;
    if (offset >= resolution) {
      offset -= resolution;
      ++cell;
    }
    const bool whole = patch >= walk.begin, irregular = !whole || cell - slots < walk.first;
    const int likeness = Weights::likeness(cell, walk.first, slots, offset, resolution, whole);
    if (!config::kSelecting && (likeness < 0 || made_for != likeness)) {
      const Cells cells = p.laws[head].cells;
      Weights::make_gates(cells, walk.time(walk.begin), walk.time(walk.end), walk.cell + cell, walk.time(patch), table,
                          gates);
      if constexpr (!config::kKeepsOnly) attend.weights.make(cells, walk.cell + cell, walk.time(patch), gates);
      Weights::make_end(gates, decays + warp * kFlux, end_weights);
      made_for = likeness;
    }
    if constexpr (!config::kKeepsOnly) {
      fetch_query(patch, 0);
      if (!config::kAhead) take_query();
    }
    if (lane == 0) patch_cells[warp] = cell;

    // The warp computes what its patch adds to the cells.
    const uint32_t tile_base = shared + layout.tiles + stage * 2 * kTile * config::kRow;
    if constexpr (config::kSelecting) {
      __syncthreads();  // all warps are done with the previous tile
      // Every token of the tile is a cell, or every other one.
      for (int item = lane; item < 2 * kPatch * Row::kChunks; item += kWarp) {
        const int chunk = item % Row::kChunks, side = item / Row::kChunks / kPatch;
        const int row = warp * kPatch + item / Row::kChunks % kPatch;
        if (time + row < walk.begin) continue;
        const uint4 words = load_shared(Row::at(tile_base + side * kTile * config::kRow, row, chunk));
        if (!finite<storage>(words)) report();
        if (row % kStride + 1 < kStride) continue;
        const int ring_row = wrap(wrap(tile_row + row / kStride, ring_rows) + slots, ring_rows);
        store_shared(Row::at(shared + layout.ring + side * side_bytes, ring_row, chunk), words);
      }
    } else {
      uint4 ends[Weights::kFluxTiles];
#pragma unroll
      for (int tile = 0; tile < Weights::kFluxTiles; ++tile) ends[tile] = end_weights[tile * kWarp + lane];
      for (int from_side = 0; from_side < 2; from_side += config::kSidesAtOnce) {
        if (from_side > 0) __syncthreads();
        uint32_t strays = 0;  // sums of columns without weights: not zero where a token is not finite
#pragma unroll
        for (int side = from_side; side < from_side + config::kSidesAtOnce; ++side) {
          const uint32_t rows = tile_base + side * kTile * config::kRow;
          constexpr int kAtOnce = kDim > 64 ? 4 : 2;  // products that do not wait for each other
#pragma unroll
          for (int first = 0; first < kDim / 16; first += kAtOnce) {
            uint32_t a[kAtOnce][4];
#pragma unroll
            for (int m = 0; m < kAtOnce; ++m) {
              load_matrices_transposed(
                  a[m], Row::at(rows, warp * kPatch + (lane / 16) * 8 + lane % 8, 2 * (first + m) + (lane / 8) % 2));
            }
#pragma unroll
            for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
              Tiles<kAtOnce> sums = {};
#pragma unroll
              for (int m = 0; m < kAtOnce; ++m) mma<storage>(sums[m], a[m], ends[tile].x, ends[tile].y);
#pragma unroll
              for (int m = 0; m < kAtOnce; ++m) mma<storage>(sums[m], a[m], ends[tile].z, ends[tile].w);
#pragma unroll
              for (int m = 0; m < kAtOnce; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  const int j = 8 * tile + 2 * q + e % 2, d = 16 * (first + m) + g + 8 * (e / 2);
                  if (j < kFlux) {
                    added(warp, side, j)[d] = sums[m][e];
                  } else {
                    strays |= __float_as_uint(sums[m][e]) & 0x7fffffff;
                  }
                }
              }
            }
          }
        }
        if (strays) report();
        if (config::kKeepsOnly && config::kStages == 1) {
          for (int side = from_side; side < from_side + config::kSidesAtOnce; ++side) fetch_next(side);
        }
        __syncthreads();

        // The cells that take tokens of this tile go from patch to patch, and a thread has one chunk of one cell. A
        // cell may need what the one before it in its slot left, so at most `slots` cells run at a time.
        const int further = tokens_left + tile_offset;
        const int cells_here = cells_per_tile + (further > resolution ? 3 : further > 0 ? 2 : 1);
        for (int lap = 0; lap < cells_here; lap += slots) {
          if (lap > 0) __syncthreads();
          const int items = min(slots, cells_here - lap) * config::kSidesAtOnce * Row::kChunks;
          for (int item = threadIdx.x; item < items; item += config::kThreads) {
            const int chunk = item % Row::kChunks, side = from_side + item / Row::kChunks % config::kSidesAtOnce;
            const int number = lap + item / (config::kSidesAtOnce * Row::kChunks), c = tile_cell + number;
            const int centre = c * resolution - walk.offset - time, last = centre + resolution - 1;
            const int lobe = centre - resolution + 1;
            const uint32_t ring = shared + layout.ring + side * side_bytes;
            const uint32_t carried = shared + layout.carried + (2 * side + (c & 1)) * config::kRow + chunk * 16;
            const uint32_t carried_tile = 4 * config::kRow;
            const int before_row = wrap(tile_row + number, ring_rows), own_row = wrap(before_row + slots, ring_rows);
            const uint32_t own = Row::at(ring, own_row, chunk);
            uint32_t from = Row::at(ring, before_row, chunk);
            if (c < walk.given_cell - slots) from = own;  // the cell ended before the walk, and is given
            if (lobe < 0 && time > 0) from = carried + odd * carried_tile;
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
            const uint32_t started = shared + layout.started_rows + side * side_bytes + chunk * 16;
            for (int w = max(lobe, 0) / kPatch; w <= end_patch; ++w) {
              const int j = c - patch_cells[w];
              if (lobe < w * kPatch) {
                if constexpr (!config::kKeepsOnly) store_shared(started + (2 * w + j) * config::kRow, words);
                if (keeps && time + w * kPatch + kPatch > walk.own_begin && time + w * kPatch < walk.own_end) {
                  const int64_t row = started_row + (time / kPatch + w) * 2 * p.kv_heads;
                  store_row(kept.started, 2 * row + 2 * side + j, chunk, words);
                }
              }
              const float4* sums = reinterpret_cast<const float4*>(added(w, side, j) + chunk * 8);
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
            store_shared(last < kTile ? own : carried + (odd ^ 1) * carried_tile, words);
            if (keeps && last < kTile && owns(time + last)) {
              store_row(kept.cells, 2 * (cell_row + c) + side, chunk, words);
            }
          }
        }
      }
    }
    __syncthreads();

    if constexpr (!config::kSelecting) {
      if (marks.at_begin && time < walk.own_begin && walk.own_begin <= time + kTile) {
        leave_cells<config>(walk, slots, walk.own_begin, marks.at_begin);
      }
    }

    // The patch's tokens attend to the slots.
    attend.row = wrap(tile_row + cell - tile_cell, ring_rows);
    attend.irregular = irregular;
    attend.masked = irregular ? min(walk.first - (cell - slots), slots) : 0;
    if (config::kStride > 1) attend.missing = irregular ? walk.first - cell : 0;
    attend.cells_going_on = config::kSelecting ? 0 : offset >= 2 ? 2 : 1;
    attend.ended_columns = irregular ? walk.given_cell - slots - cell : 0;
    attend.tokens[0] = tile_base + warp * kPatch * config::kRow;
    attend.tokens[1] = attend.tokens[0] + kTile * config::kRow;
    tile_cell += cells_per_tile;
    tile_row += cells_per_tile;
    tile_offset += tokens_left;
    if (tile_offset >= resolution) {
      tile_offset -= resolution;
      ++tile_cell;
      ++tile_row;
    }
    tile_row = wrap(tile_row, ring_rows);
    if constexpr (config::kKeepsOnly) continue;
    if (patch + kPatch <= walk.own_begin || patch >= walk.own_end) {
      if constexpr (config::kStages == 1) {
        for (int side = 0; side < 2; ++side) fetch_next(side);
      }
      continue;
    }
    if constexpr (!config::kKeepsOnly) {
      const float factor = score_factor(p.scale);
      const uint32_t staged = shared + layout.scratch + warp * config::kScratch;
      for (int i = 0; i < group; ++i) {
        const int query_head = head * group + i;
        if (i > 0) fetch_query(patch, i);
        if (i > 0 || config::kAhead) take_query();
        Tiles<kDim / 8> out = {};
        typename Attend<config>::Raw raw, shares = {};
        float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
        attend.token_products(raw, 0);
        const auto fetch_once_read = [&](int side) {
          if constexpr (config::kStages == 1) {
            if (i + 1 == group) fetch_next(side);
          }
        };
        fetch_once_read(0);
        constexpr bool kOwnFirst = (kDim > 64 || config::kSelecting) && !config::kMore;
        const auto gather_own = [&] {
          uint32_t weights[4];
          attend.pack_pair(weights, shares[0], shares[1]);
          attend.gather_tokens(out, weights, 1);
          fetch_once_read(1);
        };
        for (int first = 0; first < (config::kMore ? slots : 1); first += config::kColumns) {
          Tiles<config::kColumns / 8> score;
          if (config::kMore || i == 0) attend.find_places(first);
          attend.column_products(score, 0);
          if (first == 0) attend.template advance<-1>(score, raw);
          attend.mask(score, first);
          float before[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float most = top[half];
#pragma unroll
            for (int tile = 0; tile < config::kColumns / 8; ++tile) {
              most = fmaxf(most, fmaxf(score[tile][2 * half], score[tile][2 * half + 1]));
            }
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            const float shift = most == -INFINITY ? 0.f : most * factor;
            before[half] = exp2_fast(top[half] * factor - shift);
            top[half] = most;
            float sum = 0.f;
#pragma unroll
            for (int tile = 0; tile < config::kColumns / 8; ++tile) {
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
            attend.template split<0>(score, shares);
            if constexpr (kOwnFirst) gather_own();
          }
#pragma unroll
          for (int m = 0; m < config::kColumns / 16; ++m) {
            uint32_t weights[4];
            attend.pack_pair(weights, score[2 * m], score[2 * m + 1]);
            attend.gather_columns(out, weights, 1, m);
          }
        }
        if constexpr (!kOwnFirst) gather_own();
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = total[half];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          inverse[half] = 1.f / sum;
          const int time = patch + attend.g + 8 * half;
          if (attend.q == 0 && owns(time)) {
            static_cast<float*>(outputs.lse)[(walk.batch * p.query_heads + query_head) * p.tokens + walk.row + time] =
                (top[half] * factor + log2_fast(sum)) * 0.693147181f;
          }
        }
        attend.store_rows(out, inverse, outputs.out, walk.batch, query_head, walk.row + patch, walk.own_begin - patch,
                          walk.own_end - patch, static_cast<int>(p.value_dim), staged);
      }
    }
  }
  if constexpr (!config::kSelecting) {
    if (marks.at_end) leave_cells<config>(walk, slots, walk.own_end, marks.at_end);
  }
}

// fejer_given writes what the slots of a given state hold, as if cells held it that ended before the sequence.
template <typename storage, int dim>
__global__ void __launch_bounds__(256) fejer_given(Problem p, Kept kept, HeadList heads) {
  const int head_index = blockIdx.x % heads.count, head = heads.head[head_index];
  const Cells cells = p.laws[head].cells;
  const Sequence s(p, blockIdx.x / heads.count);
  const int64_t first_row =
      heads.cell_rows[head_index] + kept.cell_row(p, s.index, s.batch, s.row, p.laws[head]) - p.slots;
  const int64_t oldest = cells.trailing(s.position) - p.slots;
  for (int64_t i = threadIdx.x; i < p.slots * 2 * dim; i += 256) {
    const int64_t row = i / (2 * dim), side = i / dim % 2, d = i % dim;
    const int64_t slot = cells.slot(oldest + row), width = side ? p.value_dim : p.key_dim;
    const float* const state = static_cast<const float*>(side ? p.state_value : p.state_key);
    float content = 0.f;
    if (d < width && s.position > cells.slot_opening(slot)) {
      content = state[((s.index * p.kv_heads + head) * p.slots + slot) * width + d];
    }
    static_cast<storage*>(kept.cells)[first_row * 2 * dim + i] = to_storage<storage>(content);
  }
}

inline int64_t cell_seam_bytes(const Problem& p, const WalkPlan& plan, const HeadClass& c) {
  return Seams::bytes(p, plan, c.heads, c.echo, p.slots, 2);
}

template <typename config>
void launch_given(const Problem& p, const Kept& kept, const HeadList& heads) {
  launch("fejer_given", fejer_given<typename config::storage, config::kDim>, p.sequences * heads.count, 256, 0,
         p.stream, p, kept, heads);
}

// `seam_rows` points to cell_seam_bytes() of memory.
template <typename config>
void launch_walk(const char* name, const Problem& p, const Outputs& outputs, const Kept& kept, const WalkPlan& plan,
                 const HeadClass& c, void* seam_rows, uint8_t* unsound) {
  const HeadList& heads = c.heads;
  const uint32_t bytes = shared_memory_of<fejer_walk<config>>(
      p, heads, [&](int resolution) { return Layout::make<config>(static_cast<int>(p.slots), resolution).bytes; });
  const Seams seams(p, plan, heads, p.slots, cell_seam_bytes(p, plan, c), seam_rows);
  const auto walk = [&](const WalkPlan& plan, const Seams& seams, uint8_t* unsound) {
    launch_early<kPair>(name, fejer_walk<config>, plan.count * heads.count, config::kThreads, bytes, p.stream, p,
                        outputs, kept, plan, heads, seams, unsound);
  };
  walk(plan, seams, unsound);
  if (!seams.rows) return;
  launch_early("fejer_walk at seams", fejer_walk_seams<typename config::storage, config::kDim>, seams.blocks(heads),
               kSeamThreads, 0, p.stream, p, heads, seams);
  walk(plan.whole(p), seams.again(), unsound);
}

}  // namespace
}  // namespace blurry_attn::cuda
