// csrc/cuda/common/ptx.cuh for the emulator: the same functions without instructions of a card. What lanes do together
// goes through emulator::together: each brings its part, the last to come computes for all.
#pragma once

#include <type_traits>

#include "common/numbers.cuh"

namespace blurry_attn::cuda {

template <typename storage>
inline uint32_t pack(float low, float high) {
  const storage pair[2] = {to_storage<storage>(low), to_storage<storage>(high)};
  return emulator_bits<uint32_t>(pair);
}
template <typename storage>
inline float2 unpack(uint32_t pair) {
  return to_floats<storage>(pair);
}

// Each lane's part of the operands as the header of csrc/cuda/mma.cuh lays them out.
template <typename storage>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::together(kAllLanes, "mma", mine, [](Lane* const* lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < kWarp; ++l) {
      const Lane& lane = *lanes[l];
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<storage>(lane.a[i]);
        const int row = g + i % 2 * 8, column = 2 * q + i / 2 * 8;
        a[row][column] = pair.x;
        a[row][column + 1] = pair.y;
        d[g + i / 2 * 8][2 * q + i % 2] = lane.d[i];
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack<storage>(lane.b[i]);
        b[2 * q + 8 * i][g] = pair.x;
        b[2 * q + 8 * i + 1][g] = pair.y;
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) lanes[l]->d[i] = d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
    }
  });
}

inline uint32_t to_tf32(float x) { return (emulator_bits<uint32_t>(x) + 0x1000u) & 0xffffe000u; }
inline void mma_tf32(float (&d)[4], const uint32_t (&x)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* d;
    const uint32_t *x, *b;
  } mine{d, x, b};
  emulator::together(kAllLanes, "mma_tf32", mine, [](Lane* const* lanes) {
    const auto number = [](uint32_t bits) { return emulator_bits<float>(bits & 0xffffe000u); };
    float x[16][8], b[8][8], d[16][8];
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 4; ++i) {
        x[g + i / 2 * 8][2 * q + i % 2] = number(lanes[l]->x[i]);
        d[g + i / 2 * 8][2 * q + i % 2] = lanes[l]->d[i];
      }
      for (int i = 0; i < 2; ++i) b[2 * q + i][g] = number(lanes[l]->b[i]);
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 8; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += x[row][k] * b[k][column];
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) lanes[l]->d[i] = d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
    }
  });
}

template <typename storage>
inline bool finite(const uint4& words) {
  for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
    const float2 pair = unpack<storage>(word);
    if (!(fabsf(pair.x) < INFINITY && fabsf(pair.y) < INFINITY)) return false;
  }
  return true;
}

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
inline float exp2_fast(float x) { return flushed(exp2f(flushed(x))); }
inline float log2_fast(float x) { return log2f(flushed(x)); }

inline uint4 load_global(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("load_global: the address is not aligned");
  return *static_cast<const uint4*>(from);
}

inline void store_global(void* to, uint4 x) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("store_global: the address is not aligned");
  *static_cast<uint4*>(to) = x;
}

inline int hidden(int x) { return x; }

inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }
inline uint4 load_shared(uint32_t address) { return *reinterpret_cast<const uint4*>(emulator::shared_at(address, 16)); }
inline void store_shared(uint32_t address, uint4 x) { *reinterpret_cast<uint4*>(emulator::shared_at(address, 16)) = x; }

// A lane reads its row when it comes, as nothing but a barrier says that the other lanes' stores are there.
template <bool transposed>
inline void load_matrices_any(uint32_t (&x)[4], uint32_t address) {
  struct Lane {
    uint16_t row[8];
    uint32_t* x;
  } mine;
  std::memcpy(mine.row, emulator::shared_at(address, 16), 16);
  mine.x = x;
  emulator::together(kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", mine, [](Lane* const* lanes) {
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, q = l % 4;
      for (int m = 0; m < 4; ++m) {
        Lane* const* const rows = lanes + 8 * m;
        const uint32_t low = transposed ? rows[2 * q]->row[g] : rows[g]->row[2 * q];
        const uint32_t high = transposed ? rows[2 * q + 1]->row[g] : rows[g]->row[2 * q + 1];
        lanes[l]->x[m] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&x)[4], uint32_t address) { load_matrices_any<false>(x, address); }
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) { load_matrices_any<true>(x, address); }

inline uint32_t transpose(uint32_t x) {
  struct Lane {
    uint32_t given, taken;
  } mine{x, 0};
  emulator::together(kAllLanes, "movmatrix", mine, [](Lane* const* lanes) {
    const auto at = [&](int row, int column) {
      return lanes[4 * row + column / 2]->given >> column % 2 * 16 & 0xffffu;
    };
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, q = l % 4;
      lanes[l]->taken = at(2 * q, g) | at(2 * q + 1, g) << 16;
    }
  });
  return mine.taken;
}

inline void store_shared_word(uint32_t address, uint32_t x) {
  *reinterpret_cast<uint32_t*>(emulator::shared_at(address, 4)) = x;
}
template <bool transposed>
inline void store_matrices_any(uint32_t address, const uint32_t (&x)[4]) {
  struct Lane {
    uint32_t address;
    const uint32_t* x;
  } mine{address, x};
  emulator::together(kAllLanes, transposed ? "stmatrix.trans" : "stmatrix", mine, [](Lane* const* lanes) {
    for (int m = 0; m < 4; ++m) {
      for (int row = 0; row < 8; ++row) {
        auto* const to = reinterpret_cast<uint16_t*>(emulator::shared_at(lanes[8 * m + row]->address, 16));
        for (int column = 0; column < 8; ++column) {
          const int g = transposed ? column : row, d = transposed ? row : column;
          to[column] = static_cast<uint16_t>(lanes[4 * g + d / 2]->x[m] >> d % 2 * 16);
        }
      }
    }
  });
}
inline void store_matrices(uint32_t address, const uint32_t (&x)[4]) { store_matrices_any<false>(address, x); }
inline void store_matrices_transposed(uint32_t address, const uint32_t (&x)[4]) {
  store_matrices_any<true>(address, x);
}

template <int>
inline void give_registers() {}
template <int>
inline void take_registers() {}

inline void barrier_init(uint32_t barrier, int count) { emulator::init_turns(emulator::shared_at(barrier, 8), count); }
inline void barrier_arrive(uint32_t barrier) { emulator::arrive_at_turn(emulator::shared_at(barrier, 8)); }
inline void barrier_wait(uint32_t barrier, int parity) {
  emulator::wait_for_turn(emulator::shared_at(barrier, 8), parity);
}

inline void copy_async_or_zero(uint32_t to, const void* from, bool valid) {
  emulator::copy_async(emulator::shared_at(to, 16), valid ? from : nullptr, 16);
}
inline void copy_async(uint32_t to, const void* from) { copy_async_or_zero(to, from, true); }
inline void commit_copies() { emulator::commit_copies(); }
template <int pending>
inline void wait_copies() {
  emulator::wait_copies(pending);
}

}  // namespace blurry_attn::cuda
