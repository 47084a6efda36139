// This header defines the angles of a rotary embedding (https://arxiv.org/abs/2104.09864) in the rotate-half form, for
// host and device. The pair (i, i + dim / 2) of a token turns by position * rotary_frequency(i) radians. Angles in
// float64 keep their digits at any position that a state of constant size may reach.
#pragma once

#include <cmath>
#include <cstdint>

#include "law.h"

namespace blurry_attn {

BLURRY_HOST_DEVICE inline double rotary_frequency(int64_t pair, int64_t dim, double base) {
  return std::pow(base, -2.0 * static_cast<double>(pair) / static_cast<double>(dim));
}

}  // namespace blurry_attn
