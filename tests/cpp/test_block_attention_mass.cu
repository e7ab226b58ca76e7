#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <string>
#include <vector>

#include "attention_gpu.h"
#include "kernels/attention_launch.h"
#include "mage/block_attention_mass.h"

namespace mage::test {
namespace {

struct CudaMassCase {
    AttentionCase attention;
    int64_t granularity;
    MassScore score;
    MassNorm norm;
    bool masked;
};

std::vector<CudaMassCase> cuda_mass_cases() {
    std::vector<CudaMassCase> cases;
    const int64_t granularities[] = {16, 64, 32};
    // Every attention case, with the options of the emission in turn.
    size_t i = 0;
    for (const AttentionCase& c : cuda_unit_cases()) {
        cases.push_back({c, granularities[i % 3], i / 3 % 2 == 1 ? MassScore::kMax : MassScore::kMean,
                         i / 2 % 2 == 0 ? MassNorm::kContext : MassNorm::kPrefix, i % 5 > 2});
        ++i;
    }
    for (const int64_t dim : {64, 128}) {
        cases.push_back({{"GatherG64D" + std::to_string(dim), {333, 0, 65}, 32, 6, 1, dim, 1, DType::kBFloat16},
                         64,
                         MassScore::kMean,
                         MassNorm::kContext,
                         false});
    }
    // More segments than workers, so that these take several, whole ones and parts.
    std::vector<int32_t> lens;
    for (int32_t i = 0; i < 40; ++i) lens.push_back(i % 9 == 4 ? 0 : 37 * i % 400 + 1);
    for (const int64_t g : granularities) {
        cases.push_back({{"ManyRequestsG" + std::to_string(g), lens, 8, 16, 4, 64, 64, DType::kBFloat16},
                         g,
                         MassScore::kMean,
                         MassNorm::kPrefix,
                         false});
    }
    // The same with many tiles to a piece.
    std::vector<int32_t> long_lens;
    for (int32_t i = 0; i < 34; ++i) long_lens.push_back(130 + 97 * i % 500);
    for (const RowCount& r : kRowCounts) {
        const std::string name = std::string("ManyTiles") + r.name;
        cases.push_back({{name, long_lens, r.queries, 4 * r.heads, 4, 64, 64, DType::kBFloat16},
                         cases.size() % 2 == 0 ? 16 : 64,
                         MassScore::kMean,
                         MassNorm::kPrefix,
                         true});
    }
    // As many requests, all as long as one another, with lines of unit sums that are dropped once they are read.
    for (const RowCount& r : kRowCounts) {
        const std::vector<int32_t> equal(34, 300);
        cases.push_back(
            {{std::string("EqualRequests") + r.name, equal, r.queries, 4 * r.heads, 4, 64, 64, DType::kFloat16},
             cases.size() % 2 == 0 ? 64 : 16,
             MassScore::kMean,
             MassNorm::kContext,
             false});
    }
    // All of them for every row shape, and for rows that fill the largest.
    std::vector<RowCount> rows(std::begin(kRowCounts), std::end(kRowCounts));
    rows.push_back({"Rows256", 32, 8});
    for (const RowCount& r : rows) {
        for (const int64_t g : granularities) {
            for (const bool max : {false, true}) {
                for (const bool prefix : {false, true}) {
                    const std::string name = std::string(r.name) + "G" + std::to_string(g) + (max ? "Max" : "Mean") +
                                             (prefix ? "Prefix" : "Context");
                    cases.push_back({{name, {200, 0, 65}, r.queries, r.heads, 1, 64, 32, DType::kBFloat16},
                                     g,
                                     max ? MassScore::kMax : MassScore::kMean,
                                     prefix ? MassNorm::kPrefix : MassNorm::kContext,
                                     false});
                }
            }
        }
    }
    return cases;
}

// The tensors of a case: attention's and those of the emission, mass NaN. `packs`: unit sums are kept in 16 bits where
// that can be, though they are few.
struct MassOnDevice {
    bool packs;
    AttentionBuffers buffers;
    std::vector<int32_t> prefix_lens;
    std::vector<char> mask;
    BlockAttentionMassParams params;
    AttentionOnDevice attention;
    DeviceArray<int32_t> device_prefix;
    DeviceArray<char> device_mask;
    int64_t mass_size;
    DeviceArray<float> device_mass;
    std::vector<float> mass;

