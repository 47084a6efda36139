// This header has what the forward and the backward of "dirichlet" on tensor cores share.
//
// Time goes in patches of kPatch tokens on a grid that begins at the head's phase. At the end of a patch, a slot's
// content is
//     content = left * (content at the begin) + sum over the patch's tokens of weight * token,
// which is one matrix product for all slots and elements. Within the patch, the same holds with other weights, but only
// products of contents with a query are needed. The law's recurrence on numbers gives these: x begins as query *
// content, and each token s up to the query's adds gate_s * (query * key_s - x). A block walks over a stretch, which is
// a part of a sequence; each of its warps holds 16 slots in registers in float32. The walk begins one period before the
// stretch: by then a gate of 1 has replaced all that the slots held.
#pragma once

#include "common/half.cuh"
#include "common/rows.cuh"
#include "common/shared.cuh"
#include "common/tuning.h"

namespace blurry_attn::cuda {

constexpr int kMaxPatchSlots = 64;
constexpr int kWarpSlots = 16;

// A PatchRow says what a patch does to one slot. Its 32-bit words are the gates of the tokens, what is left of the
// content, and the tokens' weights (high and low parts). A row without gates begins at kLeft.
struct PatchRow {
  static constexpr int kLeft = 16, kHigh = 20, kLow = 28, kWords = 36;

  // gate(i) is the gate of the patch's token i. `row` points at word 0, which need not exist if the gates are not kept.
  template <typename storage, bool gates, typename gate_type>
  __device__ __forceinline__ static void make(uint32_t* row, const gate_type& gate) {
    float left = 1.f;
#pragma unroll 1
    for (int i = kPatch - 2; i >= 0; i -= 2) {
      const float low = gate(i), high = gate(i + 1);
      const float second = high * left, first = low * ((1.f - high) * left);
      left *= (1.f - high) * (1.f - low);
      const uint32_t word = pack<storage>(first, second);
      const float2 rounded = unpack<storage>(word);
      row[kHigh + i / 2] = word;
      row[kLow + i / 2] = pack<storage>(first - rounded.x, second - rounded.y);
      if (gates) {
        row[i] = __float_as_uint(low);
        row[i + 1] = __float_as_uint(high);
      }
    }
    row[kLeft] = __float_as_uint(left);
    for (int i = kLeft + 1; i < kHigh; ++i) row[i] = 0;  // padding: copied, not used
  }
};

// RowTables has the row of every patch that lies past all openings, by the offset of its first token from the slot's
// centre. Heads of one resolution share rows.
struct RowTables {
  uint32_t* words;
  int owners;
  uint16_t owner[kMostHeads];  // one head for each resolution
  int32_t first[kMostHeads];   // the row of offset 0, by head

  int64_t make(const Problem& p, void* memory) {  // returns the size in bytes
    words = static_cast<uint32_t*>(memory);
    owners = 0;
    int64_t rows = 0;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      bool found = false;
      for (int i = 0; i < owners && !found; ++i) {
        found = p.host_laws[owner[i]].cells.resolution == p.host_laws[h].cells.resolution;
        if (found) first[h] = first[owner[i]];
      }
      if (found) continue;
      owner[owners++] = static_cast<uint16_t>(h);
      first[h] = static_cast<int32_t>(rows);
      rows += p.host_laws[h].cells.window();
    }
    return rows * PatchRow::kWords * 4;
  }
};

template <typename storage>
__global__ void __launch_bounds__(128) dirichlet_rows(Problem p, RowTables tables, int tiles) {
  const int head = tables.owner[blockIdx.x / tiles];
  const int x = static_cast<int>(blockIdx.x) % tiles * 128 + static_cast<int>(threadIdx.x);
  const int window = static_cast<int>(p.laws[head].cells.window());
  if (x >= window) return;
  const float* const gates = static_cast<const float*>(p.gates) + p.laws[head].gates;
  PatchRow::make<storage, true>(tables.words + static_cast<int64_t>(tables.first[head] + x) * PatchRow::kWords,
                                [&](int i) { return gates[(x + i) % window]; });
}
template <typename storage>
void launch_rows(const Problem& p, const RowTables& tables) {
  const int tiles = static_cast<int>((p.longest_window + 127) / 128);
  launch("dirichlet_rows", dirichlet_rows<storage>, tables.owners * tiles, 128, 0, p.stream, p, tables, tiles);
}

