#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "mage/error.h"
#include "mage/token_confidence.h"

namespace mage::test {
namespace {

struct Result {
    std::vector<int64_t> token;
    std::vector<float> prob, entropy;
};

Result run(const void* logits, DType dtype, int64_t rows, int64_t vocab, int64_t stride) {
    Result result{std::vector<int64_t>(rows, -7), std::vector<float>(rows, NAN), std::vector<float>(rows, NAN)};
    TokenConfidenceParams params;
    params.num_rows = rows;
    params.vocab_size = vocab;
    params.dtype = dtype;
    params.logits = logits;
    params.stride_logits_row = stride;
    params.token = result.token.data();
    params.prob = result.prob.data();
    params.entropy = result.entropy.data();
    cpu::token_confidence(params);
    return result;
}

TEST(TokenConfidence, AgreesWithFloat64) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.0f, 4.0f);
    for (const int64_t vocab : {1, 15, 4096, 4097, 50000}) {
        const int64_t stride = vocab + 3;
        std::vector<float> logits(3 * stride);
        for (float& logit : logits) logit = normal(random);
        const Result result = run(logits.data(), DType::kFloat32, 3, vocab, stride);
        for (int64_t row = 0; row < 3; ++row) {
            const float* x = logits.data() + row * stride;
            const int64_t top = std::max_element(x, x + vocab) - x;
            double sum = 0.0, weighted = 0.0;
            for (int64_t i = 0; i < vocab; ++i) {
                const double below = static_cast<double>(x[i]) - x[top];
                sum += std::exp(below);
                weighted += std::exp(below) * below;
            }
            EXPECT_EQ(result.token[row], top);
            // Lanes add 32 float32 numbers in a row: a relative error of at most 2^-19.
            EXPECT_NEAR(result.prob[row], 1.0 / sum, 1.0 / sum / (1 << 19));
            EXPECT_NEAR(result.entropy[row], std::log(sum) - weighted / sum, 16.0 / (1 << 19));
        }
    }
}

TEST(TokenConfidence, HalfPrecisionIsReadExactly) {
    // 1.0, 2.0, NaN, -inf, 2.0 in bfloat16 and in float16.
    const uint16_t bf16[] = {0x3f80, 0x4000, 0x7fc0, 0xff80, 0x4000};
    const uint16_t f16[] = {0x3c00, 0x4000, 0x7e00, 0xfc00, 0x4000};
    const Result a = run(bf16, DType::kBFloat16, 1, 5, 5), b = run(f16, DType::kFloat16, 1, 5, 5);
    EXPECT_EQ(a.token[0], 1);
    EXPECT_EQ(b.token[0], 1);
    EXPECT_EQ(a.prob, b.prob);
    EXPECT_EQ(a.entropy, b.entropy);
    EXPECT_NEAR(a.prob[0], 1.0 / (2.0 + std::exp(-1.0)), 1e-6);
}

TEST(TokenConfidence, RowsWithoutANumberAndWithInfinity) {
    const float inf = INFINITY;
    const std::vector<float> logits = {NAN, -inf, NAN, 3.0f, inf, inf, -inf, NAN, -5.0f};
    const Result result = run(logits.data(), DType::kFloat32, 3, 3, 3);
    EXPECT_EQ(result.token, (std::vector<int64_t>{0, 1, 2}));
    EXPECT_EQ(result.prob, (std::vector<float>{0.0f, 0.5f, 1.0f}));
    EXPECT_EQ(result.entropy[0], 0.0f);
    EXPECT_FLOAT_EQ(result.entropy[1], std::log(2.0f));
    EXPECT_EQ(result.entropy[2], 0.0f);
}

TEST(TokenConfidence, SameBitsForAnyNumberOfThreads) {
    std::mt19937 random(6);
    std::normal_distribution<float> normal(0.0f, 4.0f);
    std::vector<float> logits(2 * 100003);
    for (float& logit : logits) logit = normal(random);
    core::set_num_threads(1);
    const Result one = run(logits.data(), DType::kFloat32, 2, 100003, 100003);
    core::set_num_threads(6);
    const Result six = run(logits.data(), DType::kFloat32, 2, 100003, 100003);
    core::set_num_threads(0);
    EXPECT_EQ(one.prob, six.prob);
    EXPECT_EQ(one.entropy, six.entropy);
    EXPECT_EQ(one.token, six.token);
}

TEST(TokenConfidence, ErrorsNameTheArgument) {
    TokenConfidenceParams params;
    const auto message = [&]() -> std::string {
        try {
            cpu::token_confidence(params);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    EXPECT_EQ(message(), "token_confidence: logits must have 1 to 1073741824 entries per row, got 0");
    params.vocab_size = 10;
    EXPECT_EQ(message(), "");  // no rows
    params.num_rows = 1;
    EXPECT_EQ(message(), "token_confidence: logits and the outputs must be given, got a null pointer");
    EXPECT_EQ(token_confidence_workspace(1, 10), 0);
}

}  // namespace
}  // namespace mage::test
