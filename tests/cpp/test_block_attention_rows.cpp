#include <gtest/gtest.h>

#include "attention_cases.h"
#include "mage/block_attention_rows.h"
#include "mage/error.h"

namespace mage::test {
namespace {

class BlockAttentionRows : public testing::TestWithParam<AttentionCase> {};

TEST_P(BlockAttentionRows, EqualsTheNaiveLoop) {
    AttentionBuffers buffers(GetParam());
    const AttentionCase& c = buffers.test;
    const int64_t rows = buffers.rows();
    for (const int64_t g : {1, 16, 64}) {
        const int64_t units = (buffers.params.max_seq_len + g - 1) / g;
        buffers.set_workspace(block_attention_rows_workspace(buffers.params.num_requests, c.num_queries, c.num_heads,
                                                             c.num_kv_heads, c.head_dim, buffers.params.max_seq_len, g,
                                                             c.split_tokens));
        buffers.poison();
        std::vector<float> row_mass(c.seq_lens.size() * c.num_kv_heads * units * rows, NAN);
        BlockAttentionRowsParams params;
        params.attention = buffers.params;
        params.granularity = g;
        params.row_mass = row_mass.data();
        cpu::block_attention_rows(params);
        MAGE_EXPECT_ATTENTION(buffers);
        for (size_t stream = 0; stream < buffers.shares.size(); ++stream) {
            const std::vector<double>& share = buffers.shares[stream];
            const auto tokens = static_cast<int64_t>(share.size()) / rows;
            for (int64_t u = 0; u < units; ++u) {
                for (int64_t r = 0; r < rows; ++r) {
                    double exact = 0.0;
                    for (int64_t t = u * g; t < std::min(tokens, (u + 1) * g); ++t) exact += share[t * rows + r];
                    const float actual = row_mass[(stream * units + u) * rows + r];
                    ASSERT_NEAR(std::exp(actual), exact, 1e-3 * std::max(exact, 1e-6)) << "unit " << u << " row " << r;
                    if (exact == 0.0) {
                        ASSERT_EQ(actual, -INFINITY) << "unit " << u << " row " << r;
                    }
                }
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttentionRows, testing::ValuesIn(attention_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(BlockAttentionRowsErrors, NameTheArgument) {
    AttentionBuffers buffers(attention_cases()[1]);
    BlockAttentionRowsParams params;
    params.attention = buffers.params;
    params.granularity = 128;
    EXPECT_THROW(cpu::block_attention_rows(params), Error);
}

}  // namespace
}  // namespace mage::test
