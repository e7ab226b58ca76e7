#include <gtest/gtest.h>

#include "mage/error.h"
#include "merge_attention_cases.h"

namespace mage::test {
namespace {

TEST(MergeAttention, EqualsTheNaiveLoop) {
    std::mt19937 random(5);
    constexpr int64_t kRequests = 2, kQueries = 3, kHeads = 5, kRows = kRequests * kQueries * kHeads;
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        for (const int64_t dim : {1, 8, 37, 64, 512}) {
            for (const size_t num_parts : {1, 2, 7}) {
                const int64_t bytes = dtype_bytes(dtype);
                std::vector<std::vector<char>> outs(num_parts, std::vector<char>(kRows * dim * bytes));
                std::vector<std::vector<float>> lses(num_parts, std::vector<float>(kRows));
                MergeAttentionParams params;
                params.num_requests = kRequests;
                params.num_queries = kQueries;
                params.num_heads = kHeads;
                params.head_dim = dim;
                params.dtype = dtype;
                params.log2_out = dim == 37;
                for (size_t i = 0; i < num_parts; ++i) {
                    for (int64_t j = 0; j < kRows * dim; ++j)
                        store_exact(dtype, random_value(random), outs[i].data() + j * bytes);
                    for (float& lse : lses[i]) lse = random() % 8 == 0 ? -INFINITY : random_value(random);
                    params.parts.push_back(
                        {outs[i].data(), kQueries * kHeads * dim, kHeads * dim, dim, lses[i].data()});
                }
                std::vector<char> out(kRows * dim * bytes, static_cast<char>(0xff));
                std::vector<float> lse(kRows, NAN);
                params.out = out.data();
                params.lse = lse.data();
                cpu::merge_attention(params);
                for (int64_t row = 0; row < kRows; ++row) {
                    const int64_t head = row % kHeads, query = row / kHeads % kQueries,
                                  request = row / kHeads / kQueries;
                    const int64_t at = (request * kHeads + head) * kQueries + query;
                    double sum = 0.0;
                    for (const std::vector<float>& part : lses) sum += std::exp(static_cast<double>(part[at]));
                    if (sum == 0.0) {
                        ASSERT_EQ(lse[at], -INFINITY);
                    } else {
                        ASSERT_NEAR(lse[at], params.log2_out ? std::log2(sum) : std::log(sum), 1e-6);
                    }
                    for (int64_t d = 0; d < dim; ++d) {
                        double exact = 0.0;
                        for (size_t i = 0; i < num_parts && sum > 0.0; ++i) {
                            exact += std::exp(static_cast<double>(lses[i][at])) / sum *
                                     load_exact(dtype, outs[i].data() + (row * dim + d) * bytes);
                        }
                        const double rounding = dtype == DType::kFloat32   ? 0.0
                                                : dtype == DType::kFloat16 ? 0x1p-11
                                                                           : 0x1p-8;
                        ASSERT_NEAR(load_exact(dtype, out.data() + (row * dim + d) * bytes), exact, rounding + 0x1p-20);
                    }
                }
            }
        }
    }
}

class MergeAttentionCases : public testing::TestWithParam<MergeCase> {};

TEST_P(MergeAttentionCases, EqualTheContract) {
    const MergeCase& c = GetParam();
    MergeBuffers buffers(c);
    buffers.bind(buffers.outs.data(), buffers.lses.data(), buffers.out.data(), buffers.lse.data());
    const MergeAttentionParams& p = buffers.params;
    cpu::merge_attention(p);
    for (int64_t row = 0; row < c.requests * c.queries * c.heads; ++row) {
        const int64_t head = row % c.heads, query = row / c.heads % c.queries, request = row / c.heads / c.queries;
        const int64_t at = (request * c.heads + head) * c.queries + query;
        const auto weight_of = [&](const MergePart& part) {
            return c.log2_in ? std::exp2(double{part.lse[at]}) : std::exp(double{part.lse[at]});
        };
        double sum = 0.0;
        for (const MergePart& part : p.parts) sum += weight_of(part);
        if (sum == 0.0) {
            ASSERT_EQ(p.lse[at], -INFINITY);
        } else {
            ASSERT_NEAR(p.lse[at], c.log2_out ? std::log2(sum) : std::log(sum), 0x1p-19);
        }
        for (int64_t d = 0; d < c.head_dim; ++d) {
            double exact = 0.0;
            for (const MergePart& part : p.parts) {
                if (part.lse[at] == -INFINITY) continue;
                const int64_t from =
                    request * part.stride_request + query * part.stride_query + head * part.stride_head + d;
                exact += weight_of(part) / sum *
                         load_exact(c.dtype, static_cast<const char*>(part.out) + from * buffers.bytes);
            }
            const char* actual = buffers.out.data() + (row * c.head_dim + d) * buffers.bytes;
            ASSERT_NEAR(load_exact(c.dtype, actual), exact, merge_tolerance(c.dtype));
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, MergeAttentionCases, testing::ValuesIn(merge_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(MergeAttention, RefusesNothingToMerge) {
    MergeAttentionParams params;
    params.head_dim = 8;
    EXPECT_THROW(cpu::merge_attention(params), Error);
}

}  // namespace
}  // namespace mage::test