    explicit MassOnDevice(const CudaMassCase& m, bool packs_units = false)
        : packs(packs_units),
          buffers(m.attention),
          prefix_lens(prefix_of(buffers)),
          mask(mask_of(m)),
          params(params_of(m, buffers)),
          attention(buffers, cuda::block_attention_mass_workspace(params) + level_bytes(params)),
          device_prefix(prefix_lens),
          device_mask(mask),
          mass_size(buffers.params.num_requests * buffers.params.num_kv_heads *
                    ((buffers.params.max_seq_len + m.granularity - 1) / m.granularity)),
          device_mass(std::vector<float>(mass_size)) {
        params.attention = attention.params;
        params.row_mask = m.masked ? reinterpret_cast<const bool*>(device_mask.data()) : nullptr;
        params.prefix_lens = m.norm == MassNorm::kPrefix ? device_prefix.data() : nullptr;
        params.mass = device_mass.data();
        poison();
    }

    // P inside of tiles and units.
    static std::vector<int32_t> prefix_of(const AttentionBuffers& buffers) {
        std::vector<int32_t> lens;
        for (const int32_t len : buffers.test.seq_lens) lens.push_back(len * 2 / 3);
        return lens;
    }

    static std::vector<char> mask_of(const CudaMassCase& m) {
        std::vector<char> mask(m.attention.seq_lens.size() * m.attention.num_queries, 1);
        for (size_t i = 0; i < mask.size(); ++i) mask[i] = !m.masked || i % 3 == 1;
        return mask;
    }

    static BlockAttentionMassParams params_of(const CudaMassCase& m, const AttentionBuffers& buffers) {
        BlockAttentionMassParams params;
        params.attention = buffers.params;
        params.granularity = m.granularity;
        params.score = m.score;
        params.norm = m.norm;
        return params;
    }

    // What packed sums take beside their own place, which is smaller than that of others.
    static int64_t level_bytes(const BlockAttentionMassParams& params) {
        const int64_t streams = params.attention.num_requests * params.attention.num_kv_heads;
        core::AttentionPlan plan = core::plan_attention(params.attention, core::kMaxSms);
        plan.pack_units(streams, 1, 0);
        return 4 * plan.level_floats(streams) + 16 * streams * params.attention.max_seq_len;
    }

    void launch(CudaStream stream) const {
        if (!packs) {
            cuda::block_attention_mass(params, stream);
            return;
        }
        cuda::UnitOutputs outputs;
        outputs.granularity = params.granularity;
        outputs.score = params.score;
        outputs.row_mask = params.row_mask;
        outputs.prefix_lens = params.prefix_lens;
        outputs.mass = params.mass;
        outputs.pack_from = 0;
        cuda::launch_block_attention("block_attention_mass", params.attention, outputs, nullptr, stream);
    }

    void poison() {
        attention.poison();
        MAGE_CUDA_CHECK("test", cudaMemset(device_mass.data(), 0xff, mass_size * sizeof(float)));
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
    }

    void fetch() {
        attention.fetch(buffers);
        mass = device_mass.get();
    }

    void run() {
        poison();
        launch(nullptr);
        fetch();
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { launch(stream); }, [this] { poison(); },
                [this] { return bytes_in(attention.out, attention.lse, device_mass); }};
    }
};

// `relative`: what unit sums in 16 bits and float32 arithmetic may be off by.
void expect_naive_mass(const MassOnDevice& m, double relative = 1e-3) {
    const std::vector<double> exact =
        m.buffers.naive_mass(m.params.granularity, m.params.score, m.params.norm, m.mask, m.prefix_lens);
    ASSERT_EQ(m.mass.size(), exact.size());
    const size_t units = exact.size() / m.buffers.shares.size();
    for (size_t i = 0; i < exact.size(); ++i) {
        ASSERT_NEAR(m.mass[i], exact[i], relative * std::max(exact[i], 1e-6))
            << "stream " << i / units << " unit " << i % units;
        if (exact[i] == 0.0) {
            ASSERT_EQ(m.mass[i], 0.0f) << "stream " << i / units << " unit " << i % units;
        }
    }
}

class BlockAttentionMassCuda : public testing::TestWithParam<CudaMassCase> {};

TEST_P(BlockAttentionMassCuda, EqualsTheNaiveLoop) {
    MAGE_NEEDS_GPU();
    MassOnDevice m(GetParam());
    for (const bool packs : {true, false}) {
        m.packs = packs;
        m.run();
        expect_naive_mass(m);
    }
    MAGE_EXPECT_CUDA_ATTENTION(m.buffers);
    // Emission does not change attention.
    const std::vector<char> out = m.buffers.out;
    const std::vector<float> lse = m.buffers.lse;
    m.poison();
    cuda::block_attention(m.params.attention, nullptr);
    m.fetch();
    EXPECT_EQ(m.buffers.out, out);
    EXPECT_EQ(m.buffers.lse, lse);
}

INSTANTIATE_TEST_SUITE_P(Cases, BlockAttentionMassCuda, testing::ValuesIn(cuda_mass_cases()),
                         [](const auto& info) { return info.param.attention.name; });

CudaMassCase small_case(int64_t queries, int64_t heads, std::vector<int32_t> lens) {
    return {{"Small", std::move(lens), queries, heads, 1, 64, 16, DType::kBFloat16},
            16,
            MassScore::kMean,
            MassNorm::kPrefix,
            true};
}

TEST(BlockAttentionMassCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t split_tokens : {0, 64}) {
            CudaMassCase c = small_case(r.queries, r.heads, {700, 1, 0, 300});
            c.attention.split_tokens = split_tokens;
            MassOnDevice m(c);
            for (const bool packs : {true, false}) {
                SCOPED_TRACE(std::string(r.name) + (packs ? " packed" : ""));
                m.packs = packs;
                m.run();
                expect_naive_mass(m);
                expect_equal_runs(m.call(), 100);
            }
        }
    }
}

