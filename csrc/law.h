// The law of blurry window attention: cells, gates, openings and phases. The only place that knows it; host and device.
// Times and positions count the tokens of one sequence from 0. See docs/law.md for the derivation.
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
// Tables of gates stay small, and no time overflows.
constexpr int64_t kMaxSlots = int64_t(1) << 20, kMaxResolution = int64_t(1) << 20;
constexpr int64_t kMaxPosition = int64_t(1) << 62;

BLURRY_HOST_DEVICE constexpr int64_t floor_div(int64_t a, int64_t b) {  // b > 0
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// Where the cells of one key/value head lie: cell c is centred at token c * resolution + phase and belongs to slot
// c mod slots. Token t lies in the flux of two cells: the trailing one, centred at or before t, and the leading one
// after it. A cell is in flux over the 2 * resolution tokens [flux_begin, flux_end]; at the first of these, which lies
// outside its lobe, it still stands.
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
  // The first cell of all: cell -1 counts only where its lobe holds a token t >= 0.
  BLURRY_HOST_DEVICE int64_t first() const { return phase > 0 ? -1 : 0; }
  // Whether `cell` is the first of its slot, which it opens at token `opening(cell)`.
  BLURRY_HOST_DEVICE bool opens(int64_t cell) const { return cell - slots < first(); }
  BLURRY_HOST_DEVICE int64_t opening(int64_t cell) const {
    const int64_t begin = flux_begin(cell) + 1;
    return begin > 0 ? begin : 0;
  }
  BLURRY_HOST_DEVICE int64_t slot_opening(int64_t slot) const {
    return opening(phase > 0 && slot == slots - 1 ? -1 : slot);
  }
  // Whether the slot of `cell` is open at `token`, one of the cell's flux.
  BLURRY_HOST_DEVICE bool is_open(int64_t cell, int64_t token) const { return !opens(cell) || token >= opening(cell); }
  // How long after the latest centre of the slot's cells `token` lies: its index in period_gates().
  BLURRY_HOST_DEVICE int64_t offset(int64_t slot, int64_t token) const {
    const int64_t since = token - centre(slot);
    return since - floor_div(since, window()) * window();
  }
  // The share of `token` that the slot of `cell` takes, for a token of the cell's flux at which the slot is open;
  // `gates` is flux_gates(): a token that opens is written whole.
  template <typename scalar>
  BLURRY_HOST_DEVICE scalar gate(const scalar* gates, int64_t cell, int64_t token) const {
    return opens(cell) && token == opening(cell) ? scalar(1) : gates[token - flux_begin(cell)];
  }
};

// Cardinal Dirichlet kernel D(x) of `slots` samples over `window` tokens: exactly 1 at 0 and 0 at the other samples.
double dirichlet(int64_t x, int64_t slots, int64_t window);

// The gate of a token that lies `offset` tokens after a slot's centre, the period being `window`.
double gate(Kernel kernel, int64_t offset, int64_t slots, int64_t window, double sharpness);

// "fejer": gates over a cell's flux, [2 * resolution], from x = -resolution (where it is 0) to resolution - 1.
std::vector<double> flux_gates(const Cells& cells, double sharpness);

// "fejer": what is left in a slot, after a cell's flux, of what it held before: the product of 1 - gate.
double echo(const Cells& cells, double sharpness);

// "fejer": whether every gate of a lobe is 1: a slot in flux holds the newest token, and in the end the lobe's last.
bool selects(const Cells& cells, double sharpness);

// Any kernel: gates over the period, [window]; slot m takes period_gates[(t - m * resolution - phase) mod window].
std::vector<double> period_gates(Kernel kernel, const Cells& cells, double sharpness);

// The law as a table, openings included: [length, slots] from token `start` on, NaN where a slot is shut.
std::vector<double> gates(Kernel kernel, const Cells& cells, double sharpness, int64_t start, int64_t length);

}  // namespace blurry_attn
