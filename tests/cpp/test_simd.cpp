// The baseline vectors; the other instruction sets run in the tests of the ops (MAGE_CPU_ISA).
#define MAGE_ISA_NAMESPACE isa_test
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cpu/simd/simd.h"

namespace mage::cpu::isa_test {
namespace {

TEST(Simd, EveryHalfComesBack) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const Float16 half = {static_cast<uint16_t>(bits)};
        const float value = to_float(half);
        Float16 back;
        from_float(value, &back);
        const int exponent = static_cast<int>(bits >> 10 & 31u);
        const double mantissa = bits & 0x3ffu;
        if (exponent == 31 && mantissa != 0) {
            EXPECT_TRUE(std::isnan(value) && std::isnan(to_float(back)));
            continue;
        }
        const double magnitude = exponent == 31  ? INFINITY
                                 : exponent == 0 ? std::ldexp(mantissa, -24)
                                                 : std::ldexp(1024 + mantissa, exponent - 25);
        ASSERT_EQ(value, (bits & 0x8000u) != 0 ? -magnitude : magnitude) << bits;
        ASSERT_EQ(back.bits, half.bits);
        const BFloat16 brain = {static_cast<uint16_t>(bits)};
        BFloat16 brain_back;
        from_float(to_float(brain), &brain_back);
        if (!std::isnan(to_float(brain))) {
            ASSERT_EQ(brain_back.bits, brain.bits);
        }
    }
}

TEST(Simd, RoundsToNearestEven) {
    // Between neighbours a < b of the 16-bit type: the middle goes to the even one, its neighbours in float32 to the
    // nearer one.
    for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
        const Float16 low = {static_cast<uint16_t>(bits)}, high = {static_cast<uint16_t>(bits + 1)};
        const float middle = (to_float(low) + to_float(high)) / 2;
        Float16 rounded;
        from_float(middle, &rounded);
        ASSERT_EQ(rounded.bits, bits % 2 == 0 ? bits : bits + 1) << bits;
        from_float(std::nextafter(middle, 0.0f), &rounded);
        ASSERT_EQ(rounded.bits, bits);
        from_float(std::nextafter(middle, 1e9f), &rounded);
        ASSERT_EQ(rounded.bits, bits + 1);
    }
    Float16 half;
    for (const float large : {65520.0f, 1e30f, INFINITY}) {
        from_float(-large, &half);
        EXPECT_EQ(half.bits, 0xfc00u);
    }
    from_float(65519.0f, &half);
    EXPECT_EQ(half.bits, 0x7bffu);
    BFloat16 brain;
    from_float(bits_to_float(0x3f808000u), &brain);  // halfway between 0x3f80 and 0x3f81
    EXPECT_EQ(brain.bits, 0x3f80u);
    from_float(bits_to_float(0x3f818000u), &brain);
    EXPECT_EQ(brain.bits, 0x3f82u);
    from_float(bits_to_float(0x3f808001u), &brain);
    EXPECT_EQ(brain.bits, 0x3f81u);
    from_float(NAN, &brain);
    EXPECT_TRUE(std::isnan(to_float(brain)));
}

float exp2_of(float x) {
    float lanes[kWidth];
    store(lanes, exp2(set1(x)));
    for (int i = 1; i < kWidth; ++i) EXPECT_EQ(float_to_bits(lanes[i]), float_to_bits(lanes[0]));
    return lanes[0];
}

TEST(Simd, Exp2) {
    std::mt19937 random(3);
    std::uniform_real_distribution<float> uniform(-126.0f, 127.4f);
    for (int i = 0; i < 200000; ++i) {
        const float x = uniform(random);
        const double exact = std::exp2(static_cast<double>(x));
        ASSERT_NEAR(exp2_of(x), exact, 2e-7 * exact) << x;
    }
    EXPECT_EQ(exp2_of(0.0f), 1.0f);
    EXPECT_EQ(exp2_of(-3.0f), 0.125f);
    EXPECT_EQ(exp2_of(-126.0f), 0x1p-126f);
    for (const float x : {-126.1f, -150.0f, -1e30f, -INFINITY}) EXPECT_EQ(exp2_of(x), 0.0f) << x;
    for (const float x : {128.0f, 1e30f, INFINITY}) EXPECT_EQ(exp2_of(x), INFINITY) << x;
    EXPECT_TRUE(std::isnan(exp2_of(NAN)));
}

TEST(Simd, ReductionsKeepNan) {
    for (int at = 0; at < kWidth; ++at) {
        float lanes[kWidth];
        for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i - 1);
        EXPECT_EQ(reduce_add(load(lanes)), static_cast<float>(kWidth * (kWidth - 1) / 2 - kWidth));
        lanes[at] = 50.0f;
        EXPECT_EQ(reduce_max(load(lanes)), 50.0f);
        lanes[at] = NAN;
        EXPECT_TRUE(std::isnan(reduce_add(load(lanes))));
        EXPECT_TRUE(std::isnan(reduce_max(load(lanes))));
        EXPECT_TRUE(std::isnan(reduce_max(max_or_nan(load(lanes), set1(1.0f)))));
        EXPECT_TRUE(std::isnan(reduce_max(max_or_nan(set1(1.0f), load(lanes)))));
    }
}

TEST(Simd, RowsOfAnyLength) {
    for (int count = 0; count < 40; ++count) {
        std::vector<float> values(count), back(count + 1, -1.0f);
        std::vector<BFloat16> stored(count);
        for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i) / 8.0f;
        round_row(values.data(), stored.data(), count);
        convert_row(stored.data(), back.data(), count);
        for (int i = 0; i < count; ++i) ASSERT_EQ(back[i], values[i]);
        ASSERT_EQ(back[count], -1.0f);
    }
}

}  // namespace
}  // namespace mage::cpu::isa_test
