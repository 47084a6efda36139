// How a warp's 16 tokens attend to what the slots hold: the products with cells, from there to the products with what
// the slots hold at each token, and back. Shared by the walk forward and the walk backward over time.
#pragma once

#include <cfloat>

#include "fejer/weights.cuh"

namespace blurry_attn::cuda {

// What scores are multiplied by, in exponents to base 2; their sign is the query's. Never zero: what is shut has a
// score of -inf.
__device__ __forceinline__ float score_factor(double scale) {
  return fmaf(fabsf(static_cast<float>(scale)), 1.44269504f, FLT_MIN);
}

// config: storage, kDim, kFlux, kColumns, kSelecting, kStride.
template <typename config>
struct Attend {
  using storage = typename config::storage;
  using Row = Rows<config::kDim>;
  using Weights = PatchWeights<storage, config::kFlux>;
  static constexpr int kDim = config::kDim, kFlux = config::kFlux, kColumns = config::kColumns;
  static constexpr int kSteps = kDim / 16, kWords = kDim / 8;
  static constexpr bool kSelecting = config::kSelecting;
  static constexpr int kStride = config::kStride;
  using Raw = Tiles<2>;  // of the patch's own tokens

  int lane, g, q, slots, ring_rows;
  // Shared memory. Of the keys, and `side_bytes` further on of the values: cells, number c in row c mod ring_rows; the
  // cells that go on in this patch, as they were when it began (not permuted). The patch's own tokens, by side.
  uint32_t ring, started_rows, side_bytes, tokens[2];
  int row;             // of the trailing cell's slot before the patch
  int cells_going_on;  // cells that go on in this patch
  int ended_columns;   // the slots of cells that ended before the walk hold them, not what was before them
  int masked;          // columns that are shut, but for fresh ones
  int missing;         // with a stride: columns whose own cells lie before the first of all
  bool irregular;
  uint32_t places[(kColumns + kWarp - 1) / kWarp];  // of the columns lane, lane + 32, ..
  uint32_t rows[kSteps][4];                         // of one query head: query, or the gradient of the output
  Weights weights;

  __device__ __forceinline__ Attend(int slots_, int ring_rows_)
      : lane(threadIdx.x % kWarp), g(lane / 4), q(lane % 4), slots(slots_), ring_rows(ring_rows_) {}

