#pragma once

#include <climits>
#include <string>
#include <vector>

#include "attention_cases.h"
#include "gpu.h"

// Cases of the attention ops on CUDA, and their tensors on the device.
namespace mage::test {

// The four row shapes (R up to 64, 128, 192 and 256), and R that is cut into tiles of each of three.
struct RowCount {
    const char* name;
    int64_t queries, heads;  // of one KV head
};
constexpr RowCount kRowCounts[] = {{"Rows56", 8, 7}, {"Rows128", 32, 4}, {"Rows192", 32, 6}, {"Rows224", 32, 7}};
constexpr RowCount kCutRowCounts[] = {
    {"Rows384", 64, 6}, {"Rows448", 64, 7}, {"Rows640", 64, 10}, {"Rows1024", 64, 16}};

// Heads of a KV head: 8 fill the largest tile of rows with blocks of 32, the others are cut and divide nothing.
constexpr int64_t kGroups[] = {8, 9, 11, 13, 15};

// Every axis by itself over small shapes: the naive loop's work, 2 * H * Q * S * D per case, is 3.3e9 in all.
inline std::vector<AttentionCase> cuda_attention_cases() {
    constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
    std::vector<AttentionCase> cases;
    const auto add = [&](const std::string& name, std::vector<int32_t> lens, int64_t queries, int64_t heads,
                         int64_t kv_heads, int64_t head_dim, int32_t page, DType dtype) -> AttentionCase& {
        cases.push_back({name, std::move(lens), queries, heads, kv_heads, head_dim, page, dtype});
        return cases.back();
    };
    const auto type_name = [](DType dtype) { return std::string(dtype == kBf16 ? "Bf16" : "Fp16"); };

    // Row shapes x dtypes x head dims, lengths at the edges of tiles and pages.
    for (const RowCount& r : kRowCounts) {
        for (const DType dtype : {kBf16, kFp16}) {
            for (const int64_t dim : {64, 128}) {
                add(r.name + type_name(dtype) + "D" + std::to_string(dim),
                    {0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193}, r.queries, r.heads, 1, dim, 64, dtype);
            }
        }
    }
    for (const RowCount& r : kCutRowCounts) add(r.name, {130, 0, 40}, r.queries, r.heads, 1, 64, 32, kBf16);
    // A last tile of up to 32 tokens beside whole ones, in workers of their own and in one that has all.
    for (const int32_t page : {1, 16, 64}) {
        const std::string of = "ShortTilePageOf" + std::to_string(page);
        const std::vector<int32_t> lens = {1, 15, 17, 31, 32, 33, 143, 144, 145, 159, 160, 161, 257, 287, 288, 289};
        add(of + "Rows128", lens, 32, 4, 1, 128, page, kBf16);
        add(of + "Rows224", lens, 32, 7, 1, 64, page, kFp16);
        add(of + "Rows224Causal", lens, 32, 7, 1, 128, page, kBf16).causal = true;
    }
    add("ShortTileOfOne", {416}, 32, 7, 1, 128, 64, kBf16);
    add("ShortTileBroken", {160, 288}, 32, 7, 1, 64, 16, kBf16).break_page = true;
    // Pages x layouts, and every page with the tiles of 128 tokens and the pairs of CTAs.
    const char* layouts[] = {"Nhd", "Hnd", "Interleaved"};
    const auto set_layout = [](AttentionCase& c, int layout) {
        c.heads_first = layout == 1;
        c.interleaved = layout == 2;
    };
    int next = 0;
    for (const int32_t page : {1, 16, 32, 64, 128, 256}) {
        const std::string of = "PageOf" + std::to_string(page);
        for (int layout = 0; layout < 3; ++layout) {
            set_layout(add(of + layouts[layout], {150, 77, 0, 257}, 10, 6, 2, 128, page, kBf16), layout);
        }
        set_layout(add(of + "Rows128", {150, 77}, 32, 8, 2, 64, page, kFp16), next++ % 3);
        set_layout(add(of + "Rows224", {150, 77}, 32, 14, 2, 64, page, kBf16), next++ % 3);
    }
    // 129 to 192 rows whose tokens are gathered one by one.
    for (const int64_t dim : {64, 128}) {
        const std::string of = "GatherD" + std::to_string(dim);
        add(of + "Rows132", {200, 0, 65, 333}, 22, 6, 1, dim, 1, kFp16);
        add(of + "Rows192", {200, 0, 65, 333}, 32, 6, 1, dim, 1, kBf16);
    }
    // Lengths at the edges of large pages.
    const std::vector<int32_t> edges = {127, 128, 129, 255, 256, 257, 511, 512, 513};
    for (size_t i = 0; i < std::size(kRowCounts); ++i) {
        const int32_t page = i % 2 == 0 ? 128 : 256;
        const RowCount& r = kRowCounts[i];
        add("EdgesOfPage" + std::to_string(page) + r.name, edges, r.queries, r.heads, 1, 64, page, kBf16);
    }
    // Streams that many workers share, and the ring of tiles goes round.
    add("LongRows192", {3000}, 32, 6, 1, 64, 16, kBf16);
    add("LongRows224", {3000}, 32, 7, 1, 64, 64, kBf16);
    add("LongAndShort", {1, 20000}, 4, 2, 1, 64, 64, kFp16);
    add("LongTiles", {5000, 5000}, 2, 2, 2, 128, 128, kBf16);
    // Workers that hold whole segments, and the end of one beside the start of another.
    add("Streams", {500, 30, 0, 129, 400, 77, 64, 350, 1, 222, 0, 480}, 2, 16, 8, 64, 32, kBf16);
    std::vector<int32_t> many(100);
    const int32_t lens[] = {0, 1, 40, 64, 65, 130, 0};
    for (size_t i = 0; i < many.size(); ++i) many[i] = lens[i * i % 7];
    add("ManyRequests", many, 2, 8, 4, 64, 16, kFp16);
    add("NoTokens", {0, 0, 0}, 3, 2, 1, 64, 16, kBf16);
    add("OneRow", {130}, 1, 1, 1, 128, 16, kBf16);
    add("RowsExceedTokens", {5, 31, 20}, 40, 6, 2, 64, 16, kFp16);
    // Rows of their own lengths.
    add("Causal", {150, 37, 0}, 37, 4, 2, 64, 32, kBf16).causal = true;
    add("CausalRows224", {300, 20}, 32, 7, 1, 64, 64, kBf16).causal = true;
    add("CausalRowsExceedTokens", {20, 64}, 64, 3, 1, 128, 16, kFp16).causal = true;
    add("Staircase", {160, 100}, 96, 4, 2, 64, 32, kBf16).stair = 32;
    for (const int32_t page : {1, 16, 64}) {
        AttentionCase& c = add("BrokenPagesOf" + std::to_string(page), {300, 20}, 8, 4, 2, 64, page, kBf16);
        c.break_page = true;
    }
    add("BrokenPagesRows224", {500}, 32, 7, 1, 64, 128, kBf16).break_page = true;
    add("BrokenPagesOf1Rows128", {150}, 32, 4, 1, 64, 1, kFp16).break_page = true;
    // A worker has more tiles than there are stages, and of these two are outside of the pool.
    for (const RowCount& r : kRowCounts) {
        AttentionCase& c = add(std::string("BrokenPagesRing") + r.name, {2048}, r.queries, r.heads, 1, 64, 128, kBf16);
        c.break_page = true;
        c.split_tokens = 1024;
    }
    // Page ids and kv_lens that are far out of range, for every row shape.
    for (const RowCount& r : kRowCounts) {
        for (const int32_t page : {1, 16}) {
            const std::string of = "Of" + std::to_string(page) + r.name;
            add("BadPages" + of, {300, 130, 270}, r.queries, r.heads, 1, 64, page, kBf16).bad_pages = true;
            add("SpreadRows" + of, {300, 0, 20}, r.queries, r.heads, 1, 64, page, kFp16).spread_rows = true;
        }
    }
    add("OnlyBrokenPages", {60, 64}, 4, 4, 2, 64, 64, kBf16).break_page = true;
    // 1e-300 is 0 in float32, and a masked score times 0 must not become NaN.
    add("NegativeScale", {190}, 9, 4, 2, 64, 16, kBf16).softmax_scale = -0.2;
    add("ZeroScale", {190}, 9, 4, 2, 64, 16, kFp16).softmax_scale = 0.0;
    add("TinyScale", {190}, 9, 4, 2, 64, 16, kBf16).softmax_scale = 1e-300;
    add("OneWinner", {190}, 9, 4, 2, 128, 16, kFp16).softmax_scale = 3.0;
    // Fixed splits, tiles of 64 and of 128 tokens.
    for (const int64_t split : {64, 128, 320}) {
        const std::string of = "SplitBy" + std::to_string(split);
        add(of, {700, 64, 0, 65, 321}, 8, 6, 2, 64, 64, kBf16).split_tokens = split;
        add(of + "Rows128", {700, 0, 129}, 32, 4, 1, 64, 16, kFp16).split_tokens = split;
        add(of + "Rows224", {450, 0, 129}, 32, 7, 1, 64, 64, kBf16).split_tokens = split;
        cases.back().causal = true;
    }
    add("RoomToSpare", {120, 0}, 6, 4, 2, 64, 32, kBf16).max_seq_len = 1000;
    for (const int64_t group : kGroups) {
        const std::string of = "Group" + std::to_string(group);
        add(of, {200, 0, 65, 333}, 32, 2 * group, 2, 128, 64, kBf16);
        add(of + "Causal", {200, 0, 65, 333}, 32, 2 * group, 2, 64, 16, kFp16).causal = true;
    }
    return cases;
}

// Of these, the ones that say something about masses.
inline std::vector<AttentionCase> cuda_unit_cases() {
    std::vector<AttentionCase> cases;
    for (const AttentionCase& c : cuda_attention_cases()) {
        const auto is = [&](const char* start) { return c.name.rfind(start, 0) == 0; };
        if (is("PageOf") && c.page_size != 16) continue;
        if (is("Rows") && (c.dtype == DType::kFloat16) == (c.head_dim == 128)) continue;
        if (is("LongRows224") || is("LongTiles")) continue;
        cases.push_back(c);
    }
    return cases;
}

// Lengths that are out of range, and a case of those that they count as.
const std::vector<int32_t> kFarLengths = {-5, INT_MAX, 70, INT_MIN, 151};
inline AttentionCase near_lengths(const RowCount& r) {
    AttentionCase c = {"Lengths", {0, 150, 70, 0, 150}, r.queries, r.heads, 1, 64, 16, DType::kBFloat16};
    c.spread_rows = true;
    return c;
}

// The tensors of a case on the device. Outputs and workspace are NaN until a kernel writes them.
struct AttentionOnDevice {
    DeviceArray<char> q, k_pool, v_pool;
    DeviceArray<int32_t> block_table, seq_lens, kv_lens;
    DeviceArray<char> out, workspace;
    DeviceArray<float> lse;
    BlockAttentionParams params;
    size_t out_bytes, lse_size;

