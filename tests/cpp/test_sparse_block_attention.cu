#include <gtest/gtest.h>

#include <climits>
#include <string>
#include <vector>

#include "attention_gpu.h"
#include "mage/merge_attention.h"
#include "sparse_attention_cases.h"

namespace mage::test {
namespace {

constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
constexpr int64_t kGranularities[] = {1, 16, 32, 64};
constexpr ListKind kLists[] = {ListKind::kHalf, ListKind::kRuns, ListKind::kAll,           ListKind::kDirty,
                               ListKind::kNone, ListKind::kOne,  ListKind::kAllButTheLast, ListKind::kUneven};
constexpr TailKind kTails[] = {TailKind::kPrefix, TailKind::kInUnit,  TailKind::kZero,
                               TailKind::kEnd,    TailKind::kPastEnd, TailKind::kNegative};

// Every row shape with every granularity, and the rows that are cut with one.
struct RowsAndUnits {
    RowCount rows;
    int64_t granularity;
};
std::vector<RowsAndUnits> rows_and_units() {
    std::vector<RowsAndUnits> all;
    for (const RowCount& r : kRowCounts) {
        for (const int64_t g : kGranularities) all.push_back({r, g});
    }
    for (size_t i = 0; i < std::size(kCutRowCounts); ++i) all.push_back({kCutRowCounts[i], kGranularities[i]});
    return all;
}

std::vector<RowCount> all_row_counts() {
    std::vector<RowCount> rows(std::begin(kRowCounts), std::end(kRowCounts));
    rows.insert(rows.end(), std::begin(kCutRowCounts), std::end(kCutRowCounts));
    return rows;
}

// Of requests that are mostly short, of which every sixth is empty: with two KV heads, of 66 requests twice as many
// pairs of CTAs as run at once, of 130 nearly twice as many CTAs.
std::vector<int32_t> wave_lengths(int requests) {
    std::vector<int32_t> lens;
    for (int b = 0; b < requests; ++b) lens.push_back(b % 6 == 1 ? 0 : 1 + (b % 17 == 3 ? 400 : 37 * b % 100));
    return lens;
}

// The naive loop's work, 6 * rows * listed tokens * D per stream, is about 6e9 in all.
std::vector<SparseCase> cuda_sparse_cases() {
    std::vector<SparseCase> cases;
    const auto add = [&](const std::string& name, std::vector<int32_t> lens, int64_t queries, int64_t heads,
                         int64_t kv_heads, int64_t head_dim, int32_t page, DType dtype, int64_t g) -> SparseCase& {
        AttentionCase c = {name, std::move(lens), queries, heads, kv_heads, head_dim, page, dtype};
        c.seed = static_cast<uint32_t>(cases.size() + 1);
        cases.push_back({c, g});
        return cases.back();
    };
    const auto of_g = [](int64_t g) { return "G" + std::to_string(g); };

    // Granularities x pages x head dims x dtypes; row shapes, lists and layouts in turn.
    const RowCount some_rows[] = {kRowCounts[0], kRowCounts[1], kRowCounts[2], kRowCounts[3], kCutRowCounts[1]};
    size_t i = 0;
    for (const int64_t g : kGranularities) {
        for (const int32_t page : {1, 16, 32, 64, 128, 256}) {
            for (const int64_t dim : {64, 128}) {
                for (const DType dtype : {kBf16, kFp16}) {
                    const RowCount& r = some_rows[i % 5];
                    const std::string name = of_g(g) + "PageOf" + std::to_string(page) + "D" + std::to_string(dim) +
                                             (dtype == kBf16 ? "Bf16" : "Fp16") + r.name;
                    SparseCase& c = add(name, {330, 0, 77, 203}, r.queries, 2 * r.heads, 2, dim, page, dtype, g);
                    c.attention.heads_first = i % 3 == 1;
                    c.attention.interleaved = i % 3 == 2;
                    c.list = kLists[i % 7 == 4 ? 7 : i % 7];
                    ++i;
                }
            }
        }
    }
    // Row shapes x lists, with lengths at the edges of tiles.
    for (const RowCount& r : all_row_counts()) {
        for (size_t list = 0; list < std::size(kLists); ++list) {
            const int64_t g = kGranularities[(list + i++) % 4];
            add(std::string(r.name) + "List" + std::to_string(list) + of_g(g), {200, 1, 65, 128}, r.queries, r.heads, 1,
                64, 32, kBf16, g)
                .list = kLists[list];
        }
    }
    // Tails x lists: a unit across tail_start that is listed, that is not, and that may be.
    for (const int64_t g : kGranularities) {
        for (size_t tail = 0; tail < std::size(kTails); ++tail) {
            for (const ListKind list : {ListKind::kAll, ListKind::kAllButTheLast, ListKind::kHalf, ListKind::kDirty}) {
                SparseCase& c = add(of_g(g) + "Tail" + std::to_string(tail) + "List" + std::to_string(int(list)),
                                    {190, 47, 0}, 8, 14, 2, 64, 16, kBf16, g);
                c.list = list;
                c.tail = kTails[tail];
            }
        }
    }
    // Rows of their own lengths: inside the tail, inside the lists, none; fixed splits too.
    for (const RowCount& r : all_row_counts()) {
        for (const int64_t g : {1, 32}) {
            for (const int64_t split : {0, 64}) {
                const std::string name = std::string(r.name) + of_g(g) + "Split" + std::to_string(split);
                add(name + "Causal", {300, 20, 0}, r.queries, r.heads, 1, 64, 64, kBf16, g).attention.causal = true;
                cases.back().attention.split_tokens = split;
                add(name + "Spread", {300, 20, 0}, r.queries, r.heads, 1, 64, 64, kFp16, g).spread_rows = true;
                cases.back().attention.split_tokens = split;
            }
        }
    }
    add("Staircase", {160, 100}, 96, 4, 2, 64, 32, kBf16, 16).attention.stair = 32;
    add("StaircaseOverTheList", {160, 100}, 96, 4, 2, 64, 32, kBf16, 16).attention.stair = 32;
    cases.back().tail = TailKind::kEnd;
    // Fixed splits, tiles of 64 and of 128 tokens.
    for (const int64_t split : {64, 128, 320}) {
        for (const int64_t g : kGranularities) {
            const std::string of = "SplitBy" + std::to_string(split) + of_g(g);
            add(of, {900, 64, 0, 65, 321}, 8, 6, 2, 64, 64, kBf16, g).attention.split_tokens = split;
            add(of + "Rows128", {900, 0, 129}, 32, 4, 1, 64, 16, kFp16, g).attention.split_tokens = split;
            add(of + "Rows224", {700, 0, 129}, 32, 7, 1, 64, 64, kBf16, g).attention.split_tokens = split;
        }
    }
    // Batches, KV heads whose lists have very different lengths, requests likewise.
    for (const int64_t g : kGranularities) {
        add(of_g(g) + "UnevenHeads", {3000}, 2, 16, 8, 64, 64, kBf16, g).list = ListKind::kUneven;
        add(of_g(g) + "UnevenHeadsRows224", {1500}, 32, 28, 4, 64, 64, kBf16, g).list = ListKind::kUneven;
        std::vector<int32_t> lens = {500, 30, 0, 129, 400, 77, 64, 350, 1, 222, 0, 480, 63, 65, 2000, 128, 3};
        add(of_g(g) + "Batch17", lens, 2, 16, 8, 64, 32, kBf16, g);
        add(of_g(g) + "Batch17Uneven", lens, 8, 14, 2, 64, 32, kBf16, g).list = ListKind::kUneven;
        lens.resize(3);
        add(of_g(g) + "Batch3Rows224", lens, 32, 28, 4, 128, 16, kBf16, g);
        std::vector<int32_t> many(70);
        const int32_t some[] = {0, 1, 40, 64, 65, 300, 0};
        for (size_t b = 0; b < many.size(); ++b) many[b] = some[b * b % 7];
        add(of_g(g) + "Batch70", many, 2, 8, 4, 64, 16, kFp16, g);
        add(of_g(g) + "Batch70Rows192", many, 32, 6, 1, 64, 16, kFp16, g).list = ListKind::kAll;
    }
    // A last tile of up to 32 positions, in as many segments as have a worker each, and in more.
    for (const int64_t g : kGranularities) {
        for (const int32_t requests : {40, 150}) {
            std::vector<int32_t> lens;
            for (int32_t b = 0; b < requests; ++b) lens.push_back(120 + 5 * b % 220);
            const std::string of = of_g(g) + "ShortTiles" + std::to_string(requests);
            add(of + "Rows224", lens, 32, 7, 1, 128, 64, kBf16, g).list = ListKind::kAll;
            add(of + "Rows128", lens, 32, 4, 1, 64, 16, kFp16, g).tail = TailKind::kInUnit;
            add(of + "Rows224Causal", lens, 32, 7, 1, 64, 64, kBf16, g).attention.causal = true;
        }
    }
    // More segments than run at once, of lists for which there is much room: one after the other, whole; and where the
    // second turn would be nearly empty, cut evenly.
    for (const int64_t g : kGranularities) {
        const std::string of = of_g(g) + "Waves";
        add(of + "Rows224", wave_lengths(66), 32, 14, 2, 64, 16, kBf16, g).capacity = 720 / g;
        add(of + (g < 32 ? "Rows128" : "Rows192Causal"), wave_lengths(130), 32, g < 32 ? 8 : 12, 2, 64, 32, kFp16, g)
            .capacity = 720 / g;
        cases.back().attention.causal = g >= 32;
    }
    for (const int64_t g : {1, 16}) {
        SparseCase& c = add(of_g(g) + "ManySegmentsCut", wave_lengths(34), 32, 14, 2, 64, 64, kBf16, g);
        c.capacity = 2080 / g;
        c.list = ListKind::kUneven;
    }
    // Lists in one launch, and in pieces that are merged.
    for (const int64_t group : kGroups) {
        for (const int64_t split : {0, 64}) {
            const std::string name = "Group" + std::to_string(group) + "Split" + std::to_string(split);
            add(name, {200, 0, 77}, 32, 2 * group, 2, 128, 64, kBf16, 16).attention.split_tokens = split;
            cases.back().attention.causal = true;
        }
    }
    add("Group8Waves", wave_lengths(66), 32, 16, 2, 64, 16, kFp16, 16).capacity = 45;
    add("NoTokens", {0, 0, 0}, 3, 2, 1, 64, 16, kBf16, 32);
    add("OneRow", {130}, 1, 1, 1, 128, 16, kBf16, 16);
    add("RowsExceedTokens", {5, 31, 20}, 40, 6, 2, 64, 16, kFp16, 1);
    // Long streams: the ring of tiles goes round, many workers share one, a long tail after a short list.
    add("LongG64Rows224", {6000}, 32, 7, 1, 64, 64, kBf16, 64);
    add("LongG16Rows192", {6000}, 32, 6, 1, 64, 16, kBf16, 16);
    add("LongG1Rows128", {5000}, 32, 4, 1, 64, 64, kBf16, 1);
    add("LongG32", {20000, 1}, 4, 2, 1, 64, 64, kFp16, 32);
    add("LongTail", {3000, 900}, 8, 7, 1, 64, 64, kBf16, 32).tail = TailKind::kZero;
    add("LongTailOfOneUnit", {3000, 900}, 8, 7, 1, 128, 64, kBf16, 64).list = ListKind::kOne;
    // One long list, and short ones that make the plan a cluster whose CTAs bring K and V for one another: tiles follow
    // one another in its ring, 3 to 5 of them.
    const std::pair<int32_t, int32_t> rings[] = {{26, 350}, {26, 650}, {13, 650}, {13, 1300}, {10, 1000}, {7, 1300}};
    for (const auto& [requests, length] : rings) {
        std::vector<int32_t> lens;
        for (int32_t b = 0; b < requests; ++b) lens.push_back(b == 1 ? length : 37 * b % 90);
        const std::string of = "SharedRing" + std::to_string(requests) + "Of" + std::to_string(length);
        add(of, lens, 43, 3, 1, 128, 16, kBf16, 32).list = ListKind::kAll;
        add(of + "Causal", lens, 43, 3, 1, 128, 64, kFp16, 32).list = ListKind::kDirty;
        cases.back().attention.causal = true;
    }
    // Lists of other widths.
    for (const int64_t g : kGranularities) {
        add(of_g(g) + "LongerThanRoom", {250, 90}, 8, 14, 2, 64, 16, kBf16, g).list = ListKind::kLongerThanRoom;
        add(of_g(g) + "NoRoom", {250, 90}, 8, 14, 2, 64, 16, kBf16, g).capacity = 0;
        add(of_g(g) + "OddRoom", {250, 90}, 32, 14, 2, 64, 16, kBf16, g).capacity = 5;
        add(of_g(g) + "Falling", {400, 90}, 32, 14, 2, 64, 16, kBf16, g).list = ListKind::kFalling;
        cases.back().attention.max_seq_len = 1200;
    }
    add("RoomToSpare", {120, 0}, 6, 4, 2, 64, 32, kBf16, 16).attention.max_seq_len = 1000;
    // Pages outside of the pool, smaller and larger than a unit.
    for (const int64_t g : kGranularities) {
        for (const int32_t page : {1, 16, 64}) {
            SparseCase& c =
                add(of_g(g) + "BrokenPagesOf" + std::to_string(page), {300, 20}, 8, 4, 2, 64, page, kBf16, g);
            c.attention.break_page = true;
            c.list = ListKind::kAll;
        }
        add(of_g(g) + "BrokenPagesRows224", {500}, 32, 7, 1, 64, 128, kBf16, g).attention.break_page = true;
    }
    // A worker has more tiles than there are stages, and of these two are outside of the pool.
    for (const int64_t g : {1, 16}) {
        for (const RowCount& r : kRowCounts) {
            SparseCase& c = add(of_g(g) + "BrokenPagesRing" + r.name, {2048}, r.queries, r.heads, 1, 64, 128, kBf16, g);
            c.attention.break_page = true;
            c.attention.split_tokens = 1024;
            c.list = ListKind::kAll;
        }
    }
    // 1e-300 is 0 in float32, and a masked score times 0 must not become NaN.
    add("NegativeScale", {190}, 9, 4, 2, 64, 16, kBf16, 16).attention.softmax_scale = -0.2;
    add("ZeroScale", {190}, 9, 4, 2, 64, 16, kFp16, 1).attention.softmax_scale = 0.0;
    add("TinyScale", {190}, 9, 4, 2, 64, 16, kBf16, 32).attention.softmax_scale = 1e-300;
    add("OneWinner", {190}, 9, 4, 2, 128, 16, kFp16, 16).attention.softmax_scale = 3.0;
    return cases;
}

// The tensors of a case on the device.
struct SparseOnDevice {
    AttentionOnDevice attention;
    DeviceArray<int32_t> indices, counts, tail_start;
    SparseBlockAttentionParams params;

