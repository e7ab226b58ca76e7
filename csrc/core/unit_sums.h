#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/attention_schedule.h"

// Unit sums in 16 bits, as the attention kernel packs them and the launch after it reads them; pure arithmetic, the
// same on the host (tests). Logarithms are to base 2.
//
// A row's sum over a unit is kept relative to a level of the row in its piece: 7 bits of exponent, 9 of mantissa,
// rounded to nearest, so within 2^-10 of itself. The first tile of which the row sees something adds up to the first
// level. A tile is looked at where the row's maximum has grown by 2^8, and is the next level if it adds up to more than
// 2^kGrowth of the last. Units keep the level that was theirs, of the last two; those of older ones count as nothing.
//   The row's total is not below a level: of sums below 2^-62 of it, which are lost, little is missed.
//   Between two looks terms are below 2^8 of the maximum, and a tile has up to 2^7 of them: sums stay below
//   2^(kGrowth + 15) of their level, which 7 bits hold, and those of the level before the last two are below 2^-33 of
//   the last.
namespace mage::core {

struct PackedSum {
    static constexpr float kGrowth = 48.0f;
    static constexpr float kOne = 64.0f;  // what 1 is divided by, so that the exponent has 7 bits
    static constexpr int kDropped = 14;   // bits of the mantissa

    // Of a sum that has been divided by 2^kOne of the level.
    static MAGE_BOTH uint32_t pack(float sum) { return (bits_of(sum) + (1u << (kDropped - 1))) >> kDropped; }

    // Of the lower or the upper half of a word; never NaN.
    static MAGE_BOTH float low(uint32_t word) { return float_of((word & 0xffffu) << kDropped); }
    static MAGE_BOTH float high(uint32_t word) { return float_of((word >> (16 - kDropped)) & (0xffffu << kDropped)); }

    static MAGE_BOTH uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
        return __float_as_uint(x);
#else
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        return bits;
#endif
    }
    static MAGE_BOTH float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
        return __uint_as_float(bits);
#else
        float x;
        std::memcpy(&x, &bits, sizeof(x));
        return x;
#endif
    }
};

// The last two levels of a row in a piece, each times 2^kOne, and the tokens from which on they are. -inf: none.
struct alignas(16) UnitLevels {
    float level;
    int32_t begin;
    float previous;
    int32_t previous_begin;
};
MAGE_BOTH UnitLevels no_levels() { return {-INFINITY, 0, -INFINITY, 0}; }

// Whether a tile that adds up to `tile` is the next level; NaN is not.
MAGE_BOTH bool is_next_level(float tile, float level) { return tile > level + PackedSum::kGrowth; }

MAGE_BOTH UnitLevels with_level(const UnitLevels& levels, float level, int32_t token) {
    return {level, token, levels.level, levels.begin};
}

// That of the unit which begins at a token, or `none`.
MAGE_BOTH float level_at(const UnitLevels& levels, int32_t token, float none = -INFINITY) {
    return token >= levels.begin ? levels.level : token >= levels.previous_begin ? levels.previous : none;
}

}  // namespace mage::core