    AttentionOnDevice(const AttentionBuffers& host, int64_t workspace_bytes)
        : q(host.q),
          k_pool(pool_of(host)),
          v_pool(host.test.interleaved ? std::vector<char>() : host.v_pool),
          block_table(host.block_table),
          seq_lens(host.test.seq_lens),
          kv_lens(host.kv_lens),
          out(std::vector<char>(host.out.size())),
          workspace(std::vector<char>(workspace_bytes)),
          lse(std::vector<float>(host.lse.size())),
          params(host.params),
          out_bytes(host.out.size()),
          lse_size(host.lse.size()) {
        params.q = q.data();
        params.k_cache.data = k_pool.data();
        params.v_cache.data =
            host.test.interleaved ? k_pool.data() + host.test.head_dim * dtype_bytes(host.test.dtype) : v_pool.data();
        params.pages.block_table = block_table.data();
        params.seq_lens = seq_lens.data();
        params.kv_lens = host.kv_lens.empty() ? nullptr : kv_lens.data();
        params.out = out.data();
        params.lse = lse.data();
        params.workspace = workspace.data();
        params.workspace_bytes = workspace_bytes;
        poison();
    }

    // V's tokens go where an interleaved pool of K leaves room for them.
    static std::vector<char> pool_of(const AttentionBuffers& host) {
        std::vector<char> pool = host.k_pool;
        const size_t row = host.test.head_dim * dtype_bytes(host.test.dtype);
        for (size_t at = 0; host.test.interleaved && at < pool.size(); at += 2 * row) {
            std::copy_n(host.v_pool.begin() + static_cast<int64_t>(at), row,
                        pool.begin() + static_cast<int64_t>(at + row));
        }
        return pool;
    }

