#include <gtest/gtest.h>

#include "attention_cases.h"
#include "mage/error.h"
#include "mage/sparse_block_attention.h"

namespace mage::test {
namespace {

class SparseBlockAttention : public testing::TestWithParam<AttentionCase> {};

TEST_P(SparseBlockAttention, EqualsTheNaiveLoop) {
    AttentionBuffers buffers(GetParam());
    const AttentionCase& c = buffers.test;
    for (const int64_t g : {1, 16, 32, 64}) {
        const int64_t capacity = buffers.params.max_seq_len / g + 1;
        std::vector<int32_t> indices(buffers.shares.size() * capacity, -1), counts(buffers.shares.size()), tail_start;
        std::mt19937 random(static_cast<uint32_t>(g));
        for (const int32_t len : c.seq_lens) tail_start.push_back(static_cast<int32_t>(len * 3 / 4 / g * g));
        for (size_t stream = 0; stream < buffers.shares.size(); ++stream) {
            for (int64_t u = 0; u * g < tail_start[stream / c.num_kv_heads]; ++u) {
                if (random() % 2 == 0) continue;
                indices[stream * capacity + counts[stream]++] = static_cast<int32_t>(u);
            }
        }
        SparseBlockAttentionParams params;
        buffers.set_workspace(sparse_block_attention_workspace(buffers.params.num_requests, c.num_queries, c.num_heads,
                                                               c.num_kv_heads, c.head_dim, buffers.params.max_seq_len,
                                                               g, capacity, c.split_tokens));
        params.indices = indices.data();
        params.counts = counts.data();
        params.tail_start = tail_start.data();
        params.capacity = capacity;
        params.granularity = g;
        buffers.run_naive([&](int64_t b, int64_t h, int64_t t) {
            if (t >= tail_start[b]) return true;
            const auto list = indices.begin() + (b * c.num_kv_heads + h) * capacity;
            return std::find(list, list + counts[b * c.num_kv_heads + h], t / g) !=
                   list + counts[b * c.num_kv_heads + h];
        });
        std::vector<char> first;
        for (const int threads : {1, 3}) {
            core::set_num_threads(threads);
            buffers.poison();
            params.attention = buffers.params;
            cpu::sparse_block_attention(params);
            if (threads == 1) first = buffers.out;
        }
        core::set_num_threads(0);
        EXPECT_EQ(buffers.out, first);
        MAGE_EXPECT_ATTENTION(buffers);
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, SparseBlockAttention, testing::ValuesIn(attention_cases()),
                         [](const auto& info) { return info.param.name; });

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
