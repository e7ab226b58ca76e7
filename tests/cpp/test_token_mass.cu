#include <gtest/gtest.h>

#include <climits>
#include <string>
#include <vector>

#include "attention_gpu.h"
#include "mage/token_mass.h"

namespace mage::test {
namespace {

// What is asked of the tokens of an attention case.
struct TokenOptions {
    MassScore score = MassScore::kMean;
    MassNorm norm = MassNorm::kContext;
    bool masked = false;
    int64_t granularity = 0;  // of a list of candidates; 0: all tokens
    int64_t candidates = 7;

    std::string name() const {
        const char* scores[] = {"mean", "max", "rows"};
        return std::string(scores[static_cast<int>(score)]) + (norm == MassNorm::kPrefix ? " prefix" : " context") +
               (masked ? " masked" : "") + (granularity > 0 ? " list of " + std::to_string(granularity) : "");
    }
};

constexpr size_t kGuard = 64;  // floats behind mass that stay as they are

// The tensors of a case. mass is NaN before a call, and not aligned to more than its floats.
struct TokensOnDevice {
    AttentionBuffers& buffers;
    TokenOptions options;
    std::vector<int32_t> prefix_lens, units;
    std::vector<char> mask;
    TokenMassParams params;
    AttentionOnDevice attention;
    DeviceArray<int32_t> device_prefix, device_units;
    DeviceArray<char> device_mask;
    size_t mass_size, shift;
    DeviceArray<float> device_mass;
    std::vector<float> mass;

    TokensOnDevice(AttentionBuffers& b, const TokenOptions& o)
        : buffers(b),
          options(o),
          prefix_lens(prefix_of(b)),
          units(units_of(b, o)),
          mask(mask_of(b, o)),
          params(params_of(b, o)),
          attention(b, cuda::token_mass_workspace(params)),
          device_prefix(prefix_lens),
          device_units(units),
          device_mask(mask),
          mass_size(b.shares.size() * length() * width()),
          shift(b.test.name.size() % 4),
          device_mass(std::vector<float>(shift + mass_size + kGuard)) {
        params.q = attention.params.q;
        params.k_cache = attention.params.k_cache;
        params.pages = attention.params.pages;
        params.seq_lens = attention.params.seq_lens;
        params.kv_lens = attention.params.kv_lens;
        params.lse = attention.lse.data();
        params.row_mask = o.masked ? reinterpret_cast<const bool*>(device_mask.data()) : nullptr;
        params.prefix_lens = o.norm == MassNorm::kPrefix ? device_prefix.data() : nullptr;
        params.units = device_units.data();
        params.mass = device_mass.data() + shift;
        params.workspace = attention.params.workspace;
        params.workspace_bytes = attention.params.workspace_bytes;
        set_lse();
        poison();
    }

    int64_t length() const {
        return options.granularity > 0 ? options.candidates * options.granularity : buffers.params.max_seq_len;
    }
    int64_t width() const { return options.score == MassScore::kRows ? buffers.rows() : 1; }

    // P inside of tiles, and outside of what it may be.
    static std::vector<int32_t> prefix_of(const AttentionBuffers& b) {
        std::vector<int32_t> lens;
        for (size_t i = 0; i < b.test.seq_lens.size(); ++i) {
            const int32_t len = b.test.seq_lens[i];
            lens.push_back(i % 4 == 3 ? INT_MAX : i % 4 == 2 ? -5 : len * 2 / 3);
        }
        return lens;
    }

    // Not ascending, one twice, one past the end, the others unused or far outside.
    static std::vector<int32_t> units_of(const AttentionBuffers& b, const TokenOptions& o) {
        if (o.granularity == 0) return {};
        std::mt19937 random(b.test.seed);
        std::vector<int32_t> units;
        for (size_t stream = 0; stream < b.shares.size(); ++stream) {
            const int32_t len = b.test.seq_lens[stream / b.test.num_kv_heads];
            const auto last = static_cast<int32_t>(std::max(len - 1, 0) / o.granularity);
            std::vector<int32_t> own = {last, -1, 0, last + 1, INT_MAX, INT_MIN, last};
            while (static_cast<int64_t>(own.size()) < o.candidates)
                own.push_back(static_cast<int32_t>(random() % (last + 1)));
            units.insert(units.end(), own.begin(), own.begin() + o.candidates);
        }
        return units;
    }

    // The last request keeps nothing.
    static std::vector<char> mask_of(const AttentionBuffers& b, const TokenOptions& o) {
        const size_t queries = b.test.num_queries, count = b.test.seq_lens.size() * queries;
        std::vector<char> mask(count, 1);
        for (size_t i = 0; i < count && o.masked; ++i)
            mask[i] = i % 3 == 1 && (i < count - queries || count == queries);
        return mask;
    }

