// This file builds the CPU kernel "fejer" (fejer.inl) once per instruction set.
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#define BLURRY_BODY "fejer.inl"
#include "each_isa.h"

BLURRY_DEFINE_ENTRIES(fejer)