    explicit SparseOnDevice(const SparseBuffers& host)
        : attention(host.attention, host.workspace_bytes()),
          indices(host.lists.indices),
          counts(host.lists.counts),
          tail_start(host.lists.tail_start),
          params(host.params) {
        params.attention = attention.params;
        params.indices = indices.data();
        params.counts = counts.data();
        params.tail_start = tail_start.data();
    }

    // Inputs of another case of the same shape, under the same addresses.
    void set(const SparseBuffers& other) {
        attention.set(other.attention);
        indices.set(other.lists.indices);
        counts.set(other.lists.counts);
        tail_start.set(other.lists.tail_start);
    }

    void run(SparseBuffers& host) {
        attention.poison();
        cuda::sparse_block_attention(params, nullptr);
        attention.fetch(host.attention);
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::sparse_block_attention(params, stream); },
                [this] { attention.poison(); }, [this] { return bytes_in(attention.out, attention.lse); }};
    }
};

class SparseBlockAttentionCuda : public testing::TestWithParam<SparseCase> {};

TEST_P(SparseBlockAttentionCuda, EqualsTheNaiveLoop) {
    MAGE_NEEDS_GPU();
    SparseBuffers buffers(GetParam());
    SparseOnDevice device(buffers);
    device.run(buffers);
    MAGE_EXPECT_CUDA_ATTENTION(buffers.attention);
}