// make_patch_plan() cuts time into stretches. A token of a warm-up takes a quarter of the work forward, and half back.
inline WalkPlan make_patch_plan(const Problem& p, bool backward) {
  WalkPlan plan{};
  plan.patches = 1;
  const int64_t least = 2 * p.longest_window;
  plan.length = std::max<int64_t>(least, is_wide(p) ? kWideStretch : kNarrowStretch);
  plan.halved = std::max<int64_t>(least, kHalvedPatchStretch);
  plan.warm_up = p.longest_window;
  plan.extra = plan.warm_up / (backward ? 2 : 4);
  plan.backward = backward;
  plan.count_stretches(p);
  return plan;
}

// A PatchWalk is one block's walk over a stretch of one sequence and head. It lies in shared memory, so that it costs
// no registers. Times are counted in tokens from the first token of the first patch.
struct PatchWalk {
  Cells cells;
  int64_t stretch, sequence, batch, position;
  int64_t first_time;      // token of the sequence at time 0
  int64_t row;             // row of time 0, which may lie before the batch entry's first
  int64_t patch;           // number of the patch at time 0, of all that there can be
  int begin, end;          // the sequence's tokens of this call
  int own_begin, own_end;  // the tokens of the stretch
  int walk_end;            // backward: where the walk begins
  int settled;             // every slot has been opened by this time
  int head, group;         // kv head; its query heads are first_head .. first_head + group - 1
  int64_t first_head;
  float scale, factor;  // of logits; of logits to base 2
  int window, resolution;
  int origin;               // offset of time 0 in the period from the centre of slot 0
  bool from_begin, to_end;  // whether the walk meets the begin, or the end, of the sequence

  PatchWalk() = default;
  __device__ PatchWalk(const Problem& p, const WalkPlan& plan, int64_t x, int head)
      : cells(p.laws[head].cells), stretch(x), head(head) {
    const Stretch own(p, plan, cells, x);
    const Sequence& s = own.sequence;
    const int64_t period = cells.window();
    sequence = s.index;
    batch = s.batch;
    position = s.position;
    from_begin = plan.backward ? own.number == 0 : own.begin - s.position <= period;
    to_end = s.end() - own.end <= period;
    const int64_t from = from_begin ? s.position : plan.backward ? own.begin : own.begin - period;
    first_time = patch_begin(cells, from);
    row = s.row + first_time - s.position;
    patch = (p.cu_seqlens ? s.row / kPatch + s.index * kSparePatches : s.batch * (p.tokens / kPatch + kSparePatches)) +
            (first_time - own.grid) / kPatch;
    begin = since(s.position);
    end = since(s.end());
    own_begin = since(own.begin);
    own_end = own.exists ? since(own.end) : own_begin;
    walk_end = own.exists ? since(to_end ? s.end() : own.end + period) : own_begin;
    settled = since(cells.opening(cells.slots - 1));
    window = static_cast<int>(period);
    resolution = static_cast<int>(cells.resolution);
    origin = static_cast<int>(first_time - cells.phase - floor_div(first_time - cells.phase, period) * period);
    group = static_cast<int>(p.query_heads / p.kv_heads);
    first_head = static_cast<int64_t>(head) * group;
    scale = static_cast<float>(p.scale);
    factor = static_cast<float>(p.scale * 1.4426950408889634);
  }
  static int64_t patches(const Problem& p) {
    return p.cu_seqlens ? p.tokens / kPatch + p.sequences * kSparePatches
                        : p.batch * (p.tokens / kPatch + kSparePatches);
  }
  // since() is a time in 32 bits; what is too far away counts as far away.
  __device__ int since(int64_t time) const {
    const int64_t far = int64_t(1) << 30, t = time - first_time;
    return static_cast<int>(t < -far ? -far : t > far ? far : t);
  }
  __device__ bool owns(int time) const { return time >= own_begin && time < own_end; }
  // These two say whether a slot was open before the sequence, and whether it is open at its end.
  __device__ bool given_before(int64_t slot) const { return position > cells.slot_opening(slot); }
  __device__ bool open_at_end(int64_t slot) const { return first_time + end > cells.slot_opening(slot); }
};

