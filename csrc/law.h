// This header defines the law of blurry window attention, for host and device; no other file knows it. A cell is one
// visit of a slot, and its lobe is the tokens of which it takes something. A gate is the share of a token that a slot
// takes. Times and positions count the tokens of one sequence from 0. docs/law.md has the derivation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define BLURRY_HOST_DEVICE __host__ __device__
#else
#define BLURRY_HOST_DEVICE
#endif

namespace blurry_attn {

enum class Kernel : int { fejer, dirichlet };

constexpr int64_t kMaxDirichletResolution = 32;
// These bounds keep tables of gates small and times within 64 bits.
constexpr int64_t kMaxSlots = int64_t(1) << 20, kMaxResolution = int64_t(1) << 20;
constexpr int64_t kMaxPosition = int64_t(1) << 62;

BLURRY_HOST_DEVICE constexpr int64_t floor_div(int64_t a, int64_t b) {  // b > 0
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// Cells says where the cells of one key/value head lie. Cell c is centred at token c * resolution + phase and belongs
// to slot c mod slots. Every token is in the flux of two cells: the trailing one, centred at or before it, and the
// leading one after it. A cell is in flux over the 2 * resolution tokens [flux_begin, flux_end]. The first of these
// lies outside its lobe: there the slot still keeps its content.
struct Cells {
  int64_t slots;
  int64_t resolution;
  int64_t phase;

  bool operator==(const Cells& other) const {
    return slots == other.slots && resolution == other.resolution && phase == other.phase;
  }
  BLURRY_HOST_DEVICE int64_t window() const { return slots * resolution; }
  BLURRY_HOST_DEVICE int64_t centre(int64_t cell) const { return cell * resolution + phase; }
  BLURRY_HOST_DEVICE int64_t slot(int64_t cell) const { return cell - floor_div(cell, slots) * slots; }
  BLURRY_HOST_DEVICE int64_t trailing(int64_t token) const { return floor_div(token - phase, resolution); }
  BLURRY_HOST_DEVICE int64_t flux_begin(int64_t cell) const { return centre(cell) - resolution; }
  BLURRY_HOST_DEVICE int64_t flux_end(int64_t cell) const { return centre(cell) + resolution - 1; }
  // first() is the first cell of all. Cell -1 counts only where its lobe holds a token t >= 0.
  BLURRY_HOST_DEVICE int64_t first() const { return phase > 0 ? -1 : 0; }
  // opens() says whether `cell` is the first of its slot, which it opens at token opening(cell).
  BLURRY_HOST_DEVICE bool opens(int64_t cell) const { return cell - slots < first(); }
  BLURRY_HOST_DEVICE int64_t opening(int64_t cell) const {
    const int64_t begin = flux_begin(cell) + 1;
    return begin > 0 ? begin : 0;
  }
  BLURRY_HOST_DEVICE int64_t slot_opening(int64_t slot) const {
    return opening(phase > 0 && slot == slots - 1 ? -1 : slot);
  }
  // is_open() says whether the slot of `cell` is open at `token`, which must be in the cell's flux.
  BLURRY_HOST_DEVICE bool is_open(int64_t cell, int64_t token) const { return !opens(cell) || token >= opening(cell); }
  // offset() is the index in period_gates(): the tokens from the latest centre of the slot's cells to `token`.
  BLURRY_HOST_DEVICE int64_t offset(int64_t slot, int64_t token) const {
    const int64_t since = token - centre(slot);
    return since - floor_div(since, window()) * window();
  }
  // gate() is the share of `token` that the slot of `cell` takes; the token that opens a slot is written whole. The
  // token must be in the cell's flux, and the slot open. `gates` is flux_gates().
  template <typename scalar>
  BLURRY_HOST_DEVICE scalar gate(const scalar* gates, int64_t cell, int64_t token) const {
    return opens(cell) && token == opening(cell) ? scalar(1) : gates[token - flux_begin(cell)];
  }
};

// dirichlet() is the cardinal Dirichlet kernel D(x) of `slots` samples over `window` tokens. It is exactly 1 at 0 and
// exactly 0 at the other samples.
double dirichlet(int64_t x, int64_t slots, int64_t window);

// gate() is the gate of a token that lies `offset` tokens after a slot's centre, where `window` is the period.
double gate(Kernel kernel, int64_t offset, int64_t slots, int64_t window, double sharpness);

// "fejer": flux_gates() are the gates over a cell's flux, [2 * resolution], from x = -resolution to resolution - 1.
std::vector<double> flux_gates(const Cells& cells, double sharpness);

// "fejer": echo() is the part of a slot's previous content that a cell's flux leaves, the product of 1 - gate.
double echo(const Cells& cells, double sharpness);

// "fejer": selects() says whether every gate of a lobe is 1. A slot in flux then holds the newest token.
bool selects(const Cells& cells, double sharpness);

// Any kernel: period_gates() are the gates over the period, [window]. At token t, slot m takes period_gates[(t - m *
// resolution - phase) mod window].
std::vector<double> period_gates(Kernel kernel, const Cells& cells, double sharpness);

// gates() is the law as a table, openings included: [length, slots] from token `start` on, NaN where a slot is shut.
std::vector<double> gates(Kernel kernel, const Cells& cells, double sharpness, int64_t start, int64_t length);

}  // namespace blurry_attn