// Whether a row grows in two steps: tiles that add up to less than a next level, then one that does and leaves them a
// share that counts.
bool grows_twice(const std::vector<double>& share, int64_t rows, int64_t row, int64_t tokens, int64_t keys) {
    double first = 0.0, before = 0.0;
    for (int64_t begin = 0; begin < tokens; begin += keys) {
        double sum = 0.0;
        for (int64_t t = begin; t < std::min(tokens, begin + keys); ++t) sum += share[t * rows + row];
        if (begin == 0) {
            first = sum;
        } else if (sum > first * 0x1p48) {
            return before > sum * 0x1p-10;
        } else {
            before = std::max(before, sum);
        }
    }
    return false;
}

// Scores so large that what a row adds up to grows by more than 16 bits can hold from one tile to another.
TEST(BlockAttentionMassCudaRange, GrowsWithinAPiece) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const bool other : {false, true}) {
            // More segments than workers, which then have whole ones.
            CudaMassCase c = {
                {"Range", std::vector<int32_t>(34, 640), r.queries, 4 * r.heads, 4, 64, 64, DType::kBFloat16},
                other ? 16 : 64,
                other ? MassScore::kMax : MassScore::kMean,
                MassNorm::kContext,
                false};
            c.attention.softmax_scale = 4.0;
            MassOnDevice m(c);
            const int64_t rows = m.buffers.rows();
            const int64_t keys = core::row_shape(core::choose_row_shape(rows)).keys;
            int64_t found = 0;
            for (const std::vector<double>& share : m.buffers.shares) {
                for (int64_t row = 0; row < rows; ++row) found += grows_twice(share, rows, row, 640, keys) ? 1 : 0;
            }
            ASSERT_GT(found, 0);
            for (const bool packs : {true, false}) {
                m.packs = packs;
                m.run();
                // 16 bits take up to 2^-10 of a share (core/unit_sums.h: 9 bits of mantissa, rounded to nearest).
                // Scores of up to 2^9 in log2 are rounded to 2^-16, which takes 2^-16 * ln 2: a score, the reference
                // when it moves after that (by 2^8 and more, so twice at most where a share is above 2^-20), and the
                // total. 2^-14 are five of these; the 1e-3 of smaller scores would leave room for two.
                expect_naive_mass(m, (packs ? 0x1p-10 : 0.0) + 0x1p-14);
            }
        }
    }
}

// Lengths that are out of range count as the nearest that are not.
TEST(BlockAttentionMassCudaLengths, AreClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const MassNorm norm : {MassNorm::kContext, MassNorm::kPrefix}) {
            MassOnDevice m({near_lengths(r), 16, MassScore::kMean, norm, true});
            m.attention.seq_lens.set(kFarLengths);
            for (const bool packs : {true, false}) {
                m.packs = packs;
                m.run();
                expect_naive_mass(m);
                MAGE_EXPECT_CUDA_ATTENTION(m.buffers);
            }
        }
    }
}

// P is clamped to [0, S].
TEST(BlockAttentionMassCudaPrefix, IsClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        MassOnDevice m(small_case(r.queries, r.heads, {150, 150, 150, 150, 150}));
        m.prefix_lens = {-1, 0, INT_MAX, 151, INT_MIN};
        m.device_prefix.set(m.prefix_lens);
        for (const bool packs : {true, false}) {
            m.packs = packs;
            m.run();
            expect_naive_mass(m);
        }
    }
}

