// This file computes gates and tables of gates on the host, in float64.
#include "law.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace blurry_attn {

namespace {

constexpr double kPi = 3.14159265358979323846;

int64_t modulo(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

}  // namespace

double dirichlet(int64_t x, int64_t slots, int64_t window) {
  x = modulo(x, window);
  if (x % (window / slots) == 0) return x == 0 ? 1.0 : 0.0;  // set, not computed: sin leaves 1e-15
  const double angle = kPi * static_cast<double>(x) / static_cast<double>(window);
  const double n = static_cast<double>(slots);
  return std::sin(n * angle) / (n * (slots % 2 ? std::sin(angle) : std::tan(angle)));
}

double gate(Kernel kernel, int64_t offset, int64_t slots, int64_t window, double sharpness) {
  const int64_t resolution = window / slots;
  offset = modulo(offset, window);
  if (kernel == Kernel::dirichlet) return dirichlet(offset, slots, window);
  if (std::min(offset, window - offset) >= resolution) return 0.0;
  const double d = dirichlet(offset, slots, window);
  return std::min(1.0, sharpness / static_cast<double>(resolution) * d * d);
}

std::vector<double> flux_gates(const Cells& cells, double sharpness) {
  const int64_t r = cells.resolution;
  std::vector<double> table(2 * r);
  for (int64_t x = -r; x < r; ++x) {
    table[x + r] = x == -r ? 0.0 : gate(Kernel::fejer, x, cells.slots, cells.window(), sharpness);
  }
  return table;
}

double echo(const Cells& cells, double sharpness) {
  double left = 1;
  for (const double gate : flux_gates(cells, sharpness)) left *= 1 - gate;
  return left;
}

bool selects(const Cells& cells, double sharpness) {
  const std::vector<double> table = flux_gates(cells, sharpness);
  return std::all_of(table.begin() + 1, table.end(), [](double gate) { return gate == 1; });
}

std::vector<double> period_gates(Kernel kernel, const Cells& cells, double sharpness) {
  std::vector<double> table(cells.window());
  for (int64_t x = 0; x < cells.window(); ++x) table[x] = gate(kernel, x, cells.slots, cells.window(), sharpness);
  return table;
}

std::vector<double> gates(Kernel kernel, const Cells& cells, double sharpness, int64_t start, int64_t length) {
  const std::vector<double> period = period_gates(kernel, cells, sharpness);
  std::vector<double> table(length * cells.slots);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t token = start + i;
    for (int64_t m = 0; m < cells.slots; ++m) {
      const int64_t opening = cells.slot_opening(m);
      table[i * cells.slots + m] = token < opening    ? std::numeric_limits<double>::quiet_NaN()
                                   : token == opening ? 1.0
                                                      : period[cells.offset(m, token)];
    }
  }
  return table;
}

}  // namespace blurry_attn
