// "fejer" in its parallel form on tensor cores: what the forward and the backward share.
//
// A block walks over time in tiles of kTile tokens, on a grid that begins at the head's phase; each of its warps has 16
// of a tile's tokens, its patch. At the beginning of a patch every slot holds something: a finished cell, which lies in
// a ring in shared memory, or the beginning of one of the first kFlux cells from the patch's trailing cell on, which
// lie in rows of their own. A token of the patch sees a slot in flux as
//     decay * (what it held at the beginning of the patch) + sum over the patch's tokens s <= t of weight * token s,
// with the same decays and weights in every patch that lies alike between two cells.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "mma.cuh"

namespace blurry_attn::cuda {

constexpr int kPatch = 16;

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
__device__ __forceinline__ uint32_t made_anew(uint32_t x) {
  return x ^ (use == 0 ? blockIdx.y : use == 1 ? blockIdx.z : blockIdx.y + blockIdx.z);
}
__device__ __forceinline__ uint32_t made_anew(uint32_t x, int turn) { return x ^ (blockIdx.y & turn); }

// Whether the kernels for head sizes over 64 do it.
inline bool is_wide(const Problem& p) { return p.key_dim > 64 || p.value_dim > 64; }

// Which heads a launch takes.
constexpr int kMaxWindowHeads = 256;
struct HeadList {
  int count;
  uint16_t head[kMaxWindowHeads];
  int64_t cell_rows[kMaxWindowHeads];  // of Contents, before the head's
};

// How time is cut for the walks. A sequence of this call is cut by its own length alone, into stretches of about the
// same work: the walk of one begins warm_up tokens before it, but for the sequence's first, or in a walk backward after
// it, but for the last, which therefore has `extra` tokens more than the others.
struct WalkPlan {
  int64_t length;  // tokens of a stretch at most
  int64_t halved;  // a sequence of so many tokens is cut in two, though it is not longer than `length`; above: none is
  int64_t warm_up;
  int64_t extra;
  int patches;  // stretches begin at multiples of so many
  bool backward;
  bool packed;
  int64_t count;       // of stretches, those included that hold no token
  int64_t seam_count;  // of numbers of seams, those included that are none

  __host__ __device__ int64_t stretches(int64_t tokens) const {
    return tokens > length ? (tokens + length - 1) / length : tokens >= halved ? 2 : 1;
  }
  // Number, in a launch, of a sequence's i-th stretch. The first of all sequences come before the second of any, so
  // that what runs at once on a multiprocessor is of both kinds, with a warm-up and without. Where sequences are
  // packed, numbers are set aside for stretches() of every one, and some more.
  __device__ int64_t index(const Problem& problem, int64_t sequence, int64_t i) const {
    if (!packed) return i * problem.sequences + sequence;
    return Sequence::boundary(problem, sequence) / unit() + sequence + i;
  }
  __device__ int64_t sequence_of(const Problem& problem, int64_t x) const {
    return packed ? last_up_to(problem, x, [&](int64_t s) { return index(problem, s, 0); }) : x % problem.sequences;
  }
  __device__ int64_t number_of(const Problem& problem, int64_t sequence, int64_t x) const {
    return packed ? x - index(problem, sequence, 0) : x / problem.sequences;
  }
  // Number, in a launch, of the seam where a sequence's stretch begins that is not its first, and of the one where the
  // stretch ends; whose seam a number is, and which of the sequence's.
  __device__ int64_t seam(const Problem& problem, int64_t sequence, int64_t stretch) const {
    return stretch - (packed ? sequence + 1 : problem.sequences);
  }
  __device__ int64_t seam_after(const Problem& problem, int64_t sequence, int64_t stretch) const {
    return seam(problem, sequence, stretch) + (packed ? 1 : problem.sequences);
  }
  __device__ int64_t sequence_of_seam(const Problem& problem, int64_t x) const {
    return packed ? last_up_to(problem, x, [&](int64_t s) { return index(problem, s, 0) - s; }) : x % problem.sequences;
  }
  __device__ int64_t number_of_seam(const Problem& problem, int64_t sequence, int64_t x) const {
    return packed ? x - index(problem, sequence, 0) + sequence + 1 : x / problem.sequences + 1;
  }
  // The same walk with one stretch for each sequence.
  WalkPlan whole(const Problem& problem) const {
    WalkPlan plan = *this;
    plan.length = plan.halved = INT64_MAX;
    plan.count_stretches(problem);
    return plan;
  }
  void count_stretches(const Problem& problem) {
    packed = problem.cu_seqlens;
    count = packed ? problem.tokens / unit() + problem.sequences : stretches(problem.tokens) * problem.sequences;
    seam_count = packed ? problem.tokens / unit() : (stretches(problem.tokens) - 1) * problem.sequences;
    if (problem.sequences == 0) count = seam_count = 0;
  }

