// float16: conversions round to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};
struct alignas(4) __half2_raw {
  unsigned short x, y;
};

struct __half {
  uint16_t bits;

  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  __half(float x) {
    const unsigned word = __float_as_uint(x), sign = word >> 16 & 0x8000u, most = word & 0x7fffffffu;
    unsigned half;
    if (most > 0x7f800000u) {
      half = 0x7fffu;
    } else if (most >= 0x47800000u) {  // 2^16 and more
      half = 0x7c00u;
    } else if (most < 0x38800000u) {  // less than 2^-14: a multiple of 2^-24, which the addition rounds to
      half = __float_as_uint(__uint_as_float(most) + .5f) - 0x3f000000u;
    } else {
      half = (most - 0x38000000u + 0xfffu + (most >> 13 & 1)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  operator float() const {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent > 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -small : small;
  }
};
struct alignas(4) __half2 {
  __half x, y;

  __half2() = default;
  __half2(__half x, __half y) : x(x), y(y) {}
  __half2(__half2_raw raw) : x(__half_raw{raw.x}), y(__half_raw{raw.y}) {}
};

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }
