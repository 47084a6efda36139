// Into how long stretches time is cut, in tokens, as measured. The emulator has shorter ones of its own.
#pragma once

#include <cstdint>

namespace blurry_attn::cuda {

// "fejer": of a launch that has the card to itself, and of one that shares it; a sequence of so many is cut in two.
constexpr int64_t kAloneStretch = 4096, kSharedStretch = 1024, kHalvedStretch = 1024;

// "dirichlet": 128 heads of 8192 tokens, over all sequences, fill 132 multiprocessors once, with three blocks on each,
// or two where heads are wide.
constexpr int64_t kNarrowStretch = 2816, kWideStretch = 4096, kHalvedPatchStretch = 2048;

}  // namespace blurry_attn::cuda
