// Random cases of the attention ops against the naive loop, eight a test and seed. Not part of the tests that CI would
// run: --gtest_filter='Fuzz.*' --gtest_repeat=100 --seed=N. The number of multiprocessors is drawn too, so that calls
// with lists have plans of all kinds.
#include <gtest/gtest.h>

#include <random>

#include "attention_gpu.h"
#include "emulator.h"
#include "mage/block_attention_mass.h"
#include "mage/block_attention_rows.h"
#include "sparse_attention_cases.h"

namespace mage::test {
namespace {

constexpr int kCases = 8;
constexpr int64_t kGranularities[] = {16, 32, 64};

class Fuzz : public testing::Test {
protected:
    void SetUp() override { random_.seed(emulator::options.seed); }
    void TearDown() override { emulator::options.multiprocessors = emulator::Options().multiprocessors; }

    int64_t between(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
    }
    bool one_in(int64_t n) { return between(1, n) == 1; }
    template <typename T>
    T pick(std::initializer_list<T> all) {
        return all.begin()[between(0, static_cast<int64_t>(all.size()) - 1)];
    }

    AttentionCase random_case() {
        AttentionCase c;
        const int64_t requests = pick({1, 1, 1, 2, 3, 5, 12});
        const int64_t longest = requests > 4 ? 300 : pick({40, 200, 700, 1600});
        for (int64_t b = 0; b < requests; ++b)
            c.seq_lens.push_back(static_cast<int32_t>(one_in(8) ? between(0, 2) : between(1, longest)));
        c.num_queries = pick({1, 3, 8, 16, 32, 40, 64});
        c.num_kv_heads = requests > 4 ? 1 : between(1, 2);
        c.num_heads = c.num_kv_heads * pick({1, 2, 4, 5, 6, 7});
        c.head_dim = pick({64, 128});
        c.page_size = pick({1, 16, 32, 64, 128, 256});
        c.dtype = pick({DType::kBFloat16, DType::kFloat16});
        c.heads_first = one_in(3);
        c.interleaved = !c.heads_first && one_in(3);
        c.break_page = one_in(6);
        c.bad_pages = one_in(10);
        c.causal = one_in(6);
        c.stair = one_in(6) ? 4 : 0;
        c.split_tokens = one_in(6) ? pick({64, 128, 320}) : 0;
        c.softmax_scale = pick({0.3, 0.15, 0.088, -0.2});
        c.max_seq_len = one_in(5) ? longest + between(0, 300) : 0;
        c.seed = static_cast<uint32_t>(random_());
        emulator::options.multiprocessors = static_cast<int>(pick({132, 132, 2, 3, 5, 8, 20, 50}));
        return c;
    }

    // What a failure is to be found by, beside the seed.
    std::string describe(int index, const AttentionCase& c) {
        return "case " + std::to_string(index) + ": " + std::to_string(c.seq_lens.size()) + " requests, Q " +
               std::to_string(c.num_queries) + ", H " + std::to_string(c.num_heads) + " / " +
               std::to_string(c.num_kv_heads) + ", D " + std::to_string(c.head_dim) + ", pages of " +
               std::to_string(c.page_size) + ", splits of " + std::to_string(c.split_tokens) + ", " +
               std::to_string(emulator::options.multiprocessors) + " multiprocessors";
    }

    std::mt19937_64 random_;
};

TEST_F(Fuzz, BlockAttention) {
    for (int i = 0; i < kCases; ++i) {
        const AttentionCase c = random_case();
        SCOPED_TRACE(describe(i, c));
        AttentionBuffers buffers(c);
        const AttentionOnDevice device(buffers, cuda::block_attention_workspace(buffers.params));
        cuda::block_attention(device.params, nullptr);
        device.fetch(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers);
    }
}

TEST_F(Fuzz, BlockAttentionMass) {
    for (int i = 0; i < kCases; ++i) {
        const AttentionCase c = random_case();
        SCOPED_TRACE(describe(i, c));
        AttentionBuffers buffers(c);
        BlockAttentionMassParams params;
        params.attention = buffers.params;
        params.granularity = kGranularities[between(0, 2)];
        params.score = pick({MassScore::kMean, MassScore::kMax});
        params.norm = pick({MassNorm::kContext, MassNorm::kPrefix});
        std::vector<int32_t> prefix_lens;
        for (const int32_t len : c.seq_lens) prefix_lens.push_back(static_cast<int32_t>(between(-2, len + 3)));
        const std::vector<char> mask(c.seq_lens.size() * c.num_queries, 1);
        const std::vector<double> exact =
            buffers.naive_mass(params.granularity, params.score, params.norm, mask, prefix_lens);
        const AttentionOnDevice device(buffers, cuda::block_attention_mass_workspace(params));
        const DeviceArray<int32_t> device_prefix_lens(prefix_lens);
        const DeviceArray<float> mass(std::vector<float>(exact.size(), NAN));
        params.attention = device.params;
        params.prefix_lens = params.norm == MassNorm::kPrefix ? device_prefix_lens.data() : nullptr;
        params.mass = mass.data();
        cuda::block_attention_mass(params, nullptr);
        device.fetch(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers);
        const std::vector<float> actual = mass.get();
        for (size_t u = 0; u < exact.size(); ++u)
            ASSERT_NEAR(actual[u], exact[u], 2e-3 * std::max(exact[u], 1e-3)) << "mass " << u;
    }
}

TEST_F(Fuzz, BlockAttentionRows) {
    for (int i = 0; i < kCases; ++i) {
        const AttentionCase c = random_case();
        SCOPED_TRACE(describe(i, c));
        AttentionBuffers buffers(c);
        BlockAttentionRowsParams params;
        params.attention = buffers.params;
        params.granularity = kGranularities[between(0, 2)];
        const int64_t units = (buffers.params.max_seq_len + params.granularity - 1) / params.granularity;
        const AttentionOnDevice device(buffers, cuda::block_attention_rows_workspace(params));
        const DeviceArray<float> row_mass(std::vector<float>(buffers.shares.size() * units * buffers.rows(), NAN));
        params.attention = device.params;
        params.row_mass = row_mass.data();
        cuda::block_attention_rows(params, nullptr);
        device.fetch(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers);
        for (const float mass : row_mass.get()) ASSERT_LE(mass, 1e-3f);  // logarithms of shares, none of them NaN
    }
}

TEST_F(Fuzz, SparseBlockAttention) {
    for (int i = 0; i < kCases; ++i) {
        SparseCase c;
        c.attention = random_case();
        c.granularity = pick({1, 16, 32, 64});
        c.list = static_cast<ListKind>(between(0, static_cast<int64_t>(ListKind::kLongerThanRoom)));
        c.tail = static_cast<TailKind>(between(0, static_cast<int64_t>(TailKind::kNegative)));
        if (one_in(8)) c.capacity = between(0, 20);
        SCOPED_TRACE(describe(i, c.attention));
        SparseBuffers buffers(c);
        const AttentionOnDevice device(buffers.attention, buffers.workspace_bytes());
        const DeviceArray<int32_t> indices(buffers.lists.indices), counts(buffers.lists.counts);
        const DeviceArray<int32_t> tail_start(buffers.lists.tail_start);
        SparseBlockAttentionParams params = buffers.params;
        params.attention = device.params;
        params.indices = indices.data();
        params.counts = counts.data();
        params.tail_start = tail_start.data();
        cuda::sparse_block_attention(params, nullptr);
        device.fetch(buffers.attention);
        MAGE_EXPECT_CUDA_ATTENTION(buffers.attention);
    }
}

}  // namespace
}  // namespace mage::test
