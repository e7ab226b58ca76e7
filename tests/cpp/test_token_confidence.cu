#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gpu.h"
#include "mage/error.h"
#include "mage/token_confidence.h"

namespace mage::test {
namespace {

struct Confidences {
    std::vector<int64_t> token;
    std::vector<float> prob, entropy;

    bool operator==(const Confidences& other) const {
        const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
        };
        return token == other.token && same(prob, other.prob) && same(entropy, other.entropy);
    }
};

// The bits of a logit, and its value once it is rounded to the dtype.
uint32_t bits_of(float value, DType dtype) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kFloat32) return bits;
    if (dtype == DType::kBFloat16) return std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __half_as_ushort(__float2half_rn(value));
}

float value_of(uint32_t bits, DType dtype) {
    float value;
    if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    if (dtype == DType::kBFloat16) bits <<= 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rows in memory `before` logits behind a boundary of 16 bytes and `stride` apart. The memory ends with the last logit,
// so that compute-sanitizer sees every overrun, and holds NaN between the rows.
struct Memory {
    Memory(const std::vector<std::vector<float>>& rows, DType dtype, int64_t before, int64_t stride)
        : dtype(dtype), before(before), stride(stride), num_rows(rows.size()), vocab(rows[0].size()) {
        const int64_t count = before + (num_rows - 1) * stride + vocab, size = dtype_bytes(dtype);
        bytes.assign(count * size, 0xff);
        for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t i = 0; i < vocab; ++i) {
                const uint32_t bits = bits_of(rows[row][i], dtype);
                std::memcpy(bytes.data() + (before + row * stride + i) * size, &bits, size);
            }
        }
    }

    TokenConfidenceParams params(const unsigned char* logits) const {
        TokenConfidenceParams params;
        params.num_rows = num_rows;
        params.vocab_size = vocab;
        params.dtype = dtype;
        params.logits = logits + before * dtype_bytes(dtype);
        params.stride_logits_row = stride;
        return params;
    }

    DType dtype;
    int64_t before, stride, num_rows, vocab;
    std::vector<unsigned char> bytes;
};

// Logits on the device, and outputs full of poison.
struct OnDevice {
    DeviceArray<unsigned char> logits;
    DeviceArray<int64_t> token;
    DeviceArray<float> prob, entropy;
    TokenConfidenceParams params;

    explicit OnDevice(const Memory& memory)
        : logits(memory.bytes),
          token(std::vector<int64_t>(memory.num_rows, -7)),
          prob(std::vector<float>(memory.num_rows, NAN)),
          entropy(std::vector<float>(memory.num_rows, NAN)),
          params(memory.params(logits.data())) {
        params.token = token.data();
        params.prob = prob.data();
        params.entropy = entropy.data();
    }

    void poison() {
        token.set(std::vector<int64_t>(params.num_rows, -7));
        prob.set(std::vector<float>(params.num_rows, NAN));
        entropy.set(std::vector<float>(params.num_rows, NAN));
    }

    Confidences results() const { return {token.get(), prob.get(), entropy.get()}; }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::token_confidence(params, stream); }, [this] { poison(); },
                [this] { return bytes_in(token, prob, entropy); }};
    }
};

Confidences run(const Memory& memory) {
    const OnDevice device(memory);
    cuda::token_confidence(device.params, nullptr);
    return device.results();
}

std::vector<std::vector<float>> normal_rows(int64_t num_rows, int64_t vocab, uint32_t seed, float scale = 4.0f) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<std::vector<float>> rows(num_rows, std::vector<float>(vocab));
    for (auto& row : rows) {
        for (float& logit : row) logit = normal(random);
    }
    return rows;
}

// e^x is within 2^-22, of which the errors of the weights are a mean; then the roundings of the results.
constexpr double kError = 1.0 / (1 << 21);

