// Shapes and shared memory of a walk backward.
#pragma once

#include "fejer/walk.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kSlice = 32;  // elements of key or value of which a warp has the gradients

// Shapes of a walk backward at compile time.
template <typename storage_type, int dim, int flux, int columns, int patches>
struct BackConfig {
  using storage = storage_type;
  static constexpr int kDim = dim, kFlux = flux, kColumns = columns;
  static constexpr bool kSelecting = is_selecting(flux);
  static constexpr int kStride = stride_of(flux);
  static constexpr int kPatches = patches;  // of a tile
  static constexpr int kTile = kPatches * kPatch;
  static constexpr int kSlices = 2 * dim / kSlice;  // a warp each
  // Registers are given and taken by four warps together, so four attend: two for each patch where a tile has two.
  static constexpr int kFirstSlice = 4, kSharing = kFirstSlice / patches;
  static constexpr int kAttending = kFirstSlice * kWarp, kSumming = kSlices * kWarp, kThreads = kAttending + kSumming;
  static constexpr int kBlocks = dim <= 64 && flux <= 3 ? 2 : 1;
  // Of the code for a patch's cells in flux. Where it is long, one for all: what a multiprocessor runs fits badly into
  // its caches for instructions.
  static constexpr int kCopies = kSelecting && (dim <= 64 || kStride == 1) ? patches : 1;
  // Registers of those that attend and of the others; 0: as they are.
  static constexpr int kAttendRegisters = dim > 64 ? 240 : kBlocks == 2 ? 168 : 0;
  static constexpr int kSumRegisters = dim > 64 ? 128 : kBlocks == 2 ? 88 : 0;
  static constexpr int kRow = Rows<dim>::kBytes;
  // Of gradients' rows, elements that are read at once: pairs lie in registers as a product's sums do, fours take fewer
  // reads where one row is all lanes'.
  static constexpr int kPiece = kSelecting ? 2 : 4;
  // Where a row of kSlice elements begins; element e lies there ^ e, so that eight rows' pieces lie in different banks.
  __device__ __forceinline__ static int grad_row(int row) { return row * kSlice + (row & (8 / kPiece - 1)) * kPiece; }
};

// Where a patch lies among the rows of gradients.
struct alignas(16) PatchPlace {
  int own;             // the trailing cell's row
  int ended_cells;     // before the walk
  int cells_going_on;  // cells that go on in the patch
};
// The first element's place in the rows of its cells in flux: of their slots before the patch, and their own.
template <int flux>
struct alignas(16) FluxPlaces {
  int before[(flux + 3) / 4 * 4], own[(flux + 3) / 4 * 4];
};

// Shared memory of a walk backward, by offsets in bytes.
struct BackLayout {
  // From the first barrier, of a tile's weights that are written: of those of cells, and of all, read; of the warps of
  // each patch.
  static constexpr uint32_t kCellsRead = 8, kAllRead = 16, kMeetings = 24;

  int ring_rows;  // of what cells hold, and
  int grad_rows;  // of its gradients
  // Rows of a patch's weights, 16 tokens each: of the cells in grad_rows, of the cells that go on and of the patch's
  // tokens; where two warps share a patch, some that nobody reads.
  int piece_started, piece_tokens, piece_spare, piece_rows;
  uint32_t ring, started_rows, side_bytes, tokens, grads, grads_started, sums, pieces, gates, weights, decays, patches,
      places, shared_weights, shared_sums, barriers, bytes;

  template <typename config>
  __host__ __device__ static BackLayout make(int slots, int resolution, int group) {
    constexpr int in_flux = config::kSelecting ? 0 : config::kFlux;
    const auto rounded = [](int x, int to) { return (x + to - 1) / to * to; };
    const int spare = kPatch % resolution ? 1 : 0;
    const int cells_of_tile = config::kTile / resolution + spare;
    const int between_patches = (config::kTile - kPatch) / resolution + spare;
    BackLayout l;
    l.ring_rows = slots + between_patches + cells_of_tile;  // the next tile is read while the last one is attended to
    if (l.ring_rows < config::kColumns) l.ring_rows = config::kColumns;
    l.grad_rows = rounded(slots + between_patches + config::kFlux, 16);
    l.piece_started = l.grad_rows;
    l.piece_tokens = l.piece_started + 8;
    l.piece_spare = l.piece_tokens + kPatch;
    l.piece_rows = l.piece_spare + (config::kSharing > 1 ? kPatch : 0);
    uint32_t at = 0;
    l.ring = at;                                       // of each side: [cell],
    l.started_rows = at + l.ring_rows * config::kRow;  // [tile mod 2][patch][2]
    l.side_bytes = (l.ring_rows + (config::kSelecting ? 0 : 4 * config::kPatches)) * config::kRow;
    at += 2 * l.side_bytes;
    l.tokens = at;  // the patches' own: [patch][side][token]
    at += config::kPatches * 2 * kPatch * config::kRow;
    l.grads = at;  // float: [slice][cell][element]
    at += config::kSlices * l.grad_rows * kSlice * 4;
    l.grads_started = at;  // float: [slice][patch][2][element]
    at += config::kSelecting ? 0 : config::kSlices * 8 * kSlice * 4;
    l.sums = at;  // of the tokens, over the heads of a group, float: [slice][patch][16][lane]
    at += group > 1 ? config::kSlices * config::kPatches * 16 * kWarp * 4 : 0;
    l.pieces = at;  // [key, value][patch][row][token]
    at += 2 * config::kPatches * l.piece_rows * kPatch * 2;
    l.gates = at;  // and what is left after them, float: [patch][2][cell][token]
    at += config::kPatches * 2 * in_flux * kPatch * 4;
    l.weights = at;  // of the patch's tokens in what cells hold at its end, float: [patch][cell][token]
    at += config::kPatches * in_flux * kPatch * 4;
    l.decays = at;  // float: [patch][cell]
    at += config::kPatches * in_flux * 4;
    l.patches = at = rounded(at, 16);  // [patch]
    at += config::kPatches * sizeof(PatchPlace);
    l.places = at;  // [patch]
    at += config::kSelecting ? 0 : config::kPatches * sizeof(FluxPlaces<config::kFlux>);
    l.shared_weights = at;  // between the warps of a patch: [patch][16 columns, in the end the tokens][lane][4]
    at += config::kSharing > 1 ? config::kPatches * (config::kColumns / 16 + 1) * kWarp * 16 : 0;
    l.shared_sums = at;  // of probabilities, and of probability * gradient: [patch][warp][token]
    at += config::kSharing > 1 ? config::kPatches * config::kSharing * kPatch * 8 : 0;
    l.barriers = at;
    at += kMeetings + 8 * config::kPatches;
    l.bytes = (at + 15) / 16 * 16;
    return l;
  }
};

// Which of a patch's columns, by tiles of eight, a warp attends to. The first ones are with the patch's tokens.
template <int from, int tiles>
struct Share {
  static constexpr int kFrom = from, kTiles = tiles;
  static constexpr bool kFirst = from == 0;
};

// Offset in bytes of half of a row of weights: chunks are permuted so that eight rows' same half lies in different
// banks.
__device__ __forceinline__ uint32_t piece_at(int row, int half) { return row * 32 + ((half ^ ((row >> 2) & 1)) << 4); }

}  // namespace
}  // namespace blurry_attn::cuda
