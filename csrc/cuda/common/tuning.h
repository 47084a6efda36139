// This file names the lengths, orders and shares that were measured. docs/design/experiments.md has the measurements.
#pragma once

#include <cstdint>

#include "common/stretches.h"

namespace blurry_attn::cuda {

// This is the size of a large card. The card at hand is not asked, so that gradients have the same bits on all cards.
constexpr int64_t kMultiprocessors = 132;

// For "fejer", these are the orders in which launches of the classes of heads begin (fejer/classes.cuh). The first
// index says whether a head_dim is over 64. With a quarter of the heads at r = 1, 2, 4 and 8 each, all launches then
// end soonest.
constexpr int kForwardOrder[2][5] = {{4, 1, 3, 0, 2}, {3, 1, 4, 0, 2}};
constexpr int kBackwardOrder[2][5] = {{0, 3, 4, 1, 2}, {0, 4, 1, 3, 2}};
// Where several classes share the card, their backward walks have this many blocks in all. Each class has a share of
// them, in halves of an even one.
constexpr int64_t kSharedBlocks = 4 * kMultiprocessors;
constexpr int64_t kHalves[2][5] = {{2, 2, 2, 1, 2}, {1, 2, 2, 2, 1}};
// A stretch is at least this many warm-ups long, if its launch has the card to itself and if it shares it.
constexpr int64_t kAloneWarmUps = 8, kSharedWarmUps = 2;
// A stretch of a backward walk has at least this many tokens.
constexpr int64_t kLeastStretch = 128;
// Two multiprocessors share a cache for instructions, so a pair of them gets blocks of one launch.
constexpr int kPair = 2;

// For the scan, these bound the numbers in a workspace of logits or weights, and the shared memory of a chunk of rows.
// A block has two chunks. kScanReadsAhead tokens of a slot are read at once.
constexpr int64_t kScanWeights = int64_t(1) << 26, kScanChunkBytes = 10 << 10;
constexpr int kScanReadsAhead = 8;

// For the rotary embedding, a multiprocessor has kRotaryBlocks blocks, so that enough rows are on their way. Where a
// launch has fewer threads than kRotaryThreads, heads are divided among more threads.
constexpr int kRotaryBlocks = 4;
constexpr int64_t kRotaryThreads = 1 << 17;

}  // namespace blurry_attn::cuda
