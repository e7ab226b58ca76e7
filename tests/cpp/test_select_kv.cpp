#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "mage/error.h"
#include "mage/select_kv.h"
#include "select_kv_cases.h"

namespace mage::test {
namespace {

std::string error_of(const SelectKvParams& params) {
    try {
        cpu::select_kv(params);
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

TEST(SelectKv, FixedTakesTheHeaviestUnits) {
    SelectBuffers buffers(1, 1, 1, 6, 16, 4);
    buffers.mass = {0.1f, 0.3f, 0.1f, 0.2f, 0.1f, 0.2f};
    buffers.params.mass = buffers.mass.data();
    buffers.params.k = 48;
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.list(0), (std::vector<int32_t>{1, 3, 5}));
    EXPECT_EQ(buffers.indices[3], -1);
    EXPECT_NEAR(buffers.kept_mass[0], 0.7f, 1e-6f);
    EXPECT_EQ(buffers.tail_start[0], 96);
    EXPECT_FALSE(buffers.overflow[0]);

    buffers.params.k = 96;  // six units, but a list has room for four: the heaviest, then the lowest of equal ones
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.list(0), (std::vector<int32_t>{0, 1, 3, 5}));
    EXPECT_TRUE(buffers.overflow[0]);

    buffers.lengths[0] = 85;  // unit 5 is partial: not listed, charged, kept
    buffers.params.k = 48;
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.list(0), (std::vector<int32_t>{1, 3}));
    EXPECT_NEAR(buffers.kept_mass[0], 0.7f, 1e-6f);
    EXPECT_EQ(buffers.tail_start[0], 80);

    buffers.lengths[0] = 0;
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.counts[0], 0);
    EXPECT_EQ(buffers.tail_start[0], 0);
}

TEST(SelectKv, BrokenMassesRankLastAndNothingIsReadOutside) {
    SelectBuffers buffers(1, 1, 1, 5, 1, 5);
    buffers.mass = {NAN, -1.0f, INFINITY, 1e-41f, 0.0f};
    buffers.params.mass = buffers.mass.data();
    buffers.params.k = 4;
    buffers.lengths[0] = 2147483647;
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.list(0), (std::vector<int32_t>{1, 2, 3, 4}));
    EXPECT_EQ(buffers.kept_mass[0], 1.0f);  // infinity counts as 1, a denormal as 0
    EXPECT_EQ(buffers.tail_start[0], 5);
    buffers.lengths[0] = -2147483647;
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.counts[0], 0);
}

TEST(SelectKv, SumsAreTheSameBitsForAnyNumberOfThreads) {
    SelectBuffers buffers(4, 3, 2, 9000, 1, 600);
    std::mt19937 random(1);
    std::exponential_distribution<float> exponential(9000.0f);
    for (float& mass : buffers.mass) mass = exponential(random);
    buffers.params.k = 512;
    buffers.params.sinks = 4;
    buffers.params.recents = 64;
    buffers.params.p = 0.3;
    buffers.lengths = {9000, 8999, 17};
    for (const auto rule : {SelectRule::kFixed, SelectRule::kMass, SelectRule::kJoint}) {
        buffers.params.rule = rule;
        core::set_num_threads(1);
        cpu::select_kv(buffers.params);
        const auto indices = buffers.indices;
        const auto kept_mass = buffers.kept_mass;
        core::set_num_threads(5);
        cpu::select_kv(buffers.params);
        EXPECT_EQ(buffers.indices, indices);
        EXPECT_EQ(buffers.kept_mass, kept_mass);
    }
    core::set_num_threads(0);
}

TEST(SelectKv, LayerBudgetsFollowUnionAndCoverage) {
    SelectBuffers buffers(2, 1, 2, 10, 16, 10);
    std::vector<int32_t> votes(40, 0);
    votes[3] = 9;
    votes[7] = 1;
    const std::vector<int32_t> union_size = {1, 2, 3, 6};
    const std::vector<float> coverage(4, 1.0f);
    buffers.params.rule = SelectRule::kLayer;
    buffers.params.k = 64;  // 8 units for two layers, scores 2 and 6
    buffers.params.votes = votes.data();
    buffers.params.union_size = union_size.data();
    buffers.params.coverage = coverage.data();
    cpu::select_kv(buffers.params);
    EXPECT_EQ(buffers.list(0), (std::vector<int32_t>{3, 7}));
    EXPECT_EQ(buffers.list(1), (std::vector<int32_t>{8, 9}));  // no votes: the most recent
    EXPECT_EQ(buffers.counts, (std::vector<int32_t>{2, 2, 6, 6}));
}

TEST(SelectKv, ErrorsNameTheArgument) {
    SelectBuffers buffers(1, 1, 1, 4, 16, 2);
    const auto message_with = [&](auto change) {
        SelectKvParams params = buffers.params;
        change(params);
        return error_of(params);
    };
    EXPECT_EQ(message_with([](auto&) {}), "");
    EXPECT_EQ(message_with([](auto& p) { p.granularity = 48; }), "select_kv: g must be 1, 16, 32 or 64, got 48");
    EXPECT_EQ(message_with([](auto& p) { p.k = 24; }), "select_kv: k must be a multiple of g = 16, got 24");
    EXPECT_EQ(message_with([](auto& p) { p.recents = -1; }), "select_kv: recents must be in [0, 1073741824], got -1");
    EXPECT_EQ(message_with([](auto& p) { p.capacity = 0; }), "select_kv: capacity must be in [1, 4194304], got 0");
    EXPECT_EQ(message_with([](auto& p) {
                  p.rule = SelectRule::kMass;
                  p.p = NAN;
              }),
              "select_kv: p must be in (0, 1] with rule \"mass\", got nan");
    EXPECT_NE(message_with([](auto& p) { p.rule = SelectRule::kLayer; }).find("votes, union_size and coverage must be"),
              std::string::npos);
    EXPECT_NE(message_with([](auto& p) { p.mass = nullptr; }).find("got a null pointer"), std::string::npos);
    EXPECT_EQ(select_kv_workspace(1, 1, 1, 4, 2), 0);
}

}  // namespace
}  // namespace mage::test
