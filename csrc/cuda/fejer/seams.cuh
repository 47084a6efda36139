// This file compares what two walks hold at a seam, which is where their stretches of a sequence meet.
#pragma once

#include "common/half.cuh"

namespace blurry_attn::cuda {

constexpr int kSeamThreads = 256;

// SeamBlock is what one block of a launch over seams compares.
struct SeamBlock {
  int64_t seam;
  int head_index, side;
};

// Seams compares what the two walks that meet at a seam hold there. One of them began its warm-up with empty slots, and
// lacks an echo of what came before. The echo is less than a rounding, unless sizes change much along the sequence.
// Then the two differ, and the whole sequence is walked again in one stretch. After the walks, one launch compares with
// a block for every seam, head and side; the next launch walks again where they differ.
struct Seams {
  void* rows = nullptr;   // [seam][head][exact, warmed up][side][row][element]; null: no comparison
  int* found = nullptr;   // [sequence][head]: whether a difference was found
  WalkPlan plan;          // the plan that cut time
  bool is_again = false;  // sequences are walked for the second time, each whole
  int64_t row_count;      // rows of a side

  // Divides `memory`, which has `bytes()`, for the heads of a launch; there is none where `bytes()` is 0.
  Seams(const Problem& p, const WalkPlan& plan, const HeadList& heads, int64_t row_count, int64_t bytes, void* memory)
      : plan(plan), row_count(row_count) {
    if (bytes == 0) return;
    rows = memory;
    found = reinterpret_cast<int*>(static_cast<unsigned char*>(memory) + bytes - found_bytes(p, heads));
  }
  static int64_t bytes(const Problem& p, const WalkPlan& plan, const HeadList& heads, double echo, int64_t row_count,
                       int64_t element_size) {
    if (echo == 0 || plan.seam_count == 0) return 0;
    return plan.seam_count * heads.count * 2 * 2 * row_count * (is_wide(p) ? 128 : 64) * element_size +
           found_bytes(p, heads);
  }
  Seams again() const {
    Seams seams = *this;
    seams.rows = nullptr;
    seams.is_again = true;
    return seams;
  }
  int64_t blocks(const HeadList& heads) const { return plan.seam_count * heads.count * 2; }
  // Returns the first of a side's rows.
  __device__ __forceinline__ int64_t row(int64_t seam, int heads, int head_index, bool warmed_up, int side) const {
    return (((seam * heads + head_index) * 2 + warmed_up) * 2 + side) * row_count;
  }
  // Marks the sequence if `differ`(block, the stretch that ends at the seam) is true in any thread of a launch of
  // blocks(). The launch begins while the walks end, and lets the next grid begin.
  template <typename differ_type>
  __device__ void compare(const Problem& p, const HeadList& heads, const differ_type& differ) const {
    start_next_grid();
    SeamBlock block;
    block.side = blockIdx.x % 2;
    block.head_index = blockIdx.x / 2 % heads.count;
    block.seam = blockIdx.x / 2 / heads.count;
    const int64_t sequence = plan.sequence_of_seam(p, block.seam),
                  number = plan.number_of_seam(p, sequence, block.seam);
    const Cells cells = p.laws[heads.head[block.head_index]].cells;
    const Stretch before(p, plan, cells, plan.index(p, sequence, number - 1));
    const Stretch after(p, plan, cells, plan.index(p, sequence, number));
    // Some numbers of seams name no seam.
    const bool exists = before.exists && after.exists && after.sequence.index == sequence && after.number == number;
    wait_for_grid_before();
    if (exists && __syncthreads_or(differ(block, before)) && threadIdx.x == 0) {
      atomicExch(&found[sequence * heads.count + block.head_index], 1);
    }
  }

 private:
  static int64_t found_bytes(const Problem& p, const HeadList& heads) {
    return (p.sequences * heads.count * static_cast<int64_t>(sizeof(int)) + 15) / 16 * 16;
  }
};

// Returns whether two walks differ, relative to the size, by no more than the roundings of both.
template <typename storage>
__device__ __forceinline__ bool within_rounding(float squared_difference, float squared_size) {
  constexpr float kTolerance = std::is_same<storage, __half>::value ? 0x1p-10f : 0x1p-7f;
  return squared_difference <= kTolerance * kTolerance * squared_size;  // false if one is NaN
}

}  // namespace blurry_attn::cuda
