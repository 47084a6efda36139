// This file says where the forward keeps what slots hold, which the backward needs.
#pragma once

#include "common/half.cuh"

namespace blurry_attn::cuda {

constexpr int64_t kSpareCells = 4;  // cells of a sequence that begin before it or end after it

// Returns whether each cell holds one token in the end, and the kernels know it. Of such cells nothing is advanced or
// kept.
BLURRY_HOST_DEVICE inline bool cells_are_tokens(const HeadLaw& law) { return law.selects && law.cells.resolution <= 2; }

// Kept is what the backward walk needs of what the slots hold, in rows of both sides: [key, value][element]. `cells`
// has, for every head, what its cells hold in the end; those of a given state come first. `started` has, for every
// patch and head, what two cells that go on in the patch hold when it begins: [patch][head][side][2][element].
struct Kept {
  void* cells = nullptr;
  void* started =
      nullptr;  // of every patch and head, what two cells hold that go on in it: [patch][head][side][2][element]
  int64_t of_states = 0;  // rows of a sequence's given state

  Kept() = default;
  Kept(const Problem& p, void* memory) : cells(memory), of_states(p.state_key ? p.slots : 0) {
    started = static_cast<unsigned char*>(memory) + all_cell_rows(p) * row_bytes(p);
  }
  static int64_t bytes(const Problem& p) {
    Kept kept;
    kept.of_states = p.state_key ? p.slots : 0;
    return (kept.all_cell_rows(p) + started_rows(p)) * row_bytes(p);
  }

  // Returns the row, within a head, of the cell that trails at the sequence's first token.
  __device__ int64_t cell_row(const Problem& p, int64_t sequence, int64_t batch, int64_t row,
                              const HeadLaw& law) const {
    if (cells_are_tokens(law)) return of_states * (sequence + 1);
    const int64_t spare = kSpareCells + of_states, resolution = law.cells.resolution;
    return of_states + (p.cu_seqlens ? row / resolution + sequence * spare : batch * (p.tokens / resolution + spare));
  }
  __host__ __device__ int64_t cell_rows(const Problem& p, const HeadLaw& law) const {
    if (cells_are_tokens(law)) return of_states * p.sequences;
    const int64_t spare = kSpareCells + of_states, resolution = law.cells.resolution;
    return p.cu_seqlens ? p.tokens / resolution + p.sequences * spare : p.batch * (p.tokens / resolution + spare);
  }
  __device__ int64_t started_row(const Problem& p, int64_t sequence, int64_t batch, int64_t row, int64_t patch,
                                 int64_t head) const {
    const int64_t base =
        p.cu_seqlens ? row / kPatch + sequence * kSparePatches : batch * (p.tokens / kPatch + kSparePatches);
    return ((base + patch) * p.kv_heads + head) * 2;
  }
  __host__ __device__ static int64_t started_rows(const Problem& p) {
    return 2 * p.kv_heads *
           (p.cu_seqlens ? p.tokens / kPatch + p.sequences * kSparePatches
                         : p.batch * (p.tokens / kPatch + kSparePatches));
  }

 private:
  int64_t all_cell_rows(const Problem& p) const {
    int64_t rows = 0;
    for (int64_t h = 0; h < p.kv_heads; ++h) rows += cell_rows(p, p.host_laws[h]);
    return rows;
  }
  static int64_t row_bytes(const Problem& p) { return (is_wide(p) ? 128 : 64) * 2 * 2; }
};

}  // namespace blurry_attn::cuda
