// This file is the backward of "fejer" on tensor cores, for bfloat16 and float16. A forward walk over time leaves what
// the slots hold, in the forward or here. A backward walk attends again, patch by patch, and takes the gradients of
// what the slots hold to the tokens. A block has one stretch of a sequence and key/value head, as in forward.cu. Walks
// that meet at a seam are compared, and may be done again. docs/design/glossary.md defines cell, lobe, lap, patch, walk
// and seam.
#include "fejer/back_place.cuh"
#include "fejer/back_seams.cuh"
#include "fejer/back_shapes.cuh"
#include "fejer/walk.cuh"

namespace blurry_attn::cuda {
namespace {

// fejer_back is the backward walk. Some warps attend: one per patch of a tile, or two that divide its columns. They
// leave weights of what the slots held when the patch began, and of the patch's tokens. The other warps sum these up,
// one tile behind, and each has a slice of elements of key or value. The walk begins plan.warm_up tokens after its
// stretch, for what the stretch's cells give to later tokens.
template <typename config>
__global__ void __launch_bounds__(config::kThreads, config::kBlocks)
    fejer_back(Problem p, Gradients gradients, Kept kept, WalkPlan plan, HeadList heads, Seams seams) {
  wait_for_grid_before();
  if (blockIdx.x >= plan.count * heads.count) return;  // the grid is rounded up to pairs
  if (seams.is_again && !seams.found[blockIdx.x]) return;
  using storage = typename config::storage;
  using Row = Rows<config::kDim>;
  using Weights = PatchWeights<storage, config::kFlux>;
  constexpr int kFlux = config::kFlux, kPatches = config::kPatches;
  constexpr int kRow = config::kRow, kThreads = config::kThreads, kColumns = config::kColumns;
  constexpr bool kSelecting = config::kSelecting;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  __shared__ WalkBack walk;
  __shared__ BackLayout layout;
  if (threadIdx.x == 0) {
    walk = WalkBack(p, kept, plan, heads, blockIdx.x / heads.count, config::kTile);
    if (seams.rows && walk.from_begin) seams.found[walk.sequence * heads.count + blockIdx.x % heads.count] = 0;
    layout = BackLayout::make<config>(walk.slots, walk.resolution, walk.group);
    barrier_init(shared_address(shared_memory) + layout.barriers, config::kAttending);
    barrier_init(shared_address(shared_memory) + layout.barriers + BackLayout::kCellsRead, config::kSumming);
    barrier_init(shared_address(shared_memory) + layout.barriers + BackLayout::kAllRead, config::kSumming);
    for (int i = 0; i < kPatches; ++i) {
      barrier_init(shared_address(shared_memory) + layout.barriers + BackLayout::kMeetings + 8 * i,
                   config::kSharing * kWarp);
    }
  }
  __syncthreads();
  const uint32_t shared = shared_address(shared_memory);
  // `written` says that a tile's weights are written. `cells_read` and `all_read` say that those of cells, or all, have
  // been read, so that the next tile's can take their place.
  const uint32_t written = shared + layout.barriers;
  const uint32_t cells_read = written + BackLayout::kCellsRead, all_read = written + BackLayout::kAllRead;
  const bool attends = warp < config::kFirstSlice;
  const int slice = warp - config::kFirstSlice;
  const int side = slice >= config::kSlices / 2;
  const int first_element = kSlice * (slice - side * (config::kSlices / 2));
  const int dim = static_cast<int>(side ? p.value_dim : p.key_dim);
  const void* const grad_state = side ? gradients.grad_state_value : gradients.grad_state_key;
  void* const grad_given = side ? gradients.state_value : gradients.state_key;
  const auto state_at = [&](int slot) {
    return ((walk.sequence * p.kv_heads + walk.head) * walk.slots + slot) * dim + first_element + lane;
  };
  const bool has_element = first_element + lane < dim;
  if (walk.length == 0 && walk.from_begin && !attends && grad_given && has_element) {
    for (int slot = 0; slot < walk.slots; ++slot) {
      const bool passes = grad_state && walk.position > walk.cells.slot_opening(slot);
      static_cast<float*>(grad_given)[state_at(slot)] =
          passes ? static_cast<const float*>(grad_state)[state_at(slot)] : 0.f;
    }
  }
  if (walk.last_tile < 0) return;
  const int slots = walk.slots, ring_rows = layout.ring_rows, grad_rows = layout.grad_rows;
  const int last_tile = walk.last_tile, group = walk.group;
  const auto goes_on = [](int offset) { return kSelecting ? 0 : offset >= 2 ? 2 : 1; };

  // Reads what cells from .. until - 1 hold, as thread `number` of `threads`. Cells that do not exist hold zeros.
  const auto load_cells = [&](int from, int until, int number, int threads) {
    const int thread = hidden(number), step = threads / (2 * Row::kChunks);
    const int chunk = thread % Row::kChunks, at = thread / Row::kChunks % 2;
    const View& view = at ? p.value : p.key;
    const bool inside = chunk * 8 < (at ? p.value_dim : p.key_dim);
    const uint32_t ring = shared + layout.ring + at * layout.side_bytes;
    int cell = from + thread / (2 * Row::kChunks);
    // Where cells are tokens, t is the cell's token.
    int t = (config::kStride > 1 ? walk.given_last_token : 0) + (cell - walk.given_cell) * config::kStride;
    const storage* token = row_of<const storage>(view, walk.batch, walk.head, walk.row + t) + chunk * 8;
    const int64_t token_step = step * config::kStride * view.token;
#pragma unroll 1
    for (; cell < until; cell += step, t += step * config::kStride, token += token_step) {
      const uint32_t to = Row::at(ring, cell % ring_rows, chunk);
      const bool is_token = kSelecting && cell >= walk.given_cell;
      if (is_token ? inside && t < walk.length : cell >= walk.given_cell - kept.of_states && cell < walk.unended_cell) {
        const int64_t row = 2 * (walk.cell_row + cell) + at;
        const void* const content = static_cast<const uint4*>(kept.cells) + row * Row::kChunks + chunk;
        copy_async(to, is_token ? static_cast<const void*>(token) : content);
      } else {
        store_shared(to, make_uint4(0, 0, 0, 0));
      }
    }
  };
  // Reads the cells that go on in the patches of a tile, as they were when these began.
  const auto load_started = [&](int tile, int thread, int threads) {
    if constexpr (!kSelecting) {
#pragma unroll 1
      for (int i = thread; i < kPatches * 4 * Row::kChunks; i += threads) {
        const int chunk = i % Row::kChunks, row = i / Row::kChunks, patch = row / 4;
        const int t = walk.tile_token(tile) + patch * kPatch;
        int offset;
        walk.trailing(tile, patch, &offset);
        const bool exists = t + kPatch > 0 && t < walk.length && row % 2 < goes_on(offset);
        const int64_t from = walk.started_row + static_cast<int64_t>(tile * kPatches + patch) * 2 * p.kv_heads;
        copy_async_or_zero(
            shared + layout.started_rows + row / 2 % 2 * layout.side_bytes +
                (((tile & 1) * kPatches + patch) * 2 + row % 2) * kRow + chunk * 16,
            static_cast<const uint4*>(kept.started) + (exists ? (2 * from + row % 4) * Row::kChunks + chunk : 0),
            exists);
      }
    }
  };
  const auto oldest = [&](int tile) { return walk.trailing(tile, 0, nullptr) - slots; };

  // The block reads the cells of the first tile and the next one; weights are zero. Columns past the last slot meet
  // rows of zeros.
  for (int i = threadIdx.x; i < static_cast<int>(2 * layout.side_bytes / 16); i += kThreads) {
    store_shared(shared + layout.ring + 16 * i, make_uint4(0, 0, 0, 0));
  }
  for (int i = threadIdx.x; i < 2 * kPatches * layout.piece_rows * 2; i += kThreads) {
    store_shared(shared + layout.pieces + 16 * i, make_uint4(0, 0, 0, 0));
  }
  __syncthreads();
  load_cells(oldest(last_tile), max(walk.trailing(last_tile, kPatches - 1, nullptr), walk.given_cell), threadIdx.x,
             kThreads);
  load_started(last_tile, threadIdx.x, kThreads);
  if (last_tile > 0) {
    load_cells(oldest(last_tile - 1), oldest(last_tile), threadIdx.x, kThreads);
    load_started(last_tile - 1, threadIdx.x, kThreads);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const auto attend_to = [&](auto share) {
    constexpr int kFrom = decltype(share)::kFrom, kTiles = decltype(share)::kTiles;
    constexpr bool kFirst = decltype(share)::kFirst, kAlone = config::kSharing == 1;
    constexpr int kPairs = kTiles / 2 + kFirst;  // pairs of tiles of which it has weights: of columns, and of tokens
    constexpr int kChunks = config::kDim / 8 / config::kSharing;  // of the query's gradient, a warp's share
    static_assert(kAlone || kChunks % 8 == 0, "chunks are permuted within every eight");
    const int patch = warp % kPatches, first_chunk = warp / kPatches * kChunks;
    Attend<config> attend(slots, ring_rows);
    attend.ring = shared + layout.ring;
    attend.side_bytes = layout.side_bytes;
    for (int i = 0; i < 2; ++i) attend.tokens[i] = shared + layout.tokens + (2 * patch + i) * kPatch * kRow;
    float* const gates = reinterpret_cast<float*>(shared_memory + layout.gates) + patch * 2 * kFlux * kPatch;
    float* const end_weights = reinterpret_cast<float*>(shared_memory + layout.weights) + patch * kFlux * kPatch;
    PatchPlace& place = reinterpret_cast<PatchPlace*>(shared_memory + layout.patches)[patch];
    auto& places = reinterpret_cast<FluxPlaces<kFlux>*>(shared_memory + layout.places)[patch];
    float* const end_decays = reinterpret_cast<float*>(shared_memory + layout.decays) + patch * kFlux;
    const uint32_t pieces = shared + layout.pieces + patch * layout.piece_rows * 32;  // weights for keys
    const uint32_t of_values = kPatches * layout.piece_rows * 32;
    [[maybe_unused]] const uint32_t shared_weights =
        shared + layout.shared_weights + (patch * (kColumns / 16 + 1) * kWarp + lane) * sizeof(uint4);
    float2* const sums = reinterpret_cast<float2*>(shared_memory + layout.shared_sums) + 2 * patch * kPatch;
    const float factor = score_factor(p.scale);
    const uint32_t query_sign = p.scale < 0 ? 0x80008000u : 0u;
    // meet() makes the warps of a patch wait for each other.
    [[maybe_unused]] int meetings = 0;
    const auto meet = [&] {
      if constexpr (!kAlone) {
        const uint32_t barrier = shared + layout.barriers + BackLayout::kMeetings + 8 * patch;
        barrier_arrive(barrier);
        barrier_wait(barrier, meetings & 1);
        ++meetings;
      }
    };
    // Each tile reads these numbers of the walk, and rows that begin at the sequence's first token of this call.
    const int length = walk.length, own_begin = walk.own_begin, own_end = walk.own_end, walk_end = walk.walk_end;
    const auto rows_of = [&](const View& view, int heads) {
      return row_of<const storage>(view, walk.batch, static_cast<int64_t>(walk.head) * heads, walk.row);
    };
    const storage* const queries = rows_of(p.query, group);
    const storage* const grads_out = rows_of(gradients.grad_out, group);
    const storage* const tokens[2] = {rows_of(p.key, 1), rows_of(p.value, 1)};
    const auto load_tokens = [&](int tile) {
      constexpr int kRowsAtOnce = kWarp / Row::kChunks;
      const int thread = hidden(lane), first_token = thread / Row::kChunks, chunk = thread % Row::kChunks;
      const int t = walk.tile_token(tile) + patch * kPatch;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const View& view = i ? p.value : p.key;
        const int dim = static_cast<int>(i ? p.value_dim : p.key_dim);
        const storage* from = tokens[i] + (t + first_token) * view.token + chunk * 8;
        const int64_t step = kRowsAtOnce * view.token;
        const uint32_t to = Row::at(attend.tokens[i], first_token, chunk);
        const auto place = [&](int n) { return (to ^ (n * kRowsAtOnce % 8 << 4)) + n * kRowsAtOnce * kRow; };
        if (t >= 0 && t + kPatch <= length && dim == config::kDim) {
#pragma unroll
          for (int n = 0; n < kPatch / kRowsAtOnce; ++n, from += step) copy_async(place(n), from);
        } else {
#pragma unroll 1
          for (int n = 0; n < kPatch / kRowsAtOnce; ++n, from += step) {
            const int token = t + first_token + n * kRowsAtOnce;
            const bool valid = chunk * 8 < dim && token >= 0 && token < length;
            copy_async_or_zero(place(n), valid ? from : view.data, valid);
          }
        }
      }
      commit_copies();
    };
    // fetch() reads a query head's rows of the patch: queries, or gradients of the output.
    typename Attend<config>::Fetched query_rows, grad_out_rows;
    const auto fetch = [&](typename Attend<config>::Fetched& rows, const storage* first, const View& view, int64_t dim,
                           int tile, int i) {
      const int t = walk.tile_token(tile) + patch * kPatch;
      attend.fetch_rows(rows, first + i * view.head + t * view.token, view.token, own_begin - t, walk_end - t,
                        static_cast<int>(dim));
    };
    // Global memory is far, so rows are fetched ahead where there are registers for them.
    constexpr bool kAhead = config::kDim > 64;
    const auto fetch_query = [&](int tile, int i) { fetch(query_rows, queries, p.query, p.key_dim, tile, i); };
    const auto fetch_grad = [&](int tile, int i) {
      fetch(grad_out_rows, grads_out, gradients.grad_out, p.value_dim, tile, i);
    };
    if constexpr (kAhead) fetch_query(last_tile, 0);
    if constexpr (kFirst) load_tokens(last_tile);
    int made_for = -1;  // the likeness of the patch that the weights are of
    int parity = 0;
    for (int tile = last_tile; tile >= 0; --tile) {
      const int t = walk.tile_token(tile) + patch * kPatch;
      int offset;
      const int cell = walk.trailing(tile, patch, &offset);
      const bool whole = t >= 0 && t + kPatch <= length, irregular = !whole || cell - slots < walk.first;
      const int likeness = Weights::likeness(cell, walk.first, slots, offset, walk.resolution, whole);
      const bool make = kFirst && !kSelecting && (likeness < 0 || made_for != likeness);
      if (make) {
        Weights::make_gates(walk.cells, walk.position, walk.end(), walk.base + cell, walk.position + t,
                            static_cast<const float*>(p.gates) + p.laws[walk.head].gates, gates);
        attend.weights.make(walk.cells, walk.base + cell, walk.position + t, gates);
        made_for = likeness;
      }
      attend.row = (cell - slots) % ring_rows;
      attend.irregular = irregular;
      attend.masked = irregular ? min(walk.first - (cell - slots), slots) : 0;
      if (config::kStride > 1) attend.missing = irregular ? walk.first - cell : 0;
      attend.ended_columns = irregular ? walk.given_cell - cell : 0;
      attend.cells_going_on = goes_on(offset);
      attend.started_rows = shared + layout.started_rows + ((tile & 1) * kPatches + patch) * 2 * kRow;
      attend.find_places(0);
      const int from = own_begin - t, until = walk_end - t;  // the patch's tokens that count
      for (int i = 0; i < group; ++i) {
        const int64_t query_head = static_cast<int64_t>(walk.head) * group + i, row = walk.row + t;
        uint32_t key_weights[kPairs][4], value_weights[kPairs][4];
        {
          Tiles<kTiles> score, grad;
          typename Attend<config>::Raw raw, shares = {}, grad_shares = {};
          if constexpr (!kAhead) fetch_query(tile, i);
          attend.take_rows(query_rows, query_sign);
          if constexpr (kAhead) fetch_grad(tile, i);
          const int64_t scalar = (walk.batch * p.query_heads + query_head) * p.tokens + row + g;
          float lse[2], grad_lse[2], total[2], delta[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int token = g + 8 * half;
            const bool valid = token >= from && token < until;
            lse[half] = valid ? static_cast<const float*>(gradients.lse)[scalar + 8 * half] * 1.44269504f : 0.f;
            grad_lse[half] =
                gradients.grad_lse && valid ? static_cast<const float*>(gradients.grad_lse)[scalar + 8 * half] : 0.f;
          }
          if constexpr (kFirst) {
            wait_copies<0>();
            __syncwarp();
            attend.token_products(raw, 0);
          }
          attend.column_products(score, 0, kFrom);
          if constexpr (kFirst) attend.template advance<-1>(score, raw);
          attend.mask(score, 8 * kFrom);
          if constexpr (!kAhead) fetch_grad(tile, i);
          attend.take_rows(grad_out_rows, hidden_from_loop(0, tile));
          if constexpr (kFirst) attend.token_products(raw, 1);
          attend.column_products(grad, 1, kFrom);
          if constexpr (kFirst) attend.template advance<0>(grad, raw);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int token = g + 8 * half;
            const bool valid = token >= from && token < until;
            float all = 0.f, sum = 0.f;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
              for (int e = 2 * half; e < 2 * half + 2; ++e) {
                score[tile][e] = valid ? exp2_fast(score[tile][e] * factor - lse[half]) : 0.f;
                all += score[tile][e];
                sum += score[tile][e] * grad[tile][e];
              }
            }
            all += __shfl_xor_sync(kAllLanes, all, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            all += __shfl_xor_sync(kAllLanes, all, 2);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            total[half] = all;
            delta[half] = sum;
            if (!kAlone && q == 0) sums[(kFirst ? 0 : kPatch) + token] = make_float2(all, sum);
          }
          meet();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if constexpr (!kAlone) {
              const float2 other = sums[(kFirst ? kPatch : 0) + g + 8 * half];
              total[half] += other.x;
              delta[half] += other.y;
            }
            // Probabilities sum to one but for the rounding of lse. Gradients that cancel would leave a rest of it, so
            // delta is divided by the sum.
            delta[half] = (total[half] > 0.f ? __fdividef(delta[half], total[half]) : 0.f) - grad_lse[half];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
              for (int e = 2 * half; e < 2 * half + 2; ++e) {
                grad[tile][e] = static_cast<float>(p.scale) * score[tile][e] * (grad[tile][e] - delta[half]);
              }
            }
          }
          if constexpr (kFirst) {
            attend.template split<1>(score, shares);
            attend.template split<2>(grad, grad_shares);
            attend.pack_pair(key_weights[kPairs - 1], grad_shares[0], grad_shares[1]);
            attend.pack_pair(value_weights[kPairs - 1], shares[0], shares[1]);
          }
#pragma unroll
          for (int m = 0; m < kTiles / 2; ++m) {
            attend.pack_pair(key_weights[m], grad[2 * m], grad[2 * m + 1]);
            attend.pack_pair(value_weights[m], score[2 * m], score[2 * m + 1]);
          }
        }
        // Returns which pair of all columns this warp's pair m is; the tokens come last.
        const auto pair_of = [&](int m) { return kFirst && m == kPairs - 1 ? kColumns / 16 : kFrom / 2 + m; };
        if constexpr (!kAlone) {
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            const uint32_t (&w)[4] = key_weights[m];
            store_shared(shared_weights + pair_of(m) * kWarp * sizeof(uint4), make_uint4(w[0], w[1], w[2], w[3]));
          }
          meet();
        }
        __syncwarp();       // values have been read; the branch and what follows overwrite them
        if (t < own_end) {  // later tokens belong to another stretch
          Tiles<kChunks> out = {};
#pragma unroll
          for (int m = 0; m <= kColumns / 16; ++m) {
            uint32_t w[4];
            if constexpr (kAlone) {
#pragma unroll
              for (int n = 0; n < 4; ++n) w[n] = key_weights[m][n];
            } else {
              const uint4 words = load_shared(shared_weights + m * kWarp * sizeof(uint4));
              w[0] = words.x, w[1] = words.y, w[2] = words.z, w[3] = words.w;
            }
            if (m < kColumns / 16) {
              attend.gather_columns(out, w, 0, m, first_chunk);
            } else {
              attend.gather_tokens(out, w, 0, first_chunk);
            }
          }
          attend.store_rows(out, {1.f, 1.f}, gradients.query, walk.batch, query_head, row, from,
                            min(until, own_end - t), static_cast<int>(p.key_dim), attend.tokens[1], first_chunk);
        }
        if constexpr (kAhead) {
          if (i + 1 < group) {
            fetch_query(tile, i + 1);
          } else if (tile > 0) {
            fetch_query(tile - 1, 0);
          }
        }
        meet();
        if constexpr (kFirst) {
          if (i + 1 < group) {
            load_tokens(tile);
          } else if (tile > 0) {
            load_tokens(tile - 1);
          }
        }
        const bool is_next = i > 0 || tile < last_tile;
        if (is_next) barrier_wait(cells_read, parity);
        // Rows of weights become zero for cells that no column has.
        const int before_row = (cell - slots) % grad_rows, own_row = wrap(before_row + slots, grad_rows);
        const int clear = irregular ? grad_rows : grad_rows - slots + attend.cells_going_on;
#pragma unroll 1
        for (int n = warp / kPatches * kWarp + lane; n < 4 * clear; n += config::kSharing * kWarp) {
          store_shared(pieces + (n & 1) * of_values + piece_at(wrap(own_row + n / 4, grad_rows), n / 2 % 2),
                       make_uint4(0, 0, 0, 0));
        }
        if (kFirst && attend.cells_going_on == 1 && lane < 4) {
          store_shared(pieces + (lane & 1) * of_values + piece_at(layout.piece_started + 2 * patch + 1, lane / 2),
                       make_uint4(0, 0, 0, 0));
        }
        __syncwarp();
        if (irregular) meet();  // some of these rows may be the other warp's
        const auto store_pair = [&](int m, int row) {
          const uint32_t at = piece_at(row, lane / 8 % 2);
          store_matrices_transposed(pieces + at, key_weights[m]);
          store_matrices_transposed(pieces + of_values + at, value_weights[m]);
        };
        const int column = 8 * (lane / 16) + lane % 8;  // the lane's column of a pair of tiles
#pragma unroll
        for (int m = kTiles / 2 - 1; m >= 0; --m) {
          // Columns past the last slot go where the first ones are written over them, or where nobody reads.
          if (slots < kColumns) __syncwarp();
          int of_all = 16 * pair_of(m) + column;
          const bool exists = of_all < slots;
          if (kAlone && !exists) of_all = column;
          int row = wrap(before_row + of_all, grad_rows);
          if (of_all < attend.ended_columns) row = wrap(row + slots, grad_rows);
          if (of_all < attend.cells_going_on) row = layout.piece_started + 2 * patch + of_all;
          if (!kAlone && !exists) row = layout.piece_spare + column;
          store_pair(m, row);
        }
        if constexpr (kFirst) {
          if (is_next) barrier_wait(all_read, parity);
          if (make && i == 0) Weights::make_end(gates, end_decays, end_weights);
          if (lane == 0) place = {own_row, walk.given_cell - cell, attend.cells_going_on};
          if (!kSelecting && lane < kFlux) {
            places.before[lane] = config::grad_row(wrap(before_row + lane, grad_rows));
            places.own[lane] = config::grad_row(wrap(own_row + lane, grad_rows));
          }
          store_pair(kPairs - 1, layout.piece_tokens + attend.token_of(column));
        }
        if (is_next) parity ^= 1;
        barrier_arrive(written);
      }
    }
  };
  if (attends) {
    take_registers<config::kAttendRegisters>();
    if constexpr (config::kSharing == 1) {
      attend_to(Share<0, kColumns / 8>{});
    } else if (warp < kPatches) {
      attend_to(Share<0, 2>{});
    } else {
      attend_to(Share<2, kColumns / 8 - 2>{});
    }
    return;
  }

  give_registers<config::kSumRegisters>();
  float* const all_grads = reinterpret_cast<float*>(shared_memory + layout.grads) + slice * grad_rows * kSlice;
  float* const all_grads_started = reinterpret_cast<float*>(shared_memory + layout.grads_started) + slice * 8 * kSlice;
  float* const sums_before =
      reinterpret_cast<float*>(shared_memory + layout.sums) + slice * kPatches * 16 * kWarp + lane;
  // A product has kSlice / 8 tiles of eight columns, of which a lane has the 8 neighbouring elements from 8 q on.
  constexpr int kPiece = config::kPiece;
  struct alignas(4 * kPiece) Piece {
    float x[kPiece];
  };
  using Eight = float[8];
  const auto load_eight = [&](const float* rows, int row_place, Eight& x) {
#pragma unroll
    for (int n = 0; n < 8; n += kPiece) {
      const Piece piece = *reinterpret_cast<const Piece*>(rows + (row_place ^ (8 * q + n)));
#pragma unroll
      for (int e = 0; e < kPiece; ++e) x[n + e] = piece.x[e];
    }
  };
  const auto store_eight = [&](float* rows, int row_place, const Eight& x) {
#pragma unroll
    for (int n = 0; n < 8; n += kPiece) {
      Piece piece;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) piece.x[e] = x[n + e];
      *reinterpret_cast<Piece*>(rows + (row_place ^ (8 * q + n))) = piece;
    }
  };
  const auto at_lane = [&](int row) { return config::grad_row(row) ^ lane; };
  for (int row = 0; row < grad_rows; ++row) all_grads[at_lane(row)] = 0.f;
  if (walk.to_end && grad_state && has_element) {
    // The newest cells of the slots take the gradient of the final state. A token that is a cell lies in two slots
    // where the next cell has begun.
    const int64_t trailing = walk.cells.trailing(walk.end() - 1);
    const int64_t newest = trailing + (!kSelecting || walk.end() - 1 > walk.cells.centre(trailing));
    for (int i = 0; i < slots; ++i) {
      const int64_t cell = newest - i, held = kSelecting && i == 0 ? trailing : cell;
      const int slot = static_cast<int>(walk.cells.slot(cell));
      if (walk.end() <= walk.cells.slot_opening(slot)) continue;
      all_grads[at_lane(static_cast<int>(held - walk.base) % grad_rows)] +=
          static_cast<const float*>(grad_state)[state_at(slot)];
    }
  }
  __syncwarp();

  // Leaves, at a seam, the gradients of what slots held where a tile begins.
  const auto leave_gradients = [&](bool warmed_up, int tile) {
    __syncwarp();  // other lanes wrote some of them
    const int64_t seam = warmed_up
                             ? seams.plan.seam_after(p, walk.sequence, static_cast<int64_t>(blockIdx.x / heads.count))
                             : seams.plan.seam(p, walk.sequence, static_cast<int64_t>(blockIdx.x / heads.count));
    const int64_t row = seams.row(seam, heads.count, blockIdx.x % heads.count, warmed_up, side);
    float* const to = static_cast<float*>(seams.rows) + row * config::kDim + first_element + lane;
    int place = oldest(tile) % grad_rows;
#pragma unroll 2
    for (int n = 0; n < static_cast<int>(seams.row_count); ++n, place = wrap(place + 1, grad_rows)) {
      to[n * config::kDim] = all_grads[at_lane(place)];
    }
    __syncwarp();
  };
  const View& rows_view = side ? gradients.grad_out : p.query;
  const View& to_view = side ? gradients.value : gradients.key;
  const storage* const first_row =
      row_of<const storage>(rows_view, walk.batch, static_cast<int64_t>(walk.head) * group, walk.row) + first_element +
      8 * q;
  storage* const first_to = row_of<storage>(to_view, walk.batch, walk.head, walk.row) + first_element + 8 * q;
  const uint32_t all_pieces = shared + layout.pieces + side * kPatches * layout.piece_rows * 32;
  const uint32_t patch_pieces = layout.piece_rows * 32;
  const int begin = walk.own_begin, end = walk.walk_end;
  const bool has_eight = first_element + 8 * q < dim;
  // As the left side of a product, this lane reads one row of 16, and one half of it.
  const uint32_t left = piece_at(lane % 16, lane / 16);
  int parity = 0;
  for (int tile = last_tile; tile >= 0; --tile) {
    const int t = walk.tile_token(tile);
    const int zero = hidden_from_loop(0, tile);
    float* const grads = all_grads + zero;
    float* const grads_started = all_grads_started + zero;
    const uint32_t pieces = all_pieces + zero;
    for (int i = 0; i < group; ++i) {
      uint32_t b[kPatches][kSlice / 8][2];
      const storage* from = first_row + i * rows_view.head + (t + g) * rows_view.token;
      const bool whole = has_eight && t >= begin && t + config::kTile <= end;
#pragma unroll
      for (int w = 0; w < kPatches; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half, from += 8 * rows_view.token) {
          const int token = t + w * kPatch + g + 8 * half;
          const bool exists = whole || (has_eight && token >= begin && token < end);
          const uint4 words = exists ? load_global(from) : make_uint4(0, 0, 0, 0);
          b[w][0][half] = words.x;
          b[w][1][half] = words.y;
          b[w][2][half] = words.z;
          b[w][3][half] = words.w;
        }
      }
      barrier_wait(written, parity);
      parity ^= 1;
      const bool is_last = i + 1 == group, is_end = is_last && tile == 0;
      if (is_last && tile >= 2) {
        const int thread = static_cast<int>(threadIdx.x) - config::kFirstSlice * kWarp + zero;
        load_cells(oldest(tile - 2), oldest(tile - 1), thread, config::kSumming);
        load_started(tile - 2, thread, config::kSumming);
        commit_copies();
      }
#pragma unroll
      for (int w = 0; w < kPatches; ++w) {
#pragma unroll
        for (int n = 0; n < kSlice / 8; ++n) {
          b[w][n][0] = transpose(b[w][n][0]);
          b[w][n][1] = transpose(b[w][n][1]);
        }
      }
      const auto load_weights = [&](uint32_t (&a)[4], int w, int row) {
        load_matrices(a, pieces + w * patch_pieces + row * 32 + left);
      };
      const auto multiply = [&](float (&sums)[kSlice / 8][4], const uint32_t (&a)[4], int w) {
#pragma unroll
        for (int n = 0; n < kSlice / 8; ++n) mma<storage>(sums[n], a, b[w][n][0], b[w][n][1]);
      };
      const auto add = [&](float* rows, int row, int piece, int halves, bool fresh) {
        float sums[kSlice / 8][4] = {};
        if (!fresh) {
          for (int half = 0; half < halves; ++half) {
            Eight x;
            load_eight(rows, config::grad_row(row + g + 8 * half), x);
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[e / 2][2 * half + e % 2] = x[e];
          }
        }
#pragma unroll
        for (int w = 0; w < kPatches; ++w) {
          uint32_t a[4];
          load_weights(a, w, piece);
          multiply(sums, a, w);
        }
        for (int half = 0; half < halves; ++half) {
          Eight x;
#pragma unroll
          for (int e = 0; e < 8; ++e) x[e] = sums[e / 2][2 * half + e % 2];
          store_eight(rows, config::grad_row(row + g + 8 * half), x);
        }
      };
      // add() sums the gradients of what the slots held when the patches began: of cells, and of cells that go on.
      for (int row = 0; row < grad_rows; row += 16) add(grads, row, row, 2, false);
      if constexpr (!kSelecting) add(grads_started, 0, layout.piece_started, 1, i == 0);
      wait_copies<0>();
      __syncwarp();
      if (!is_end) barrier_arrive(cells_read);

      // The gradients go back over the patches.
#pragma unroll(config::kCopies)
      for (int w = kPatches - 1; w >= 0; --w) {
        float sums[kSlice / 8][4] = {};
        uint32_t a[4];
        load_weights(a, w, layout.piece_tokens);
#pragma unroll
        for (int n = 0; n < kPatches; ++n) {
          if (n == w) multiply(sums, a, n);
        }
        if (group > 1) {
#pragma unroll
          for (int e = 0; e < 16; ++e) {
            float* const before = sums_before + (w * 16 + e) * kWarp;
            if (i > 0) sums[e / 4][e % 4] += *before;
            if (!is_last) *before = sums[e / 4][e % 4];
          }
        }
        if (!is_last) continue;
        const PatchPlace place = reinterpret_cast<const PatchPlace*>(shared_memory + layout.patches)[w];
        if constexpr (kSelecting) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int token = g + 8 * half, cell = token / config::kStride;
            if (cell < place.ended_cells) continue;
            if constexpr (config::kStride > 1) {  // only the cell's last token that exists
              const int left = walk.length - (t + w * kPatch + token);
              if (left < 1 || (left > 1 && token % config::kStride + 1 < config::kStride)) continue;
            }
            const int row = config::grad_row(wrap(place.own + cell, grad_rows));
            Eight held;
            load_eight(grads, row, held);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              sums[e / 2][2 * half + e % 2] += held[e];
              held[e] = 0.f;
            }
            store_eight(grads, row, held);
          }
        } else {
          // Gradients go from what the cells in flux hold at the patch's end to the patch's tokens, and to what the
          // slots held before.
          const float* const decays = reinterpret_cast<const float*>(shared_memory + layout.decays) + w * kFlux;
          const float* const weights =
              reinterpret_cast<const float*>(shared_memory + layout.weights) + w * kFlux * kPatch;
          const auto& places = reinterpret_cast<const FluxPlaces<kFlux>*>(shared_memory + layout.places)[w];
          int before[kFlux], own[kFlux];
          float at_begin[kFlux], held[kFlux];
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            before[j] = places.before[j] ^ lane;
            own[j] = places.own[j];
            at_begin[j] = decays[j] * grads[own[j] ^ lane];
            held[j] = grads[before[j]];
          }
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            const float low = weights[j * kPatch + g], high = weights[j * kPatch + g + 8];
            Eight end;
            load_eight(grads, own[j], end);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              sums[e / 2][e % 2] += low * end[e];
              sums[e / 2][2 + e % 2] += high * end[e];
            }
          }
          __syncwarp();
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            float& now = grads[own[j] ^ lane];
            if (j < 2 && j < place.cells_going_on) {  // at most two go on, so others have no code
              now = at_begin[j] + grads_started[at_lane(2 * w + j)];
            } else if (j >= place.ended_cells) {
              now = 0.f;
              grads[before[j]] = held[j] + at_begin[j];
            } else {
              now = at_begin[j];
            }
          }
          __syncwarp();
        }
        storage* to = first_to + (t + w * kPatch + g) * to_view.token;
