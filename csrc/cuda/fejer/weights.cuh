// This file computes how the 16 tokens of a patch weigh in the cells in flux. A slot holds one cell after another, and
// a token is written to the two cells around it, which are in flux. At each token, a slot in flux holds part of its
// content at the patch's begin, plus a weighted sum of the patch's tokens. advance() turns products with what slots
// held into products with what they hold at each token, and split() is its adjoint.
#pragma once

#include <type_traits>

#include "common/rows.cuh"
#include "fejer/classes.cuh"

namespace blurry_attn::cuda {

// Tiles has 16 tokens as rows, and columns by eights, as the sums of an mma. The columns are slots, the patch's own
// tokens, or elements.
template <int tiles>
using Tiles = float[tiles][4];

// PatchGates computes the gates of a patch in its cells in flux, and what follows from them at the patch's end. All
// warps of a block do this at once while others wait, though only for few patches, so instructions are few and loops
// short. Half a warp has one cell, and a lane has one of the patch's tokens.
template <typename storage, int kFlux>
struct PatchGates {
  static constexpr int kFluxTiles = (kFlux + 8) / 8;  // at least one column is empty, for the walk's `strays`
  static constexpr int kPairs = (kFlux + 1) / 2;      // pairs of cells

  // Returns a number that patches with the same gates share, or -1 for a patch that shares its gates with no other.
  // `offset` counts tokens from the trailing cell's centre to the patch, and `first` is the first cell of all. Patches
  // are alike past the first lap, and also where every cell opens its slot. `whole` says that the patch lies in the
  // sequence.
  __device__ __forceinline__ static int likeness(int cell, int first, int slots, int offset, int resolution,
                                                 bool whole) {
    if (!whole) return -1;
    if (cell - slots >= first) return offset;
    return cell > first + 1 && cell + kFlux - 1 - slots < first ? resolution + offset : -1;
  }
  // Returns whether a token sees nothing in a cell's slot, because the cell does not exist or opens the slot later.
  __device__ __forceinline__ static bool shut(const Cells& cells, int64_t cell, int64_t token) {
    return cells.opens(cell) && (cell < cells.first() || token < cells.opening(cell));
  }

  // Writes the gates of the patch's tokens in its cells, [kFlux][kPatch], as a whole warp. Tokens outside
  // begin .. end - 1 have gate 0.
  __device__ __forceinline__ static void make_gates(const Cells& cells, int64_t begin, int64_t end, int64_t cell,
                                                    int64_t token, const float* table, float* gates) {
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < kFlux * kPatch; i += kWarp) {
      const int64_t c = cell + i / kPatch, t = token + i % kPatch, x = t - cells.centre(c);
      const bool lies = c >= cells.first() && t >= begin && t < end && x > -cells.resolution && x < cells.resolution;
      gates[i] = lies ? cells.gate(table, c, t) : 0.f;
    }
    __syncwarp();
  }
  // Returns the product of x over the later lanes of this half of the warp.
  __device__ __forceinline__ static float product_after(float x, int token) {
    x = __shfl_down_sync(kAllLanes, x, 1, kPatch);
    if (token == kPatch - 1) x = 1.f;
#pragma unroll
    for (int by = 1; by < kPatch; by *= 2) {
      const float later = __shfl_down_sync(kAllLanes, x, by, kPatch);
      x *= token + by < kPatch ? later : 1.f;
    }
    return x;
  }
  // Calls body(pair, cell, gate, left) for each pair of cells, with the lane's own cell and its token's gate. `left` is
  // the product of 1 - gate over all later tokens of the patch.
  template <typename body_type>
  __device__ __forceinline__ static void for_ends(const float* gates, const body_type& body) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
      const int j = 2 * pair + lane / kPatch;
      const float gate = j < kFlux ? gates[j * kPatch + lane % kPatch] : 0.f;
      body(pair, j, gate, product_after(1.f - gate, lane % kPatch));
    }
    __syncwarp();
  }
  // Writes the cells' decays over the patch, and the weights of its tokens at its end. Weights are each thread's
  // fragments of b of an mma, in high and low parts: [kFluxTiles][lane].
  __device__ __forceinline__ static void make_end(const float* gates, float* end_decays, uint4* end_weights) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    float w[kFluxTiles][4] = {};
    for_ends(gates, [&](int pair, int j, float gate, float left) {
      if (lane % kPatch == 0 && j < kFlux) end_decays[j] = left * (1.f - gate);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = __shfl_sync(kAllLanes, gate * left, g % 2 * kPatch + 8 * (i / 2) + 2 * q + i % 2);
#pragma unroll
        for (int tile = 0; tile < kFluxTiles; ++tile) {
          if (g / 2 + 4 * tile == pair) w[tile][i] = weight;
        }
      }
    });
    const auto low = [](float x) { return x - to_compute<float>(to_storage<storage>(x)); };
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
      const float (&x)[4] = w[tile];
      end_weights[tile * kWarp + lane] =
          make_uint4(pack<storage>(x[0], x[1]), pack<storage>(x[2], x[3]), pack<storage>(low(x[0]), low(x[1])),
                     pack<storage>(low(x[2]), low(x[3])));
    }
    __syncwarp();
  }
  // This one writes plain numbers: weights [kFlux][kPatch], decays [kFlux].
  __device__ __forceinline__ static void make_end(const float* gates, float* end_decays, float* end_weights) {
    const int token = threadIdx.x % kPatch;
    for_ends(gates, [&](int, int j, float gate, float left) {
      if (j >= kFlux) return;
      end_weights[j * kPatch + token] = gate * left;
      if (token == 0) end_decays[j] = left * (1.f - gate);
    });
  }
};

