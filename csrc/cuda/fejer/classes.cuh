// Heads by how many cells are in flux in a patch: a launch has those of one class.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tuning.h"
#include "fejer/kept.cuh"

namespace blurry_attn::cuda {

// How many cells are in flux in one patch at most: where patches begin is a
// multiple of both 16's and r's common divisor.
BLURRY_HOST_DEVICE inline int cells_in_flux(int64_t resolution) {
  const int64_t power = resolution & -resolution, step = power < kPatch ? power : kPatch;
  return static_cast<int>((resolution - step + kPatch - 1) / resolution + 2);
}
// Heads go by classes of it; what kFlux is for each. The last two are those whose cells are tokens: all, or every other
// one; a patch ends so many of them.
constexpr int kHeadClasses = 5;
constexpr int kEveryOther = kPatch / 2;
// Whether cells are tokens, one of how many: they replace what their slots held, and there are no decays and no
// weights.
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

// The heads of a class.
struct HeadClass {
  int number;
  HeadList heads;
  int64_t longest_window;
  double echo;  // the largest
};
// Those there are, in the order in which their launches begin.
enum class Task { forward, keep, backward };
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
// Calls body(class, problem) for each; two run at once. The code of three is more than the cache for instructions that
// a group of multiprocessors has in common (128 KB on an H100), and each would run at half its speed.
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
