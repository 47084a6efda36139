// Rows in shared memory as matrix loads read them.
#pragma once

#include "common/ptx.cuh"

namespace blurry_attn::cuda {

// Rows of 16-byte chunks in shared memory. Chunks are permuted within every eight rows, so that eight rows' same chunk
// lies in different banks.
template <int dim>
struct Rows {
  static constexpr int kBytes = 2 * dim;
  static constexpr int kChunks = dim / 8;

  __device__ __forceinline__ static uint32_t at(uint32_t base, int row, int chunk) {
    return base + row * kBytes + ((chunk ^ (row & 7)) << 4);
  }
  // Byte offset of an element.
  __device__ __forceinline__ static int element(int row, int d) {
    return row * kBytes + (((d >> 3) ^ (row & 7)) << 4) + (d & 7) * 2;
  }
  // The chunk that holds the words 4 i .. 4 i + 3 of thread q of a row's four (q = lane % 4): each has the same share
  // of every 16 columns that an mma sums over, in an order that lets it read 16 bytes at once.
  __device__ __forceinline__ static int chunk_of(int q, int i) { return 8 * (i >> 1) + 2 * q + (i & 1); }
};

// The same number, which the compiler takes for another, for each `use` or at each turn of a loop: what is made of it
// is made anew, and not kept in registers. Grids have one dimension.
template <int use = 0>
__device__ __forceinline__ uint32_t hidden_from_loop(uint32_t x) {
  return x ^ (use == 0 ? blockIdx.y : use == 1 ? blockIdx.z : blockIdx.y + blockIdx.z);
}
__device__ __forceinline__ uint32_t hidden_from_loop(uint32_t x, int turn) { return x ^ (blockIdx.y & turn); }

__device__ __forceinline__ int wrap(int row, int rows) { return row >= rows ? row - rows : row; }

}  // namespace blurry_attn::cuda
