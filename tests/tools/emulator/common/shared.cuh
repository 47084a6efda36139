// csrc/cuda/common/shared.cuh for the emulator: dynamic shared memory is its array.
#pragma once

#include "emulator.h"

namespace blurry_attn::cuda {

using emulator::shared_memory;

}  // namespace blurry_attn::cuda
