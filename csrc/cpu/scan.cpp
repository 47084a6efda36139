// Any kernel on the CPU as a scan over time: one build of scan.inl per instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#define BLURRY_BODY "scan.inl"
#include "each_isa.h"

BLURRY_DEFINE_ENTRIES(scan)