// RowFetch brings the rows of slots into shared memory, patch by patch, with two threads per slot.
template <typename storage, bool with_gates>
struct RowFetch {
  static constexpr int kFirst = with_gates ? 0 : PatchRow::kLeft;  // leading words that are not kept
  static constexpr int kStride = PatchRow::kWords - kFirst;        // words of a row in shared memory
  static constexpr int kChunks = kStride / 4, kFirstPart = (kChunks + 1) / 2;

  const Problem& p;
  const RowTables& tables;
  const PatchWalk& walk;

  // clear() sets the rows of slots that do not exist to zero, of `count` rows.
  __device__ __forceinline__ void clear(uint32_t* rows, int count) const {
    const int slot = threadIdx.x / 2;
    if (slot < p.slots || slot >= count) return;
    for (int i = threadIdx.x % 2; i < kStride; i += 2) rows[slot * kStride + i] = 0;
  }
  __device__ __forceinline__ void fetch(uint32_t* rows, int time) const {
    const int thread = hidden(threadIdx.x), slot = thread / 2, part = thread % 2;
    if (slot >= p.slots) return;
    uint32_t* const to = rows + slot * kStride;
    // The offset of the patch from the slot's centre is computed anew each time, to save registers.
    const int offset = (walk.origin + time + walk.window - slot * walk.resolution) % walk.window;
    if (time >= walk.begin && time + kPatch <= walk.end && time > walk.settled) {
      const int64_t row = tables.first[walk.head] + offset;
      const uint32_t* const from = tables.words + row * PatchRow::kWords + kFirst;
      const uint32_t shared = shared_address(to);
#pragma unroll
      for (int i = 0; i < kFirstPart; ++i) {
        const int chunk = i + part * kFirstPart;
        if (chunk < kChunks) copy_async(shared + chunk * 16, from + chunk * 4);
      }
    } else if (part == 0) {
      const float* const gates = static_cast<const float*>(p.gates) + p.laws[walk.head].gates;
      const int opening = walk.since(walk.cells.slot_opening(slot));
      PatchRow::make<storage, with_gates>(to - kFirst, [&](int i) {
        const int t = time + i;
        if (t < walk.begin || t >= walk.end || t < opening) return 0.f;
        return t == opening ? 1.f : gates[(offset + i) % walk.window];
      });
    }
  }
};

// fetch_patch() sends a patch's rows of a tensor to shared memory. Rows outside of times from .. end - 1 and elements
// past `width` become zeros.
template <typename storage, int dim, int threads>
__device__ __forceinline__ void fetch_patch(uint32_t to, const View& view, const storage* first, int time, int from,
                                            int end, int width) {
  using Row = Rows<dim>;
  static_assert(kPatch * Row::kChunks % threads == 0);
  const int thread = hidden(threadIdx.x);
#pragma unroll
  for (int n = 0; n < kPatch * Row::kChunks / threads; ++n) {
    const int i = thread + n * threads, row = i / Row::kChunks, chunk = i % Row::kChunks, t = time + row;
    const bool valid = t >= from && t < end && chunk * 8 < width;
    copy_async_or_zero(Row::at(to, row, chunk), valid ? first + t * view.token + chunk * 8 : view.data, valid);
  }
}

// split() writes each of two numbers as the sum of a high and a low part.
template <typename storage>
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack<storage>(x, y);
  const float2 rounded = unpack<storage>(high);
  low = pack<storage>(x - rounded.x, y - rounded.y);
}

// A PatchReader reads 16 rows by 16 elements of a patch in shared memory, from element 16 m on.
template <int dim>
struct PatchReader {
  uint32_t row, chunk;  // offsets of the lane in bytes, as in Rows::at()

  __device__ __forceinline__ PatchReader() {
    const int lane = hidden(threadIdx.x) % kWarp;
    row = lane % 16 * Rows<dim>::kBytes;
    chunk = (lane / 16 ^ (lane & 7)) << 4;
  }
  // load() reads the left operand of a product over elements. With tokens as columns it is the right operand: words 0
  // and 2 are tokens 0 - 7, and words 1 and 3 tokens 8 - 15.
  __device__ __forceinline__ void load(uint32_t (&x)[4], uint32_t patch, int m) const {
    load_matrices(x, patch + row + (chunk ^ (m << 5)));
  }
  // load_transposed() reads the right operand of a product over tokens. Words 0 and 1 are elements 0 - 7, and words 2
  // and 3 elements 8 - 15.
  __device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t patch, int m) const {
    load_matrices_transposed(x, patch + row + (chunk ^ (m << 5)));
  }
};