// FewWeights and ManyWeights have one head's decays and weights in one patch, as fragments of an mma. make() computes
// them. advance() turns products with what the slots held when the patch began into products with what they hold at the
// row's token. split(), its adjoint, takes weights of what the slots hold at the row's token. It adds the part of the
// patch's tokens to `shares`, and leaves the part of what the slots held in `sums`. `decay` has tokens as rows and
// cells as columns; below zero, the slot is shut.

// FewWeights is for few cells: it has the weight of each token at each later one.
template <typename storage, int kFlux>
struct FewWeights : PatchGates<storage, kFlux> {
  using PatchGates<storage, kFlux>::kFluxTiles;
  using PatchGates<storage, kFlux>::kPairs;
  using PatchGates<storage, kFlux>::shut;

  // kNothing stands for log2 of 0, since float32 has no such power of 2. kShut stands for the logarithm of a shut slot.
  static constexpr float kNothing = -160.f, kShut = 1.f;

  // The weights are pairs of float16, with tokens as columns. Word 0 has row g and the first eight tokens. Words 1 and
  // 2 have row g + 8, and the first and the last eight. A token has no weight before its time.
  uint32_t weight[kFlux][3];
  float decay[kFluxTiles][4];

  // Returns two weights of cell j: of tokens 8 tile + 2 q and the next, in row g + 8 half. With `use` >= 0, they are
  // unpacked anew (hidden_from_loop()).
  template <int use>
  __device__ __forceinline__ float2 pair(int j, int half, int tile) const {
    const uint32_t words = weight[j][half + tile];
    return unpack<__half>(use < 0 ? words : hidden_from_loop<use>(words));
  }
  // Writes, behind the gates and also [kFlux][kPatch], the log2 of how much of a slot's old content is left at each
  // token. The weight of a token at a later one is its gate times the ratio of two of these.
  __device__ __forceinline__ void make(const Cells& cells, int64_t cell, int64_t token, float* gates) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    float* const logs = gates + kFlux * kPatch;
#pragma unroll 1
    for (int i = lane; i < kPairs * kWarp; i += kWarp) {
      const int own = i % kPatch;
      const bool exists = i < kFlux * kPatch;
      float log = exists ? fmaxf(log2_fast(1.f - gates[i]), kNothing) : 0.f;
#pragma unroll
      for (int by = 1; by < kPatch; by *= 2) {
        const float before = __shfl_up_sync(kAllLanes, log, by, kPatch);
        if (own >= by) log += before;
      }
      if (exists) logs[i] = shut(cells, cell + i / kPatch, token + own) ? kShut : log;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kFlux; ++j) {
      const float* const its = logs + j * kPatch;
      const float of_row[2] = {its[g], its[g + 8]};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float2 gate = *reinterpret_cast<const float2*>(gates + j * kPatch + 8 * tile + 2 * q);
        const float2 log = *reinterpret_cast<const float2*>(its + 8 * tile + 2 * q);
#pragma unroll
        for (int half = tile; half < 2; ++half) {
          const float x = gate.x * exp2_fast(of_row[half] - log.x), y = gate.y * exp2_fast(of_row[half] - log.y);
          weight[j][half + tile] =
              pack<__half>(half > tile || 2 * q <= g ? x : 0.f, half > tile || 2 * q < g ? y : 0.f);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 8 * tile + 2 * q + e % 2;
        const float log = j < kFlux ? logs[j * kPatch + g + 8 * (e / 2)] : 0.f;
        decay[tile][e] = log == kShut ? -1.f : exp2_fast(log);
      }
    }
  }
  template <int use, int tiles>
  __device__ __forceinline__ void advance(Tiles<tiles>& sums, const Tiles<2>& raw) const {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kFlux; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
#pragma unroll
        for (int tile = 0; tile <= half; ++tile) {
          const float2 weight = pair<use>(j, half, tile);
          sum += weight.x * raw[tile][2 * half];
          sum += weight.y * raw[tile][2 * half + 1];
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (j % 8 / 2 == q) {
          float& s = sums[j / 8][2 * half + j % 2];
          s = s * decay[j / 8][2 * half + j % 2] + sum;
        }
      }
    }
  }
  template <int use, int tiles>
  __device__ __forceinline__ void split(Tiles<tiles>& sums, Tiles<2>& shares) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kFlux; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float share = __shfl_sync(kAllLanes, sums[j / 8][2 * half + j % 2], (lane & ~3) | (j % 8 / 2));
