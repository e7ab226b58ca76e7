#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attention_gpu.h"
#include "mage/block_attention_rows.h"

namespace mage::test {
namespace {

// The tensors of a case: attention's, and row_mass, NaN.
struct RowsOnDevice {
    AttentionBuffers buffers;
    BlockAttentionRowsParams params;
    AttentionOnDevice attention;
    int64_t units;
    std::vector<float> row_mass;
    DeviceArray<float> device_row_mass;

    RowsOnDevice(const AttentionCase& c, int64_t granularity)
        : buffers(c),
          params(params_of(buffers, granularity)),
          attention(buffers, cuda::block_attention_rows_workspace(params)),
          units((buffers.params.max_seq_len + granularity - 1) / granularity),
          row_mass(buffers.shares.size() * units * buffers.rows()),
          device_row_mass(row_mass) {
        params.attention = attention.params;
        params.row_mass = device_row_mass.data();
        poison();
    }

    static BlockAttentionRowsParams params_of(const AttentionBuffers& buffers, int64_t granularity) {
        BlockAttentionRowsParams params;
        params.attention = buffers.params;
        params.granularity = granularity;
        return params;
    }

    void poison() {
        attention.poison();
        MAGE_CUDA_CHECK("test", cudaMemset(device_row_mass.data(), 0xff, row_mass.size() * sizeof(float)));
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
    }

    void fetch() {
        attention.fetch(buffers);
        row_mass = device_row_mass.get();
    }

    void run() {
        poison();
        cuda::block_attention_rows(params, nullptr);
        fetch();
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::block_attention_rows(params, stream); }, [this] { poison(); },
                [this] { return bytes_in(attention.out, attention.lse, device_row_mass); }};
    }
};

void expect_naive_rows(const RowsOnDevice& m) {
    const int64_t g = m.params.granularity, rows = m.buffers.rows();
    for (size_t stream = 0; stream < m.buffers.shares.size(); ++stream) {
        const std::vector<double>& share = m.buffers.shares[stream];
        const auto tokens = static_cast<int64_t>(share.size()) / rows;
        for (int64_t u = 0; u < m.units; ++u) {
            for (int64_t r = 0; r < rows; ++r) {
                double exact = 0.0;
                for (int64_t t = u * g; t < std::min(tokens, (u + 1) * g); ++t) exact += share[t * rows + r];
                const float actual = m.row_mass[(stream * m.units + u) * rows + r];
                ASSERT_NEAR(std::exp(actual), exact, 1e-3 * std::max(exact, 1e-6))
                    << "stream " << stream << " unit " << u << " row " << r;
                if (exact == 0.0) {
                    ASSERT_EQ(actual, -INFINITY) << "stream " << stream << " unit " << u << " row " << r;
                }
            }
        }
    }
}

// Cases with masses, the row shapes once each.
std::vector<AttentionCase> cuda_rows_cases() {
    std::vector<AttentionCase> cases;
    for (const AttentionCase& c : cuda_unit_cases()) {
        if (c.name.rfind("Rows", 0) != 0 || c.head_dim == 64) cases.push_back(c);
    }
    return cases;
}

class BlockAttentionRowsCuda : public testing::TestWithParam<AttentionCase> {};

TEST_P(BlockAttentionRowsCuda, EqualsTheNaiveLoop) {
    MAGE_NEEDS_GPU();
    const AttentionCase& c = GetParam();
    const int64_t granularities[] = {16, 32, 64};
    RowsOnDevice m(c, granularities[c.name.size() % 3]);
    m.run();
    expect_naive_rows(m);
    MAGE_EXPECT_CUDA_ATTENTION(m.buffers);
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttentionRowsCuda, testing::ValuesIn(cuda_rows_cases()),
                         [](const auto& info) { return info.param.name; });

AttentionCase small_case(int64_t queries, int64_t heads, std::vector<int32_t> lens, uint32_t seed = 1) {
    AttentionCase c = {"Small", std::move(lens), queries, heads, 1, 64, 16, DType::kBFloat16};
    c.max_seq_len = 700;
    c.stair = 8;
    c.seed = seed;
    return c;
}

// Lengths that are out of range count as the nearest that are not.
TEST(BlockAttentionRowsCudaLengths, AreClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        RowsOnDevice m(near_lengths(r), 16);
        m.attention.seq_lens.set(kFarLengths);
        m.run();
        expect_naive_rows(m);
        MAGE_EXPECT_CUDA_ATTENTION(m.buffers);
    }
}

