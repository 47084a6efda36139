// Whether the threads' accesses of memory are ordered, for kernels compiled with -fsanitize=thread, whose calls
// races.cpp takes. Of two accesses of a byte, one of them a write, both must be one thread's, or a barrier that both
// threads wait at must lie between them; a collective operation that is no barrier orders nothing, and neither does
// anything between blocks of a launch. Accesses outside the memory that is known are found, too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator::races {

void enable();  // as compiled code does

// Memory that kernels may use, beside the program's own.
void know(const void* memory, size_t bytes);
void forget(const void* memory);

void begin_launch();
void begin_block();
void sync_warp(int warp);
void sync_warps(uint32_t warps);  // at a barrier that they all wait at
// What is ordered before those who wait for others that arrive, by warp.
struct Arrived {
  uint64_t before[32] = {};
};
void arrive(Arrived& arrived, int warp);
void join(const Arrived& arrived, int warp);
void access(const void* memory, size_t bytes, bool writes, const void* place = nullptr, size_t alignment = 1);

}  // namespace emulator::races
