// "fejer" backward on tensor cores, bfloat16 and float16. The walk forward over time leaves the gradient of the query
// and every patch's weights; a walk backward takes the gradients of what the slots hold to the tokens of key and value.
#include "window_walk.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kSlice = 16;      // elements of key or value that a warp has
constexpr int kMaxSlices = 16;  // of key and value together

// Shared memory of a warp of window_tokens, in floats.
struct SliceLayout {
  int ring_rows, columns, ends, weights, gates, decays, floats;

  __host__ __device__ static SliceLayout make(int slots, int resolution, int flux) {
    SliceLayout l;
    l.ring_rows = (slots + flux + kPatch / resolution + 3 + 7) / 8 * 8;
    int at = l.ring_rows * kSlice;  // gradients of what cells hold in the end: [cell][element]
    const int in_flux = flux == kPatch ? 0 : flux;
    l.columns = at;  // of what slots in flux held when the patch began: [cell][element]
    at += in_flux * kSlice;
    l.ends = at;  // of what they hold when it ends
    at += in_flux * kSlice;
    l.weights = at;  // of the patch's tokens in what they hold when it ends: [cell][token]
    at += in_flux * kPatch;
    l.gates = at;
    at += in_flux * kPatch;
    l.decays = at;
    at += (in_flux + 3) / 4 * 4;
    l.floats = at;
    return l;
  }
};