#pragma unroll
        for (int half = 0; half < 2; ++half, to += 8 * to_view.token) {
          const int token = t + w * kPatch + g + 8 * half;
          if (!has_eight || token < begin || token >= walk.own_end) continue;
          store_global(to, make_uint4(pack<storage>(sums[0][2 * half], sums[0][2 * half + 1]),
                                      pack<storage>(sums[1][2 * half], sums[1][2 * half + 1]),
                                      pack<storage>(sums[2][2 * half], sums[2][2 * half + 1]),
                                      pack<storage>(sums[3][2 * half], sums[3][2 * half + 1])));
        }
      }
      if (!is_end) barrier_arrive(all_read);
    }
    const bool warmed_up = tile > 0;
    if (!kSelecting && seams.rows && (warmed_up ? tile == walk.end_tile && !walk.to_end : !walk.from_begin)) {
      leave_gradients(warmed_up, tile);
    }
  }

  if (!walk.from_begin || !grad_given || !has_element) return;
  if constexpr (!kSelecting) {
    int offset;
    const int cell = walk.trailing(0, 0, &offset);
    for (int j = 0; j < goes_on(offset); ++j) {
      if (cell + j < walk.given_cell) continue;
      all_grads[at_lane((cell + j - slots) % grad_rows)] += all_grads[at_lane((cell + j) % grad_rows)];
    }
  }
  for (int i = 0; i < slots; ++i) {
    const int cell = walk.given_cell - 1 - i, slot = static_cast<int>(walk.cells.slot(walk.base + cell));
    const bool open = walk.position > walk.cells.slot_opening(slot);
    static_cast<float*>(grad_given)[state_at(slot)] = open ? all_grads[at_lane(cell % grad_rows)] : 0.f;
  }
}

