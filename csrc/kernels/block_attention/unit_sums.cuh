#pragma once

#include <cstdint>

// Unit sums in 16 bits, as the attention kernel packs them and the launch after it reads them: of a row's sum over a
// unit, relative to the row's level in the piece, 7 bits of exponent and 9 of mantissa, rounded to nearest. The level
// is the logarithm of what the row's first tile adds up to, so that a row's total is not below it: what is lost is less
// than 2^-62 of the total. A tile whose sum is 2^kGrowth of the level is the new one; the units before it, which are
// then less than 2^-34 of the total, count as nothing.
//   relative error <= 2^-10; sums up to 2^(kGrowth + 14) of the level
namespace mage::cuda {

struct PackedSum {
    static constexpr float kGrowth = 48.0f;  // in log2
    static constexpr float kOne = 64.0f;     // log2 of what 1 is divided by, so that the exponent has 7 bits
    static constexpr int kDropped = 14;      // bits of the mantissa

    // Of a sum that has been divided by 2^kOne of the level.
    static __device__ __forceinline__ uint32_t pack(float sum) {
        return (__float_as_uint(sum) + (1u << (kDropped - 1))) >> kDropped;
    }

    // Of the lower or the upper half of a word; never NaN.
    static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float((word & 0xffffu) << kDropped); }
    static __device__ __forceinline__ float high(uint32_t word) {
        return __uint_as_float((word >> (16 - kDropped)) & (0xffffu << kDropped));
    }
};

}  // namespace mage::cuda
