#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "core/row_votes_tiles.h"
#include "mage/error.h"
#include "row_votes_cases.h"

namespace mage::test {
namespace {

TEST(RowVotes, EveryRowTakesItsOwnTopUnits) {
    VoteBuffers buffers(1, 1, 4, 2, 16);
    const float shares[4][2] = {{0.5f, 0.1f}, {0.2f, 0.2f}, {0.2f, 0.3f}, {0.1f, 0.4f}};
    for (int64_t unit = 0; unit < 4; ++unit) {
        for (int64_t row = 0; row < 2; ++row) buffers.share(0, unit, row) = std::log(shares[unit][row]);
    }
    buffers.params.k = 32;
    cpu::row_votes(buffers.params);
    EXPECT_EQ(buffers.votes, (std::vector<int32_t>{1, 1, 1, 1}));  // row 0: 0 and, of equal ones, 1; row 1: 3 and 2
    EXPECT_EQ(buffers.union_size[0], 4);
    EXPECT_NEAR(buffers.coverage[0], 1.0f, 1e-6f);

    buffers.params.k = 16;
    buffers.lengths[0] = 63;  // unit 3 can't be chosen
    cpu::row_votes(buffers.params);
    EXPECT_EQ(buffers.votes, (std::vector<int32_t>{1, 0, 1, 0}));
    EXPECT_NEAR(buffers.coverage[0], (0.7f + 0.4f) / 2, 1e-6f);

    const bool row_mask[2] = {false, true};
    buffers.params.row_mask = row_mask;
    buffers.params.num_positions = 2;
    cpu::row_votes(buffers.params);
    EXPECT_EQ(buffers.votes, (std::vector<int32_t>{0, 0, 1, 0}));
    EXPECT_NEAR(buffers.coverage[0], 0.3f, 1e-6f);
}

TEST(RowVotes, NothingToChooseFrom) {
    VoteBuffers buffers(1, 2, 3, 5, 1);  // shares of 0 everywhere
    std::fill_n(buffers.row_mass.begin(), 5, NAN);
    buffers.params.k = 3;
    cpu::row_votes(buffers.params);
    EXPECT_EQ(buffers.votes, std::vector<int32_t>(6, 0));
    EXPECT_EQ(buffers.union_size, std::vector<int32_t>(2, 0));
    EXPECT_EQ(buffers.coverage, std::vector<float>(2, 0.0f));
}

// Against sorting, with ties, odd numbers of rows and several threads.
TEST(RowVotes, AgreesWithSorting) {
    std::mt19937 random(3);
    VoteBuffers buffers(2, 2, 1300, 37, 16);
    for (float& share : buffers.row_mass) share = -static_cast<float>(random() % 64) / 4;
    buffers.params.k = 20 * 16;
    buffers.lengths = {1300 * 16, 777 * 16 + 5};
    std::vector<int32_t> expected(buffers.votes.size(), 0);
    for (int64_t head = 0; head < 4; ++head) {
        const int64_t eligible = buffers.lengths[head / 2] / 16;
        for (int64_t row = 0; row < 37; ++row) {
            std::vector<int64_t> order(eligible);
            for (int64_t unit = 0; unit < eligible; ++unit) order[unit] = unit;
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
                return buffers.share(head, a, row) > buffers.share(head, b, row);
            });
            for (int64_t i = 0; i < 20; ++i) ++expected[head * 1300 + order[i]];
        }
    }
    std::vector<float> coverage;
    for (const int threads : {1, 4}) {
        core::set_num_threads(threads);
        cpu::row_votes(buffers.params);
        EXPECT_EQ(buffers.votes, expected);
        if (threads == 1) coverage = buffers.coverage;
        EXPECT_EQ(buffers.coverage, coverage);
    }
    core::set_num_threads(0);
}

class RowVotesCases : public testing::TestWithParam<VoteCase> {};

