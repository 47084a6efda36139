// This file divides heads into classes by how many cells are in flux in a patch. A launch has the heads of one class.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tuning.h"
#include "fejer/kept.cuh"

namespace blurry_attn::cuda {

// Returns how many cells are in flux in one patch at most. A patch begins at a multiple of the common divisor of 16 and
// r, counted from a cell's centre.
BLURRY_HOST_DEVICE inline int cells_in_flux(int64_t resolution) {
  const int64_t power = resolution & -resolution, step = power < kPatch ? power : kPatch;
  return static_cast<int>((resolution - step + kPatch - 1) / resolution + 2);
}
// Each class has a kFlux, for which its kernels are compiled: the most cells in flux in a patch. In the last two
// classes, every token or every other one is a cell, and kFlux is how many cells end in a patch.
constexpr int kHeadClasses = 5;
constexpr int kEveryOther = kPatch / 2;
// is_selecting() says whether cells are tokens, and stride_of() says that every such token is a cell, or every other
// one. Such cells replace what their slots held, so there are no decays and no weights.
constexpr bool is_selecting(int flux) { return flux == kPatch || flux == kEveryOther; }
constexpr int stride_of(int flux) { return is_selecting(flux) ? kPatch / flux : 1; }
BLURRY_HOST_DEVICE inline int flux_of(int number) {
  constexpr int kFlux[kHeadClasses] = {3, 5, 9, kPatch, kEveryOther};
  return kFlux[number];
}
BLURRY_HOST_DEVICE inline int head_class(const HeadLaw& law) {
  if (cells_are_tokens(law)) return law.cells.resolution == 1 ? 3 : 4;
  int number = 0;
  while (cells_in_flux(law.cells.resolution) > flux_of(number)) ++number;
  return number;
}

// HeadClass has the heads of one class.
struct HeadClass {
  int number;
  HeadList heads;
  int64_t longest_window;
  double echo;  // the largest of its heads
};
// Task names what launches are for, on which their order depends.
enum class Task { forward, keep, backward };
// Returns the classes that have heads, in the order in which their launches begin.
inline std::vector<HeadClass> head_classes(const Problem& p, const Kept& kept, Task task) {
  const auto& order = (task == Task::forward ? kForwardOrder : kBackwardOrder)[is_wide(p)];
  HeadClass classes[kHeadClasses] = {};
  int64_t cell_rows = 0;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    HeadClass& c = classes[head_class(p.host_laws[h])];
    c.longest_window = std::max(c.longest_window, p.host_laws[h].cells.window());
    c.echo = std::max(c.echo, p.host_laws[h].echo);
    c.heads.head[c.heads.count] = static_cast<uint16_t>(h);
    c.heads.cell_rows[c.heads.count++] = cell_rows;
    cell_rows += kept.cell_rows(p, p.host_laws[h]);
  }
  std::vector<HeadClass> found;
  for (const int number : order) {
    classes[number].number = number;
    if (classes[number].heads.count > 0) found.push_back(classes[number]);
  }
  return found;
}
// Calls body(class, problem) for each class, whose launches run two at once. The code of three exceeds the instruction
// cache of a group of multiprocessors (128 KB on an H100), and would run at half speed.
template <typename body_type>
void two_at_once(const Problem& p, const std::vector<HeadClass>& classes, const body_type& body) {
  const TwoStreams streams(p.stream, classes.size() > 1);
  for (size_t i = 0; i < classes.size(); ++i) {
    Problem problem = p;
    problem.stream = streams.of(i);
    body(classes[i], problem);
  }
}

}  // namespace blurry_attn::cuda