INSTANTIATE_TEST_SUITE_P(Cases, SparseBlockAttentionCuda, testing::ValuesIn(cuda_sparse_cases()),
                         [](const auto& info) { return info.param.attention.name; });

// Lengths and tails that are out of range count as the nearest that are not.
TEST(SparseBlockAttentionCudaLengths, AreClamped) {
    MAGE_NEEDS_GPU();
    for (const RowCount& r : kRowCounts) {
        SparseBuffers buffers({{"", {0, 150, 70}, r.queries, r.heads, 1, 64, 16, kBf16}, 16, ListKind::kDirty});
        SparseOnDevice device(buffers);
        device.attention.seq_lens.set({-5, INT_MAX, 70});
        device.run(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers.attention);
    }
}

// --- against the other ops -------------------------------------------------------------------------------------------

// Two results, each of which may be off by the tolerance.
void expect_close(const AttentionBuffers& naive, const std::vector<char>& out, const std::vector<char>& other,
                  const std::string& what) {
    const int64_t bytes = dtype_bytes(naive.test.dtype);
    for (size_t i = 0; i < naive.naive_out.size(); ++i) {
        ASSERT_NEAR(load_exact(naive.test.dtype, out.data() + i * bytes),
                    load_exact(naive.test.dtype, other.data() + i * bytes), 2 * cuda_out_tolerance(naive, i))
            << what << " out " << i;
    }
}