// One warp has kSlice elements of key or value of one head, from the last patch of a stretch to the first. It begins
// plan.warm_up tokens later, for what cells of the stretch give to later tokens.
template <typename storage, int kFlux, int kColumns>
__global__ void __launch_bounds__(kMaxSlices* kWarp)
    window_tokens(Problem p, Gradients gradients, WalkPlan plan, HeadList heads, int tile, int key_slices,
                  const uint4* pieces) {
  constexpr bool kSliding = kFlux == kPatch;
  constexpr int kGroups = kColumns / 16;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int head = heads.head[blockIdx.x % heads.count];
  const int64_t x = blockIdx.x / heads.count;
  const Cells cells = p.laws[head].cells;
  const int slots = static_cast<int>(cells.slots), resolution = static_cast<int>(cells.resolution);
  const SliceLayout layout = SliceLayout::make(slots, resolution, kFlux);
  const int ring_rows = layout.ring_rows;
  float* const ring = reinterpret_cast<float*>(shared_memory) + warp * layout.floats;
  float *const columns = ring + layout.columns, *const ends = ring + layout.ends;
  float *const weights = ring + layout.weights, *const gates = ring + layout.gates,
               *const decays = ring + layout.decays;
  const bool is_value = warp >= key_slices;
  const int first_element = kSlice * (is_value ? warp - key_slices : warp);
  const int dim = static_cast<int>(is_value ? p.value_dim : p.key_dim);
  const View& rows_view = is_value ? gradients.grad_out : p.query;
  const View& to_view = is_value ? gradients.value : gradients.key;
  const float* const table = static_cast<const float*>(p.gates) + p.laws[head].gates;
  const int group = static_cast<int>(p.query_heads / p.kv_heads);

  const Sequence s(p, plan.find(p, x));
  const int64_t number = x - plan.first(p, s.index);
  const void* const grad_state = is_value ? gradients.grad_state_value : gradients.grad_state_key;
  void* const grad_given = is_value ? gradients.state_value : gradients.state_key;
  const auto state_at = [&](int slot, int element) {
    return ((s.index * p.kv_heads + head) * slots + slot) * dim + first_element + element;
  };
  if (s.length == 0 && number == 0 && grad_given) {
    for (int i = lane; i < slots * kSlice; i += kWarp) {
      const int slot = i / kSlice, element = i % kSlice;
      if (first_element + element >= dim) continue;
      const bool passes = grad_state && s.position > cells.slot_opening(slot);
      static_cast<float*>(grad_given)[state_at(slot, element)] =
          passes ? static_cast<const float*>(grad_state)[state_at(slot, element)] : 0.f;
    }
  }
  if (number * plan.length >= s.length) return;
  const int64_t grid = floor_div(s.position - cells.phase, tile) * tile + cells.phase;
  const int64_t own = number == 0 ? s.position : grid + number * plan.length;
  const bool last = (number + 1) * plan.length >= s.length;
  const int64_t own_to = last ? s.end() : grid + (number + 1) * plan.length;
  const int64_t later = own_to + (plan.warm_up + kPatch - 1) / kPatch * kPatch;
  const bool to_end = last || later >= s.end();
  const int64_t to = to_end ? s.end() : later;
  // From here on patches, tokens and cells are plain ints: tokens are counted from the first of this call, cells from
  // one that lies before all that this walk meets.
  const int lead = static_cast<int>(grid - s.position), length = static_cast<int>(s.length);
  const int first_patch = static_cast<int>((own - grid) / kPatch),
            last_patch = static_cast<int>((to - 1 - grid) / kPatch);
  const int own_begin = static_cast<int>(own - s.position), own_end = static_cast<int>(own_to - s.position);
  const int64_t base = cells.trailing(grid + static_cast<int64_t>(first_patch) * kPatch) - slots;
  const int first_offset =
      static_cast<int>(grid + static_cast<int64_t>(first_patch) * kPatch - cells.centre(base + slots));
  const auto row_of_cell = [&](int cell) { return static_cast<int>(static_cast<uint32_t>(cell) % ring_rows); };
  const auto at = [&](int row, int element) { return row * kSlice + (element ^ (((row >> 1) & 1) << 3)); };
  // The trailing cell where the given state ends, or a bound below it.
  const int64_t given_cell = cells.trailing(s.position) - base;
  const int given = given_cell > -(1 << 30) ? static_cast<int>(given_cell) : -(1 << 30);
  for (int i = lane; i < ring_rows * kSlice; i += kWarp) ring[i] = 0.f;
  __syncwarp();
  if (to_end && grad_state) {
    // The newest cells of the slots; one of r = 1 begins with its centre, all others before it.
    const int64_t newest = cells.trailing(s.end() - 1) + (kSliding ? 0 : 1);
    for (int i = lane; i < slots * kSlice; i += kWarp) {
      const int64_t cell = newest - i / kSlice;
      const int element = first_element + i % kSlice, slot = static_cast<int>(cells.slot(cell));
      if (element >= dim || s.end() <= cells.slot_opening(slot)) continue;
      ring[at(row_of_cell(static_cast<int>(cell - base)), i % kSlice)] =
          static_cast<const float*>(grad_state)[state_at(slot, i % kSlice)];
    }
    __syncwarp();
  }

  // What a patch and a query head bring: weights, and the rows' slice. Read one ahead.
  struct Item {
    uint4 weights[kGroups + 1];
    uint32_t rows[2][2];
  };
  const uint4* const first_piece =
      pieces + piece_at(p, s.index, s.batch, s.row, 0, static_cast<int64_t>(head) * group, kColumns / 8) +
      (is_value ? (kGroups + 1) * kWarp : 0) + lane;
  const storage* const first_row_slice =
      row_of<const storage>(rows_view, s.batch, static_cast<int64_t>(head) * group, s.row) + first_element + 2 * q;
  const auto fetch = [&](int patch, int i) {
    Item item;
    const uint4* piece = first_piece + (patch * p.query_heads + i) * pieces_of_patch(kColumns / 8);
#pragma unroll
    for (int m = 0; m <= kGroups; ++m) item.weights[m] = piece[m * kWarp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = lead + patch * kPatch + g + 8 * half;
      const storage* from = first_row_slice + i * rows_view.head + t * rows_view.token;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const bool exists = t >= 0 && t < length && first_element + 8 * n + 2 * q < dim;
        item.rows[n][half] = exists ? *reinterpret_cast<const uint32_t*>(from + 8 * n) : 0u;
      }
    }
    return item;
  };
  Item next = fetch(last_patch, 0);

  float live0 = 0.f, live1 = 0.f;  // gradients of the cells in flux where the next patch begins; lane: element
  int made_for = -1, cell = given;
  for (int patch = last_patch; patch >= first_patch; --patch) {
    const int token0 = lead + patch * kPatch, since = first_offset + (patch - first_patch) * kPatch;
    const int offset = since % resolution;
    cell = slots + since / resolution;
    const int ended = max(given - cell, 0);
    const int first_row = row_of_cell(cell - slots);
    const auto column_row = [&](int column) {
      const int row = wrap(first_row + column, ring_rows);
      return column < ended ? wrap(row + slots, ring_rows) : row;
    };
    if constexpr (!kSliding) {
      const bool irregular = cells.opens(base + cell) || token0 < 0 || token0 + kPatch > length;
      if (irregular || made_for != offset) {
        for (int i = lane; i < kFlux * kPatch; i += kWarp) {
          const int64_t c = base + cell + i / kPatch, t = s.position + token0 + i % kPatch;
          const int64_t from_centre = t - cells.centre(c);
          const bool lies = c >= cells.first() && t >= s.position && t < s.end() && from_centre > -cells.resolution &&
                            from_centre < cells.resolution;
          gates[i] = lies ? cells.gate(table, c, t) : 0.f;
        }
        __syncwarp();
        for (int i = lane; i < kFlux * kPatch; i += kWarp) {
          const int j = i / kPatch;
          float product = 1.f;
          for (int t = kPatch - 1; t > i % kPatch; --t) product *= 1.f - gates[j * kPatch + t];
          weights[i] = gates[i] * product;
          if (i % kPatch == 0) decays[j] = product * (1.f - gates[i]);
        }
        made_for = irregular ? -1 : offset;
        __syncwarp();
      }
    }

    // Products of weights and rows, over the heads of the group.
    float sums[kGroups][2][4] = {}, token_sums[2][4] = {};
    for (int i = 0; i < group; ++i) {
      const Item item = next;
      if (i + 1 < group) {
        next = fetch(patch, i + 1);
      } else if (patch > first_patch) {
        next = fetch(patch - 1, 0);
      }
      uint32_t b[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 2; ++n) b[n][half] = transpose(item.rows[n][half]);
      }
#pragma unroll
      for (int m = 0; m <= kGroups; ++m) {
        const uint32_t a[4] = {item.weights[m].x, item.weights[m].y, item.weights[m].z, item.weights[m].w};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma<storage>(m < kGroups ? sums[m < kGroups ? m : 0][n] : token_sums[n], a, b[n][0], b[n][1]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * m + g + 8 * half;
        if (column >= slots) continue;
        const bool in_flux = !kSliding && column < kFlux;
        const int row = column_row(column);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int element = 8 * n + 2 * q;
          float2* to =
              reinterpret_cast<float2*>(in_flux ? columns + column * kSlice + element : ring + at(row, element));
          float2 sum = in_flux ? make_float2(0.f, 0.f) : *to;
          sum.x += sums[m][n][2 * half];
          sum.y += sums[m][n][2 * half + 1];
          *to = sum;
        }
      }
    }
    __syncwarp();

    if constexpr (!kSliding) {
      // Back over the patch: from what the cells in flux hold at its end to what they held when it began.
      if (lane < kSlice) {
        const int finished = patch == last_patch && to_end ? kFlux : (offset + kPatch) / resolution;
        float begin0 = 0.f, begin1 = 0.f;
#pragma unroll
        for (int j = 0; j < kFlux; ++j) {
          const int before = wrap(first_row + j, ring_rows), own_row = wrap(before + slots, ring_rows);
          float end = j == finished ? live0 : j == finished + 1 ? live1 : 0.f;
          if (j < finished) {
            end = ring[at(own_row, lane)];
            ring[at(own_row, lane)] = 0.f;
          }
          ends[j * kSlice + lane] = end;
          const float begin = decays[j] * end + columns[j * kSlice + lane];
          if (j == 0) {
            begin0 = begin;
          } else if (j == 1 && offset >= 2) {
            begin1 = begin;
          } else {
            ring[at(j < ended ? own_row : before, lane)] += begin;
          }
        }
        live0 = begin0;
        live1 = begin1;
      }
      __syncwarp();
    }

    // The patch's tokens.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = g + 8 * half, t = token0 + token;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int element = 8 * n + 2 * q;
        float2 sum = make_float2(token_sums[n][2 * half], token_sums[n][2 * half + 1]);
        if constexpr (kSliding) {
          if (token >= ended) {
            float2* const held = reinterpret_cast<float2*>(
                ring + at(wrap(wrap(first_row + token, ring_rows) + slots, ring_rows), element));
            sum.x += held->x;
            sum.y += held->y;
            *held = make_float2(0.f, 0.f);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kFlux; ++j) {
            const float2 end = *reinterpret_cast<const float2*>(ends + j * kSlice + element);
            sum.x += weights[j * kPatch + token] * end.x;
            sum.y += weights[j * kPatch + token] * end.y;
          }
        }
        if (t >= own_begin && t < own_end && first_element + element < dim) {
          *reinterpret_cast<uint32_t*>(row_of<storage>(to_view, s.batch, head, s.row + t) + first_element + element) =
              pack<storage>(sum.x, sum.y);
        }
      }
    }
    __syncwarp();
  }

  if (number > 0 || !grad_given) return;
  if (!kSliding && lane < kSlice) {
    for (int j = 0; j < 2; ++j) {
      const int c = cell + j;
      ring[at(row_of_cell(c < given ? c : c - slots), lane)] += j ? live1 : live0;
    }
  }
  __syncwarp();
  for (int i = lane; i < slots * kSlice; i += kWarp) {
    const int c = given - 1 - i / kSlice;
    const int element = first_element + i % kSlice, slot = static_cast<int>(cells.slot(base + c));
    if (element >= dim) continue;
    const bool open = s.position > cells.slot_opening(slot);
    static_cast<float*>(grad_given)[state_at(slot, i % kSlice)] = open ? ring[at(row_of_cell(c), i % kSlice)] : 0.f;
  }
}