void expect_right(const Memory& memory, const Confidences& actual) {
    const int64_t size = dtype_bytes(memory.dtype);
    for (int64_t row = 0; row < memory.num_rows; ++row) {
        std::vector<double> x(memory.vocab);
        int64_t top = -1, ties = 0;
        for (int64_t i = 0; i < memory.vocab; ++i) {
            uint32_t bits = 0;
            std::memcpy(&bits, memory.bytes.data() + (memory.before + row * memory.stride + i) * size, size);
            x[i] = value_of(bits, memory.dtype);
            if (std::isnan(x[i])) x[i] = -INFINITY;
            if (x[i] > (top < 0 ? -INFINITY : x[top])) top = i;
            ties += x[i] == INFINITY;
        }
        const std::string where = "row " + std::to_string(row) + " of " + std::to_string(memory.vocab);
        EXPECT_EQ(actual.token[row], std::max<int64_t>(top, 0)) << where;
        double prob = 0.0, entropy = 0.0;
        if (ties > 0) {
            prob = 1.0 / ties;
            entropy = std::log(ties);
        } else if (top >= 0) {
            double sum = 0.0, weighted = 0.0;
            for (const double logit : x) {
                if (logit == -INFINITY) continue;
                sum += std::exp(logit - x[top]);
                weighted += std::exp(logit - x[top]) * (logit - x[top]);
            }
            prob = 1.0 / sum;
            entropy = std::log(sum) - weighted / sum;
        }
        EXPECT_NEAR(actual.prob[row], prob, prob * kError) << where;
        EXPECT_NEAR(actual.entropy[row], entropy, std::max(entropy, 1.0) * kError) << where;
    }
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

TEST(TokenConfidenceCuda, AgreesWithFloat64) {
    MAGE_NEEDS_GPU();
    for (const DType dtype : kDTypes) {
        for (const int64_t vocab : {1, 2, 7, 8, 9, 31, 1000, 8191, 8200, 16385, 50257, 151936, 262144}) {
            const auto rows = normal_rows(3, vocab, static_cast<uint32_t>(vocab));
            for (const int64_t before : {0, 1, 5}) {
                const Memory memory(rows, dtype, before, vocab + 3);
                expect_right(memory, run(memory));
            }
        }
    }
}

// A row's bits do not depend on the base, the stride or the number of rows.
TEST(TokenConfidenceCuda, SameBitsWhereverARowLies) {
    MAGE_NEEDS_GPU();
    for (const DType dtype : kDTypes) {
        for (const int64_t vocab : {5, 1003, 20000, 70001}) {
            const auto rows = normal_rows(5, vocab, 3);
            const Confidences expected = run(Memory(rows, dtype, 0, (vocab + 15) / 8 * 8));
            for (int64_t before = 0; before < 8; ++before) {
                for (const int64_t gap : {0, 1, 6}) {
                    EXPECT_EQ(run(Memory(rows, dtype, before, vocab + gap)), expected) << vocab << " " << before;
                }
            }
            for (int row = 0; row < 5; ++row) {
                const Confidences one = run(Memory({rows[row]}, dtype, row, vocab));
                EXPECT_EQ(one, (Confidences{{expected.token[row]}, {expected.prob[row]}, {expected.entropy[row]}}));
            }
            for (const int copies : {20, 40, 60, 120}) {  // fewer CTAs per row
                std::vector<std::vector<float>> many;
                Confidences repeated;
                for (int i = 0; i < 5 * copies; ++i) {
                    many.push_back(rows[i % 5]);
                    repeated.token.push_back(expected.token[i % 5]);
                    repeated.prob.push_back(expected.prob[i % 5]);
                    repeated.entropy.push_back(expected.entropy[i % 5]);
                }
                EXPECT_EQ(run(Memory(many, dtype, 0, vocab)), repeated) << vocab << " x " << copies;
            }
        }
    }
}

TEST(TokenConfidenceCuda, TiesNanAndInfinity) {
    MAGE_NEEDS_GPU();
    constexpr int64_t kVocab = 40001;  // several CTAs of a cluster
    std::vector<std::vector<float>> rows = normal_rows(9, kVocab, 4);
    for (float& logit : rows[0]) logit = 0.0f;
    for (float& logit : rows[1]) logit = -INFINITY;
    for (float& logit : rows[2]) logit = NAN;
    rows[3][123] = rows[3][39999] = rows[3][20000] = INFINITY;
    rows[4][40000] = rows[4][17] = 50.0f;                              // of different CTAs
    rows[5][4096] = rows[5][4096 + 2048] = rows[5][4096 + 8] = 60.0f;  // of different threads and batches
    for (int64_t i = 0; i < kVocab; i += 3) rows[6][i] = i % 2 ? NAN : -INFINITY;
    for (float& logit : rows[7]) logit = NAN;
    rows[7][31234] = -60000.0f;
    for (float& logit : rows[8]) logit = INFINITY;
    for (const DType dtype : kDTypes) {
        for (const int64_t before : {0, 3}) {
            const Memory memory(rows, dtype, before, kVocab + 5);
            const Confidences actual = run(memory);
            expect_right(memory, actual);
            EXPECT_EQ(actual.token, (std::vector<int64_t>{0, 0, 0, 123, 17, 4096, actual.token[6], 31234, 0}));
            EXPECT_EQ(actual.prob[3], 1.0f / 3.0f);
            EXPECT_EQ(actual.prob[0], 1.0f / kVocab);
        }
    }
}

// A captured launch reads what the buffer holds when the graph runs.
TEST(TokenConfidenceCudaGraph, FollowsNewLogits) {
    MAGE_NEEDS_GPU();
    const Memory captured(normal_rows(4, 30000, 1), DType::kBFloat16, 0, 30000);
    const Memory replayed(normal_rows(4, 30000, 2), DType::kBFloat16, 0, 30000);
    OnDevice device(captured);
    Streams streams;
    streams.capture([&](cudaStream_t stream) {
        for (int i = 0; i < 3; ++i) cuda::token_confidence(device.params, stream);  // each may begin early
    });
    EXPECT_EQ(device.token.get(), std::vector<int64_t>(4, -7)) << "capturing must not run the kernel";
    for (const Memory* memory : {&replayed, &captured}) {
        device.logits.set(memory->bytes);
        streams.replay();
        EXPECT_EQ(device.results(), run(*memory));
    }
}

// Rows of one CTA and of several, from where vectors can be read and from elsewhere.
std::vector<Memory> memories_of_each_kernel() {
    std::vector<Memory> memories;
    for (const DType dtype : kDTypes) {
        for (const int64_t vocab : {1000, 70001}) {
            for (const int64_t before : {0, 1}) memories.emplace_back(normal_rows(3, vocab, 7), dtype, before, 70008);
        }
    }
    return memories;
}

TEST(TokenConfidenceCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const Memory& memory : memories_of_each_kernel()) {
        SCOPED_TRACE(std::to_string(memory.vocab) + " from " + std::to_string(memory.before));
        OnDevice device(memory);
        expect_equal_runs(device.call(), 100);
    }
}