#pragma unroll
        for (int tile = 0; tile <= half; ++tile) {
          const float2 weight = pair<use>(j, half, tile);
          shares[tile][2 * half] += share * weight.x;
          shares[tile][2 * half + 1] += share * weight.y;
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[tile][e] *= fmaxf(decay[tile][e], 0.f);
    }
  }
};

// ManyWeights is for many cells, and multiplies on tensor cores. The weight of token s at a later token t is gate(s),
// times 1 - gate of all tokens after s up to t. It factors into share(s) factor(t). There, factor is the product of all
// 1 - gate up to t, and share is gate over that product up to s. At a gate of 1 both products begin anew, and shares
// are 2^steps larger from there on. What came before is then lost in the rounding of what follows.
template <typename storage, int kFlux>
struct ManyWeights : PatchGates<storage, kFlux> {
  using PatchGates<storage, kFlux>::kFluxTiles;
  using PatchGates<storage, kFlux>::shut;
  static constexpr int kMostSteps = 90;  // bounds the sum of all steps; gates of 1 are few, as r is 2 or 3

  // token_shares are those of cell g of a tile at tokens 2q and 2q + 1 of a half. cell_shares are those of token g of a
  // half in cells 2q and 2q + 1. Both are in tf32.
  uint32_t token_shares[kFluxTiles][2][2], cell_shares[kFluxTiles][2][2];
  float factor[kFluxTiles][4], decay[kFluxTiles][4];

  __device__ __forceinline__ void make(const Cells& cells, int64_t cell, int64_t token, const float* gates) {
    // A lane goes along the tokens of one cell, and hands what it finds to the lanes that need it.
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    const auto gate_at = [&](int t) { return lane < kFlux ? gates[lane * kPatch + t] : 0.f; };
    int whole = 0;
#pragma unroll 1
    for (int t = 0; t < kPatch; ++t) whole += gate_at(t) == 1.f;
    const int steps = whole > 0 ? min(30, kMostSteps / whole) : 0;
    float scale = ldexpf(1.f, -steps * whole / 2), product = 1.f, left = 1.f;
#pragma unroll 1
    for (int t = 0; t < kPatch; ++t) {
      const float gate = gate_at(t);
      if (gate == 1.f) {
        product = 1.f;
        scale = ldexpf(scale, steps);
      } else {
        product *= 1.f - gate;
      }
      left *= 1.f - gate;
      const uint32_t share = to_tf32(gate / product * scale);
      const float ratio = product / scale;
#pragma unroll
      for (int tile = 0; tile < kFluxTiles; ++tile) {
        const uint32_t of_column = __shfl_sync(kAllLanes, share, 8 * tile + g);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int from = 8 * tile + 2 * q + i;
          const uint32_t of_row = __shfl_sync(kAllLanes, share, from);
          const float its_ratio = __shfl_sync(kAllLanes, ratio, from), its_left = __shfl_sync(kAllLanes, left, from);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (t == 8 * half + 2 * q + i) token_shares[tile][half][i] = of_column;
            if (t != 8 * half + g) continue;
            cell_shares[tile][half][i] = of_row;
            factor[tile][2 * half + i] = its_ratio;
            decay[tile][2 * half + i] = its_left;
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 8 * tile + 2 * q + e % 2, row = g + 8 * (e / 2);
        if (j < kFlux && shut(cells, cell + j, token + row)) decay[tile][e] = -1.f;
      }
    }
  }
  // Returns whether the patch's token in column e of a tile is the row's token or an earlier one.
  __device__ __forceinline__ static bool past(int tile, int e) {
    const int lane = threadIdx.x % kWarp;
    return 8 * tile + lane % 4 * 2 + e % 2 <= lane / 4 + 8 * (e / 2);
  }
  template <int use, int tiles>
  __device__ __forceinline__ void advance(Tiles<tiles>& sums, const Tiles<2>& raw) const {
    uint32_t high[2][4], low[2][4];  // two parts of the products, which have 22 bits together
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = past(half, e) ? raw[half][e] : 0.f;
        high[half][e] = to_tf32(x);
        low[half][e] = __float_as_uint(x - __uint_as_float(high[half][e]));
      }
    }
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
      float sum[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_tf32(sum, high[half], token_shares[tile][half]);
        mma_tf32(sum, low[half], token_shares[tile][half]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[tile][e] = sums[tile][e] * decay[tile][e] + sum[e] * factor[tile][e];
      }
    }
  }
  template <int use, int tiles>
  __device__ __forceinline__ void split(Tiles<tiles>& sums, Tiles<2>& shares) const {
    Tiles<2> of_tokens = {};
#pragma unroll
    for (int tile = 0; tile < kFluxTiles; ++tile) {
      uint32_t x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = to_tf32(sums[tile][e] * factor[tile][e]);
        sums[tile][e] *= fmaxf(decay[tile][e], 0.f);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) mma_tf32(of_tokens[half], x, cell_shares[tile][half]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) shares[half][e] += past(half, e) ? of_tokens[half][e] : 0.f;
    }
  }
};

template <typename storage, int kFlux>
using PatchWeights = std::conditional_t<(kFlux > 5), ManyWeights<storage, kFlux>, FewWeights<storage, kFlux>>;

}  // namespace blurry_attn::cuda
