// This file is the device's view of the law in csrc/law.h: gates of tokens, lobes of slots, sequences of a call.
#pragma once

#include "common/numbers.cuh"

namespace blurry_attn::cuda {

// Law has the cells and the table of gates of one key/value head.
template <typename compute>
struct Law {
  Cells cells;
  const compute* gates;
  Kernel kernel;

  __device__ Law(const Problem& problem, int64_t head)
      : cells(problem.laws[head].cells),
        gates(static_cast<const compute*>(problem.gates) + problem.laws[head].gates),
        kernel(problem.kernel) {}

  __device__ bool is_open(int slot, int64_t token) const { return token >= cells.slot_opening(slot); }
};

// Spread says how the gates of one token lie over the slots.
enum class Spread : int {
  few,    // at most two slots take a share
  all,    // every slot takes a share, and none is 0 or 1
  mixed,  // any slot may take any share
};

// TokenGates finds the gate of one token in any slot. make() runs once per token, and gate() is then cheap for every
// slot.
template <typename compute>
struct TokenGates {
  int64_t token;
  Spread spread;
  int slot[2];       // few: the slots that take a share
  compute share[2];  // few: their gates
  int offset;        // all, mixed: tokens since the last centre of slot 0

  __device__ void make(const Law<compute>& law, int64_t t) {
    const Cells& cells = law.cells;
    token = t;
    if (law.kernel == Kernel::fejer) {
      spread = Spread::few;
      const int64_t trailing = cells.trailing(t);
      slot[0] = static_cast<int>(cells.slot(trailing));
      slot[1] = slot[0] + 1 < cells.slots ? slot[0] + 1 : 0;
      for (int which = 0; which < 2; ++which) {
        const int64_t cell = trailing + which;
        share[which] = cells.gate(law.gates, cell, t);  // 0 in a shut slot: t is then outside the lobe
      }
    } else {
      const int64_t from_centre = t - cells.centre(0), window = cells.window();
      offset = static_cast<int>(from_centre - floor_div(from_centre, window) * window);
      const int resolution = static_cast<int>(cells.resolution), centred = offset / resolution;
      const bool settled = t > cells.opening(cells.slots - 1);  // every slot opened before this token
      spread = !settled ? Spread::mixed : offset == centred * resolution ? Spread::few : Spread::all;
      slot[0] = centred;
      slot[1] = -1;
      share[0] = 1;
      share[1] = 0;
    }
  }
  // Returns the share of the token that slot `m` takes, which is 0 where the slot is shut.
  __device__ __forceinline__ compute gate(const Law<compute>& law, int m) const {
    if (spread == Spread::few) return m == slot[0] ? share[0] : m == slot[1] ? share[1] : compute(0);
    if (spread == Spread::mixed) {
      const int64_t opening = law.cells.slot_opening(m);
      if (token <= opening) return token == opening ? compute(1) : compute(0);
    }
    const int from_centre = offset - m * static_cast<int>(law.cells.resolution);
    return law.gates[from_centre < 0 ? from_centre + static_cast<int>(law.cells.window()) : from_centre];
  }
  // Returns whether one of the slots m .. m + 3 may take a share.
  __device__ __forceinline__ bool touches(int m) const {
    return spread != Spread::few || static_cast<unsigned>(slot[0] - m) < 4 || static_cast<unsigned>(slot[1] - m) < 4;
  }
};

// Calls body(begin, end, gates, opens) for each lobe of a "fejer" slot. The lobe's tokens are those in from .. to - 1
// at which the slot is open. Token begin + i has the gate gates[i], except that the first one has gate 1 if it `opens`
// the slot.
template <typename compute, typename body_type>
__device__ __forceinline__ void for_lobes(const Law<compute>& law, int slot, int64_t from, int64_t to,
                                          const body_type& body) {
  const Cells& cells = law.cells;
  const int64_t base = cells.trailing(from);
  const int64_t ahead = slot - cells.slot(base);
  for (int64_t cell = base + (ahead < 0 ? ahead + cells.slots : ahead); cells.flux_begin(cell) + 1 < to;
       cell += cells.slots) {
    int64_t begin = cells.flux_begin(cell) + 1, end = cells.flux_end(cell) + 1;
    if (cells.opens(cell) && cells.opening(cell) > begin) begin = cells.opening(cell);
    begin = begin > from ? begin : from;
    end = end < to ? end : to;
    if (begin < end) {
      body(begin, end, law.gates + (begin - cells.flux_begin(cell)), cells.opens(cell) && begin == cells.opening(cell));
    }
  }
}

// Calls body(token, gate), in order, for the tokens from .. to - 1 of which an open slot takes a share.
template <typename compute, typename body_type>
__device__ void walk_slot(const Law<compute>& law, int slot, int64_t from, int64_t to, const body_type& body) {
  if (law.kernel == Kernel::fejer) {
    for_lobes(law, slot, from, to, [&](int64_t begin, int64_t end, const compute* gates, bool opens) {
#pragma unroll 4
      for (int64_t t = begin; t < end; ++t) body(t, opens && t == begin ? compute(1) : gates[t - begin]);
    });
    return;
  }
  for (int64_t t = from; t < to; ++t) {
    TokenGates<compute> gates;
    gates.make(law, t);
    body(t, gates.gate(law, slot));
  }
}

// Returns a slot's content after a token is written. A gate of 1 does not read the content, and a gate of 0 does not
// read the token.
template <typename compute>
__device__ __forceinline__ compute written(compute content, compute token, compute gate) {
  return gate == compute(1) ? token : gate == compute(0) ? content : content + gate * (token - content);
}

// Clamps a given position to its range, since the host cannot check it in a captured call.
__device__ __forceinline__ int64_t bounded_position(int64_t position) {
  return position < 0 ? 0 : position < kMaxPosition ? position : kMaxPosition;
}

// Sequence is one sequence of a call: its batch entry, its first row there, its rows (`length`), and the tokens before
// them (`position`).
struct Sequence {
  int64_t index, batch, row, length, position;

  __device__ Sequence(const Problem& problem, int64_t i) : index(i) {
    batch = problem.cu_seqlens ? 0 : i;
    row = problem.cu_seqlens ? boundary(problem, i) : 0;
    const int64_t end = problem.cu_seqlens ? boundary(problem, i + 1) : problem.tokens;
    length = end > row ? end - row : 0;
    position = problem.position ? bounded_position(problem.position[i]) : 0;
  }
  // Returns cu_seqlens[i], clamped to the tokens of the call.
  __device__ static int64_t boundary(const Problem& problem, int64_t i) {
    const int64_t x = problem.cu_seqlens_is_64 ? static_cast<const int64_t*>(problem.cu_seqlens)[i]
                                               : static_cast<const int32_t*>(problem.cu_seqlens)[i];
    return x < 0 ? 0 : x > problem.tokens ? problem.tokens : x;
  }
  __device__ int64_t end() const { return position + length; }
};

}  // namespace blurry_attn::cuda
