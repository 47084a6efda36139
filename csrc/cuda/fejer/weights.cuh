// What the tokens of a patch weigh in the cells in flux: how products with what slots held become products with what
// they hold at each token, and back.
#pragma once

#include <type_traits>

#include "common/rows.cuh"
#include "fejer/classes.cuh"

namespace blurry_attn::cuda {

// 16 tokens by eights of columns, which are slots, the patch's own tokens, or elements; as an mma has them.
template <int tiles>
using Tiles = float[tiles][4];

// The gates of a patch in its cells in flux, and what follows from them for the patch's end. All warps of a block do
// this at once, while others wait, but for few patches: instructions are few, and loops short. Half a warp has a cell,
// a lane one of the patch's tokens.
template <typename storage, int kFlux>
struct PatchGates {
  static constexpr int kFluxTiles = (kFlux + 8) / 8;  // one column at least is empty: see Compress
  static constexpr int kPairs = (kFlux + 1) / 2;      // of cells

  // Patches that have the same number here, if it is not below zero, have the same gates: `offset` tokens after the
  // trailing cell's centre, past the first lap or where every cell opens its slot. `first` is the first cell of all,
  // `whole` says that the patch lies in the sequence.
  __device__ __forceinline__ static int likeness(int cell, int first, int slots, int offset, int resolution,
                                                 bool whole) {
    if (!whole) return -1;
    if (cell - slots >= first) return offset;
    return cell > first + 1 && cell + kFlux - 1 - slots < first ? resolution + offset : -1;
  }
  // Whether a token sees nothing in the slot of a cell: there is no such cell, or the slot opens later.
  __device__ __forceinline__ static bool shut(const Cells& cells, int64_t cell, int64_t token) {
    return cells.opens(cell) && (cell < cells.first() || token < cells.opening(cell));
  }

  // Writes the gates of the patch's tokens, begin <= t < end, in its cells: [kFlux][kPatch]; for all lanes of a warp.
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
  // The product of what the lanes after this one have, of the half warp's 16.
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
  // Of the patch's end: body(cell, gate, left) for each pair of cells with the lane's own; `left` is the product of
  // 1 - gate of all later tokens.
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
  // The decays, and for each thread its fragments of b, high and low parts, of the weights: [kFluxTiles][lane].
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
  // The same as plain numbers: [kFlux][kPatch] and [kFlux].
  __device__ __forceinline__ static void make_end(const float* gates, float* end_decays, float* end_weights) {
    const int token = threadIdx.x % kPatch;
    for_ends(gates, [&](int, int j, float gate, float left) {
      if (j >= kFlux) return;
      end_weights[j * kPatch + token] = gate * left;
      if (token == 0) end_decays[j] = left * (1.f - gate);
    });
  }
};

// One head's decays and weights in one patch, as the fragments of an mma have them. Both kinds have make(); advance(),
// from products with what the slots held to products with what they hold at the row's token; and its adjoint, split(),
// which splits weights of what the slots hold at the row's token into those of the patch's tokens, which are added to,
// and of what the slots held. `decay` is of tokens (rows) and cells (columns); below zero: shut.

// For few cells: the weight of each token at each later one.
template <typename storage, int kFlux>
struct FewWeights : PatchGates<storage, kFlux> {
  using PatchGates<storage, kFlux>::kFluxTiles;
  using PatchGates<storage, kFlux>::kPairs;
  using PatchGates<storage, kFlux>::shut;

  // What stands for the logarithm of 0, to base 2: float32 has no such power; and for that of what is shut.
  static constexpr float kNothing = -160.f, kShut = 1.f;

  // Pairs of half, of tokens (columns): the first eight in row g, the first and the last eight in row g + 8. A token
  // has no weight before its time.
  uint32_t weight[kFlux][3];
  float decay[kFluxTiles][4];

  // Two weights of a cell: of tokens 8 tile + 2 q and the next in row g + 8 half. Below zero, `use` is the first one.
  template <int use>
  __device__ __forceinline__ float2 pair(int j, int half, int tile) const {
    const uint32_t words = weight[j][half + tile];
    return unpack<__half>(use < 0 ? words : hidden_from_loop<use>(words));
  }
  // Leaves behind the gates, [kFlux][kPatch] too, the logarithm of how much is left at each token of what a slot held
  // when the patch began. What a token weighs at a later one is its gate times a ratio of two such.
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

// For many cells: products on tensor cores. The weight of a token s at a later one t, gate(s) times 1 - gate of all
// after it up to t, is share(s) factor(t): factor is the product of all 1 - gate up to t, share is gate over the
// product up to s. Where a gate is 1 both products begin anew, and shares are 2^steps larger from there on, so that
// what came before is lost in the rounding of what follows.
template <typename storage, int kFlux>
struct ManyWeights : PatchGates<storage, kFlux> {
  using PatchGates<storage, kFlux>::kFluxTiles;
  using PatchGates<storage, kFlux>::shut;
  static constexpr int kMostSteps = 90;  // over all gates of 1: few, as these are cells of two or three tokens

  // In tf32, of cells 8 tile .. and tokens 8 half ..: cell g, tokens 2q and 2q + 1; token g, cells 2q and 2q + 1.
  uint32_t token_shares[kFluxTiles][2][2], cell_shares[kFluxTiles][2][2];
  float factor[kFluxTiles][4], decay[kFluxTiles][4];

  __device__ __forceinline__ void make(const Cells& cells, int64_t cell, int64_t token, const float* gates) {
    // A lane goes along the tokens of one cell, and hands what it finds to those that need it.
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
  // Whether a token of the patch, column e of a tile, is the row's or one before it.
  __device__ __forceinline__ static bool past(int tile, int e) {
    const int lane = threadIdx.x % kWarp;
    return 8 * tile + lane % 4 * 2 + e % 2 <= lane / 4 + 8 * (e / 2);
  }
  template <int use, int tiles>
  __device__ __forceinline__ void advance(Tiles<tiles>& sums, const Tiles<2>& raw) const {
    uint32_t high[2][4], low[2][4];  // products in two parts, which have 22 bits
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