  // Rows that are fetched ahead of their use.
  struct Fetched {
    uint4 words[2][kWords / 4];
  };
  // Rows from .. to - 1 of a patch, whose first one lies at `first`, `step` elements from each to the next; others are
  // zero.
  __device__ __forceinline__ void fetch_rows(Fetched& fetched, const storage* first, int64_t step, int from, int to,
                                             int dim) const {
    const storage* at = first + g * step + 16 * q;
    const bool whole = from <= 0 && to >= kPatch && dim == kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half, at += 8 * step) {
      const int token = g + 8 * half;
      uint4(&words)[kWords / 4] = fetched.words[half];
      if (whole) {
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) words[w] = load_global(at + (Row::chunk_of(q, w) - 2 * q) * 8);
      } else {
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) {
          const int chunk = Row::chunk_of(q, w);
          words[w] = make_uint4(0, 0, 0, 0);
          if (token >= from && token < to && chunk * 8 < dim) words[w] = load_global(at + (chunk - 2 * q) * 8);
        }
      }
    }
  }
  // `sign`: bits of each word to flip; if none, then a zero that the compiler does not know, so that it does not move
  // words anew for each product.
  __device__ __forceinline__ void take_rows(const Fetched& fetched, uint32_t sign) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < kWords / 4; ++w) {
        const uint4& words = fetched.words[half][w];
        rows[2 * w][half] = words.x ^ sign;
        rows[2 * w][half + 2] = words.y ^ sign;
        rows[2 * w + 1][half] = words.z ^ sign;
        rows[2 * w + 1][half + 2] = words.w ^ sign;
      }
    }
  }
  // Writes the chunks from `first_chunk` on of rows from .. to - 1, times a number each, through 16 rows of shared
  // memory.
  template <int chunks>
  __device__ __forceinline__ void store_rows(const Tiles<chunks>& sums, const float (&times)[2], const View& view,
                                             int64_t batch, int64_t head, int64_t first, int from, int to, int dim,
                                             uint32_t staged, int first_chunk = 0) {
    const uint32_t place = hidden_from_loop(Row::at(staged, lane % 16, lane / 16)) + 16 * first_chunk;
#pragma unroll
    for (int m = 0; m < chunks / 2; ++m) {
      const uint32_t words[4] = {pack<storage>(sums[2 * m][0] * times[0], sums[2 * m][1] * times[0]),
                                 pack<storage>(sums[2 * m][2] * times[1], sums[2 * m][3] * times[1]),
                                 pack<storage>(sums[2 * m + 1][0] * times[0], sums[2 * m + 1][1] * times[0]),
                                 pack<storage>(sums[2 * m + 1][2] * times[1], sums[2 * m + 1][3] * times[1])};
      store_matrices((place ^ (m % 4 << 5)) + 128 * (m / 4), words);
    }
    __syncwarp();
    constexpr int kRowsAtOnce = kWarp / chunks;
    const int first_token = lane / chunks, chunk = first_chunk + lane % chunks;
    storage* at = row_of<storage>(view, batch, head, first + first_token) + chunk * 8;
#pragma unroll
    for (int n = 0; n < kPatch / kRowsAtOnce; ++n, at += kRowsAtOnce * view.token) {
      const int token = first_token + n * kRowsAtOnce;
      if (token >= from && token < to && chunk * 8 < dim) {
        store_global(at, load_shared(Row::at(staged, token, chunk)));
      }
    }
    __syncwarp();
  }

  // Finds where lies what the slots of columns `first` and further on held when the patch began: the address of a row,
  // with the order of its chunks in bits 4 to 6. A lane finds some, and hands them to the others.
  __device__ __forceinline__ void find_places(int first) {
#pragma unroll
    for (int i = 0; i < (kColumns + kWarp - 1) / kWarp; ++i) {
      const int column = min(first + i * kWarp + lane, slots - 1);  // those past the last are masked later
      int at = wrap(row + column, ring_rows);
      if (column < ended_columns) at = wrap(at + slots, ring_rows);
      places[i] = column < cells_going_on ? started_rows + column * Row::kBytes : Row::at(ring, at, 0);
    }
  }
  // The products of `rows` with eight rows, of which this thread's lies at `place`.
  __device__ __forceinline__ void product(float (&sum)[4], uint32_t place) const {
    const uint32_t even = place ^ (2 * q << 4), odd = even ^ 16;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = 0.f;
#pragma unroll
    for (int w = 0; w < kWords / 4; ++w) {
      const uint4 words = load_shared((w % 2 ? odd : even) + 128 * (w / 2));
      mma<storage>(sum, rows[2 * w], words.x, words.y);
      mma<storage>(sum, rows[2 * w + 1], words.z, words.w);
    }
  }
  // The token of a product's column: where every other one is a cell, cell i is column i and the token before it 8 + i.
  __device__ __forceinline__ static int token_of(int column) {
    return kStride == 1 ? column : column < 8 ? 2 * column + 1 : 2 * column - 16;
  }
  __device__ __forceinline__ void token_products(Raw& sums, int side) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) product(sums[tile], Row::at(tokens[side], token_of(8 * tile + g), 0));
  }
  // With eight columns each, from tile `from` on.
  template <int tiles>
  __device__ __forceinline__ void column_products(Tiles<tiles>& sums, int side, int from = 0) const {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      const int tile = from + i;
      product(sums[i], side * side_bytes + __shfl_sync(kAllLanes, places[tile / 4], tile % 4 * 8 + g));
    }
  }
  // Where cells are tokens: whether the row's token, or one of the patch before it, has replaced the column's cell.
  __device__ __forceinline__ bool fresh(int tile, int e) const {
    const int column = 8 * tile + 2 * q + e % 2;
    return kSelecting && tile < 2 && column * kStride < g + 8 * (e / 2) + kStride && column >= ended_columns;
  }
  // What a fresh column holds, where every other token is a cell: that token, or the row's own, which is the cell's
  // first, or, if the cell has not begun but for its lobe, the cell before it.
  enum class Holds { own, first, before };
  __device__ __forceinline__ Holds holds(int tile, int e) const {
    const int ahead = g + 8 * (e / 2) - 2 * (8 * tile + 2 * q + e % 2);  // of the row's token
    return ahead > 0 ? Holds::own : ahead == 0 ? Holds::first : Holds::before;
  }
  // From products with what the slots held to products with what they hold at the row's token; `use`: see FewWeights.
  template <int use, int tiles>
  __device__ __forceinline__ void advance(Tiles<tiles>& sums, const Raw& raw) const {
    if constexpr (kSelecting && kStride == 1) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[tile][e] = fresh(tile, e) ? raw[tile][e] : sums[tile][e];
      }
    } else if constexpr (kSelecting) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float before = raw[0][e ^ 1];
        if (e % 2 == 0) before = __shfl_sync(kAllLanes, before, (q + 3) % 4, 4);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const Holds what = holds(tile, e);
          const float now = what == Holds::own ? raw[0][e] : what == Holds::first ? raw[1][e] : before;
          sums[tile][e] = fresh(tile, e) ? now : sums[tile][e];
        }
      }
    } else {
      weights.template advance<use>(sums, raw);
    }
  }
  template <int tiles>
  __device__ __forceinline__ void mask(Tiles<tiles>& score, int first) const {
    if (masked > 0 || first + 8 * tiles > slots) {
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = first + 8 * tile + 2 * q + e % 2;
          const bool old = kSelecting ? column >= ended_columns && !(first == 0 && fresh(tile, e)) : column >= kFlux;
          const bool none = kStride > 1 && column < ended_columns && column < missing;
          if (column >= slots || (old && column < masked) || none) score[tile][e] = -INFINITY;
        }
      }
    }
    if (!kSelecting && irregular && first == 0) {
#pragma unroll
      for (int tile = 0; tile < Weights::kFluxTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (weights.decay[tile][e] < 0.f) score[tile][e] = -INFINITY;
        }
      }
    }
  }
  // The adjoint of advance(): splits weights of what the slots hold at the row's token into those of the patch's
  // tokens, which are added to, and of what the slots held.
  template <int use, int tiles>
  __device__ __forceinline__ void split(Tiles<tiles>& sums, Raw& shares) const {
    if constexpr (kSelecting && kStride == 1) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          shares[tile][e] += fresh(tile, e) ? sums[tile][e] : 0.f;
          sums[tile][e] = fresh(tile, e) ? 0.f : sums[tile][e];
        }
      }
    } else if constexpr (kSelecting) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float of_before = 0.f;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const float sum = fresh(tile, e) ? sums[tile][e] : 0.f;
          const Holds what = holds(tile, e);
          shares[0][e] += what == Holds::own ? sum : 0.f;
          shares[1][e] += what == Holds::first ? sum : 0.f;
          of_before += what == Holds::before ? sum : 0.f;
          sums[tile][e] = fresh(tile, e) ? 0.f : sums[tile][e];
        }
        if (e % 2 == 0) of_before = __shfl_sync(kAllLanes, of_before, (q + 1) % 4, 4);
        shares[0][e ^ 1] += of_before;
      }
    } else {
      weights.template split<use>(sums, shares);
    }
  }
  // Two tiles of weights as the left side of a product.
  __device__ __forceinline__ static void pack_pair(uint32_t (&a)[4], const float (&even)[4], const float (&odd)[4]) {
    a[0] = pack<storage>(even[0], even[1]);
    a[1] = pack<storage>(even[2], even[3]);
    a[2] = pack<storage>(odd[0], odd[1]);
    a[3] = pack<storage>(odd[2], odd[3]);
  }
  // out += what 16 columns, or the patch's tokens, hold, by weight; of the elements from chunk `first_chunk` on.
  template <int chunks>
  __device__ __forceinline__ void gather(Tiles<chunks>& out, const uint32_t (&a)[4], uint32_t address) const {
#pragma unroll
    for (int d = 0; d < chunks / 2; ++d) {
      uint32_t b[4];
      load_matrices_transposed(b, (address ^ ((d % 4) << 5)) + 128 * (d / 4));
      mma<storage>(out[2 * d], a, b[0], b[1]);
      mma<storage>(out[2 * d + 1], a, b[2], b[3]);
    }
  }
  template <int chunks>
  __device__ __forceinline__ void gather_columns(Tiles<chunks>& out, const uint32_t (&a)[4], int side, int m,
                                                 int first_chunk = 0) const {
    const uint32_t place = __shfl_sync(kAllLanes, places[m / 2], m % 2 * 16 + lane % 16);
    gather(out, a, side * side_bytes + (place ^ (lane / 16 << 4)) + 16 * first_chunk);
  }
  template <int chunks>
  __device__ __forceinline__ void gather_tokens(Tiles<chunks>& out, const uint32_t (&a)[4], int side,
                                                int first_chunk = 0) const {
    gather(out, a, Row::at(tokens[side], token_of(lane % 16), lane / 16) + 16 * first_chunk);
  }
};

}  // namespace blurry_attn::cuda