void expect_close(const std::vector<float>& lse, const std::vector<float>& other, const std::string& what) {
    for (size_t i = 0; i < lse.size(); ++i) {
        if (std::isinf(other[i])) {
            ASSERT_EQ(lse[i], other[i]) << what << " lse " << i;
        } else {
            ASSERT_NEAR(lse[i], other[i], 2e-4 * std::max(1.0f, std::abs(other[i]))) << what << " lse " << i;
        }
    }
}

TEST(SparseBlockAttentionCudaFullList, GivesWhatBlockAttentionGives) {
    MAGE_NEEDS_GPU();
    for (const auto& [r, g] : rows_and_units()) {
        for (const int64_t split_tokens : {0, 128}) {
            AttentionCase c = {"", {700, 1, 0, 130}, r.queries, r.heads, 1, 64, 32, kBf16};
            c.split_tokens = split_tokens;
            SparseBuffers buffers({c, g, ListKind::kAll, TailKind::kInUnit});
            SparseOnDevice device(buffers);
            device.run(buffers);
            const std::vector<char> out = buffers.attention.out;
            const std::vector<float> lse = buffers.attention.lse;
            const AttentionOnDevice exact(buffers.attention, cuda::block_attention_workspace(buffers.attention.params));
            cuda::block_attention(exact.params, nullptr);
            exact.fetch(buffers.attention);
            const std::string what = std::string(r.name) + " g " + std::to_string(g);
            expect_close(buffers.attention, out, buffers.attention.out, what);
            expect_close(lse, buffers.attention.lse, what);
            if (HasFatalFailure()) return;
        }
    }
}

// The units that a list lacks, up to its tail, and no tail: together with the list and its tail, every token once.
SparseLists complement(const SparseBuffers& buffers) {
    SparseLists other = buffers.lists;
    const int64_t g = buffers.test.granularity, kv_heads = buffers.test.attention.num_kv_heads;
    for (size_t stream = 0; stream < other.counts.size(); ++stream) {
        const int32_t* listed = buffers.lists.indices.data() + stream * other.capacity;
        const auto units = static_cast<int32_t>(buffers.lists.tail_start[stream / kv_heads] / g);
        int32_t count = 0;
        for (int32_t u = 0; u < units; ++u) {
            if (std::find(listed, listed + buffers.lists.counts[stream], u) != listed + buffers.lists.counts[stream])
                continue;
            other.indices[stream * other.capacity + count++] = u;
        }
        other.counts[stream] = count;
    }
    std::fill(other.tail_start.begin(), other.tail_start.end(), INT_MAX);
    return other;
}