    static TokenMassParams params_of(const AttentionBuffers& b, const TokenOptions& o) {
        const BlockAttentionParams& p = b.params;
        TokenMassParams params;
        params.num_requests = p.num_requests;
        params.num_queries = p.num_queries;
        params.num_heads = p.num_heads;
        params.num_kv_heads = p.num_kv_heads;
        params.head_dim = p.head_dim;
        params.max_seq_len = p.max_seq_len;
        params.dtype = p.dtype;
        params.stride_q_request = p.stride_q_request;
        params.stride_q_query = p.stride_q_query;
        params.stride_q_head = p.stride_q_head;
        params.softmax_scale = p.softmax_scale;
        params.score = o.score;
        params.norm = o.norm;
        params.has_units = o.granularity > 0;
        params.num_candidates = params.has_units ? o.candidates : 0;
        params.granularity = params.has_units ? o.granularity : 1;
        return params;
    }

    // The naive loop's lse, rounded; NaN for rows that don't count.
    void set_lse() {
        std::vector<float> lse;
        const AttentionCase& c = buffers.test;
        for (size_t i = 0; i < buffers.naive_lse.size(); ++i) {
            const size_t request = i / (c.num_heads * c.num_queries);
            const bool kept = mask[request * c.num_queries + i % c.num_queries] != 0;
            lse.push_back(kept ? static_cast<float>(buffers.naive_lse[i]) : NAN);
        }
        attention.lse.set(lse);
    }

    // Inputs of another case of the same shape, under the same addresses.
    void set(const TokensOnDevice& other) {
        attention.set(other.buffers);
        device_prefix.set(other.prefix_lens);
        device_units.set(other.units);
        device_mask.set(other.mask);
        attention.lse.set(other.attention.lse.get());
    }

    void poison() {
        MAGE_CUDA_CHECK("test", cudaMemset(device_mass.data(), 0xff, (shift + mass_size + kGuard) * sizeof(float)));
        MAGE_CUDA_CHECK("test", cudaMemset(params.workspace, 0xff, params.workspace_bytes));
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
    }

    void fetch() {
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
        mass = device_mass.get();
        for (size_t i = 0; i < shift + kGuard; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &mass[i < shift ? i : mass_size + i], 4);
            ASSERT_EQ(bits, ~0u) << "written outside of mass";
        }
        mass.erase(mass.begin(), mass.begin() + static_cast<int64_t>(shift));
        mass.resize(mass_size);
    }

    void run() {
        poison();
        cuda::token_mass(params, nullptr);
        fetch();
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::token_mass(params, stream); }, [this] { poison(); },
                [this] { return bytes_in(device_mass); }};
    }
};