// A masked row may hold anything: its NaN reaches its own output and no mass.
TEST(BlockAttentionMassCudaMask, HidesNan) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const MassScore score : {MassScore::kMean, MassScore::kMax}) {
            CudaMassCase c = small_case(r.queries, r.heads, {700, 90});
            c.score = score;
            for (const bool packs : {true, false}) {
                MassOnDevice m(c, packs);
                m.run();
                const std::vector<float> mass = m.mass;
                const size_t query = m.buffers.q.size() / m.mask.size();
                for (size_t i = 0; i < m.mask.size(); ++i) {
                    if (!m.mask[i]) std::fill_n(m.buffers.q.begin() + static_cast<int64_t>(i * query), query, '\xff');
                }
                m.attention.q.set(m.buffers.q);
                m.run();
                EXPECT_EQ(m.mass, mass) << r.name;
            }
        }
    }
}

// NaN of a row that counts shows in every unit of its KV head that has tokens, and in no other.
TEST(BlockAttentionMassCudaMask, ShowsNanOfRowsThatCount) {
    MAGE_NEEDS_GPU();
    const std::vector<int32_t> lens = {300, 127};
    for (const RowCount& r : kRowCounts) {
        for (const MassScore score : {MassScore::kMean, MassScore::kMax}) {
            const CudaMassCase c = {{"Nan", lens, r.queries, 2 * r.heads, 2, 64, 16, DType::kBFloat16},
                                    16,
                                    score,
                                    MassNorm::kContext,
                                    false};
            for (const bool packs : {true, false}) {
                MassOnDevice m(c, packs);
                for (const size_t b : {0, 1}) std::fill_n(m.buffers.q.begin() + b * m.buffers.q.size() / 2, 2, '\xff');
                m.attention.q.set(m.buffers.q);
                m.run();
                for (size_t i = 0; i < m.mass.size(); ++i) {
                    const size_t units = m.mass.size() / 4, request = i / units / 2, kv_head = i / units % 2;
                    const bool has_tokens = i % units * 16 < static_cast<size_t>(lens[request]);
                    ASSERT_EQ(std::isnan(m.mass[i]), kv_head == 0 && has_tokens)
                        << r.name << (packs ? ", packed" : "") << ", request " << request << ", KV head " << kv_head
                        << ", unit " << i % units;
                }
            }
        }
    }
}

// With fixed splits a request's masses are those which it has alone, whatever bounds the lengths of its batch.
TEST(BlockAttentionMassCudaSplits, MakeARequestIndependentOfItsBatch) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const int64_t split_tokens : {64, 320}) {
            CudaMassCase c = small_case(r.queries, r.heads, {700, 64, 0, 65, 321});
            c.attention.split_tokens = split_tokens;
            c.attention.stair = 4;
            c.score = split_tokens == 64 ? MassScore::kMean : MassScore::kMax;
            MassOnDevice m(c);
            m.run();
            const std::vector<float> batch = m.mass;
            const auto requests = static_cast<int64_t>(c.attention.seq_lens.size());
            for (int64_t b = 0; b < requests; ++b) {
                for (const int64_t longest : {int64_t{700}, std::max<int64_t>(1, c.attention.seq_lens[b])}) {
                    m.poison();
                    BlockAttentionMassParams own = m.params;
                    own.attention = alone(own.attention, b, longest);
                    own.row_mask += b * r.queries;
                    own.prefix_lens += b;
                    cuda::block_attention_mass(own, nullptr);
                    m.fetch();
                    const int64_t units = (longest + c.granularity - 1) / c.granularity;
                    ASSERT_EQ(std::memcmp(m.mass.data(), batch.data() + b * (m.mass_size / requests), units * 4), 0)
                        << r.name << " split " << split_tokens << " request " << b << " of " << longest;
                }
            }
        }
    }
}