TEST(SparseBlockAttentionCudaComplement, MergesToBlockAttention) {
    MAGE_NEEDS_GPU();
    for (const auto& [r, g] : rows_and_units()) {
        for (const bool causal : {false, true}) {
            AttentionCase c = {"", {500, 40, 0, 257}, r.queries, 2 * r.heads, 2, 64, 32, kBf16};
            c.causal = causal;
            SparseBuffers buffers({c, g});
            AttentionBuffers whole(c);  // same seed, so the same tokens; none of them NaN
            SparseOnDevice device(buffers);
            device.attention.set(whole);
            device.run(buffers);
            const DeviceArray<char> first(buffers.attention.out);
            const DeviceArray<float> first_lse(buffers.attention.lse);
            const SparseLists others = complement(buffers);
            device.indices.set(others.indices);
            device.counts.set(others.counts);
            device.tail_start.set(others.tail_start);
            device.run(buffers);

            MergeAttentionParams merge;
            merge.num_requests = static_cast<int64_t>(c.seq_lens.size());
            merge.num_queries = c.num_queries;
            merge.num_heads = c.num_heads;
            merge.head_dim = c.head_dim;
            merge.dtype = c.dtype;
            const int64_t row = c.num_heads * c.head_dim;
            merge.parts = {
                {first.data(), c.num_queries * row, row, c.head_dim, first_lse.data()},
                {device.attention.out.data(), c.num_queries * row, row, c.head_dim, device.attention.lse.data()}};
            const DeviceArray<char> merged(whole.out);
            const DeviceArray<float> merged_lse(whole.lse);
            merge.out = merged.data();
            merge.lse = merged_lse.data();
            cuda::merge_attention(merge, nullptr);
            whole.out = merged.get();
            whole.lse = merged_lse.get();
            const std::string what = std::string(r.name) + " g " + std::to_string(g);
            // Both parts are rounded, each by u * |out| of its own: at most u * size of the whole once more.
            for (size_t i = 0; i < whole.naive_out.size(); ++i) {
                ASSERT_NEAR(whole.out_value(i), whole.naive_out[i], 2 * cuda_out_tolerance(whole, i))
                    << what << " out " << i;
            }
            expect_close(whole.lse, std::vector<float>(whole.naive_lse.begin(), whole.naive_lse.end()), what);
            if (HasFatalFailure()) return;
        }
    }
}

// --- splits ----------------------------------------------------------------------------------------------------------

// One request of a batch by itself, under the same addresses.
SparseBlockAttentionParams alone(const SparseBlockAttentionParams& batch, int64_t b, int64_t max_seq_len) {
    SparseBlockAttentionParams params = batch;
    params.attention = test::alone(batch.attention, b, max_seq_len);
    params.indices += b * params.attention.num_kv_heads * params.capacity;
    params.counts += b * params.attention.num_kv_heads;
    params.tail_start += b;
    return params;
}

// With fixed splits a request's result is that which it has alone, whatever bounds the lengths of its batch.
void expect_alone_as_in_batch(bool own_max_seq_len) {
    for (const auto& [r, g] : rows_and_units()) {
        for (const int64_t split_tokens : {64, 320}) {
            AttentionCase c = {"", {900, 64, 0, 65, 321}, r.queries, r.heads, 1, 64, 64, kBf16};
            c.split_tokens = split_tokens;
            c.causal = g == 16;
            SparseBuffers buffers({c, g, ListKind::kRuns});
            SparseOnDevice device(buffers);
            device.run(buffers);
            const std::vector<char> out = buffers.attention.out;
            const std::vector<float> lse = buffers.attention.lse;
            const size_t out_size = out.size() / c.seq_lens.size(), lse_size = lse.size() / c.seq_lens.size();
            for (size_t b = 0; b < c.seq_lens.size(); ++b) {
                device.attention.poison();
                const int64_t longest =
                    own_max_seq_len ? std::max<int64_t>(1, c.seq_lens[b]) : buffers.attention.params.max_seq_len;
                cuda::sparse_block_attention(alone(device.params, static_cast<int64_t>(b), longest), nullptr);
                device.attention.fetch(buffers.attention);
                const std::string what = std::string(r.name) + " g " + std::to_string(g) + " split " +
                                         std::to_string(split_tokens) + " request " + std::to_string(b);
                ASSERT_EQ(std::memcmp(buffers.attention.out.data(), out.data() + b * out_size, out_size), 0) << what;
                ASSERT_EQ(std::memcmp(buffers.attention.lse.data(), lse.data() + b * lse_size, lse_size * 4), 0)
                    << what;
            }
        }
    }
}

TEST(SparseBlockAttentionCudaSplits, MakeARequestIndependentOfItsBatch) {
    MAGE_NEEDS_GPU();
    expect_alone_as_in_batch(false);
}

TEST(SparseBlockAttentionCudaSplits, MakeARequestIndependentOfMaxSeqLen) {
    MAGE_NEEDS_GPU();
    expect_alone_as_in_batch(true);
}

TEST(SparseBlockAttentionCudaSplits, GiveTheSameWithinRounding) {
    MAGE_NEEDS_GPU();
    for (const auto& [r, g] : rows_and_units()) {
        std::vector<char> out;
        std::vector<float> lse;
        for (const int64_t split_tokens : {0, 64, 128, 320}) {
            AttentionCase c = {"", {1500, 333, 0}, r.queries, r.heads, 1, 64, 64, kBf16};
            c.split_tokens = split_tokens;
            SparseBuffers buffers({c, g});
            SparseOnDevice device(buffers);
            device.run(buffers);
            if (split_tokens == 0) {
                out = buffers.attention.out;
                lse = buffers.attention.lse;
                continue;
            }
            const std::string what =
                std::string(r.name) + " g " + std::to_string(g) + " split " + std::to_string(split_tokens);
            expect_close(buffers.attention, buffers.attention.out, out, what);
            expect_close(buffers.attention.lse, lse, what);
            if (HasFatalFailure()) return;
        }
    }
}

// --- runs, graphs, streams -------------------------------------------------------------------------------------------

