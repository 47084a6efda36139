// This file says how rows lie in shared memory, so that matrix loads meet no bank conflicts.
#pragma once

#include "common/ptx.cuh"

namespace blurry_attn::cuda {

// Rows places rows of 16-byte chunks in shared memory. Chunks are permuted within every eight rows, so that the same
// chunk of eight rows lies in different banks.
template <int dim>
struct Rows {
  static constexpr int kBytes = 2 * dim;
  static constexpr int kChunks = dim / 8;

  __device__ __forceinline__ static uint32_t at(uint32_t base, int row, int chunk) {
    return base + row * kBytes + ((chunk ^ (row & 7)) << 4);
  }
  // Returns the byte offset of element d of a row.
  __device__ __forceinline__ static int element(int row, int d) {
    return row * kBytes + (((d >> 3) ^ (row & 7)) << 4) + (d & 7) * 2;
  }
  // Returns the chunk with the words 4 i .. 4 i + 3 of a row that thread q = lane % 4 has. Each thread has the same
  // share of every 16 columns that an mma sums over. In this order of columns a thread reads 16 bytes at once.
  __device__ __forceinline__ static int chunk_of(int q, int i) { return 8 * (i >> 1) + 2 * q + (i & 1); }
};

// Returns x, which the compiler takes for another number at each `use` or turn of a loop. What is derived from it is
// computed anew, and not kept in registers. Grids have one dimension, so the blockIdx used here are 0.
template <int use = 0>
__device__ __forceinline__ uint32_t hidden_from_loop(uint32_t x) {
  return x ^ (use == 0 ? blockIdx.y : use == 1 ? blockIdx.z : blockIdx.y + blockIdx.z);
}
__device__ __forceinline__ uint32_t hidden_from_loop(uint32_t x, int turn) { return x ^ (blockIdx.y & turn); }

__device__ __forceinline__ int wrap(int row, int rows) { return row >= rows ? row - rows : row; }

}  // namespace blurry_attn::cuda
