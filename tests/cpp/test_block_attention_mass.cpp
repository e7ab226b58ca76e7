#include <gtest/gtest.h>

#include "attention_cases.h"
#include "mage/block_attention_mass.h"
#include "mage/error.h"

namespace mage::test {
namespace {

struct MassCase {
    AttentionCase attention;
    int64_t granularity;
    MassScore score;
    MassNorm norm;
    bool masked;
};

// Every attention case, with the options of the emission in turn.
std::vector<MassCase> mass_cases() {
    std::vector<MassCase> cases;
    const int64_t granularities[] = {16, 64, 32, 1};
    int64_t i = 0;
    for (const AttentionCase& c : attention_cases()) {
        for (int64_t variant = 0; variant < 2; ++variant, ++i) {
            cases.push_back({c, granularities[i % 4], i % 3 == 1 ? MassScore::kMax : MassScore::kMean,
                             variant == 0 ? MassNorm::kContext : MassNorm::kPrefix, i % 5 > 2});
            cases.back().attention.name += variant == 0 ? "Context" : "Prefix";
        }
    }
    return cases;
}

class BlockAttentionMass : public testing::TestWithParam<MassCase> {};

TEST_P(BlockAttentionMass, EqualsTheNaiveLoop) {
    const MassCase& m = GetParam();
    AttentionBuffers buffers(m.attention);
    const AttentionCase& c = buffers.test;
    const int64_t units = (buffers.params.max_seq_len + m.granularity - 1) / m.granularity;
    buffers.set_workspace(block_attention_mass_workspace(buffers.params.num_requests, c.num_queries, c.num_heads,
                                                         c.num_kv_heads, c.head_dim, buffers.params.max_seq_len,
                                                         m.granularity, c.split_tokens));
    std::vector<int32_t> prefix_lens;
    for (const int32_t len : c.seq_lens) prefix_lens.push_back(len * 2 / 3);
    std::vector<char> mask(c.seq_lens.size() * c.num_queries, 1);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = !m.masked || i % 3 == 1;
    std::vector<float> mass(c.seq_lens.size() * c.num_kv_heads * units, NAN);

    BlockAttentionMassParams params;
    params.granularity = m.granularity;
    params.score = m.score;
    params.norm = m.norm;
    params.row_mask = m.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
    params.prefix_lens = m.norm == MassNorm::kPrefix ? prefix_lens.data() : nullptr;
    params.mass = mass.data();
    std::vector<float> first;
    for (const int threads : {1, 3}) {
        core::set_num_threads(threads);
        buffers.poison();
        params.attention = buffers.params;
        cpu::block_attention_mass(params);
        if (threads == 1) first = mass;
    }
    core::set_num_threads(0);
    EXPECT_EQ(mass, first);
    MAGE_EXPECT_ATTENTION(buffers);

    const std::vector<double> exact = buffers.naive_mass(m.granularity, m.score, m.norm, mask, prefix_lens);
    ASSERT_EQ(mass.size(), exact.size());
    for (size_t i = 0; i < mass.size(); ++i) {
        ASSERT_NEAR(mass[i], exact[i], 1e-3 * std::max(exact[i], 1e-6))
            << "stream " << i / units << " unit " << i % units;
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttentionMass, testing::ValuesIn(mass_cases()),
                         [](const auto& info) { return info.param.attention.name; });

TEST(BlockAttentionMassErrors, NameTheArgument) {
    AttentionBuffers buffers(attention_cases()[1]);
    BlockAttentionMassParams params;
    params.attention = buffers.params;
    params.granularity = 8;
    EXPECT_THROW(cpu::block_attention_mass(params), Error);
    params.granularity = 16;
    params.norm = MassNorm::kPrefix;  // without prefix_lens
    EXPECT_THROW(cpu::block_attention_mass(params), Error);
    params.norm = MassNorm::kContext;
    params.score = MassScore::kRows;
    EXPECT_THROW(cpu::block_attention_mass(params), Error);
    params.score = MassScore::kMean;
    params.attention.workspace_bytes = cpu::block_attention_mass_workspace(params) - 1;
    EXPECT_THROW(cpu::block_attention_mass(params), Error);
}

}  // namespace
}  // namespace mage::test
