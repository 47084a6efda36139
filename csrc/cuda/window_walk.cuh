// The walk over time, for one of two tasks: the output, or backwards the gradient of the query and the patches'
// weights, which window_tokens takes further.
#pragma once

#include "window.cuh"

namespace blurry_attn::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared_memory[];

// Shapes of a walk at compile time. kColumns: slots that are taken at once; kMore: there may be more of them.
template <typename storage_type, int dim, int flux, int columns, bool more, bool backward = false>
struct Config {
  using storage = storage_type;
  static constexpr int kDim = dim, kFlux = flux, kColumns = columns;
  static constexpr bool kMore = more, kBackward = backward;
  // With r = 1 every token is a cell, which replaces what its slot held: no decays, no weights.
  static constexpr bool kSliding = flux == kPatch;
  static constexpr int kWarps = dim <= 64 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTile = kWarps * kPatch;
  static constexpr int kBlocks = dim <= 64 && flux <= 5 && !backward ? 2 : 1;
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
    const int in_flux = config::kSliding ? 0 : config::kFlux;
    l.started = at;  // cells at the beginning of a patch in which they go on:
                     // [side][warp][2]
    at += config::kSliding ? 0 : 2 * config::kWarps * 2 * config::kRow;
    l.carried = at;  // and at the end of a tile, for the next: [tile mod
                     // 2][side][cell mod 2]; neither permuted
    at += config::kSliding ? 0 : 2 * 2 * 2 * config::kRow;
    l.added = at;  // what patches add to cells, [warp][side][cell][element],
                   // float; later the rows of out, [warp][16]
    const uint32_t added = config::kWarps * 2 * in_flux * config::kAddedStride * 4;
    const uint32_t rows = config::kWarps * kPatch * config::kRow;
    at += added > rows ? added : rows;
    l.ends = at;  // weights of patches' ends: [warp][8 cells][lane]
    at += config::kSliding ? 0 : config::kWarps * ((config::kFlux + 8) / 8) * kWarp * 16;
    l.gates = at;  // [warp][cell][16]
    at += config::kWarps * in_flux * kPatch * 4;
    l.decays = at;  // of whole patches: [warp][cell]
    at += config::kWarps * in_flux * 4;
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
    window_walk(Problem p, Outputs outputs, Gradients gradients, WalkPlan plan, HeadList heads, uint8_t* unsound,
                uint4* pieces) {
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
    if (!config::kBackward) unsound[walk.stretch * p.kv_heads + head] = 0;
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

  const auto owns = [&](int time) { return time >= walk.own_begin && time < walk.own_end; };
  uint32_t rows[kSteps][4];  // of the patch, of one query head: query, or the gradient of the output
  const uint32_t query_sign = p.scale < 0 ? 0x80008000u : 0u;  // the scale below is its absolute value
  const auto load_rows = [&](const View& view, int64_t query_head, int patch, int dim, uint32_t sign) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int time = patch + g + 8 * half;
      const storage* from = row_of<const storage>(view, walk.batch, query_head, walk.row + time) + 16 * q;
#pragma unroll
      for (int w = 0; w < kWords / 4; ++w) {
        const int chunk = Row::chunk_of(q, w);
        uint4 words = make_uint4(0, 0, 0, 0);
        if (owns(time) && chunk * 8 < dim) words = load_global(from + (chunk - 2 * q) * 8);
        rows[2 * w][half] = words.x ^ sign;
        rows[2 * w][half + 2] = words.y ^ sign;
        rows[2 * w + 1][half] = words.z ^ sign;
        rows[2 * w + 1][half + 2] = words.w ^ sign;
      }
    }
  };

  Weights weights;
  int made_for = -1;  // the regular patch that `weights` are of: its offset from
                      // the trailing cell's centre
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
    if (!config::kSliding && (irregular || made_for != offset)) {
      weights.make(p.laws[head].cells, walk.time(walk.begin), walk.cell + cell, walk.time(patch), table, gates,
                   decays + warp * kFlux, end_weights);
      made_for = irregular ? -1 : offset;
    }
    if (lane == 0) patch_cells[warp] = cell;
    if (!config::kBackward) {
      load_rows(p.query, static_cast<int64_t>(head) * (p.query_heads / p.kv_heads), patch, static_cast<int>(p.key_dim),
                query_sign);
    }

    // What the patch adds to its cells.
    const uint32_t tile_base = shared + layout.tiles + stage * 2 * kTile * config::kRow;
    if constexpr (config::kSliding) {
      // The tile's tokens are its cells.
      for (int item = threadIdx.x; item < 2 * kTile * Row::kChunks; item += config::kThreads) {
        const int chunk = item % Row::kChunks, row = item / Row::kChunks % kTile, side = item / Row::kChunks / kTile;
        if (time + row < walk.begin) continue;
        const uint4 words = load_shared(Row::at(tile_base + side * kTile * config::kRow, row, chunk));
        sound = sound && finite<storage>(words);
        store_shared(Row::at(shared + layout.ring + side * ring_side,
                             wrap(wrap(tile_row + row, ring_rows) + slots, ring_rows), chunk),
                     words);
      }
    } else {
      uint4 ends[Weights::kFluxTiles];
#pragma unroll
      for (int tile = 0; tile < Weights::kFluxTiles; ++tile) ends[tile] = end_weights[tile * kWarp + lane];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const uint32_t rows = tile_base + side * kTile * config::kRow;
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
          uint32_t a[4];
          load_matrices_transposed(a,
                                   Row::at(rows, warp * kPatch + (lane / 16) * 8 + lane % 8, 2 * m + (lane / 8) % 2));
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

      // The cells that take tokens of this tile, each from patch to patch: a thread has one chunk of one cell. A cell
      // may need what the one before it in its slot left, so no more than `slots` at a time.
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
            const float4* sums = reinterpret_cast<const float4*>(
                added + ((w * 2 + side) * kFlux + j) * config::kAddedStride + chunk * 8);
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
    const int going_on = config::kSliding ? 0 : here_offset >= 2 ? 2 : 1;
    // And the slots of those that ended before the walk hold them, not what was before them.
    const int ended = irregular ? walk.given - slots - here_cell : 0;
    const uint32_t raw_keys = tile_base + warp * kPatch * config::kRow, raw_values = raw_keys + kTile * config::kRow;
    const uint32_t ring_keys = shared + layout.ring, ring_values = ring_keys + ring_side;
    const uint32_t started_keys = shared + layout.started + 2 * warp * config::kRow;
    const uint32_t started_values = started_keys + started_side;
    const float factor = fabsf(static_cast<float>(p.scale)) * 1.44269504f;  // exponentials to base 2

    // The products of the patch's rows in `rows` with eight rows; this thread's is number `row` of its eight.
    const auto product = [&](float (&sum)[4], uint32_t row_address, int row) {
      const uint32_t even = row_address + (((2 * q) ^ (row & 7)) << 4), odd = even ^ 16;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = 0.f;
#pragma unroll
      for (int w = 0; w < kWords / 4; ++w) {
        const uint4 words = load_shared((w % 2 ? odd : even) + 128 * (w / 2));
        mma<storage>(sum, rows[2 * w], words.x, words.y);
        mma<storage>(sum, rows[2 * w + 1], words.z, words.w);
      }
    };
    const auto patch_products = [&](float (&sums)[2][4], uint32_t patch_rows) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) product(sums[tile], patch_rows + (8 * tile + g) * config::kRow, g);
    };
    // Where what the slot of a column holds at the beginning of the patch lies, its chunks not yet permuted.
    const auto column_row = [&](uint32_t& address, uint32_t ring, uint32_t started, int column) {
      int row = wrap(here_row + column, ring_rows);
      if (column < ended) row = wrap(row + slots, ring_rows);
      address = ring + row * config::kRow;
      if (column < going_on) {
        row = 0;
        address = started + column * config::kRow;
      }
      return row;
    };
    const auto column_products = [&](float (&sums)[kColumnTiles][4], uint32_t ring, uint32_t started, int first) {
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        uint32_t address;
        const int row = column_row(address, ring, started, first + 8 * tile + g);
        product(sums[tile], address, row);
      }
    };
    // With r = 1: whether the row's token, or one of the patch before it, has replaced the column's cell.
    const auto fresh = [&](int tile, int e) {
      const int column = 8 * tile + 2 * q + e % 2;
      return config::kSliding && tile < 2 && column <= g + 8 * (e / 2) && column >= ended;
    };
    // From products with what the slots held to products with what they hold at the row's token.
    const auto advance = [&](float (&sums)[kColumnTiles][4], const float (&raw)[2][4]) {
      if constexpr (config::kSliding) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[tile][e] = fresh(tile, e) ? raw[tile][e] : sums[tile][e];
        }
      } else {
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
              float& s = sums[j / 8][2 * half + j % 2];
              s = s * weights.decay[j / 8][2 * half + j % 2] + sum;
            }
          }
        }
      }
    };
    const auto mask = [&](float (&score)[kColumnTiles][4], int first) {
      if (masked > 0 || first + config::kColumns > slots) {
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = first + 8 * tile + 2 * q + e % 2;
            const bool old = config::kSliding ? column >= ended && !(first == 0 && fresh(tile, e)) : column >= kFlux;
            if (column >= slots || (old && column < masked)) score[tile][e] = -INFINITY;
          }
        }
      }
      if (!config::kSliding && irregular && first == 0) {
#pragma unroll
        for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (weights.decay[tile][e] < 0.f) score[tile][e] = -INFINITY;
          }
        }
      }
    };
    // The adjoint of advance(): splits weights of what the slots hold at the row's token into those of the patch's
    // tokens, which are added to, and of what the slots held.
    const auto split = [&](float (&sums)[kColumnTiles][4], float (&shares)[2][4]) {
      if constexpr (config::kSliding) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            shares[tile][e] += fresh(tile, e) ? sums[tile][e] : 0.f;
            sums[tile][e] = fresh(tile, e) ? 0.f : sums[tile][e];
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kFlux; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float share = __shfl_sync(kAllLanes, sums[j / 8][2 * half + j % 2], (lane & ~3) | (j % 8 / 2));
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
          for (int e = 0; e < 4; ++e) sums[tile][e] *= fmaxf(weights.decay[tile][e], 0.f);
        }
      }
    };
    // out += what columns, or the patch's tokens, hold, by weight.
    float out[kDim / 8][4];
    const auto gather_columns = [&](const float (&sums)[kColumnTiles][4], uint32_t ring, uint32_t started, int first) {
#pragma unroll
      for (int step = 0; step < kColumnTiles / 2; ++step) {
        const uint32_t a[4] = {pack<storage>(sums[2 * step][0], sums[2 * step][1]),
                               pack<storage>(sums[2 * step][2], sums[2 * step][3]),
                               pack<storage>(sums[2 * step + 1][0], sums[2 * step + 1][1]),
                               pack<storage>(sums[2 * step + 1][2], sums[2 * step + 1][3])};
        uint32_t address;
        const int row = column_row(address, ring, started, first + 16 * step + lane % 16);
        address += ((lane / 16) ^ (row & 7)) << 4;
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          uint32_t b[4];
          load_matrices_transposed(b, (address ^ ((d % 4) << 5)) + 128 * (d / 4));
          mma<storage>(out[2 * d], a, b[0], b[1]);
          mma<storage>(out[2 * d + 1], a, b[2], b[3]);
        }
      }
    };
    const auto gather_patch = [&](const float (&shares)[2][4], uint32_t patch_rows) {
      const uint32_t a[4] = {pack<storage>(shares[0][0], shares[0][1]), pack<storage>(shares[0][2], shares[0][3]),
                             pack<storage>(shares[1][0], shares[1][1]), pack<storage>(shares[1][2], shares[1][3])};
      const uint32_t address = patch_rows + lane % 16 * config::kRow + (((lane / 16) ^ (lane & 7)) << 4);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        load_matrices_transposed(b, (address ^ ((d % 4) << 5)) + 128 * (d / 4));
        mma<storage>(out[2 * d], a, b[0], b[1]);
        mma<storage>(out[2 * d + 1], a, b[2], b[3]);
      }
    };
    // Writes the owned rows of `out`, times a number per row.
    const auto store_rows = [&](const View& view, int64_t query_head, int dim, const float (&times)[2]) {
      unsigned char* const staged = shared_memory + layout.added + warp * kPatch * config::kRow;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < kDim / 8; ++tile) {
          *reinterpret_cast<uint32_t*>(staged + Row::element(g + 8 * half, 8 * tile + 2 * q)) =
              pack<storage>(out[tile][2 * half] * times[half], out[tile][2 * half + 1] * times[half]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kPatch * Row::kChunks / kWarp; ++n) {
        const int at = lane + n * kWarp, row = at / Row::kChunks, chunk = at % Row::kChunks;
        if (owns(patch + row) && chunk * 8 < dim) {
          *reinterpret_cast<uint4*>(row_of<storage>(view, walk.batch, query_head, walk.row + patch + row) + chunk * 8) =
              *reinterpret_cast<const uint4*>(staged + Row::element(row, chunk * 8));
        }
      }
      __syncwarp();
    };
    const auto scalar_at = [&](int64_t query_head, int row) {
      return (walk.batch * p.query_heads + query_head) * p.tokens + walk.row + patch + row;
    };
    const int group = static_cast<int>(p.query_heads / p.kv_heads);

    for (int i = 0; i < group; ++i) {
      const int64_t query_head = static_cast<int64_t>(head) * group + i;
      if (i > 0 || config::kBackward) load_rows(p.query, query_head, patch, static_cast<int>(p.key_dim), query_sign);
#pragma unroll
      for (int tile = 0; tile < kDim / 8; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[tile][e] = 0.f;
      }
      float raw[2][4], shares[2][4] = {};
      patch_products(raw, raw_keys);
      if constexpr (config::kBackward) {
        float score[kColumnTiles][4], grad[kColumnTiles][4], raw_grad[2][4], grad_shares[2][4] = {};
        column_products(score, ring_keys, started_keys, 0);
        advance(score, raw);
        mask(score, 0);
        load_rows(gradients.grad_out, query_head, patch, static_cast<int>(p.value_dim), 0);
        patch_products(raw_grad, raw_values);
        column_products(grad, ring_values, started_values, 0);
        advance(grad, raw_grad);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g + 8 * half;
          const bool own = owns(patch + row);
          const float lse = own ? static_cast<const float*>(gradients.lse)[scalar_at(query_head, row)] : 0.f;
          float delta = 0.f;
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              score[tile][e] = own ? exp2_fast(score[tile][e] * factor - lse * 1.44269504f) : 0.f;
              delta += score[tile][e] * grad[tile][e];
            }
          }
          delta += __shfl_xor_sync(kAllLanes, delta, 1);
          delta += __shfl_xor_sync(kAllLanes, delta, 2);
          if (gradients.grad_lse && own) {
            delta -= static_cast<const float*>(gradients.grad_lse)[scalar_at(query_head, row)];
          }
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              grad[tile][e] = static_cast<float>(p.scale) * score[tile][e] * (grad[tile][e] - delta);
            }
          }
        }
        split(score, shares);
        split(grad, grad_shares);
        // For the gradients of key and value: the weights, a column's in a row.
        uint4* to = pieces +
                    piece_at(p, walk.sequence, walk.batch, walk.sequence_row, walk.first_patch + patch / kPatch,
                             query_head, kColumnTiles) +
                    lane;
        const auto put = [&](const float (&even)[4], const float (&odd)[4]) {
          *to = make_uint4(transpose(pack<storage>(even[0], even[1])), transpose(pack<storage>(odd[0], odd[1])),
                           transpose(pack<storage>(even[2], even[3])), transpose(pack<storage>(odd[2], odd[3])));
          to += kWarp;
        };
