#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/debug.h"
#include "mage/error.h"

namespace mage::test {
namespace {

template <typename Check>
std::string error_of(Check check) {
    try {
        check();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

TEST(Debug, ValuesAndOrder) {
    const std::vector<int32_t> lengths = {0, 5, 6, -1};
    EXPECT_EQ(error_of([&] { core::check_values("op", "x", lengths.data(), 3, 0, 6); }), "");
    EXPECT_EQ(error_of([&] { core::check_values("op", "x", lengths.data(), 4, 0, 6); }),
              "op: x[3] must be in [0, 6], got -1");
    EXPECT_EQ(error_of([&] { core::check_nondecreasing("op", "x", lengths.data(), 1, 3); }), "");
    EXPECT_EQ(error_of([&] { core::check_nondecreasing("op", "x", lengths.data(), 2, 2); }),
              "op: x[1, 1] must be >= 6, the entry before it, got -1");
}

TEST(Debug, PagesThatHoldTokens) {
    const std::vector<int32_t> ids = {0, -1, 2, 1, -5, 7};
    PageTable table;
    table.block_table = ids.data();
    table.stride_request = 3;
    table.max_pages = 3;
    table.page_size = 16;
    table.num_pages = 8;
    const std::vector<int32_t> within = {16, 16}, beyond = {16, 17};
    EXPECT_EQ(error_of([&] { core::check_pages("op", table, 2, within.data()); }), "");
    EXPECT_EQ(error_of([&] { core::check_pages("op", table, 2, beyond.data()); }),
              "op: block_table[1, 1] must be in [0, 8), got -5");

    const auto written = [&](std::vector<int32_t> start, int64_t rows) {
        return error_of([&] { core::check_written_pages("op", table, 2, start.data(), rows); });
    };
    EXPECT_EQ(written({32, 40}, 8), "");
    EXPECT_EQ(written({-8, -1000}, 8), "");  // nothing is written
    EXPECT_EQ(written({10, 48}, 9), "");     // no page, and past the table
    EXPECT_EQ(written({32, 49}, 8), "op: start[1] must be in [0, 48] (or at most -8 to write nothing), got 49");
    EXPECT_EQ(written({-7, 40}, 8), "op: start[0] must be in [0, 48] (or at most -8 to write nothing), got -7");
    EXPECT_EQ(written({32, 30}, 8), "op: block_table[1, 1] must be in [-1, 8), got -5");
}

TEST(Debug, Lists) {
    std::vector<int32_t> indices = {0, 2, 3, -1, 1, -1, -1, -1};
    std::vector<int32_t> counts = {3, 1}, tail_start = {64};
    const auto check = [&] {
        return error_of(
            [&] { core::check_lists("op", indices.data(), counts.data(), tail_start.data(), 1, 2, 4, 16); });
    };
    EXPECT_EQ(check(), "");
    indices[1] = 0;
    EXPECT_EQ(check(), "op: indices[0, 0, 1] must be above the entry before it, 0, got 0");
    indices[1] = 2;
    tail_start[0] = 48;
    EXPECT_EQ(check(), "op: indices[0, 0, 2] must be in [0, 3), got 3");
    tail_start[0] = 65;
    EXPECT_EQ(check(), "op: tail_start[0] must be a multiple of g = 16 >= 0, got 65");
    tail_start[0] = 64;
    counts[1] = 5;
    EXPECT_EQ(check(), "op: counts[0, 1] must be in [0, 4], got 5");
}

TEST(Debug, SwitchKeepsItsState) {
    const bool before = core::debug_flag().exchange(true);
    EXPECT_TRUE(core::debug_enabled());
    core::debug_flag() = before;
}

}  // namespace
}  // namespace mage::test