TEST(SparseBlockAttentionCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const auto& [r, g] : rows_and_units()) {
        AttentionCase c = {"", {1300, 1, 0, 300}, r.queries, 2 * r.heads, 2, 64, 32, kBf16};
        c.split_tokens = g == 32 ? 64 : 0;
        SparseBuffers buffers({c, g, ListKind::kUneven});
        SparseOnDevice device(buffers);
        device.run(buffers);
        const std::vector<char> out = buffers.attention.out;
        const std::vector<float> lse = buffers.attention.lse;
        for (int i = 1; i < 100; ++i) {
            device.run(buffers);
            ASSERT_EQ(buffers.attention.out, out) << r.name << " g " << g << " run " << i;
            ASSERT_EQ(buffers.attention.lse, lse) << r.name << " g " << g << " run " << i;
        }
    }
}

// Segments that follow one another are whole: nothing is left to merge, and 100 runs are the same.
TEST(SparseBlockAttentionCudaWaves, LeaveTheWorkspaceAlone) {
    MAGE_NEEDS_GPU();
    for (const int64_t heads : {14, 8, 12}) {
        const int requests = heads == 14 ? 66 : 130;
        SparseCase c = {{"", wave_lengths(requests), 32, heads, 2, 64, 64, kBf16}, 16, ListKind::kUneven};
        c.capacity = 45;
        SparseBuffers buffers(c);
        SparseOnDevice device(buffers);
        device.run(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers.attention);
        const std::vector<char> untouched(device.attention.workspace.get().size(), static_cast<char>(0xff));
        ASSERT_FALSE(untouched.empty());
        ASSERT_EQ(device.attention.workspace.get(), untouched) << heads << " heads";
        const std::vector<char> out = buffers.attention.out;
        const std::vector<float> lse = buffers.attention.lse;
        for (int i = 1; i < 100; ++i) {
            device.run(buffers);
            ASSERT_EQ(buffers.attention.out, out) << heads << " heads, run " << i;
            ASSERT_EQ(buffers.attention.lse, lse) << heads << " heads, run " << i;
        }
    }
}

SparseCase graph_case(int64_t g, int64_t split_tokens, std::vector<int32_t> lens, uint32_t seed,
                      ListKind list = ListKind::kHalf, TailKind tail = TailKind::kPrefix) {
    AttentionCase c = {"Graph", std::move(lens), 32, 14, 2, 64, 16, kBf16};
    c.split_tokens = split_tokens;
    c.max_seq_len = 600;
    c.seed = seed;
    c.stair = 16;
    return {c, g, list, tail};
}

// A captured call follows the lists, counts, tails, lengths, tables and tokens that are in the buffers when the graph
// runs.
TEST(SparseBlockAttentionCudaGraph, ReplaysWithNewLists) {
    MAGE_NEEDS_GPU();
    for (const int64_t g : kGranularities) {
        for (const int64_t split_tokens : {0, 64}) {
            SparseBuffers captured(graph_case(g, split_tokens, {77, 0, 130}, 1));
            SparseOnDevice device(captured);
            Streams streams;
            streams.capture([&](cudaStream_t stream) { cuda::sparse_block_attention(device.params, stream); });
            device.attention.fetch(captured.attention);
            for (const float lse : captured.attention.lse)
                ASSERT_TRUE(std::isnan(lse)) << "capturing must not run the kernel";
            streams.replay();
            device.attention.fetch(captured.attention);
            MAGE_EXPECT_CUDA_ATTENTION(captured.attention);
            const std::vector<std::vector<int32_t>> batches = {{600, 1, 0}, {0, 0, 0}, {64, 599, 600}, {600, 600, 600}};
            for (size_t i = 0; i < batches.size(); ++i) {
                SparseBuffers other(graph_case(g, split_tokens, batches[i], static_cast<uint32_t>(i) + 2,
                                               kLists[i % std::size(kLists)], kTails[i % std::size(kTails)]));
                device.set(other);
                device.attention.poison();
                streams.replay();
                device.attention.fetch(other.attention);
                MAGE_EXPECT_CUDA_ATTENTION(other.attention);
            }
        }
    }
}

TEST(SparseBlockAttentionCudaWaves, ReplayWithNewLists) {
    MAGE_NEEDS_GPU();
    SparseBuffers captured(graph_case(16, 0, wave_lengths(66), 1));
    SparseOnDevice device(captured);
    Streams streams;
    streams.capture([&](cudaStream_t stream) { cuda::sparse_block_attention(device.params, stream); });
    for (uint32_t i = 0; i < 3; ++i) {
        std::vector<int32_t> lens = wave_lengths(66);
        std::rotate(lens.begin(), lens.begin() + 5 * i, lens.end());
        lens[i] = 600;
        SparseBuffers other(graph_case(16, 0, lens, i + 2, kLists[i], kTails[i]));
        device.set(other);
        device.attention.poison();
        streams.replay();
        device.attention.fetch(other.attention);
        MAGE_EXPECT_CUDA_ATTENTION(other.attention);
    }
}

TEST(SparseBlockAttentionCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    SparseBuffers first({{"", {1500, 300}, 32, 28, 4, 64, 64, kBf16}, 16, ListKind::kUneven});
    SparseBuffers second({{"", {900, 0, 1, 77}, 32, 8, 2, 64, 16, kFp16}, 1});
    SparseOnDevice first_device(first), second_device(second);
    const Streams streams;
    for (int i = 0; i < 20; ++i) {
        cuda::sparse_block_attention(first_device.params, streams.first);
        cuda::sparse_block_attention(second_device.params, streams.second);
    }
    first_device.attention.fetch(first.attention);
    second_device.attention.fetch(second.attention);
    MAGE_EXPECT_CUDA_ATTENTION(first.attention);
    MAGE_EXPECT_CUDA_ATTENTION(second.attention);
}