TEST(BlockAttentionMassCudaGraph, ReplaysWithNewLengths) {
    MAGE_NEEDS_GPU();
    const auto graph_case = [](std::vector<int32_t> lens, uint32_t seed) {
        CudaMassCase c = small_case(32, 6, std::move(lens));
        c.attention.max_seq_len = 600;
        c.attention.seed = seed;
        return c;
    };
    const auto expect_replays = [&](const std::vector<std::vector<int32_t>>& batches, bool packs) {
        MassOnDevice captured(graph_case(batches[0], 1), packs);
        Streams streams;
        streams.capture([&](cudaStream_t stream) { captured.launch(stream); });
        for (size_t i = 1; i < batches.size(); ++i) {
            MassOnDevice other(graph_case(batches[i], static_cast<uint32_t>(i) + 2));
            captured.attention.set(other.buffers);
            captured.device_prefix.set(other.prefix_lens);
            captured.poison();
            streams.replay();
            captured.fetch();
            other.buffers.out = captured.buffers.out;
            other.buffers.lse = captured.buffers.lse;
            other.mass = captured.mass;
            expect_naive_mass(other);
            MAGE_EXPECT_CUDA_ATTENTION(other.buffers);
        }
    };
    // Of more than a warp of requests, all as long as one another, and then not.
    std::vector<int32_t> equal(34, 130), uneven(34, 130);
    uneven[0] = 600;
    uneven[1] = 0;
    uneven[33] = 1;
    for (const bool packs : {true, false}) {
        expect_replays({{77, 0, 130}, {600, 1, 0}, {0, 0, 0}, {64, 599, 600}}, packs);
        expect_replays({equal, uneven, equal, std::vector<int32_t>(34, 0)}, packs);
        if (HasFatalFailure()) return;
    }
}

TEST(BlockAttentionMassCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    MassOnDevice first(small_case(32, 4, {700, 90}), true), second(small_case(32, 6, {65, 0, 400}), true);
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        first.launch(streams.first);
        second.launch(streams.second);
    }
    for (MassOnDevice* m : {&first, &second}) {
        m->fetch();
        expect_naive_mass(*m);
        MAGE_EXPECT_CUDA_ATTENTION(m->buffers);
    }
}

// Every input may come from a kernel that lets this one start early.
TEST(BlockAttentionMassCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const bool packs : {false, true}) {
            CudaMassCase c = small_case(r.queries, r.heads, {300, 0, 77});
            c.attention.stair = 4;
            MassOnDevice m(c, packs);
            SCOPED_TRACE(std::string(r.name) + (packs ? " packed" : ""));
            LateInputs late;
            add_inputs(m.attention, &late);
            late.add("row_mask", m.device_mask, 0);
            late.add("prefix_lens", m.device_prefix, 0);
            late.expect_awaited(m.call());
            if (HasFatalFailure()) return;
        }
    }
}

// What is written may still be read by a kernel that lets this one start early.
TEST(BlockAttentionMassCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        for (const bool packs : {false, true}) {
            for (const std::vector<int32_t>& lens : kEmptySlots) {
                CudaMassCase c = small_case(r.queries, r.heads, lens);
                c.attention.max_seq_len = 300;
                MassOnDevice m(c, packs);
                SCOPED_TRACE(std::string(r.name) + (packs ? " packed" : "") + " first length " +
                             std::to_string(lens[0]));
                LateReads late;
                add_outputs(m.attention, &late);
                late.add("mass", m.device_mass);
                late.expect_awaited(m.call());
                if (HasFatalFailure()) return;
            }
        }
    }
}

TEST(BlockAttentionMassCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    const MassOnDevice m(small_case(8, 7, {70}));
    const auto expect_error = [&](const BlockAttentionMassParams& bad, const std::string& message) {
        expect_cuda_error([&] { cuda::block_attention_mass(bad, nullptr); }, "block_attention_mass: " + message);
    };
    BlockAttentionMassParams bad = m.params;
    bad.attention.dtype = DType::kFloat32;
    expect_error(bad, "q must be bfloat16 or float16 on CUDA, got float32");
    bad = m.params;
    bad.attention.head_dim = 96;
    bad.attention.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "the head dim of q must be 64 or 128 on CUDA, got 96");
    bad = m.params;
    bad.granularity = 1;
    bad.attention.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "g must be 16, 32 or 64 on CUDA (token_mass has g = 1), got 1");
    bad.granularity = 8;
    expect_error(bad, "g must be 1, 16, 32 or 64, got 8");
    bad = m.params;
    bad.attention.num_queries = 1000000;
    bad.attention.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "q must have at most ");
    bad = m.params;
    const int64_t needed = cuda::block_attention_mass_workspace(m.params);
    bad.attention.workspace_bytes = needed - 1;
    expect_error(
        bad, "workspace must have at least " + std::to_string(needed) + " bytes, got " + std::to_string(needed - 1));
    bad = m.params;
    bad.prefix_lens = nullptr;
    expect_error(bad, "prefix_lens must be given with norm prefix");
    bad = m.params;
    bad.score = MassScore::kRows;
    expect_error(bad, "score must be mean or max, got rows");
}

}  // namespace
}  // namespace mage::test