TEST(BlockAttentionRowsCudaRuns, AreBitwiseEqualForEveryUnit) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t g : {16, 32, 64}) {
            RowsOnDevice m(small_case(r.queries, r.heads, {700, 1, 0, 300}), g);
            m.run();
            expect_naive_rows(m);
            SCOPED_TRACE(std::string(r.name) + " g " + std::to_string(g));
            expect_equal_runs(m.call(), 100);
        }
    }
}

// With fixed splits a request's shares are those which it has alone, whatever bounds the lengths of its batch.
TEST(BlockAttentionRowsCudaSplits, MakeARequestIndependentOfItsBatch) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t split_tokens : {64, 320}) {
            AttentionCase c = small_case(r.queries, r.heads, {700, 64, 0, 65, 321});
            c.split_tokens = split_tokens;
            RowsOnDevice m(c, 32);
            m.run();
            const std::vector<float> batch = m.row_mass;
            const auto requests = static_cast<int64_t>(c.seq_lens.size());
            for (int64_t b = 0; b < requests; ++b) {
                for (const int64_t longest : {int64_t{700}, std::max<int64_t>(1, c.seq_lens[b])}) {
                    m.poison();
                    BlockAttentionRowsParams own = m.params;
                    own.attention = alone(own.attention, b, longest);
                    cuda::block_attention_rows(own, nullptr);
                    m.fetch();
                    const int64_t shares = (longest + 31) / 32 * m.buffers.rows();
                    ASSERT_EQ(std::memcmp(m.row_mass.data(), batch.data() + b * m.units * m.buffers.rows(), shares * 4),
                              0)
                        << r.name << " split " << split_tokens << " request " << b << " of " << longest;
                }
            }
        }
    }
}

TEST(BlockAttentionRowsCudaGraph, ReplaysWithNewLengths) {
    MAGE_NEEDS_GPU();
    RowsOnDevice captured(small_case(32, 7, {77, 0, 130}), 32);
    Streams streams;
    streams.capture([&](cudaStream_t stream) { cuda::block_attention_rows(captured.params, stream); });
    const std::vector<std::vector<int32_t>> batches = {{700, 1, 0}, {0, 0, 0}, {64, 699, 700}};
    for (size_t i = 0; i < batches.size(); ++i) {
        RowsOnDevice other(small_case(32, 7, batches[i], static_cast<uint32_t>(i) + 2), 32);
        captured.attention.set(other.buffers);
        captured.poison();
        streams.replay();
        captured.fetch();
        other.buffers.out = captured.buffers.out;
        other.buffers.lse = captured.buffers.lse;
        other.row_mass = captured.row_mass;
        expect_naive_rows(other);
        MAGE_EXPECT_CUDA_ATTENTION(other.buffers);
    }
}

TEST(BlockAttentionRowsCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    RowsOnDevice first(small_case(32, 7, {700, 90}), 16), second(small_case(32, 6, {65, 0, 400}), 64);
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        cuda::block_attention_rows(first.params, streams.first);
        cuda::block_attention_rows(second.params, streams.second);
    }
    for (RowsOnDevice* m : {&first, &second}) {
        m->fetch();
        expect_naive_rows(*m);
        MAGE_EXPECT_CUDA_ATTENTION(m->buffers);
    }
}

// Every input may come from a kernel that lets this one start early.
TEST(BlockAttentionRowsCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t g : {16, 64}) {
            AttentionCase c = small_case(r.queries, r.heads, {300, 0, 77});
            c.stair = 4;
            RowsOnDevice m(c, g);
            SCOPED_TRACE(std::string(r.name) + " g " + std::to_string(g));
            LateInputs late;
            add_inputs(m.attention, &late);
            late.expect_awaited(m.call());
            if (HasFatalFailure()) return;
        }
    }
}

TEST(BlockAttentionRowsCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    const RowsOnDevice m(small_case(8, 7, {70}), 16);
    const auto expect_error = [&](const BlockAttentionRowsParams& bad, const std::string& message) {
        expect_cuda_error([&] { cuda::block_attention_rows(bad, nullptr); }, "block_attention_rows: " + message);
    };
    BlockAttentionRowsParams bad = m.params;
    bad.attention.dtype = DType::kFloat32;
    expect_error(bad, "q must be bfloat16 or float16 on CUDA, got float32");
    bad = m.params;
    bad.granularity = 1;
    expect_error(bad, "g must be 16, 32 or 64 on CUDA (token_mass has g = 1), got 1");
    bad = m.params;
    bad.attention.workspace_bytes -= 1;
    expect_error(bad, "workspace must have at least " + std::to_string(m.params.attention.workspace_bytes) +
                          " bytes, got " + std::to_string(m.params.attention.workspace_bytes - 1));
}

}  // namespace
}  // namespace mage::test
