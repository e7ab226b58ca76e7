#pragma once

#include <cmath>

#include "emulator.h"

// In place of csrc/device/math.cuh.
namespace mage::device {

// ex2.approx.ftz, lg2.approx.ftz: results and arguments below 2^-126 count as 0.
inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) { return fabsf(x) < 0x1p-126f ? -INFINITY : log2f(x); }

// max.NaN.
inline float max_or_nan(float x, float y) {
    if (std::isnan(x)) return x;
    return x > y ? x : y;
}

inline void store_if(bool stores, float* to, float x, uint64_t) {
    if (stores) *to = x;
}
inline void store_16_bits_if(bool stores, void* to, uint32_t x, uint64_t) {
    const auto low = static_cast<uint16_t>(x);
    if (stores) memcpy(to, &low, sizeof low);
}

// discard.global.L2: what the line holds is undefined from now on.
inline void discard_line(const void* line) {
    if (reinterpret_cast<uintptr_t>(line) % 128 != 0) emulator::fail("discard.L2 of a line that is not on 128 bytes");
    memset(const_cast<void*>(line), 0xff, 128);
}
inline void discard_lines(const void* begin, int32_t bytes, int32_t lane) {
    const uint8_t* at = static_cast<const uint8_t*>(begin);
    const auto skipped = static_cast<int32_t>(-reinterpret_cast<uintptr_t>(begin) & 127);
    for (int32_t i = skipped + lane * 128; i + 128 <= bytes; i += 32 * 128) discard_line(at + i);
}

inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
inline float warp_max(float value) {
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}
inline float warp_max_or_nan(float value) {
    for (int step = 16; step > 0; step /= 2) value = max_or_nan(value, __shfl_xor_sync(~0u, value, step));
    return value;
}
inline float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

}  // namespace mage::device