 private:
  // The last sequence of which `first`(sequence) is at most x; it grows with the sequence.
  template <typename first_type>
  __device__ static int64_t last_up_to(const Problem& problem, int64_t x, const first_type& first) {
    int64_t low = 0, high = problem.sequences;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first(middle) <= x ? low : high) = middle;
    }
    return low;
  }
  __host__ __device__ int64_t unit() const { return length < halved ? length : halved; }
};

// Where the patch of a token begins: patches lie on a grid that begins at the head's phase.
__device__ __forceinline__ int64_t patch_begin(const Cells& cells, int64_t token) {
  return floor_div(token - cells.phase, kPatch) * kPatch + cells.phase;
}

// Stretch number x of a launch: which sequence's, and the tokens begin .. end - 1 that it owns. Stretches begin on the
// grid of patches, but for a sequence's first, whose first patch begins at `grid`.
struct Stretch {
  Sequence sequence;
  int64_t number;  // of the sequence's
  int64_t grid, begin, end;
  bool exists, last;

  __device__ Stretch(const Problem& p, const WalkPlan& plan, const Cells& cells, int64_t x)
      : sequence(p, plan.sequence_of(p, x)), number(plan.number_of(p, sequence.index, x)) {
    grid = patch_begin(cells, sequence.position);
    const int64_t count = plan.stretches(sequence.length), extra = plan.extra < sequence.length ? plan.extra : 0;
    const auto begin_of = [&](int64_t i) {
      const int64_t even = (plan.backward ? 0 : extra) + i * (sequence.length - extra) / count;
      const int unit = plan.patches * kPatch, units = static_cast<int>(sequence.position - grid + even) / unit;
      return grid + (units > i ? units : i) * unit;
    };
    last = number + 1 >= count;
    begin = number == 0 ? sequence.position : begin_of(number);
    end = last ? sequence.end() : begin_of(number + 1);
    exists = number >= 0 && number < count && begin < end;  // below zero only where cu_seqlens is wrong
  }
};

// One block's walk: a stretch of one sequence and head. Tokens ("times") are counted from the first tile's first, cells
// from the one that trails there, both as plain ints.
struct Walk {
  int64_t stretch, sequence, batch;
  int64_t sequence_row;  // of the sequence's first token
  int64_t row;           // of time 0, which may lie before the batch entry's first
  int64_t first_time;    // tokens of the sequence before time 0: below zero where the patch begins before the sequence
  int64_t cell;          // number of the first cell
  int64_t position;
  int64_t first_patch;        // number of the patch at time 0, from the sequence's first
  int64_t trailing_at_begin;  // the cell that trails at the sequence's first token
  int begin, end;             // the sequence's tokens of this call
  int own_begin, own_end;     // the stretch's
  int offset, resolution;     // of time 0 from the first cell's centre
  int first;                  // the first cell of all, or a bound below it
  int given;                  // the trailing cell when the contents that the walk begins with were left, in ring rows
  bool from_begin;
  // Whether another walk knows what this one warms up for, and the reverse.
  bool seam_before, seam_after;

