// csrc/cuda/common/stretches.h for the emulator: stretches are so short that small problems have several.
#pragma once

#include "emulator.h"

namespace blurry_attn::cuda {

inline const int64_t &kAloneStretch = emulator::stretch, &kSharedStretch = emulator::stretch,
                     &kHalvedStretch = emulator::stretch, &kNarrowStretch = emulator::stretch,
                     &kWideStretch = emulator::stretch, &kHalvedPatchStretch = emulator::stretch;

}  // namespace blurry_attn::cuda