    // Inputs of another case of the same shape, under the same addresses.
    void set(const AttentionBuffers& host) {
        q.set(host.q);
        k_pool.set(pool_of(host));
        if (!host.test.interleaved) v_pool.set(host.v_pool);
        block_table.set(host.block_table);
        seq_lens.set(host.test.seq_lens);
        kv_lens.set(host.kv_lens);
    }

    void poison() {
        MAGE_CUDA_CHECK("test", cudaMemset(out.data(), 0xff, out_bytes));
        MAGE_CUDA_CHECK("test", cudaMemset(lse.data(), 0xff, lse_size * sizeof(float)));
        MAGE_CUDA_CHECK("test", cudaMemset(params.workspace, 0xff, params.workspace_bytes));
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
    }

    void fetch(AttentionBuffers& host) const {
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
        host.out = out.get();
        host.lse = lse.get();
    }
};

// What an op of attention reads of a case. Early numbers are NaN, pages are outside of the pool, requests are empty.
inline void add_inputs(const AttentionOnDevice& device, LateInputs* late, bool reads_v = true) {
    late->add("q", device.q);
    late->add("k_cache", device.k_pool);
    if (reads_v) late->add("v_cache", device.v_pool);
    late->add("block_table", device.block_table);
    late->add("seq_lens", device.seq_lens, 0);
    late->add("kv_lens", device.kv_lens, 0);
}

// What an op of attention writes.
inline void add_outputs(const AttentionOnDevice& device, LateReads* late) {
    late->add("out", device.out);
    late->add("lse", device.lse);
    late->add("workspace", device.workspace);
}

// A batch with empty slots, and one of nothing else: where requests may have 300 tokens, most CTAs have nothing to do.
const std::vector<std::vector<int32_t>> kEmptySlots = {{300, 0, 77, 0}, {0, 0, 0, 0}};

// One request of a batch by itself, under the same addresses.
inline BlockAttentionParams alone(const BlockAttentionParams& batch, int64_t b, int64_t max_seq_len) {
    BlockAttentionParams params = batch;
    params.num_requests = 1;
    params.max_seq_len = max_seq_len;
    params.q = static_cast<const char*>(batch.q) + b * batch.stride_q_request * dtype_bytes(batch.dtype);
    params.pages.block_table = batch.pages.block_table + b * batch.pages.stride_request;
    params.seq_lens = batch.seq_lens + b;
    if (batch.kv_lens != nullptr) params.kv_lens = batch.kv_lens + b * batch.num_queries;
    return params;
}

// Largest |out - naive| that rounding explains. With u the rounding of 16-bit numbers (2^-8 bfloat16, 2^-11 float16),
// A = sum w |v| and weights w that sum to 1: attention in that precision rounds every w, which moves out by at most
// u * A, and out itself, u * |out|. float32 adds, relative to A: the score s * scale * log2(e) is rounded three times
// (2^-24 each, of |score|) and exponentiated (2^-22), in the weights and in their sum; sums of S terms in tensor cores,
// 2^-27 * S with the 16 of one instruction together. float16 weights below 2^-14 are rounded by 2^-25 each (the largest
// of a row is at least 1), of |v| <= 2; so is out.
inline double cuda_out_tolerance(const AttentionBuffers& b, size_t i) {
    const bool fp16 = b.test.dtype == DType::kFloat16;
    const double u = fp16 ? 0x1p-11 : 0x1p-8;
    const auto tokens = static_cast<double>(b.params.max_seq_len);
    const double scores = 3 * 0x1p-24 * 1.4427 * b.largest_score + 0x1p-22;
    const double relative = 2 * scores + 0x1p-20 + 0x1p-27 * tokens;
    return u * (b.naive_size[i] + std::abs(b.naive_out[i])) + relative * b.naive_size[i] +
           (fp16 ? 0x1p-25 * (2 * tokens + 1) : 0x1p-30);
}

// Calls `call` and compares the error's text.
template <typename Call>
void expect_cuda_error(const Call& call, const std::string& message) {
    try {
        call();
        FAIL() << "no error, wanted: " << message;
    } catch (const std::exception& error) {
        EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
}

}  // namespace mage::test

// Compares out and lse of AttentionBuffers, fetched from the device, with the naive loop.
#define MAGE_EXPECT_CUDA_ATTENTION(buffers)                                                                         \
    do {                                                                                                            \
        for (size_t i = 0; i < (buffers).naive_out.size(); ++i) {                                                   \
            ASSERT_NEAR((buffers).out_value(i), (buffers).naive_out[i], mage::test::cuda_out_tolerance(buffers, i)) \
                << "out " << i;                                                                                     \
        }                                                                                                           \
        for (size_t i = 0; i < (buffers).naive_lse.size(); ++i) {                                                   \
            const double exact = (buffers).naive_lse[i];                                                            \
            if (exact == -INFINITY) {                                                                               \
                ASSERT_EQ((buffers).lse[i], -INFINITY) << "lse " << i;                                              \
            } else {                                                                                                \
                ASSERT_NEAR((buffers).lse[i], exact, 1e-4 * std::max(1.0, std::abs(exact))) << "lse " << i;         \
            }                                                                                                       \
        }                                                                                                           \
    } while (0)