// Calls body(config{}) with the shapes for one class of heads.
template <typename storage, int dim, int flux, int patches, typename body_type>
void with_back_columns(const Problem& p, const body_type& body) {
  if (p.slots <= 32) return body(BackConfig<storage, dim, flux, 32, patches>());
  body(BackConfig<storage, dim, flux, 64, patches>());
}
template <typename storage, typename body_type>
void with_back_flux(const Problem& p, int flux, const body_type& body) {
  if (!is_wide(p)) {
    if (flux <= 3) return with_back_columns<storage, 64, 3, 4>(p, body);
    if (flux <= 5) return with_back_columns<storage, 64, 5, 4>(p, body);
    if (flux == kEveryOther) return with_back_columns<storage, 64, kEveryOther, 4>(p, body);
    if (flux <= 9) return with_back_columns<storage, 64, 9, 4>(p, body);
    return with_back_columns<storage, 64, kPatch, 4>(p, body);
  }
  if (flux <= 3 && p.query_heads == p.kv_heads) return with_back_columns<storage, 128, 3, 4>(p, body);
  if (flux <= 3) return with_back_columns<storage, 128, 3, 2>(p, body);
  if (flux <= 5 && p.query_heads == p.kv_heads) return with_back_columns<storage, 128, 5, 4>(p, body);
  if (flux <= 5) return with_back_columns<storage, 128, 5, 2>(p, body);
  if (flux == kEveryOther && p.query_heads == p.kv_heads) {
    return with_back_columns<storage, 128, kEveryOther, 4>(p, body);
  }
  if (flux == kEveryOther) return with_back_columns<storage, 128, kEveryOther, 2>(p, body);
  if (flux <= 9) return with_back_columns<storage, 128, 9, 2>(p, body);
  with_back_columns<storage, 128, kPatch, 2>(p, body);
}
template <typename body_type>
void with_back_config(const Problem& p, int flux, const body_type& body) {
  for_half(p.dtype, [&](auto storage) { with_back_flux<decltype(storage)>(p, flux, body); });
}

