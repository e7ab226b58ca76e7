#include <gtest/gtest.h>

#include "attention_cases.h"
#include "mage/block_attention.h"
#include "mage/error.h"

namespace mage::test {
namespace {

class BlockAttention : public testing::TestWithParam<AttentionCase> {};

TEST_P(BlockAttention, EqualsTheNaiveLoopOnAnyNumberOfThreads) {
    AttentionBuffers buffers(GetParam());
    std::vector<char> first_out;
    std::vector<float> first_lse;
    for (const int threads : {1, 3}) {
        core::set_num_threads(threads);
        buffers.poison();
        cpu::block_attention(buffers.params);
        if (threads == 1) {
            MAGE_EXPECT_ATTENTION(buffers);
            first_out = buffers.out;
            first_lse = buffers.lse;
        }
    }
    core::set_num_threads(0);
    EXPECT_EQ(buffers.out, first_out);
    EXPECT_EQ(buffers.lse, first_lse);
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttention, testing::ValuesIn(attention_cases()),
                         [](const auto& info) { return info.param.name; });

void expect_error(const BlockAttentionParams& params, const std::string& message) {
    try {
        cpu::block_attention(params);
        FAIL() << "no error, wanted: " << message;
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
}

TEST(BlockAttentionErrors, NameTheArgument) {
    AttentionBuffers buffers(attention_cases()[1]);
    const std::vector<char> before = buffers.out;
    BlockAttentionParams bad = buffers.params;
    bad.num_heads = 4;
    bad.num_kv_heads = 3;
    expect_error(bad, "block_attention: the number of heads of q must be a multiple of the KV heads (3), got 4");
    bad = buffers.params;
    bad.head_dim = 12;
    expect_error(bad, "block_attention: the head dim of q must be a multiple of 8 and at most 512, got 12");
    bad = buffers.params;
    bad.max_seq_len = 145;
    expect_error(bad, "block_attention: block_table must have pages for max_seq_len = 145 tokens, got 9 pages of 16");
    bad = buffers.params;
    bad.pages.page_size = 48;
    expect_error(bad, "block_attention: k_cache must have pages of 1, 16, 32, 64, 128 or 256 tokens, got 48");
    bad = buffers.params;
    bad.split_tokens = 32;
    expect_error(bad, "block_attention: split_tokens must be 0 or a positive multiple of 64, got 32");
    bad = buffers.params;
    bad.softmax_scale = INFINITY;
    expect_error(bad, "block_attention: softmax_scale must be finite, got inf");
    bad = buffers.params;
    bad.workspace_bytes = cpu::block_attention_workspace(bad) - 1;
    expect_error(bad, "block_attention: workspace must have at least ");
    EXPECT_EQ(buffers.out, before);
}

BlockAttentionParams dimensions(int64_t requests, int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                int64_t max_seq_len, int64_t split_tokens) {
    BlockAttentionParams params;
    params.num_requests = requests;
    params.num_queries = queries;
    params.num_heads = heads;
    params.num_kv_heads = kv_heads;
    params.head_dim = head_dim;
    params.max_seq_len = max_seq_len;
    params.split_tokens = split_tokens;
    return params;
}

TEST(BlockAttentionWorkspace, FollowsTheFormula) {
    // CPU: 96 rows in one tile; 2048 tokens in splits of 256. CUDA: a tile of 128, a worker for each of 3 * 16 tiles of
    // keys, 8 bytes for each of 3 segments, up to a multiple of 16.
    BlockAttentionParams params = dimensions(1, 32, 9, 3, 64, 2048, 0);
    EXPECT_EQ(cpu::block_attention_workspace(params), 3 * 8 * 96 * (64 + 2) * 4);
    EXPECT_EQ(cuda::block_attention_workspace(params), 2 * 3 * 16 * 128 * (3 * 64 + 12) + 32);
    EXPECT_EQ(block_attention_workspace(1, 32, 9, 3, 64, 2048, 0), 2 * 3 * 16 * 128 * (3 * 64 + 12) + 32);
    // CPU: 1024 rows in five tiles of 240; one split of 256. CUDA: four tiles of 256.
    params = dimensions(2, 64, 16, 1, 64, 200, 256);
    EXPECT_EQ(cpu::block_attention_workspace(params), 2 * 5 * 240 * (64 + 2) * 4);
    EXPECT_EQ(cuda::block_attention_workspace(params), 2 * 4 * 256 * (3 * 64 + 12) + 64);
    EXPECT_EQ(block_attention_workspace(2, 64, 16, 1, 64, 200, 256), 2 * 5 * 240 * (64 + 2) * 4);
}

}  // namespace
}  // namespace mage::test