// Calls that follow one another on a stream may share a workspace, although their launches overlap.
TEST(SparseBlockAttentionCudaStreams, CallsInARowShareAWorkspace) {
    MAGE_NEEDS_GPU();
    SparseBuffers first({{"", {1500, 300}, 32, 28, 4, 64, 64, kBf16}, 64, ListKind::kUneven});
    SparseBuffers second({{"", {900, 0, 1, 77}, 32, 6, 1, 64, 16, kBf16}, 16});
    SparseOnDevice first_device(first), second_device(second);
    BlockAttentionParams &a = first_device.params.attention, &b = second_device.params.attention;
    (a.workspace_bytes > b.workspace_bytes ? b : a).workspace =
        (a.workspace_bytes > b.workspace_bytes ? a : b).workspace;
    const Streams streams;
    for (int i = 0; i < 10; ++i) {
        cuda::sparse_block_attention(first_device.params, streams.first);
        cuda::sparse_block_attention(second_device.params, streams.first);
    }
    first_device.attention.fetch(first.attention);
    second_device.attention.fetch(second.attention);
    MAGE_EXPECT_CUDA_ATTENTION(first.attention);
    MAGE_EXPECT_CUDA_ATTENTION(second.attention);
}

// --- launches that overlap -------------------------------------------------------------------------------------------

// Launches of a graph of which each attends with the output of the one before it: none may read q too early.
TEST(SparseBlockAttentionCudaOverlap, AChainWaitsForItsInputs) {
    MAGE_NEEDS_GPU();
    constexpr int kLinks = 8;
    for (const auto& [r, g] : rows_and_units()) {
        SparseBuffers buffers({{"", {1300, 1, 300}, r.queries, 2 * r.heads, 2, 64, 32, kBf16}, g});
        SparseOnDevice device(buffers);
        const DeviceArray<char> even(buffers.attention.out), odd(buffers.attention.out);
        const auto link = [&](int i, cudaStream_t stream) {
            SparseBlockAttentionParams params = device.params;
            if (i > 0) params.attention.q = (i % 2 == 1 ? even : odd).data();
            params.attention.out = (i % 2 == 1 ? odd : even).data();
            cuda::sparse_block_attention(params, stream);
        };
        for (int i = 0; i < kLinks; ++i) {
            link(i, nullptr);
            MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
        }
        const std::vector<char> expected = odd.get();
        device.attention.fetch(buffers.attention);
        const std::vector<float> lse = buffers.attention.lse;
        Streams streams;
        streams.capture([&](cudaStream_t stream) {
            for (int i = 0; i < kLinks; ++i) link(i, stream);
        });
        for (int run = 0; run < 5; ++run) {
            device.attention.poison();
            MAGE_CUDA_CHECK("test", cudaMemset(even.data(), 0xff, expected.size()));
            MAGE_CUDA_CHECK("test", cudaMemset(odd.data(), 0xff, expected.size()));
            MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
            streams.replay();
            device.attention.fetch(buffers.attention);
            ASSERT_EQ(odd.get(), expected) << r.name << " g " << g;
            ASSERT_EQ(buffers.attention.lse, lse) << r.name << " g " << g;
        }
    }
}

// Every input may come from a kernel that lets this one start early: a selection, a write of K and V, a projection.
TEST(SparseBlockAttentionCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    struct Batch {
        int64_t g, split_tokens;
        std::vector<int32_t> lens;
    };
    std::vector<Batch> batches = {{16, 0, wave_lengths(66)}};
    for (const int64_t g : kGranularities) {
        for (const int64_t split_tokens : {0, 64}) batches.push_back({g, split_tokens, {200, 300, 150}});
    }
    for (const auto& [g, split_tokens, lens] : batches) {
        SparseBuffers buffers(graph_case(g, split_tokens, lens, 2));
        SparseOnDevice device(buffers);
        device.run(buffers);
        MAGE_EXPECT_CUDA_ATTENTION(buffers.attention);
        SCOPED_TRACE("g " + std::to_string(g) + " split " + std::to_string(split_tokens));
        LateInputs late;
        add_inputs(device.attention, &late);
        late.add("indices", device.indices);
        late.add("counts", device.counts, 0);
        late.add("tail_start", device.tail_start, 0);
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
    }
}

// What is written may still be read by a kernel that lets this one start early.
TEST(SparseBlockAttentionCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    const auto expect_awaited = [](int64_t g, int64_t split_tokens, const std::vector<int32_t>& lens) {
        SCOPED_TRACE("g " + std::to_string(g) + " split " + std::to_string(split_tokens) + " first length " +
                     std::to_string(lens[0]));
        SparseOnDevice device(SparseBuffers(graph_case(g, split_tokens, lens, 2)));
        LateReads late;
        add_outputs(device.attention, &late);
        late.expect_awaited(device.call());
    };
    for (const int64_t g : kGranularities) {
        for (const int64_t split_tokens : {0, 64}) {
            for (const std::vector<int32_t>& lens : kEmptySlots) expect_awaited(g, split_tokens, lens);
        }
    }
    expect_awaited(16, 0, wave_lengths(66));
}