template <typename storage, int dim, typename body_type>
void with_backward_flux(const Problem& p, int flux, const body_type& body) {
  const bool few = p.slots <= 32;
  if (flux <= 3)
    return few ? body(Config<storage, dim, 3, 32, false, true>()) : body(Config<storage, dim, 3, 64, false, true>());
  if (flux <= 5)
    return few ? body(Config<storage, dim, 5, 32, false, true>()) : body(Config<storage, dim, 5, 64, false, true>());
  if (flux <= 9) return body(Config<storage, dim, 9, 64, false, true>());
  return few ? body(Config<storage, dim, kPatch, 32, false, true>())
             : body(Config<storage, dim, kPatch, 64, false, true>());
}
template <typename body_type>
void with_backward_config(const Problem& p, int flux, const body_type& body) {
  for_half(p.dtype, [&](auto storage_tag) {
    using storage = decltype(storage_tag);
    if (p.key_dim > 64 || p.value_dim > 64) return with_backward_flux<storage, 128>(p, flux, body);
    with_backward_flux<storage, 64>(p, flux, body);
  });
}

int64_t patches(const Problem& p) {
  return p.cu_seqlens ? p.tokens / kPatch + kSparePatches * p.sequences : p.batch * (p.tokens / kPatch + kSparePatches);
}

}  // namespace