  Walk() = default;
  __device__ Walk(const Problem& p, const WalkPlan& plan, int64_t x, int head) : stretch(x) {
    const Cells cells = p.laws[head].cells;
    const Stretch own(p, plan, cells, x);
    const Sequence& s = own.sequence;
    sequence = s.index;
    batch = s.batch;
    position = s.position;
    from_begin = own.begin - s.position <= plan.warm_up;
    const int64_t from = from_begin ? s.position : own.begin - plan.warm_up;
    first_time = patch_begin(cells, from);
    sequence_row = s.row;
    row = s.row + first_time - s.position;
    cell = cells.trailing(first_time);
    const auto since = [&](int64_t t) {
      const int64_t least = -(int64_t(1) << 30);
      return static_cast<int>(t - first_time > least ? t - first_time : least);
    };
    begin = since(s.position);
    end = since(s.end());
    own_begin = since(own.begin);
    own_end = own.exists ? since(own.end) : own_begin;
    seam_before = !from_begin;
    seam_after = !own.last && own.end - s.position > plan.warm_up;
    first_patch = (first_time - own.grid) / kPatch;
    trailing_at_begin = cells.trailing(s.position) - cell;
    offset = static_cast<int>(first_time - cells.centre(cell));
    resolution = static_cast<int>(cells.resolution);
    const int64_t first_of_all = cells.first() - cell;
    first = static_cast<int>(first_of_all > -(int64_t(1) << 30) ? first_of_all : -(int64_t(1) << 30));
    given = static_cast<int>((from_begin ? cells.trailing(s.position) : cell) - cell + cells.slots);
    cells_ = cells;
  }
  __device__ int64_t time(int t) const { return first_time + t; }
  // The slot of the cell `back` before the newest given one, or -1 where none is open.
  __device__ int given_slot(int back, int slots) const {
    if (back >= slots) return -1;
    const int64_t c = cell + given - slots - 1 - back;
    const int64_t slot = cells_.slot(c);
    return position > cells_.slot_opening(slot) ? static_cast<int>(slot) : -1;
  }

 private:
  Cells cells_;
};

// Whether cells hold a token in the end, and kernels know it: nothing is to be advanced, or kept, of them.
BLURRY_HOST_DEVICE inline bool cells_are_tokens(const HeadLaw& law) { return law.selects && law.cells.resolution <= 2; }

// What the walk backward needs of what the slots hold, in rows of both sides: [key, value][element].
constexpr int64_t kSpareCells = 4, kSparePatches = 2;  // of a sequence: those that begin before it or end later
struct Contents {
  void* cells = nullptr;  // of every head, what cells hold in the end; those of a given state first
  void* started =
      nullptr;  // of every patch and head, what two cells hold that go on in it: [patch][head][side][2][element]
  int64_t of_states = 0;  // rows of a sequence's given state

  Contents() = default;
  Contents(const Problem& p, void* memory) : cells(memory), of_states(p.state_key ? p.slots : 0) {
    started = static_cast<unsigned char*>(memory) + all_cell_rows(p) * row_bytes(p);
  }
  static int64_t bytes(const Problem& p) {
    Contents contents;
    contents.of_states = p.state_key ? p.slots : 0;
    return (contents.all_cell_rows(p) + started_rows(p)) * row_bytes(p);
  }

