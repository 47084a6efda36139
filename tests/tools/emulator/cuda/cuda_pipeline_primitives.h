#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::copy_async(to, from, static_cast<int>(bytes));
}
inline void __pipeline_commit() { emulator::commit_copies(); }
inline void __pipeline_wait_prior(int pending) { emulator::wait_copies(pending); }