// Masses of a case in float64 from the naive shares, with the options of `m`. Above a millionth of their total, which
// is at least 1, they may differ by 1e-3 of their size: scores are rounded to 2^-24 of some hundreds, lse likewise.
void expect_naive_tokens(const TokensOnDevice& m) {
    const AttentionBuffers& b = m.buffers;
    const AttentionCase& c = b.test;
    const int64_t rows = b.rows(), group = c.num_heads / c.num_kv_heads,
                  g = std::max<int64_t>(m.options.granularity, 1);
    ASSERT_EQ(m.mass.size(), m.mass_size);
    for (size_t stream = 0; stream < b.shares.size(); ++stream) {
        const std::vector<double>& share = b.shares[stream];
        const auto request = static_cast<int64_t>(stream) / c.num_kv_heads;
        const int64_t seq_len = c.seq_lens[request];
        const int64_t end =
            m.options.norm == MassNorm::kPrefix ? std::clamp<int64_t>(m.prefix_lens[request], 0, seq_len) : seq_len;
        std::vector<double> total(rows, 0.0);
        int64_t kept = 0;
        for (int64_t r = 0; r < rows; ++r) {
            if (!m.mask[request * c.num_queries + r / group]) continue;
            ++kept;
            if (m.options.norm == MassNorm::kContext) {
                total[r] = 1.0;
                continue;
            }
            for (int64_t t = 0; t < end; ++t) total[r] += share[t * rows + r];
            // Below 2^-126 a share is 0 in float32: a total near that is not for this test.
            ASSERT_TRUE(total[r] == 0.0 || total[r] > 0x1p-100) << "row " << r << " total " << total[r];
        }
        const auto is_seen = [&](int64_t t, int64_t r) {
            const int64_t query = r / group;
            if (t < 0 || t >= end || b.is_broken(request, t) || !m.mask[request * c.num_queries + query]) return false;
            return total[r] > 0.0 && (b.kv_lens.empty() || t < b.kv_lens[request * c.num_queries + query]);
        };
        for (int64_t at = 0; at < m.length(); ++at) {
            int64_t t = at;
            if (m.options.granularity > 0) {
                const int64_t unit = m.units[static_cast<int64_t>(stream) * m.options.candidates + at / g];
                t = unit < 0 ? -1 : unit * g + at % g;
            }
            double sum = 0.0, largest = 0.0;
            bool seen = false;
            for (int64_t r = 0; r < rows; ++r) {
                const double exact = is_seen(t, r) ? share[t * rows + r] / total[r] : 0.0;
                seen = seen || is_seen(t, r);
                sum += exact;
                largest = std::max(largest, exact);
                if (m.options.score != MassScore::kRows) continue;
                const float actual = m.mass[(stream * m.length() + at) * rows + r];
                ASSERT_NEAR(std::exp(actual), exact, 1e-3 * std::max(exact, 1e-6))
                    << "stream " << stream << " place " << at << " row " << r;
                if (!is_seen(t, r)) {
                    ASSERT_EQ(actual, -INFINITY) << "stream " << stream << " place " << at << " row " << r;
                }
            }
            if (m.options.score == MassScore::kRows) continue;
            const double exact =
                m.options.score == MassScore::kMax ? largest : sum / static_cast<double>(std::max<int64_t>(kept, 1));
            const float actual = m.mass[stream * m.length() + at];
            ASSERT_NEAR(actual, exact, 1e-3 * std::max(exact, 1e-6)) << "stream " << stream << " place " << at;
            if (!seen) {
                ASSERT_EQ(actual, 0.0f) << "stream " << stream << " place " << at;
            }
        }
    }
}

std::vector<TokenOptions> all_options(int64_t granularity) {
    std::vector<TokenOptions> all;
    for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
        for (const MassNorm norm : {MassNorm::kContext, MassNorm::kPrefix}) {
            for (const int64_t g : {int64_t{0}, granularity}) all.push_back({score, norm, all.size() % 3 == 1, g});
        }
    }
    return all;
}

class TokenMassCuda : public testing::TestWithParam<AttentionCase> {};

TEST_P(TokenMassCuda, EqualsTheNaiveLoop) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(GetParam());
    const int64_t granularities[] = {16, 1, 64, 32};
    for (const TokenOptions& options : all_options(granularities[buffers.test.name.size() % 4])) {
        SCOPED_TRACE(options.name());
        if (buffers.test.name == "OneWinner" && options.norm == MassNorm::kPrefix) continue;  // totals near 2^-126
        TokensOnDevice m(buffers, options);
        m.run();
        expect_naive_tokens(m);
        if (HasFatalFailure()) return;
    }
}

// Fixed splits mean nothing here.
std::vector<AttentionCase> cuda_token_cases() {
    std::vector<AttentionCase> cases;
    for (const AttentionCase& c : cuda_attention_cases()) {
        if (c.name.rfind("SplitBy", 0) != 0) cases.push_back(c);
    }
    // Chunks of rows over a long stream, where a worker goes back to the start of a run.
    cases.push_back({"CutRowsLong", {1500, 70}, 64, 5, 1, 64, 64, DType::kBFloat16});
    cases.back().stair = 16;
    // More tiles to each of 132 CTAs than a ring has stages: 8, and 7 where a call has 129 to 192 rows.
    cases.push_back({"RingRows8", {76100}, 2, 4, 1, 128, 64, DType::kBFloat16});
    cases.push_back({"RingRows140", {67700}, 10, 14, 1, 128, 64, DType::kBFloat16});
    return cases;
}

INSTANTIATE_TEST_SUITE_P(Cases, TokenMassCuda, testing::ValuesIn(cuda_token_cases()),
                         [](const auto& info) { return info.param.name; });

AttentionCase small_case(int64_t queries, int64_t heads, std::vector<int32_t> lens, uint32_t seed = 1) {
    AttentionCase c = {"Small", std::move(lens), queries, heads, 2, 64, 16, DType::kBFloat16};
    c.num_heads *= 2;
    c.max_seq_len = 700;
    c.stair = 8;
    c.seed = seed;
    return c;
}

// Lengths that are out of range count as the nearest that are not.
TEST(TokenMassCudaLengths, AreClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        AttentionBuffers buffers(near_lengths(r));
        for (const TokenOptions& options : all_options(16)) {
            SCOPED_TRACE(std::string(r.name) + " " + options.name());
            TokensOnDevice m(buffers, options);
            m.attention.seq_lens.set(kFarLengths);
            m.run();
            expect_naive_tokens(m);
            if (HasFatalFailure()) return;
        }
    }
}

