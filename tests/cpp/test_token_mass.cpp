#include <gtest/gtest.h>

#include "attention_cases.h"
#include "mage/error.h"
#include "mage/token_mass.h"

namespace mage::test {
namespace {

TokenMassParams token_params(const AttentionBuffers& buffers) {
    const BlockAttentionParams& p = buffers.params;
    TokenMassParams params;
    params.num_requests = p.num_requests;
    params.num_queries = p.num_queries;
    params.num_heads = p.num_heads;
    params.num_kv_heads = p.num_kv_heads;
    params.head_dim = p.head_dim;
    params.max_seq_len = p.max_seq_len;
    params.dtype = p.dtype;
    params.q = p.q;
    params.stride_q_request = p.stride_q_request;
    params.stride_q_query = p.stride_q_query;
    params.stride_q_head = p.stride_q_head;
    params.k_cache = p.k_cache;
    params.pages = p.pages;
    params.seq_lens = p.seq_lens;
    params.kv_lens = p.kv_lens;
    params.softmax_scale = p.softmax_scale;
    return params;
}

class TokenMass : public testing::TestWithParam<AttentionCase> {};

TEST_P(TokenMass, EqualsTheNaiveLoop) {
    AttentionBuffers buffers(GetParam());
    const AttentionCase& c = buffers.test;
    const int64_t rows = buffers.rows(), tokens = buffers.params.max_seq_len;
    cpu::block_attention(buffers.params);
    std::vector<char> workspace(token_mass_workspace(buffers.params.num_requests, c.num_queries, c.num_heads,
                                                     c.num_kv_heads, c.head_dim, tokens),
                                static_cast<char>(0xff));
    std::vector<int32_t> prefix_lens;
    for (const int32_t len : c.seq_lens) prefix_lens.push_back(len / 2);
    TokenMassParams params = token_params(buffers);
    params.lse = buffers.lse.data();
    params.workspace = workspace.data();
    params.workspace_bytes = static_cast<int64_t>(workspace.size());
    for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
        for (const MassNorm norm : {MassNorm::kContext, MassNorm::kPrefix}) {
            const int64_t width = score == MassScore::kRows ? rows : 1;
            std::vector<float> mass(buffers.shares.size() * tokens * width, NAN);
            params.score = score;
            params.norm = norm;
            params.prefix_lens = norm == MassNorm::kPrefix ? prefix_lens.data() : nullptr;
            params.mass = mass.data();
            cpu::token_mass(params);
            for (size_t stream = 0; stream < buffers.shares.size(); ++stream) {
                const std::vector<double>& share = buffers.shares[stream];
                const size_t request = stream / c.num_kv_heads;
                const int64_t end = norm == MassNorm::kPrefix ? prefix_lens[request] : c.seq_lens[request];
                std::vector<double> total(rows, norm == MassNorm::kPrefix ? 0.0 : 1.0);
                for (int64_t t = 0; t < end && norm == MassNorm::kPrefix; ++t) {
                    for (int64_t r = 0; r < rows; ++r) total[r] += share[t * rows + r];
                }
                for (int64_t t = 0; t < tokens; ++t) {
                    double sum = 0.0, largest = 0.0;
                    for (int64_t r = 0; r < rows; ++r) {
                        const double exact = t < end && total[r] > 0.0 ? share[t * rows + r] / total[r] : 0.0;
                        sum += exact;
                        largest = std::max(largest, exact);
                        if (score != MassScore::kRows) continue;
                        const float actual = std::exp(mass[(stream * tokens + t) * rows + r]);
                        ASSERT_NEAR(actual, exact, 1e-3 * std::max(exact, 1e-6)) << "token " << t << " row " << r;
                    }
                    if (score == MassScore::kRows) continue;
                    const double exact = score == MassScore::kMax ? largest : sum / static_cast<double>(rows);
                    ASSERT_NEAR(mass[stream * tokens + t], exact, 1e-3 * std::max(exact, 1e-6)) << "token " << t;
                }
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, TokenMass, testing::ValuesIn(attention_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(TokenMassUnits, GiveTheTokensOfTheList) {
    AttentionBuffers buffers(attention_cases()[1]);  // one KV head, 130 tokens
    cpu::block_attention(buffers.params);
    std::vector<float> all(130, NAN), listed(5 * 16, NAN), workspace(4096);
    const std::vector<int32_t> units = {8, -1, 2, INT32_MAX, 0};
    TokenMassParams params = token_params(buffers);
    params.lse = buffers.lse.data();
    params.workspace = workspace.data();
    params.workspace_bytes = static_cast<int64_t>(workspace.size() * 4);
    params.mass = all.data();
    cpu::token_mass(params);
    params.has_units = true;
    params.units = units.data();
    params.num_candidates = 5;
    params.granularity = 16;
    params.mass = listed.data();
    cpu::token_mass(params);
    for (int64_t c = 0; c < 5; ++c) {
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t token = int64_t{units[c]} * 16 + i;
            EXPECT_EQ(listed[c * 16 + i], token >= 0 && token < 130 ? all[token] : 0.0f)
                << "candidate " << c << " token " << i;
        }
    }
    params.has_units = false;
    EXPECT_THROW(cpu::token_mass(params), Error);  // g = 16 without units
}

}  // namespace
}  // namespace mage::test