  // Row of the cell that trails at the sequence's first token, within a head.
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

// Calls body(storage{}) for bfloat16 or float16.
template <typename body_type>
void for_half(DType dtype, const body_type& body) {
  if (dtype == DType::bfloat16) return body(__nv_bfloat16());
  body(__half());
}

__device__ __forceinline__ int wrap(int row, int rows) { return row >= rows ? row - rows : row; }

// How many cells are in flux in one patch at most: where patches begin is a
// multiple of both 16's and r's common divisor.
BLURRY_HOST_DEVICE inline int cells_in_flux(int64_t resolution) {
  const int64_t power = resolution & -resolution, step = power < kPatch ? power : kPatch;
  return static_cast<int>((resolution - step + kPatch - 1) / resolution + 2);
}
// Heads go by classes of it; what kFlux is for each. The last two are those whose cells are tokens: all, or every other
// one; a patch ends so many of them.
constexpr int kFluxClasses = 5;
constexpr int kEveryOther = kPatch / 2;
// Whether cells are tokens, one of how many: they replace what their slots held, and there are no decays and no
// weights.
constexpr bool is_selecting(int flux) { return flux == kPatch || flux == kEveryOther; }
constexpr int stride_of(int flux) { return is_selecting(flux) ? kPatch / flux : 1; }
BLURRY_HOST_DEVICE inline int flux_of_class(int number) {
  constexpr int kFlux[kFluxClasses] = {3, 5, 9, kPatch, kEveryOther};
  return kFlux[number];
}
BLURRY_HOST_DEVICE inline int flux_class(const HeadLaw& law) {
  if (cells_are_tokens(law)) return law.cells.resolution == 1 ? 3 : 4;
  int number = 0;
  while (cells_in_flux(law.cells.resolution) > flux_of_class(number)) ++number;
  return number;
}

// The heads of a class.
struct FluxClass {
  int number;
  HeadList heads;
  int64_t longest_window;
  double echo;  // the largest
};
// Those there are, in the order in which they begin: that after which all have ended soonest, as measured with a
// quarter of the heads at r = 1, 2, 4 and 8 each.
enum class Task { forward, contents, backward };
inline std::vector<FluxClass> flux_classes(const Problem& p, const Contents& contents, Task task) {
  constexpr int kForward[2][kFluxClasses] = {{4, 1, 3, 0, 2}, {3, 1, 4, 0, 2}};
  constexpr int kBackward[2][kFluxClasses] = {{0, 3, 4, 1, 2}, {0, 4, 1, 3, 2}};
  const auto& order = (task == Task::forward ? kForward : kBackward)[is_wide(p)];
  FluxClass classes[kFluxClasses] = {};
  int64_t cell_rows = 0;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    FluxClass& c = classes[flux_class(p.host_laws[h])];
    c.longest_window = std::max(c.longest_window, p.host_laws[h].cells.window());
    c.echo = std::max(c.echo, p.host_laws[h].echo);
    c.heads.head[c.heads.count] = static_cast<uint16_t>(h);
    c.heads.cell_rows[c.heads.count++] = cell_rows;
    cell_rows += contents.cell_rows(p, p.host_laws[h]);
  }
  std::vector<FluxClass> found;
  for (const int number : order) {
    classes[number].number = number;
    if (classes[number].heads.count > 0) found.push_back(classes[number]);
  }
  return found;
}
// Calls body(class, problem) for each; two run at once. The code of three is more than the cache for instructions that
// a group of multiprocessors has in common (128 KB on an H100), and each would run at half its speed.
template <typename body_type>
void two_at_once(const Problem& p, const std::vector<FluxClass>& classes, const body_type& body) {
  const TwoStreams streams(p.stream, classes.size() > 1);
  for (size_t i = 0; i < classes.size(); ++i) {
    Problem problem = p;
    problem.stream = streams.of(i);
    body(classes[i], problem);
  }
}
// Two multiprocessors have a smaller such cache in common: they get blocks of one class.
constexpr int kPair = 2;

// Of a large card. Not asked of the one at hand: gradients' bits are the same on all of them.
constexpr int64_t kMultiprocessors = 132;
// Of window_back's blocks, those of all classes where several share the card, and each class's share in halves, as
// measured.
constexpr int64_t kSharedBlocks = 4 * kMultiprocessors;
constexpr int64_t kHalves[2][kFluxClasses] = {{2, 2, 2, 1, 2}, {1, 2, 2, 2, 1}};

constexpr int64_t kLeastStretch = 128;  // tokens; at least a patch
constexpr int64_t kSeamPatches = 4;     // walks back meet where tiles of both begin

// After how many laps less is left of what a slot held than a rounding of what it holds; an echo is under a half.
inline int laps_until(double rounding, double echo) {
  int laps = 1;
  for (double left = echo; left > rounding; left *= echo) ++laps;
  return laps;
}