#pragma unroll
        for (int m = 0; m < kColumnTiles / 2; ++m) put(grad[2 * m], grad[2 * m + 1]);
        put(grad_shares[0], grad_shares[1]);
#pragma unroll
        for (int m = 0; m < kColumnTiles / 2; ++m) put(score[2 * m], score[2 * m + 1]);
        put(shares[0], shares[1]);
        gather_columns(grad, ring_keys, started_keys, 0);
        gather_patch(grad_shares, raw_keys);
        store_rows(gradients.query, query_head, static_cast<int>(p.key_dim), {1.f, 1.f});
      } else {
        float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
        for (int first = 0; first < (config::kMore ? slots : 1); first += config::kColumns) {
          float score[kColumnTiles][4];
          column_products(score, ring_keys, started_keys, first);
          if (first == 0) advance(score, raw);
          mask(score, first);
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
            split(score, shares);
          }
          gather_columns(score, ring_values, started_values, first);
        }
        gather_patch(shares, raw_values);
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = total[half];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          inverse[half] = 1.f / sum;
          if (q == 0 && owns(patch + g + 8 * half)) {
            static_cast<float*>(outputs.lse)[scalar_at(query_head, g + 8 * half)] =
                (top[half] * factor + log2_fast(sum)) * 0.693147181f;
          }
        }
        store_rows(outputs.out, query_head, static_cast<int>(p.value_dim), inverse);
      }
    }
  }
  if (!sound && !config::kBackward) unsound[walk.stretch * p.kv_heads + head] = 1;
}

template <typename config>
uint32_t shared_bytes(const Problem& p, const HeadList& heads) {
  uint32_t bytes = 0;
  for (int i = 0; i < heads.count; ++i) {
    const int resolution = static_cast<int>(p.cells[heads.head[i]].resolution);
    bytes = std::max(bytes, Layout::make<config>(static_cast<int>(p.slots), resolution).bytes);
  }
  return bytes;
}

}  // namespace
}  // namespace blurry_attn::cuda
