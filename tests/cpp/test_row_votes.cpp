#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "mage/error.h"
#include "mage/row_votes.h"

namespace mage::test {
namespace {

struct VoteBuffers {
    VoteBuffers(int64_t requests, int64_t heads, int64_t units, int64_t rows, int64_t granularity)
        : row_mass(requests * heads * units * rows, -INFINITY),
          lengths(requests, static_cast<int32_t>(units * granularity)),
          votes(requests * heads * units, -7),
          union_size(requests * heads, -7),
          coverage(requests * heads, NAN) {
        params.num_requests = requests;
        params.num_kv_heads = heads;
        params.num_units = units;
        params.num_rows = rows;
        params.granularity = granularity;
        params.row_mass = row_mass.data();
        params.prefix_lens = lengths.data();
        params.votes = votes.data();
        params.union_size = union_size.data();
        params.coverage = coverage.data();
    }

    float& share(int64_t head, int64_t unit, int64_t row) {
        return row_mass[(head * params.num_units + unit) * params.num_rows + row];
    }

    RowVotesParams params;
    std::vector<float> row_mass;
    std::vector<int32_t> lengths, votes, union_size;
    std::vector<float> coverage;
};

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
    EXPECT_EQ(row_votes_workspace(1, 1, 4, 6), 0);
}

}  // namespace
}  // namespace mage::test
