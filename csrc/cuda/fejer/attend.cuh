// This file computes how the 16 tokens of a warp's patch attend to what the slots hold. It takes products with cells
// and with the patch's own tokens, and turns them into products with what the slots hold at each token. It also has the
// adjoint. The forward walk and the backward walk share it.
#pragma once

#include <cfloat>

#include "fejer/weights.cuh"

namespace blurry_attn::cuda {

// Returns the factor from products to logits of base 2; the sign of the scale goes to the query. The factor is never
// zero, since a shut slot has the product -inf.
__device__ __forceinline__ float score_factor(double scale) {
  return fmaf(fabsf(static_cast<float>(scale)), 1.44269504f, FLT_MIN);
}

// `config` has storage, kDim, kFlux, kColumns, kSelecting and kStride.
template <typename config>
struct Attend {
  using storage = typename config::storage;
  using Row = Rows<config::kDim>;
  using Weights = PatchWeights<storage, config::kFlux>;
  static constexpr int kDim = config::kDim, kFlux = config::kFlux, kColumns = config::kColumns;
  static constexpr int kSteps = kDim / 16, kWords = kDim / 8;
  static constexpr bool kSelecting = config::kSelecting;
  static constexpr int kStride = config::kStride;
  using Raw = Tiles<2>;  // products with the patch's own tokens

  int lane, g, q, slots, ring_rows;
  // These are addresses in shared memory, of the keys; the values lie `side_bytes` further on. Cell number c is in row
  // c mod ring_rows of `ring`. The cells that go on in this patch are in `started_rows`, as they were when it began,
  // not permuted. `tokens` has the patch's own tokens, by side.
  uint32_t ring, started_rows, side_bytes, tokens[2];
  int row;             // ring row of what the trailing cell's slot held before that cell
  int cells_going_on;  // cells that began before this patch and go on in it
  int ended_columns;   // columns whose cells ended before the walk, so that their slots hold them
  int masked;          // columns that are shut, except fresh ones
  int missing;         // with a stride: columns whose own cells do not exist
  bool irregular;      // the patch is not whole, or lies in the first lap
  uint32_t places[(kColumns + kWarp - 1) / kWarp];  // rows of the columns lane, lane + 32, ..
  uint32_t rows[kSteps][4];                         // of one query head: queries, or gradients of the output
  Weights weights;

  __device__ __forceinline__ Attend(int slots_, int ring_rows_)
      : lane(threadIdx.x % kWarp), g(lane / 4), q(lane % 4), slots(slots_), ring_rows(ring_rows_) {}

  // Fetched has rows that are fetched ahead of their use.
  struct Fetched {
    uint4 words[2][kWords / 4];
  };
  // Fetches rows from .. to - 1 of a patch; other rows are zero. The patch's first row lies at `first`, and rows are
  // `step` elements apart.
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
  // Takes fetched rows as the left side of products. `sign` has the bits of each word to flip. Without any, it is a
  // zero that the compiler does not know, so that words are not moved anew for each product.
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
  // Writes the chunks from `first_chunk` on of rows from .. to - 1, each row multiplied by a number, through 16 rows of
  // shared memory.
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

  // Finds the rows of what the slots of columns first, first + 1, .. held when the patch began. A place is a row's
  // address, with the order of its chunks in bits 4 to 6. Each lane finds some places, and hands them to the others.
  __device__ __forceinline__ void find_places(int first) {
#pragma unroll
    for (int i = 0; i < (kColumns + kWarp - 1) / kWarp; ++i) {
      const int column = min(first + i * kWarp + lane, slots - 1);  // mask() takes out columns past the last slot
      int at = wrap(row + column, ring_rows);
      if (column < ended_columns) at = wrap(at + slots, ring_rows);
      places[i] = column < cells_going_on ? started_rows + column * Row::kBytes : Row::at(ring, at, 0);
    }
  }
  // Computes the products of `rows` with eight rows, of which this thread's lies at `place`.
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
  // Returns the token of a product's column. Where every other token is a cell, column i < 8 is cell i, and column
  // 8 + i is the token before it.
  __device__ __forceinline__ static int token_of(int column) {
    return kStride == 1 ? column : column < 8 ? 2 * column + 1 : 2 * column - 16;
  }
  __device__ __forceinline__ void token_products(Raw& sums, int side) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) product(sums[tile], Row::at(tokens[side], token_of(8 * tile + g), 0));
  }
  // Computes the products with eight columns for each tile, from tile `from` on.
  template <int tiles>
  __device__ __forceinline__ void column_products(Tiles<tiles>& sums, int side, int from = 0) const {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      const int tile = from + i;
      product(sums[i], side * side_bytes + __shfl_sync(kAllLanes, places[tile / 4], tile % 4 * 8 + g));
    }
  }
  // Returns whether cells are tokens and the row's token, or an earlier one of the patch, has replaced what the
  // column's slot held.
  __device__ __forceinline__ bool fresh(int tile, int e) const {
    const int column = 8 * tile + 2 * q + e % 2;
    return kSelecting && tile < 2 && column * kStride < g + 8 * (e / 2) + kStride && column >= ended_columns;
  }
  // Holds says which token of its lobe a fresh column holds where every other token is a cell. It is the last one
  // (own), the middle one (first) or the first one (before). The latter two are the row's own token. The lobe's first
  // token is also the last one of the lobe before.
  enum class Holds { own, first, before };
  __device__ __forceinline__ Holds holds(int tile, int e) const {
    const int ahead = g + 8 * (e / 2) - 2 * (8 * tile + 2 * q + e % 2);  // the row's token minus the lobe's middle
    return ahead > 0 ? Holds::own : ahead == 0 ? Holds::first : Holds::before;
  }
  // Turns products with what the slots held into products with what they hold at the row's token. FewWeights explains
  // `use`.
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
  // split() is the adjoint of advance(). It takes weights of what the slots hold at the row's token, and adds the part
  // of the patch's tokens to `shares`. The part of what the slots held stays in `sums`.
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
  // Packs two tiles of weights as the left side of a product.
  __device__ __forceinline__ static void pack_pair(uint32_t (&a)[4], const float (&even)[4], const float (&odd)[4]) {
    a[0] = pack<storage>(even[0], even[1]);
    a[1] = pack<storage>(even[2], even[3]);
    a[2] = pack<storage>(odd[0], odd[1]);
    a[3] = pack<storage>(odd[2], odd[3]);
  }
  // Adds to `out` what 16 columns, or the patch's tokens, hold, by weight. The elements begin at chunk `first_chunk`.
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