TEST(TokenConfidenceCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    OnDevice first(Memory(normal_rows(3, 70001, 7), DType::kBFloat16, 0, 70008));
    OnDevice second(Memory(normal_rows(9, 30000, 8), DType::kFloat32, 1, 30000));
    expect_equal_at_once(first.call(), second.call());
}

// Logits may come from a kernel that lets this one start early.
TEST(TokenConfidenceCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const Memory& memory : memories_of_each_kernel()) {
        OnDevice device(memory);
        LateInputs late;
        late.add("logits", device.logits);
        SCOPED_TRACE(std::to_string(memory.vocab) + " from " + std::to_string(memory.before));
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
    }
}

// What is written may still be read by a kernel that lets this one start early.
TEST(TokenConfidenceCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (const Memory& memory : memories_of_each_kernel()) {
        OnDevice device(memory);
        LateReads late;
        late.add("token", device.token);
        late.add("prob", device.prob);
        late.add("entropy", device.entropy);
        SCOPED_TRACE(std::to_string(memory.vocab) + " from " + std::to_string(memory.before));
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
    }
}

TEST(TokenConfidencePlan, FewRowsFillTheGpuAndManyAreOneWave) {
    TokenConfidenceParams params;
    params.dtype = DType::kBFloat16;
    for (const auto& [rows, vocab, cluster] : std::vector<std::tuple<int64_t, int64_t, uint32_t>>{{5, 1, 1},
                                                                                                  {5, 16384, 1},
                                                                                                  {5, 16385, 2},
                                                                                                  {5, 49152, 4},
                                                                                                  {5, 65537, 8},
                                                                                                  {66, 151936, 8},
                                                                                                  {67, 151936, 4},
                                                                                                  {512, 151936, 1},
                                                                                                  {1, kMaxVocab, 8}}) {
        params.num_rows = rows;
        params.vocab_size = vocab;
        const LaunchPlan plan = cuda::token_confidence_plan(params);
        EXPECT_EQ(plan.cluster, cluster) << rows << " x " << vocab;
        EXPECT_EQ(plan.grid[0], rows * cluster);
        EXPECT_TRUE(plan.overlap);
    }
    params.num_rows = int64_t{1} << 31;
    try {
        cuda::token_confidence_plan(params);
        FAIL() << "must throw";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("token_confidence: logits must have fewer than 2^31 rows"),
                  std::string::npos)
            << error.what();
    }
}

}  // namespace
}  // namespace mage::test