// KeepingConfig is that of the forward walk that keeps what the slots hold.
template <typename config>
using KeepingConfig = Config<typename config::storage, config::kDim, config::kFlux, 32, false, true>;
// Calls body(config{}, forward, back) with the plans of a class, of the walk that keeps and of the backward walk.
template <typename body_type>
void with_walks(const Problem& p, const HeadClass& c, const body_type& body) {
  with_back_config(p, flux_of(c.number), [&](auto config_tag) {
    using config = decltype(config_tag);
    body(config_tag, make_back_plan(p, c, Task::keep, KeepingConfig<config>::kBlocks),
         make_back_plan(p, c, Task::backward, config::kBlocks));
  });
}

template <typename config>
uint32_t back_bytes(const Problem& p, int resolution) {
  const int group = static_cast<int>(p.query_heads / p.kv_heads);
  return BackLayout::make<config>(static_cast<int>(p.slots), resolution, group).bytes;
}

// Returns why the backward walk cannot take a problem that fejer_refusal() accepts, or null.
const char* refusal_of_slots(const Problem& p) {
  if (p.slots > 64) return "backward: there are more than 64 slots";
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const int resolution = static_cast<int>(p.host_laws[h].cells.resolution);
    bool fits = true;
    with_back_config(p, flux_of(head_class(p.host_laws[h])),
                     [&](auto config) { fits = back_bytes<decltype(config)>(p, resolution) <= shared_memory_limit(); });
    if (!fits) return "backward: the slots do not fit into shared memory";
  }
  return nullptr;
}

}  // namespace