TEST(TokenMassCudaLists, EqualTheFullPassBitForBit) {
    MAGE_NEEDS_GPU();
    const auto compare = [](AttentionBuffers& buffers, const TokenOptions& options) {
        TokensOnDevice all(buffers, {options.score, options.norm}), listed(buffers, options);
        all.run();
        listed.run();
        const int64_t g = options.granularity, width = all.width();
        for (int64_t i = 0; i < static_cast<int64_t>(listed.units.size()) * g; ++i) {
            const int64_t unit = listed.units[i / g], token = unit * g + i % g;
            if (unit < 0 || token >= all.length()) continue;
            const float* expected = &all.mass[(i / listed.length() * all.length() + token) * width];
            ASSERT_EQ(std::memcmp(&listed.mass[i * width], expected, width * 4), 0) << options.name() << " place " << i;
        }
    };
    for (const int64_t queries : {32, 48}) {  // one chunk of rows, two
        AttentionBuffers buffers(small_case(queries, 7, {700, 1, 64, 333}));
        for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
            for (const MassNorm norm : {MassNorm::kContext, MassNorm::kPrefix}) {
                for (const int64_t g : {1, 16, 32, 64}) compare(buffers, {score, norm, false, g, 40});
            }
        }
    }
}

// The third request's prefix is empty, and a CTA has it behind streams that are not: their sums are not its.
TEST(TokenMassCudaLists, OfAnEmptyPrefixBehindAFullOne) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(small_case(32, 7, {700, 400, 300, 333}));
    for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
        TokensOnDevice m(buffers, {score, MassNorm::kPrefix, false, 64, 49});
        m.run();
        expect_naive_tokens(m);
    }
}

TEST(TokenMassCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        AttentionCase c = small_case(r.queries, r.heads, {320, 1, 0, 300});
        c.max_seq_len = 0;
        AttentionBuffers buffers(c);
        for (const TokenOptions& options : all_options(16)) {
            TokensOnDevice m(buffers, options);
            m.run();
            expect_naive_tokens(m);
            const std::vector<float> mass = m.mass;
            for (int i = 1; i < 100; ++i) {
                m.run();
                ASSERT_EQ(m.mass, mass) << r.name << " " << options.name() << " run " << i;
            }
        }
    }
}

// Options that are neither captured nor part of the shape: lengths, tables, kv_lens, P, masks, lists, lse.
TEST(TokenMassCudaGraph, ReplaysWithNewLengths) {
    MAGE_NEEDS_GPU();
    for (const TokenOptions& options :
         {TokenOptions{MassScore::kMean, MassNorm::kPrefix, true}, TokenOptions{MassScore::kRows},
          TokenOptions{MassScore::kMax, MassNorm::kPrefix, false, 16, 33}}) {
        AttentionBuffers first(small_case(32, 7, {77, 0, 130}));
        TokensOnDevice captured(first, options);
        Streams streams;
        streams.capture([&](cudaStream_t stream) { cuda::token_mass(captured.params, stream); });
        const std::vector<std::vector<int32_t>> batches = {{700, 1, 0}, {0, 0, 0}, {64, 699, 700}, {1, 700, 65}};
        for (size_t i = 0; i < batches.size(); ++i) {
            AttentionBuffers buffers(small_case(32, 7, batches[i], static_cast<uint32_t>(i) + 2));
            TokensOnDevice other(buffers, options);
            captured.set(other);
            captured.poison();
            streams.replay();
            captured.fetch();
            other.mass = captured.mass;
            expect_naive_tokens(other);
        }
    }
}

TEST(TokenMassCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    AttentionBuffers a(small_case(32, 7, {700, 90})), b(small_case(32, 6, {65, 0, 400}));
    TokensOnDevice first(a, {MassScore::kMean, MassNorm::kPrefix}), second(b, {MassScore::kMax, MassNorm::kPrefix});
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        cuda::token_mass(first.params, streams.first);
        cuda::token_mass(second.params, streams.second);
    }
    for (TokensOnDevice* m : {&first, &second}) {
        m->fetch();
        expect_naive_tokens(*m);
    }
}