TEST_P(RowVotesCases, EqualTheContract) {
    VoteBuffers buffers = vote_buffers(GetParam());
    buffers.bind();
    const RowVotesParams& p = buffers.params;
    cpu::row_votes(p);
    for (int64_t head = 0; head < p.num_requests * p.num_kv_heads; ++head) {
        const int64_t request = head / p.num_kv_heads, g = p.granularity;
        const int64_t eligible = std::clamp<int64_t>(buffers.lengths[request], 0, p.num_units * g) / g;
        std::vector<int32_t> votes(p.num_units, 0);
        std::vector<int64_t> kept;
        for (int64_t row = 0; row < p.num_rows; ++row) {
            const int64_t group = p.row_mask ? p.num_rows / p.num_positions : 1;
            if (p.row_mask && !p.row_mask[request * p.num_positions + row / group]) continue;
            kept.push_back(row);
            std::vector<int64_t> order;
            for (int64_t unit = 0; unit < eligible; ++unit) {
                if (buffers.share(head, unit, row) > -INFINITY) order.push_back(unit);
            }
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
                return buffers.share(head, a, row) > buffers.share(head, b, row);
            });
            order.resize(std::min<size_t>(order.size(), p.k / g));
            for (const int64_t unit : order) ++votes[unit];
        }
        double coverage = 0.0;
        for (const int64_t row : kept) {
            double total = 0.0, inside = 0.0;
            for (int64_t unit = 0; unit < p.num_units; ++unit) {
                const double log_share = buffers.share(head, unit, row);
                const double share = std::isnan(log_share) ? 0.0 : std::exp(std::min(log_share, 0.0));
                total += share;
                if (votes[unit] > 0) inside += share;
            }
            if (total > 0.0) coverage += inside / total / static_cast<double>(kept.size());
        }
        const int32_t* actual = p.votes + head * p.num_units;
        ASSERT_EQ(std::vector<int32_t>(actual, actual + p.num_units), votes);
        ASSERT_EQ(p.union_size[head], p.num_units - std::count(votes.begin(), votes.end(), 0));
        ASSERT_NEAR(p.coverage[head], coverage, coverage * 0x1p-16);
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, RowVotesCases, testing::ValuesIn(vote_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(RowVotes, ErrorsNameTheArgument) {
    VoteBuffers buffers(1, 1, 4, 6, 16);
    const auto message_with = [&](auto change) -> std::string {
        RowVotesParams params = buffers.params;
        change(params);
        try {
            cpu::row_votes(params);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    EXPECT_EQ(message_with([](auto&) {}), "");
    EXPECT_EQ(message_with([](auto& p) { p.k = 8; }), "row_votes: k must be a multiple of g = 16 >= 0, got 8");
    EXPECT_EQ(message_with([](auto& p) { p.granularity = 2; }), "row_votes: g must be 1, 16, 32 or 64, got 2");
    EXPECT_EQ(message_with([](auto& p) { p.num_rows = 1025; }),
              "row_votes: row_mass must have 1 to 1024 rows, got 1025");
    const bool row_mask[4] = {};
    EXPECT_EQ(message_with([&](auto& p) {
                  p.row_mask = row_mask;
                  p.num_positions = 4;
              }),
              "row_votes: row_mask must have Q positions that divide the rows (6), got 4");
    EXPECT_NE(message_with([](auto& p) { p.votes = nullptr; }).find("got a null pointer"), std::string::npos);
}

TEST(RowVotes, WorkspaceFollowsTheShapes) {
    EXPECT_EQ(row_votes_workspace(1, 1, 4, 6), 8 * (1 + 6 * 2));
    EXPECT_EQ(row_votes_workspace(1, 4, 2048, 224), 8 * 4 * (1 + 224 * 65));
    EXPECT_EQ(row_votes_workspace(2, 3, 1 << 20, 7), 8 * 6 * (1 + 7 * 65));
    EXPECT_EQ(row_votes_workspace(0, 4, 2048, 224), 0);
}

// The blocks of the CUDA kernel: every group of units once, within the workspace and the threads of a block.
TEST(RowVotes, TilesCoverEveryGroupOnce) {
    for (const int64_t heads : {1, 4, 12, 300}) {
        for (const int64_t units : {1, 31, 33, 2048, 2049, 5000, 131072}) {
            for (const int64_t rows : {1, 33, 224, 512, 1024}) {
                const core::VoteTiles plan = core::vote_tiles(heads, units, rows);
                const int64_t groups = (units + core::kVoteGroup - 1) / core::kVoteGroup;
                ASSERT_GE(plan.row_threads, rows);
                ASSERT_EQ(plan.row_threads % 32, 0);
                ASSERT_LE(plan.row_threads * plan.slices, 1024);
                ASSERT_LE(plan.tiles, core::max_vote_tiles(units));
                ASSERT_GE(plan.tiles * plan.rounds * plan.slices, groups);
                ASSERT_LT((plan.tiles - 1) * plan.rounds * plan.slices, groups) << "a block has nothing to do";
            }
        }
    }
}

// The CTAs of a cluster: all rows, every unit once, at least two, and messages of whole vectors.
TEST(RowVotes, ClustersCoverRowsAndUnits) {
    for (const int64_t units : {1, 15, 100, 2049, 2176}) {
        for (const int64_t rows : {1, 16, 17, 192, 224, 256}) {
            const core::VoteClusters plan = core::vote_clusters(3, units, rows);
            ASSERT_GE(plan.ctas, 2);
            ASSERT_LE(plan.ctas, core::kMaxVoteClusterCtas);
            ASSERT_GE(plan.ctas * core::kVoteClusterRows, rows);
            ASSERT_GE(plan.ctas * plan.share, units);
            ASSERT_EQ(plan.share % 16, 0);
            ASSERT_LE(plan.ctas * plan.share, core::kMaxVoteClusterUnits + 16 * core::kMaxVoteClusterCtas);
        }
    }
    EXPECT_EQ(core::vote_clusters(1, 2177, 16).ctas, 0);
    EXPECT_EQ(core::vote_clusters(1, 100, 257).ctas, 0);
    EXPECT_EQ(core::vote_clusters(65536, 100, 16).ctas, 0);
}

}  // namespace
}  // namespace mage::test