const char* fejer_backward_refusal(const Problem& p, const Gradients& gradients) {
  if (const char* const refusal = fejer_refusal(p)) return refusal;
  if (const char* const refusal = refusal_of_slots(p)) return refusal;
  if (const char* const refusal = range_refusal(p, gradients)) return refusal;
  return aligned(gradients.grad_out) ? nullptr : "backward: rows are not aligned to 16 bytes";
}

int64_t fejer_kept(const Problem& p) {
  return refusal_of_slots(p) || range_refusal(p, Gradients()) ? 0 : Kept::bytes(p);
}
int64_t fejer_backward_workspace_with_kept(const Problem& p) {
  int64_t bytes = 0;
  for (const HeadClass& c : head_classes(p, Kept(), Task::backward)) {
    with_walks(p, c, [&](auto, const WalkPlan&, const WalkPlan& back) { bytes += grad_seam_bytes(p, back, c); });
  }
  return bytes;
}
int64_t fejer_backward_workspace(const Problem& p) {
  int64_t bytes = Kept::bytes(p);
  for (const HeadClass& c : head_classes(p, Kept(), Task::backward)) {
    with_walks(p, c, [&](auto, const WalkPlan& forward, const WalkPlan& back) {
      bytes += cell_seam_bytes(p, forward, c) + grad_seam_bytes(p, back, c);
    });
  }
  return bytes;
}

