#include <gtest/gtest.h>

#include <string>

#include "mage/error.h"
#include "sparse_attention_cases.h"

namespace mage::test {
namespace {

void expect_naive(SparseBuffers& buffers) {
    std::vector<char> first;
    for (const int threads : {1, 3}) {
        core::set_num_threads(threads);
        buffers.attention.poison();
        cpu::sparse_block_attention(buffers.params);
        if (threads == 1) first = buffers.attention.out;
    }
    core::set_num_threads(0);
    EXPECT_EQ(buffers.attention.out, first);
    MAGE_EXPECT_ATTENTION(buffers.attention);
}

class SparseBlockAttention : public testing::TestWithParam<AttentionCase> {};

TEST_P(SparseBlockAttention, EqualsTheNaiveLoop) {
    for (const int64_t g : {1, 16, 32, 64}) {
        SparseBuffers buffers({GetParam(), g});
        expect_naive(buffers);
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, SparseBlockAttention, testing::ValuesIn(attention_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(SparseBlockAttentionLists, OfEveryLook) {
    AttentionCase c = {"Lists", {150, 0, 1, 77, 205}, 9, 6, 3, 32, 16, DType::kFloat32};
    for (const int64_t g : {1, 16, 32, 64}) {
        for (const ListKind list :
             {ListKind::kHalf, ListKind::kNone, ListKind::kOne, ListKind::kAll, ListKind::kAllButTheLast,
              ListKind::kUneven, ListKind::kRuns, ListKind::kDirty, ListKind::kFalling, ListKind::kLongerThanRoom}) {
            for (const TailKind tail : {TailKind::kPrefix, TailKind::kInUnit, TailKind::kZero, TailKind::kEnd,
                                        TailKind::kPastEnd, TailKind::kNegative}) {
                for (const bool spread : {false, true}) {
                    SCOPED_TRACE("g " + std::to_string(g) + ", list " + std::to_string(static_cast<int>(list)) +
                                 ", tail " + std::to_string(static_cast<int>(tail)) + (spread ? ", rows" : ""));
                    c.seed += 1;
                    SparseBuffers buffers({c, g, list, tail, -1, spread});
                    expect_naive(buffers);
                    if (HasFatalFailure()) return;
                }
            }
        }
        SparseBuffers buffers({c, g, ListKind::kAll, TailKind::kPrefix, 0});
        expect_naive(buffers);
    }
}

TEST(SparseBlockAttentionErrors, NameTheArgument) {
    AttentionBuffers buffers(attention_cases()[1]);
    SparseBlockAttentionParams params;
    params.attention = buffers.params;
    params.granularity = 2;
    EXPECT_THROW(cpu::sparse_block_attention(params), Error);
    params.granularity = 16;
    params.capacity = -1;
    EXPECT_THROW(cpu::sparse_block_attention(params), Error);
}

}  // namespace
}  // namespace mage::test