const char* window_backward_refusal(const Problem& p, const Gradients& gradients) {
  if (const char* const refusal = window_refusal(p)) return refusal;
  if (p.slots > 64) return "backward: there are more than 64 slots";
  if (!aligned(gradients.grad_out)) return "backward: rows are not aligned to 16 bytes";
  return nullptr;
}

int64_t window_backward_workspace(const Problem& p) {
  return patches(p) * p.query_heads * pieces_of_patch(8) * static_cast<int64_t>(sizeof(uint4));
}

void window_backward(const Problem& p, const Gradients& gradients, void* workspace) {
  const WalkPlan plan = make_plan(p);
  uint4* const pieces = static_cast<uint4*>(workspace);
  for_flux_classes(p, [&](int flux, const HeadList& heads) {
    with_backward_config(p, flux, [&](auto config_tag) {
      using config = decltype(config_tag);
      if (p.tokens > 0) {
        const uint32_t bytes = shared_bytes<config>(p, heads);
        cudaFuncSetAttribute(window_walk<config>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
        launch("window_walk backward", window_walk<config>, plan.count * heads.count, config::kThreads, bytes, p.stream,
               p, Outputs{}, gradients, plan, heads, static_cast<uint8_t*>(nullptr), pieces);
      }
      const int key_slices = static_cast<int>((p.key_dim + kSlice - 1) / kSlice);
      const int slices = key_slices + static_cast<int>((p.value_dim + kSlice - 1) / kSlice);
      const auto kernel = window_tokens<typename config::storage, config::kFlux, config::kColumns>;
      int floats = 0;
      for (int i = 0; i < heads.count; ++i) {
        const int resolution = static_cast<int>(p.cells[heads.head[i]].resolution);
        floats = std::max(floats, SliceLayout::make(static_cast<int>(p.slots), resolution, config::kFlux).floats);
      }
      const int bytes = floats * 4 * slices;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      launch("window_tokens", kernel, plan.count * heads.count, slices * kWarp, bytes, p.stream, p, gradients, plan,
             heads, config::kTile, key_slices, static_cast<const uint4*>(pieces));
    });
  });
}

}  // namespace blurry_attn::cuda
