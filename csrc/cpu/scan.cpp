// This file builds the scan over time (scan.inl), which serves any kernel, once per instruction set of a CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#define BLURRY_BODY "scan.inl"
#include "each_isa.h"

BLURRY_DEFINE_ENTRIES(scan)