void fejer_backward(const Problem& p, const Gradients& gradients, void* workspace) {
  const bool is_given = gradients.kept;
  const Kept kept(p, is_given ? const_cast<void*>(gradients.kept) : workspace);
  uint8_t* seam_rows = static_cast<uint8_t*>(workspace) + (is_given ? 0 : Kept::bytes(p));
  two_at_once(p, head_classes(p, kept, Task::backward), [&](const HeadClass& c, const Problem& problem) {
    const HeadList& heads = c.heads;
    with_walks(p, c, [&](auto config_tag, const WalkPlan& forward, const WalkPlan& back) {
      using config = decltype(config_tag);
      if (!is_given) {
        if (p.state_key) launch_given<config>(problem, kept, heads);
        if constexpr (!config::kSelecting) {
          if (p.tokens > 0) {
            launch_walk<KeepingConfig<config>>("fejer_walk of what is kept", problem, Outputs{}, kept, forward, c,
                                               seam_rows, nullptr);
          }
        }
        seam_rows += cell_seam_bytes(p, forward, c);
      }
      const uint32_t bytes = shared_memory_of<fejer_back<config>>(
          p, heads, [&](int resolution) { return back_bytes<config>(p, resolution); });
      const int64_t seam_bytes = grad_seam_bytes(p, back, c);
      const Seams seams(p, back, heads, grad_seam_rows(p), seam_bytes, seam_rows);
      const auto walk = [&](const WalkPlan& plan, const Seams& seams) {
        launch_early<kPair>("fejer_back", fejer_back<config>, plan.count * heads.count, config::kThreads, bytes,
                            problem.stream, problem, gradients, kept, plan, heads, seams);
      };
      walk(back, seams);
      seam_rows += seam_bytes;
      if (!seams.rows) return;
      launch_early("fejer_back at seams", fejer_back_seams<typename config::storage, config::kDim>, seams.blocks(heads),
                   kSeamThreads, 0, problem.stream, problem, gradients, heads, seams);
      walk(back.whole(p), seams.again());
    });
  });
}

}  // namespace blurry_attn::cuda