// --- workspace -------------------------------------------------------------------------------------------------------

SparseBlockAttentionParams dimensions(int64_t requests, int64_t queries, int64_t heads, int64_t kv_heads,
                                      int64_t head_dim, int64_t max_seq_len, int64_t granularity, int64_t capacity,
                                      int64_t split_tokens) {
    SparseBlockAttentionParams params;
    params.attention.num_requests = requests;
    params.attention.num_queries = queries;
    params.attention.num_heads = heads;
    params.attention.num_kv_heads = kv_heads;
    params.attention.head_dim = head_dim;
    params.attention.max_seq_len = max_seq_len;
    params.attention.split_tokens = split_tokens;
    params.granularity = granularity;
    params.capacity = capacity;
    return params;
}

TEST(SparseBlockAttentionCudaWorkspace, InNumbers) {
    // 7B, a block of 32: R = 224, a pair of CTAs, 66 workers with two slots of 256 rows. 8 bytes name the pieces of
    // each of 4 segments.
    const int64_t row = 3 * 128 + 12, most = int64_t{2} * 66 * 256 * row + 4 * 8;
    EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(1, 32, 28, 4, 128, 16384, 64, 16, 0)), most);
    EXPECT_EQ(sparse_block_attention_workspace(1, 32, 28, 4, 128, 16384, 64, 16, 0), most);
    // 1.5B: R = 192 in tiles of 64 tokens. A stream has 4 * 16 listed tokens, 200 and 64: 6 tiles, of 6 streams.
    EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(3, 32, 12, 2, 128, 200, 16, 4, 0)),
              2 * 36 * 192 * row + 6 * 8);
    // 56 rows take a tile of 128 rows and 128 tokens: 8 * 32 + 1000 + 64 tokens are 11 tiles, of 4 streams.
    EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(1, 8, 28, 4, 128, 1000, 32, 8, 0)),
              2 * 44 * 128 * row + 4 * 8);
    // Fixed: a slot per split of 320. 10 * 64 + 1000 + 64 tokens are 6 of them, as are 64 more.
    for (const int64_t capacity : {10, 11}) {
        EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(3, 32, 12, 2, 64, 1000, 64, capacity, 320)),
                  int64_t{36} * 192 * (3 * 64 + 12) + 6 * 8);
    }
    // One row without a list; the pieces take up to 16 bytes.
    EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(1, 1, 1, 1, 64, 64, 1, 0, 0)),
              2 * 128 * (3 * 64 + 12) + 16);
    EXPECT_EQ(cuda::sparse_block_attention_workspace(dimensions(0, 1, 1, 1, 64, 64, 1, 0, 0)), 0);
}

// --- refusals --------------------------------------------------------------------------------------------------------

TEST(SparseBlockAttentionCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    AttentionCase c = {"", {3000, 37}, 32, 7, 1, 64, 32, kBf16};
    c.split_tokens = 64;
    SparseBuffers buffers({c, 16});
    const SparseOnDevice device(buffers);
    const auto expect_error = [&](const SparseBlockAttentionParams& bad, const std::string& message) {
        expect_cuda_error([&] { cuda::sparse_block_attention(bad, nullptr); }, "sparse_block_attention: " + message);
    };
    SparseBlockAttentionParams bad = device.params;
    bad.attention.dtype = DType::kFloat32;
    expect_error(bad, "q must be bfloat16 or float16 on CUDA, got float32");
    for (const int64_t dim : {8, 96}) {
        bad = device.params;
        bad.attention.head_dim = dim;
        bad.attention.workspace_bytes = int64_t{1} << 40;
        expect_error(bad, "the head dim of q must be 64 or 128 on CUDA, got " + std::to_string(dim));
    }
    bad = device.params;
    bad.granularity = 8;
    expect_error(bad, "g must be 1, 16, 32 or 64, got 8");
    bad = device.params;
    bad.capacity = -1;
    expect_error(bad, "indices must be of shape [B, Hkv, Kmax], got Kmax = -1");
    bad = device.params;
    bad.attention.workspace_bytes = 0;  // many splits, so that something is needed
    expect_error(bad, "workspace must have at least ");
    bad = device.params;
    bad.attention.split_tokens = 32;
    bad.attention.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "split_tokens must be 0 or a positive multiple of 64, got 32");
    bad = device.params;
    bad.attention.max_seq_len = 3009;
    bad.attention.workspace_bytes = int64_t{1} << 40;
    expect_error(bad, "block_table must have pages for max_seq_len = 3009 tokens, got 94 pages of 32");
    bad = device.params;
    bad.attention.softmax_scale = INFINITY;
    expect_error(bad, "softmax_scale must be finite, got inf");
    device.attention.fetch(buffers.attention);
    for (const float lse : buffers.attention.lse) ASSERT_TRUE(std::isnan(lse)) << "nothing may be written";
    bad = device.params;
    bad.attention.num_requests = 0;
    cuda::sparse_block_attention(bad, nullptr);
    device.attention.fetch(buffers.attention);
    for (const float lse : buffers.attention.lse) ASSERT_TRUE(std::isnan(lse)) << "no request, no output";
}

}  // namespace
}  // namespace mage::test