// Every input may come from a kernel that lets this one start early. Early candidates are unused.
TEST(TokenMassCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const int64_t queries : {8, 32, 48}) {  // one chunk of rows, the same, two
        AttentionCase c = small_case(queries, 7, {300, 77, 0, 130, 64});
        c.stair = 4;
        AttentionBuffers buffers(c);
        for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
            for (const int64_t g : {0, 16}) {
                TokensOnDevice m(buffers, {score, MassNorm::kPrefix, true, g});
                SCOPED_TRACE(std::to_string(queries) + " queries " + m.options.name());
                LateInputs late;
                add_inputs(m.attention, &late, false);
                late.add("lse", m.attention.lse);
                late.add("row_mask", m.device_mask, 0);
                late.add("prefix_lens", m.device_prefix, 0);
                late.add("units", m.device_units);
                late.expect_awaited(m.call());
                if (HasFatalFailure()) return;
            }
        }
    }
}

// What is written may still be read by a kernel that lets this one start early.
TEST(TokenMassCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (const int64_t queries : {32, 48}) {  // one chunk of rows, two
        for (const std::vector<int32_t>& lens : kEmptySlots) {
            AttentionCase c = small_case(queries, 7, lens);
            c.max_seq_len = 300;
            AttentionBuffers buffers(c);
            for (const TokenOptions& options : all_options(16)) {
                SCOPED_TRACE(std::to_string(queries) + " queries, first length " + std::to_string(lens[0]) + " " +
                             options.name());
                TokensOnDevice m(buffers, options);
                LateReads late;
                late.add("mass", m.device_mass);
                late.add("workspace", m.attention.workspace);
                late.expect_awaited(m.call());
                if (HasFatalFailure()) return;
            }
        }
    }
}

// A row that doesn't count may hold anything.
TEST(TokenMassCudaMask, HidesNan) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(small_case(30, 7, {200, 64}));
    for (const MassScore score : {MassScore::kMean, MassScore::kMax, MassScore::kRows}) {
        TokensOnDevice m(buffers, {score, MassNorm::kPrefix, true});
        const AttentionCase& c = buffers.test;
        std::vector<char> q = buffers.q;
        const size_t row_bytes = c.num_heads * c.head_dim * 2;
        for (size_t i = 0; i < m.mask.size(); ++i) {
            if (!m.mask[i]) std::fill_n(q.begin() + static_cast<int64_t>(i * row_bytes), row_bytes, '\xff');
        }
        m.attention.q.set(q);
        m.run();
        expect_naive_tokens(m);
    }
}

TEST(TokenMassCudaWorkspace, InNumbers) {
    TokenMassParams p;
    p.num_requests = 2;
    p.num_queries = 32;
    p.num_heads = 28;
    p.num_kv_heads = 4;
    p.head_dim = 128;
    p.max_seq_len = 4096;
    EXPECT_EQ(cuda::token_mass_workspace(p), 0);
    p.norm = MassNorm::kPrefix;
    EXPECT_EQ(cuda::token_mass_workspace(p), 4 * 224 * (8 + 132) + 8 * 8);
    EXPECT_EQ(token_mass_workspace(2, 32, 28, 4, 128, 4096), 4 * 224 * (8 + 132) + 8 * 8);
    p.max_seq_len = 65;
    EXPECT_EQ(cuda::token_mass_workspace(p), 4 * 224 * (8 + 16) + 8 * 8);
    EXPECT_EQ(token_mass_workspace(2, 32, 28, 4, 128, 131072), 4 * 8 * 224 * (256 + 2));
}

TEST(TokenMassCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    AttentionBuffers buffers(small_case(8, 7, {70}));
    const TokensOnDevice m(buffers, {MassScore::kMean, MassNorm::kPrefix});
    const auto expect_error = [&](const TokenMassParams& bad, const std::string& message) {
        expect_cuda_error([&] { cuda::token_mass(bad, nullptr); }, "token_mass: " + message);
    };
    TokenMassParams bad = m.params;
    bad.dtype = DType::kFloat32;
    expect_error(bad, "q must be bfloat16 or float16 on CUDA, got float32");
    bad = m.params;
    bad.head_dim = 96;
    expect_error(bad, "the head dim of q must be 64 or 128 on CUDA, got 96");
    bad = m.params;
    bad.workspace_bytes -= 1;
    expect_error(bad, "workspace must have at least " + std::to_string(m.params.workspace_bytes) + " bytes, got " +
                          std::to_string(m.params.workspace_bytes - 1));
    bad = m.params;
    bad.workspace = static_cast<char*>(bad.workspace) + 8;
    expect_error(bad, "workspace must be aligned to 16 bytes, got a base 8 bytes past it");
    bad = m.params;
    bad.granularity = 16;
    expect_error(bad, "g must be 1 without units, got 16");
}

}  // namespace
}  // namespace mage::test