// EndWeights are the tokens' weights (columns) in the contents of a warp's 16 slots (rows) at the end of a patch.
struct EndWeights {
  uint32_t high[4], low[4];

  __device__ __forceinline__ explicit EndWeights(const uint32_t* rows) {  // the row of the first slot
    const int lane = threadIdx.x % kWarp;
    const uint32_t at = shared_address(rows + (lane % 16) * PatchRow::kWords + lane / 16 * 4);
    load_matrices(high, at + PatchRow::kHigh * 4);
    load_matrices(low, at + PatchRow::kLow * 4);
  }
};

// SlotRows are the contents of a warp's 16 slots, as rows, in float32.
template <typename storage, int dim>
struct SlotRows {
  float content[dim / 8][4];

  // at(slot, element) returns the given content.
  template <typename at_type>
  __device__ __forceinline__ void load(const at_type& at) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) content[n][e] = at(g + 8 * (e / 2), 8 * n + 2 * q + e % 2);
    }
  }
  // multiply() computes z += rows * content over the 16 elements from 16 m on.
  __device__ __forceinline__ void multiply(float (&z)[2][4], const uint32_t (&rows)[4], int m) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t high[2], low[2];
      split<storage>(content[2 * m][2 * half], content[2 * m][2 * half + 1], high[0], low[0]);
      split<storage>(content[2 * m + 1][2 * half], content[2 * m + 1][2 * half + 1], high[1], low[1]);
      mma<storage>(z[half], rows, high[0], high[1]);
      mma<storage>(z[half], rows, low[0], low[1]);
    }
  }
  // mix() computes sums += weights * content, a product over slots, for the 16 elements from 16 m on.
  __device__ __forceinline__ void mix(float (&low_sums)[4], float (&high_sums)[4], const uint32_t (&weights)[4],
                                      int m) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&sums)[4] = half ? high_sums : low_sums;
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        split<storage>(content[2 * m + half][2 * i], content[2 * m + half][2 * i + 1], high[i], low[i]);
        high[i] = transpose(high[i]);
        low[i] = transpose(low[i]);
      }
      mma<storage>(sums, weights, high[0], high[1]);
      mma<storage>(sums, weights, low[0], low[1]);
    }
  }
  __device__ __forceinline__ void write(const uint32_t* rows, const EndWeights& weights, uint32_t patch) {
    const PatchReader<dim> reader;
    const int g = threadIdx.x % kWarp / 4;
    const float left[2] = {__uint_as_float(rows[g * PatchRow::kWords + PatchRow::kLeft]),
                           __uint_as_float(rows[(g + 8) * PatchRow::kWords + PatchRow::kLeft])};
#pragma unroll
    for (int m = 0; m < dim / 16; ++m) {
      uint32_t tokens[4];
      reader.load_transposed(tokens, patch, m);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&x)[4] = content[2 * m + half];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] *= left[e / 2];
        mma<storage>(x, weights.high, tokens[2 * half], tokens[2 * half + 1]);
        mma<storage>(x, weights.low, tokens[2 * half], tokens[2 * half + 1]);
      }
    }
  }
};

// Scores are the products of a patch's queries with its own tokens, [token][kScoreStride], per warp in shared memory.
constexpr int kScoreStride = kPatch + 4;
constexpr int kScoreFloats = kPatch * kScoreStride;
__device__ __forceinline__ void store_scores(float* scores, const float (&sums)[2][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(scores + (g + 8 * half) * kScoreStride + 8 * n + 2 * q) =
          make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }
}

