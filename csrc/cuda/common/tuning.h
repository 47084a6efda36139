// Lengths, orders and shares that were measured, by name. docs/design/experiments.md has the measurements.
#pragma once

#include <cstdint>

#include "common/stretches.h"

namespace blurry_attn::cuda {

// Of a large card. Not asked of the one at hand: gradients' bits are the same on all of them.
constexpr int64_t kMultiprocessors = 132;

// "fejer", by class of heads (fejer/classes.cuh), for head sizes up to 64 and over: the order in which launches begin,
// after which all have ended soonest with a quarter of the heads at r = 1, 2, 4 and 8 each;
constexpr int kForwardOrder[2][5] = {{4, 1, 3, 0, 2}, {3, 1, 4, 0, 2}};
constexpr int kBackwardOrder[2][5] = {{0, 3, 4, 1, 2}, {0, 4, 1, 3, 2}};
// of the walk back's blocks, those of all classes where several share the card, and each class's share in halves;
constexpr int64_t kSharedBlocks = 4 * kMultiprocessors;
constexpr int64_t kHalves[2][5] = {{2, 2, 2, 1, 2}, {1, 2, 2, 2, 1}};
// how many warm-ups long a stretch is at least, if a launch has the card to itself and if it shares it;
constexpr int64_t kAloneWarmUps = 8, kSharedWarmUps = 2;
// the least tokens of a stretch back.
constexpr int64_t kLeastStretch = 128;
// Two multiprocessors share a cache for instructions: they get blocks of one launch.
constexpr int kPair = 2;

// The scan: numbers in a workspace of logits or weights; shared memory of a chunk of rows, of which a block has two;
// tokens of a slot that are read at once.
constexpr int64_t kScanWeights = int64_t(1) << 26, kScanChunkBytes = 10 << 10;
constexpr int kScanReadsAhead = 8;

// Rotary embedding: blocks of a multiprocessor, so that enough rows are on their way; where there are fewer threads
// than this, heads are divided among more.
constexpr int kRotaryBlocks = 4;
constexpr int64_t kRotaryThreads = 1 << 17;

}  // namespace blurry_attn::cuda
