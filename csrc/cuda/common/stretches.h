// These constants, which were measured, say how long the stretches are into which time is cut, in tokens. The emulator
// has shorter ones (tests/tools/emulator/common/stretches.h).
#pragma once

#include <cstdint>

namespace blurry_attn::cuda {

// For "fejer", these are the least `length` of a plan whose launch has the card to itself, and of one whose launch
// shares it. The third is the least length of a sequence that is cut in two.
constexpr int64_t kAloneStretch = 4096, kSharedStretch = 1024, kHalvedStretch = 1024;

// For "dirichlet", 128 heads of 8192 tokens, over all sequences, fill 132 multiprocessors once. A multiprocessor has
// three blocks, or two where heads are wide. The third is the least length of a sequence that is cut in two.
constexpr int64_t kNarrowStretch = 2816, kWideStretch = 4096, kHalvedPatchStretch = 2048;

}  // namespace blurry_attn::cuda
