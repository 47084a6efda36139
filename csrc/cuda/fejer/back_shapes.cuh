// This file has the shapes and the shared memory of a backward walk.
#pragma once

#include "fejer/walk.cuh"

namespace blurry_attn::cuda {
namespace {

constexpr int kSlice = 32;  // elements of key or value whose gradients a warp sums up

// BackConfig has the shapes of a backward walk at compile time.
template <typename storage_type, int dim, int flux, int columns, int patches>
struct BackConfig {
  using storage = storage_type;
  static constexpr int kDim = dim, kFlux = flux, kColumns = columns;
  static constexpr bool kSelecting = is_selecting(flux);
  static constexpr int kStride = stride_of(flux);
  static constexpr int kPatches = patches;  // patches of a tile
  static constexpr int kTile = kPatches * kPatch;
  static constexpr int kSlices = 2 * dim / kSlice;  // slices of key and value, a warp each
  // Four warps give or take registers together, so four attend: two for each patch where a tile has two.
  static constexpr int kFirstSlice = 4, kSharing = kFirstSlice / patches;
  static constexpr int kAttending = kFirstSlice * kWarp, kSumming = kSlices * kWarp, kThreads = kAttending + kSumming;
  static constexpr int kBlocks = dim <= 64 && flux <= 3 ? 2 : 1;
  // kCopies is how many copies there are of the code for a patch's cells in flux. Where it is long, patches share one,
  // since a multiprocessor's caches for instructions are small.
  static constexpr int kCopies = kSelecting && (dim <= 64 || kStride == 1) ? patches : 1;
  // These are the registers of a thread that attends and of another one; 0 leaves them as they are.
  static constexpr int kAttendRegisters = dim > 64 ? 240 : kBlocks == 2 ? 168 : 0;
  static constexpr int kSumRegisters = dim > 64 ? 128 : kBlocks == 2 ? 88 : 0;
  static constexpr int kRow = Rows<dim>::kBytes;
  // kPiece elements of a gradient row are read at once. Pairs lie in registers as a product's sums do, and fours take
  // fewer reads where all lanes share one row.
  static constexpr int kPiece = kSelecting ? 2 : 4;
  // Returns where a row of kSlice elements begins. Element e lies at that place ^ e, so that the same piece of eight
  // rows lies in different banks.
  __device__ __forceinline__ static int grad_row(int row) { return row * kSlice + (row & (8 / kPiece - 1)) * kPiece; }
};

// PatchPlace says where a patch lies among the rows of gradients.
struct alignas(16) PatchPlace {
  int own;             // row of the trailing cell
  int ended_cells;     // cells that ended before this call
  int cells_going_on;  // cells that began before the patch and go on in it
};
// FluxPlaces says where the gradient rows begin of what the slots in flux held before, and of the patch's own cells.
template <int flux>
struct alignas(16) FluxPlaces {
  int before[(flux + 3) / 4 * 4], own[(flux + 3) / 4 * 4];
};

// BackLayout is the shared memory of a backward walk, as offsets in bytes.
struct BackLayout {
  // The first barrier says that a tile's weights are written, and these are offsets from it in bytes. The barriers at
  // kCellsRead and kAllRead say that weights of cells, or all, have been read. From kMeetings on, the warps of each
  // patch have one.
  static constexpr uint32_t kCellsRead = 8, kAllRead = 16, kMeetings = 24;

  int ring_rows;  // rows of what cells hold
  int grad_rows;  // rows of cells' gradients
  // A patch's weights are rows of 16 tokens. First are those of the cells in grad_rows, then of the cells that go on,
  // then of the patch's tokens. Where two warps share a patch, the last ones are spare, and nobody reads them.
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
    l.ring_rows = slots + between_patches + cells_of_tile;  // the next tile's are read while this tile's are in use
    if (l.ring_rows < config::kColumns) l.ring_rows = config::kColumns;
    l.grad_rows = rounded(slots + between_patches + config::kFlux, 16);
    l.piece_started = l.grad_rows;
    l.piece_tokens = l.piece_started + 8;
    l.piece_spare = l.piece_tokens + kPatch;
    l.piece_rows = l.piece_spare + (config::kSharing > 1 ? kPatch : 0);
    uint32_t at = 0;
    l.ring = at;                                       // cells of each side: [ring row]
    l.started_rows = at + l.ring_rows * config::kRow;  // cells that go on: [tile mod 2][patch][2]
    l.side_bytes = (l.ring_rows + (config::kSelecting ? 0 : 4 * config::kPatches)) * config::kRow;
    at += 2 * l.side_bytes;
    l.tokens = at;  // the patches' own tokens: [patch][side][token]
    at += config::kPatches * 2 * kPatch * config::kRow;
    l.grads = at;  // gradients of cells, float: [slice][cell][element]
    at += config::kSlices * l.grad_rows * kSlice * 4;
    l.grads_started = at;  // gradients of cells that go on, float: [slice][patch][2][element]
    at += config::kSelecting ? 0 : config::kSlices * 8 * kSlice * 4;
    l.sums = at;  // tokens' gradients, summed over a group's heads, float: [slice][patch][16][lane]
    at += group > 1 ? config::kSlices * config::kPatches * 16 * kWarp * 4 : 0;
    l.pieces = at;  // weights: [key, value][patch][row][token]
    at += 2 * config::kPatches * l.piece_rows * kPatch * 2;
    l.gates = at;  // gates and logarithms of decays, float: [patch][2][cell][token]
    at += config::kPatches * 2 * in_flux * kPatch * 4;
    l.weights = at;  // weights of the patch's tokens at its end, float: [patch][cell][token]
    at += config::kPatches * in_flux * kPatch * 4;
    l.decays = at;  // decays over the patch, float: [patch][cell]
    at += config::kPatches * in_flux * 4;
    l.patches = at = rounded(at, 16);  // PatchPlace: [patch]
    at += config::kPatches * sizeof(PatchPlace);
    l.places = at;  // FluxPlaces: [patch]
    at += config::kSelecting ? 0 : config::kPatches * sizeof(FluxPlaces<config::kFlux>);
    l.shared_weights = at;  // key weights between a patch's warps: [patch][16 columns, the tokens last][lane][4]
    at += config::kSharing > 1 ? config::kPatches * (config::kColumns / 16 + 1) * kWarp * 16 : 0;
    l.shared_sums = at;  // sums of probability, and of probability * gradient: [patch][warp][token]
    at += config::kSharing > 1 ? config::kPatches * config::kSharing * kPatch * 8 : 0;
    l.barriers = at;
    at += kMeetings + 8 * config::kPatches;
    l.bytes = (at + 15) / 16 * 16;
    return l;
  }
};

// Share says which of a patch's columns a warp attends to, by tiles of eight. The warp with the first columns also has
// the patch's tokens.
template <int from, int tiles>
struct Share {
  static constexpr int kFrom = from, kTiles = tiles;
  static constexpr bool kFirst = from == 0;
};

// Returns the byte offset of half of a row of weights. Chunks are permuted so that the same half of eight rows lies in
// different banks.
__device__ __forceinline__ uint32_t piece_at(int row, int half) { return row * 32 + ((half ^ ((row >> 2) & 1)) << 4); }

}  // namespace
}  // namespace blurry_attn::cuda