// As an mma leaves them, lane (g, q) has tokens g and g + 8. Its slots of the warp's are 2 q, 2 q + 1, 2 q + 8 and
// 2 q + 9; load_gates() reads their gates for the patch's tokens 4 b .. 4 b + 3.
__device__ __forceinline__ void load_gates(Quad<float> (&gates)[4], const uint32_t* rows, int b) {
  const uint32_t* const from = rows + threadIdx.x % 4 * 2 * PatchRow::kWords + 4 * b;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    gates[c] = read_pack<float, 4>(reinterpret_cast<const float*>(from + (c / 2 * 8 + c % 2) * PatchRow::kWords));
  }
}
// advance() turns products with contents at the patch's begin into products with contents at the rows' tokens. All
// `sides` have the same gates; their scores lie one after the other.
template <int sides>
__device__ __forceinline__ void advance(float (&z)[sides][2][4], const uint32_t* rows, const float* scores) {
  const int g = threadIdx.x % kWarp / 4;
  scores += g * kScoreStride;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    Quad<float> gates[4], low[sides], high[sides];
    load_gates(gates, rows, b);
#pragma unroll
    for (int side = 0; side < sides; ++side) {
      const float* const from = scores + side * kScoreFloats + 4 * b;
      if (b < 2) low[side] = read_pack<float, 4>(from);
      high[side] = read_pack<float, 4>(from + 8 * kScoreStride);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool reached = (4 * b + e) % 8 <= g;  // by token g, or g + 8
#pragma unroll
      for (int side = 0; side < sides; ++side) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = z[side][c / 2][c % 2];
          float& y = z[side][c / 2][2 + c % 2];
          if (b < 2 && reached) x += gates[c].x[e] * (low[side].x[e] - x);
          if (b < 2 || reached) y += gates[c].x[e] * (high[side].x[e] - y);
        }
      }
    }
  }
}
// advance_back() is the adjoint. `a` turns from weights of contents at the rows' tokens into weights of contents at the
// patch's begin. `sums` gets the weights of the patch's tokens, summed over the warp's slots.
template <typename storage, int sides>
__device__ __forceinline__ void advance_back(float (&a)[sides][2][4], float (&sums)[sides][2][4],
                                             const uint32_t* rows) {
  const int g = threadIdx.x % kWarp / 4;
  // An mma sums over the four lanes of a token. Each lane brings the sums of four tokens, of which column n takes one.
  uint32_t ones[2][2];
  const int column = hidden(g);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int first = column - 4 * i - 2 * j;
      ones[i][j] = pack<storage>(first == 0 ? 1.f : 0.f, first == 1 ? 1.f : 0.f);
    }
  }
#pragma unroll
  for (int b = 3; b >= 0; --b) {
    Quad<float> gates[4];
    load_gates(gates, rows, b);
    float low[sides][4] = {}, high[sides][4] = {};
#pragma unroll
    for (int e = 3; e >= 0; --e) {
      const bool reached = (4 * b + e) % 8 <= g;
#pragma unroll
      for (int side = 0; side < sides; ++side) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = a[side][c / 2][c % 2];
          float& y = a[side][c / 2][2 + c % 2];
          if (b < 2 && reached) {
            low[side][e] += gates[c].x[e] * x;
            x -= gates[c].x[e] * x;
          }
          if (b < 2 || reached) {
            high[side][e] += gates[c].x[e] * y;
            y -= gates[c].x[e] * y;
          }
        }
      }
    }
#pragma unroll
    for (int side = 0; side < sides; ++side) {
      uint32_t parts[4] = {0, pack<storage>(high[side][0], high[side][1]), 0,
                           pack<storage>(high[side][2], high[side][3])};
      if (b < 2) {
        parts[0] = pack<storage>(low[side][0], low[side][1]);
        parts[2] = pack<storage>(low[side][2], low[side][3]);
      }
      mma<storage>(sums[side][b / 2], parts, ones[b % 2][0], ones[b % 2][1]);
    }
  }
}
// pack_left() packs two neighbouring tiles of 8 columns as the left operand of a product over these columns.
template <typename storage>
__device__ __forceinline__ void pack_left(uint32_t (&x)[4], const float (&sums)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = pack<storage>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
}
template <typename storage>
__device__ __forceinline__ void split_left(uint32_t (&high)[4], uint32_t (&low)[4], const float (&sums)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) split<storage>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1], high[i], low[i]);
}
__device__ __forceinline__ uint4 transpose_all(const uint32_t (&x)[4]) {
  return make_uint4(transpose(x[0]), transpose(x[1]), transpose(x[2]), transpose(x[3]));
}

// patch_warps() is the number of warps of a block that walks forward.
inline int patch_warps(const Problem& p) { return p.slots <= 2 * kWarpSlots ? 2 : 4; }

}  // namespace blurry_attn::cuda