inline bool is_alone(const Problem& problem, const FluxClass& c) { return c.heads.count == problem.kv_heads; }

// What plans begin with.
inline WalkPlan plan_of(const Problem& problem, const FluxClass& c) {
  WalkPlan plan{};
  plan.patches = 1;
  // Walks begin with empty slots so much before the tokens they own.
  const int laps = laps_until(problem.dtype == DType::bfloat16 ? 0x1p-11 : 0x1p-14, c.echo);
  plan.warm_up = laps * c.longest_window + 2 * c.longest_window / problem.slots;
  // Where classes share the card they are cut finer, so that all end together.
  const bool alone = is_alone(problem, c);
  plan.length = std::max<int64_t>((alone ? 8 : 2) * plan.warm_up, alone ? 4096 : 1024);
  return plan;
}

// Of the walk for the output, which is cut by each sequence's own length alone.
inline WalkPlan make_plan(const Problem& problem, const FluxClass& c) {
  WalkPlan plan = plan_of(problem, c);
  plan.extra = plan.warm_up / 3;  // of its work it does so much where it warms up
  plan.halved = std::max<int64_t>(plan.warm_up + plan.warm_up / 2, 1024);
  plan.count_stretches(problem);
  return plan;
}

// Of the walk back, or of the one that makes contents for it, of which `at_once` blocks fit on a multiprocessor.
inline WalkPlan make_back_plan(const Problem& problem, const FluxClass& c, Task task, int64_t at_once) {
  WalkPlan plan = plan_of(problem, c);
  plan.backward = task == Task::backward;
  plan.patches = kSeamPatches;
  plan.extra = plan.backward ? plan.warm_up - plan.warm_up / 8 : plan.warm_up;  // back without gradients of queries
  int64_t tokens = 0, count = 1;
  if (problem.sequences > 0) {
    const int64_t lanes = problem.sequences * problem.kv_heads;
    tokens = problem.cu_seqlens ? problem.tokens / problem.sequences : problem.tokens;
    const int64_t finest = tokens / (std::max(plan.warm_up / 2, kLeastStretch) + 1);
    if (is_alone(problem, c)) {
      // So many stretches as fill the card once, or a few times, or one: those that end first.
      const int64_t blocks = at_once * kMultiprocessors;
      const auto time = [&](int64_t n) {
        const int64_t own = (tokens - plan.warm_up) / n;
        return (lanes * n + blocks - 1) / blocks * (n > 1 ? own + plan.warm_up : tokens);
      };
      for (int64_t times = 1; times <= 8; ++times) {
        const int64_t n = std::min(times * blocks / lanes, finest);
        if (n > 1 && time(n) < time(count)) count = n;
      }
    } else {
      // Sequences that could stay whole are cut in two, unless they are short.
      const int64_t even = (kSharedBlocks + lanes / 2) / lanes;
      const int64_t least = problem.cu_seqlens || tokens < plan.length ? 1 : 2;
      count = std::max(least, std::min(even * kHalves[is_wide(problem)][c.number] / 2, finest));
    }
  }
  plan.length = count > 1 ? (tokens + count - 1) / count : std::max(tokens, plan.length);
  plan.halved = plan.length + 1;
  plan.count_stretches(problem);
  return plan;
}

// Whether rows are runs of whole, aligned 16 bytes, eight elements each.
inline bool aligned(const View& view) { return in_packs(view, 8, 2); }

// What a launch over heads has of shared memory: as much as bytes_for(resolution) says that one needs.
template <auto kernel, typename bytes_type>
uint32_t shared_memory_of(const Problem& p, const HeadList& heads, const bytes_type& bytes_for) {
  uint32_t bytes = 0;
  for (int i = 0; i < heads.count; ++i) {
    bytes = std::max<uint32_t>(bytes, bytes_for(static_cast<int>(p.host_laws[heads.head[i]].cells.resolution)));
  }
  allow_shared_memory<kernel>();
  return bytes;
}

}  // namespace blurry_attn::cuda
