// CUDA on the CPU, for tests of the kernels' logic: every CUDA thread is a fiber, blocks run one after another. Warps
// are scheduled at random and so are the lanes of a warp between two collective operations; new shared memory is NaN;
// an asynchronous copy lands as late (or, in some blocks, as early) as it may. Misuse throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kLanes = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kSharedBase = 1024;  // the 32-bit address of shared_memory: zero is none

extern unsigned char shared_memory[];  // of the block that runs
// Of common/stretches.h: small problems then have several stretches.
extern int64_t stretch;
extern int objects;        // streams and events that there are
extern int until_failure;  // calls that make one and succeed before one that fails; below zero: none fails

// Bound to a source line by the macros in cuda_runtime.h.
struct Place {
  const char* file;
  int line;
};

void seed(uint64_t number);
[[noreturn]] void fail(const std::string& what);

size_t& shared_limit(const void* kernel);  // bytes that a launch may ask for

// Runs `kernel(arguments)` once per thread of the grid.
void run_grid(Index grid, Index block, size_t shared_bytes, void (*kernel)(const void*), const void* arguments,
              size_t argument_bytes);

// Waits for `count` of the block's threads, all that have not ended if 0, at barrier `id`; whether one brought `value`.
bool wait_at_barrier(int id, int count, bool value, Place place);

// A barrier in shared memory: `count` threads arrive in each turn, others wait until the turn of a parity is over.
void init_turns(void* barrier, int count);
void arrive_at_turn(void* barrier);
void wait_for_turn(void* barrier, int parity);

// Every lane of `mask` brings a `mine`; the last to come runs body(lanes), which may read and write all of them.
void meet(unsigned mask, const char* name, void* mine, const void* body, void (*run)(const void*, void* const*));
template <typename type, typename body_type>
void together(unsigned mask, const char* name, type& mine, const body_type& body) {
  meet(mask, name, &mine, &body, [](const void* of, void* const* lanes) {
    (*static_cast<const body_type*>(of))(reinterpret_cast<type* const*>(lanes));
  });
}
int lane();
int thread_number();  // in its block; below zero outside of kernels
bool is_stack(const void* pointer);
size_t shared_size();  // of the launch

// Copies into shared memory in the background, by thread; null is zeros.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);  // until at most that many groups are left

// The bytes at a 32-bit address in shared memory, or at a pointer into it: aligned and of the launch's.
unsigned char* shared_at(uint32_t address, int bytes);
void check_shared(const void* pointer, int bytes);

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs
