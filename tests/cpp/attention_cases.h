#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "mage/block_attention.h"
#include "mage/block_attention_mass.h"

// Cases and the naive float64 loop for the tests of the attention ops.
namespace mage::test {

struct AttentionCase {
    std::string name;
    std::vector<int32_t> seq_lens;
    int64_t num_queries = 1, num_heads = 1, num_kv_heads = 1, head_dim = 8;
    int32_t page_size = 16;
    DType dtype = DType::kFloat32;
    bool heads_first = false;  // pool [pages, Hkv, page, D]
    bool causal = false;       // kv_lens S - Q + 1 + i
    bool break_page = false;   // the table's entries of the second and the fourth page of request 0 are out of range
    int64_t split_tokens = 0;
    double softmax_scale = 0.3;
    bool interleaved = false;  // pool [pages, page, Hkv, 2, D] of K and V
    int64_t stair = 0;         // kv_lens: every `stair` rows see what is before their end
    int64_t max_seq_len = 0;   // more than the longest request
    uint32_t seed = 1;
    bool spread_rows = false;  // kv_lens from far below 0 over all of [0, S] to far above it
    bool bad_pages = false;    // every other entry of the table is out of range, as far as can be and just so
};

inline std::vector<AttentionCase> attention_cases() {
    constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16, kFp32 = DType::kFloat32;
    return {
        {"AllOnes", {1}, 1, 1, 1, 8, 1, kFp32},
        {"OneRow", {130}, 1, 3, 1, 64, 16, kFp32},
        {"BlockOf135M", {300}, 32, 9, 3, 64, 16, kBf16, true},
        {"BlockOf7B", {150, 40}, 32, 28, 4, 128, 64, kBf16},
        {"Ragged", {0, 1, 63, 64, 65, 250}, 5, 4, 2, 64, 32, kFp32, true},
        {"Half", {129, 0, 17}, 4, 6, 2, 24, 16, kFp16},
        {"RowsExceedTokens", {5, 31}, 33, 6, 2, 32, 16, kFp16},
        {"PageOf1", {97, 40}, 4, 4, 4, 40, 1, kBf16},
        {"PageOf256", {257}, 3, 16, 1, 128, 256, kFp32},
        {"ManyRows", {100}, 64, 16, 1, 64, 128, kFp32},
        {"LargestHeadDim", {70}, 30, 4, 2, 512, 64, kFp32},
        {"Causal", {150, 37}, 37, 4, 2, 64, 32, kFp32, false, true},
        {"BrokenPage", {200, 20}, 8, 4, 2, 64, 64, kFp32, false, false, true},
        {"FixedSplits", {700, 64, 65}, 8, 6, 3, 64, 64, kFp32, false, true, false, 64},
        {"NegativeScale", {90}, 5, 4, 2, 16, 16, kFp32, false, false, false, 0, -0.5},
    };
}

// Eighths in [-2, 2]: exact in every dtype, so the naive loop sees the very values that the kernels read.
inline float random_value(std::mt19937& random) {
    return static_cast<float>(static_cast<int>(random() % 33) - 16) / 8.0f;
}

inline void store_exact(DType dtype, float value, char* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kFloat32) {
        std::memcpy(to, &bits, 4);
        return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kFloat16) {  // NaN, 0, or normal with few bits
        const uint32_t sign = bits >> 16 & 0x8000u;
        if (std::isnan(value)) {
            half = 0x7e00u;
        } else {
            half = static_cast<uint16_t>(value == 0.0f ? sign : sign | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
        }
    }
    std::memcpy(to, &half, 2);
}

inline float load_exact(DType dtype, const char* from) {
    if (dtype == DType::kFloat32) {
        float value;
        std::memcpy(&value, from, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, from, 2);
    if (dtype == DType::kFloat16) {
        const double magnitude = (half & 0x7c00u) != 0
                                     ? std::ldexp(1024 + (half & 0x3ffu), static_cast<int>(half >> 10 & 31u) - 25)
                                     : std::ldexp(half & 0x3ffu, -24);
        return static_cast<float>((half & 0x8000u) != 0 ? -magnitude : magnitude);
    }
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The tensors of a case, params that point to them, and what the naive loop makes of them.
struct AttentionBuffers {
    AttentionCase test;
    BlockAttentionParams params;
    std::vector<char> q, k_pool, v_pool, out, workspace;
    std::vector<int32_t> block_table, kv_lens;
    std::vector<float> lse;
    std::vector<double> naive_out, naive_lse;
    std::vector<double> naive_size;           // as naive_out, of |v|
    double largest_score = 0.0;               // in magnitude
    std::vector<std::vector<double>> shares;  // per (request, KV head): [S, R] softmax shares

    // Without `naive` the loop is left to the caller.
    explicit AttentionBuffers(const AttentionCase& c, bool naive = true) : test(c) {
        std::mt19937 random(c.seed);
        const auto requests = static_cast<int64_t>(c.seq_lens.size());
        const int64_t bytes = dtype_bytes(c.dtype);
        const int64_t longest =
            std::max<int64_t>({1, c.max_seq_len, *std::max_element(c.seq_lens.begin(), c.seq_lens.end())});
        const int64_t max_pages = (longest + c.page_size - 1) / c.page_size;
        const int64_t pages = requests * max_pages + 2;
        params.num_requests = requests;
        params.num_queries = c.num_queries;
        params.num_heads = c.num_heads;
        params.num_kv_heads = c.num_kv_heads;
        params.head_dim = c.head_dim;
        params.max_seq_len = longest;
        params.dtype = c.dtype;
        params.softmax_scale = c.softmax_scale;
        params.split_tokens = c.split_tokens;

        block_table.resize(requests * max_pages);
        std::vector<int32_t> order(pages);
        for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
        std::shuffle(order.begin(), order.end(), random);
        std::copy_n(order.begin(), block_table.size(), block_table.begin());
        if (c.break_page) block_table[1] = static_cast<int32_t>(pages);
        if (c.break_page && max_pages > 3) block_table[3] = -7;
        const int32_t bad[] = {INT_MIN, INT_MAX, -1, static_cast<int32_t>(pages)};
        for (int64_t i = 0; i < requests * max_pages && c.bad_pages; ++i) {
            const int64_t page = i % max_pages;
            if (page % 2 == 1) block_table[i] = bad[(i / max_pages + page / 2) % 4];
        }

        // Pools full of NaN, then values where a token lies.
        const int64_t row = c.head_dim, step = c.interleaved ? 2 * row : row;
        const int64_t stride_token = c.heads_first ? step : step * c.num_kv_heads;
        const int64_t stride_head = c.heads_first ? step * c.page_size : step;
        const int64_t stride_page = step * c.num_kv_heads * c.page_size;
        for (std::vector<char>* pool : {&k_pool, &v_pool}) {
            pool->resize(pages * stride_page * bytes);
            for (int64_t i = 0; i < pages * stride_page; ++i) {
                store_exact(c.dtype, std::numeric_limits<float>::quiet_NaN(), pool->data() + i * bytes);
            }
            for (int64_t b = 0; b < requests; ++b) {
                for (int64_t t = 0; t < c.seq_lens[b]; ++t) {
                    const int64_t page = block_table[b * max_pages + t / c.page_size];
                    if (page < 0 || page >= pages) continue;
                    for (int64_t h = 0; h < c.num_kv_heads; ++h) {
                        const int64_t at = page * stride_page + t % c.page_size * stride_token + h * stride_head;
                        for (int64_t d = 0; d < row; ++d) {
                            store_exact(c.dtype, random_value(random), pool->data() + (at + d) * bytes);
                        }
                    }
                }
            }
        }
        params.k_cache = {k_pool.data(), stride_page, stride_token, stride_head};
        params.v_cache = {v_pool.data(), stride_page, stride_token, stride_head};
        params.pages = {block_table.data(), max_pages, static_cast<int32_t>(max_pages), c.page_size, pages};
        params.seq_lens = test.seq_lens.data();

        const int64_t q_elements = requests * c.num_queries * c.num_heads * row;
        q.resize(q_elements * bytes);
        for (int64_t i = 0; i < q_elements; ++i) store_exact(c.dtype, random_value(random), q.data() + i * bytes);
        params.q = q.data();
        params.stride_q_head = row;
        params.stride_q_query = c.num_heads * row;
        params.stride_q_request = c.num_queries * c.num_heads * row;
        const int64_t stair = c.causal ? 1 : c.stair;
        if (stair > 0) {
            for (int64_t b = 0; b < requests; ++b) {
                for (int64_t i = 0; i < c.num_queries; ++i) {
                    const int64_t seen = std::min(c.num_queries, (i / stair + 1) * stair);
                    kv_lens.push_back(static_cast<int32_t>(c.seq_lens[b] - c.num_queries + seen));
                }
            }
            params.kv_lens = kv_lens.data();
        }
        if (c.spread_rows) spread_rows();
        out.resize(q.size());
        lse.resize(requests * c.num_heads * c.num_queries);
        params.out = out.data();
        params.lse = lse.data();
        set_workspace(block_attention_workspace(requests, c.num_queries, c.num_heads, c.num_kv_heads, row, longest,
                                                c.split_tokens));
        poison();
        if (naive) run_naive([](int64_t, int64_t, int64_t) { return 1; });
    }

    AttentionBuffers(const AttentionBuffers&) = delete;
    AttentionBuffers& operator=(const AttentionBuffers&) = delete;

    void spread_rows() {
        const int64_t queries = test.num_queries;
        for (const int32_t len : test.seq_lens) {
            for (int64_t i = 0; i < queries; ++i) {
                kv_lens.push_back(i == 0             ? INT_MIN
                                  : i == queries - 1 ? INT_MAX
                                                     : static_cast<int32_t>(len * (i - 1) / (queries - 2)));
            }
        }
        params.kv_lens = kv_lens.data();
    }

    int64_t rows() const { return test.num_queries * (test.num_heads / test.num_kv_heads); }

    // 16 spare bytes to align the base.
    void set_workspace(int64_t bytes) {
        workspace.resize(bytes + 16);
        const auto address = reinterpret_cast<uintptr_t>(workspace.data());
        params.workspace = workspace.data() + (16 - address % 16) % 16;
        params.workspace_bytes = bytes;
    }

    // Outputs and workspace hold NaN before a call.
    void poison() {
        std::fill(out.begin(), out.end(), static_cast<char>(0xff));
        std::fill(workspace.begin(), workspace.end(), static_cast<char>(0xff));
        std::fill(lse.begin(), lse.end(), std::numeric_limits<float>::quiet_NaN());
    }

    bool is_broken(int64_t b, int64_t t) const {
        const int64_t page = block_table[b * params.pages.max_pages + t / test.page_size];
        return page < 0 || page >= params.pages.num_pages;
    }

    // The tokens of a request and KV head, [S, D]; zeros where the page is out of range.
    std::vector<double> tokens_of(const std::vector<char>& pool, int64_t b, int64_t h) const {
        const PagedPool& strides = params.k_cache;
        std::vector<double> values(test.seq_lens[b] * test.head_dim, 0.0);
        for (int64_t t = 0; t < test.seq_lens[b]; ++t) {
            if (is_broken(b, t)) continue;
            const int64_t page = block_table[b * params.pages.max_pages + t / test.page_size];
            const int64_t at =
                page * strides.stride_page + t % test.page_size * strides.stride_token + h * strides.stride_head;
            for (int64_t d = 0; d < test.head_dim; ++d) {
                values[t * test.head_dim + d] =
                    load_exact(test.dtype, pool.data() + (at + d) * dtype_bytes(test.dtype));
            }
        }
        return values;
    }

    // The plain loop over tokens, of which each counts attended(request, kv_head, token) times.
    template <typename Attended>
    void run_naive(const Attended& attended) {
        const AttentionCase& c = test;
        const int64_t group = c.num_heads / c.num_kv_heads;
        naive_out.assign(lse.size() * c.head_dim, 0.0);
        naive_size.assign(naive_out.size(), 0.0);
        naive_lse.assign(lse.size(), -INFINITY);
        largest_score = 0.0;
        shares.assign(c.seq_lens.size() * c.num_kv_heads, {});
        for (size_t b = 0; b < c.seq_lens.size(); ++b) {
            for (int64_t h = 0; h < c.num_kv_heads; ++h) {
                std::vector<double>& share = shares[b * c.num_kv_heads + h];
                share.assign(c.seq_lens[b] * rows(), 0.0);
                const auto k = tokens_of(k_pool, static_cast<int64_t>(b), h);
                const auto v = tokens_of(v_pool, static_cast<int64_t>(b), h);
                std::vector<double> q_row(c.head_dim);
                for (int64_t r = 0; r < rows(); ++r) {
                    const int64_t query = r / group, head = h * group + r % group;
                    const int64_t q_at = ((b * c.num_queries + query) * c.num_heads + head) * c.head_dim;
                    const int64_t length =
                        kv_lens.empty() ? c.seq_lens[b]
                                        : std::clamp<int64_t>(kv_lens[b * c.num_queries + query], 0, c.seq_lens[b]);
                    for (int64_t d = 0; d < c.head_dim; ++d) {
                        q_row[d] = load_exact(c.dtype, q.data() + (q_at + d) * dtype_bytes(c.dtype));
                    }
                    std::vector<double> score(length, -INFINITY);
                    double highest = -INFINITY, sum = 0.0;
                    for (int64_t t = 0; t < length; ++t) {
                        if (is_broken(static_cast<int64_t>(b), t)) continue;
                        const auto times = static_cast<double>(attended(static_cast<int64_t>(b), h, t));
                        if (times == 0.0) continue;
                        double dot = 0.0;
                        for (int64_t d = 0; d < c.head_dim; ++d) dot += q_row[d] * k[t * c.head_dim + d];
                        score[t] = dot * c.softmax_scale + std::log(times);
                        largest_score = std::max(largest_score, std::abs(score[t]));
                        highest = std::max(highest, score[t]);
                    }
                    for (const double s : score) sum += s == -INFINITY ? 0.0 : std::exp(s - highest);
                    if (sum == 0.0) continue;
                    naive_lse[(b * c.num_heads + head) * c.num_queries + query] = highest + std::log(sum);
                    for (int64_t t = 0; t < length; ++t) {
                        if (score[t] == -INFINITY) continue;
                        const double weight = std::exp(score[t] - highest) / sum;
                        share[t * rows() + r] = weight;
                        for (int64_t d = 0; d < c.head_dim; ++d) {
                            naive_out[q_at + d] += weight * v[t * c.head_dim + d];
                            naive_size[q_at + d] += weight * std::abs(v[t * c.head_dim + d]);
                        }
                    }
                }
            }
        }
    }

    // Largest |out - naive| that rounding explains: values are at most 2, so half a unit of the output's last place
    // there, and 2^-20 for sums of weights in float32; scores reach 100, which the exponential turns into 2^-17.
    double out_tolerance() const {
        const double rounding = test.dtype == DType::kFloat32 ? 0.0 : test.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
        return rounding + 0x1p-16;
    }

    // What block_attention_mass makes of the naive shares, [B, Hkv, n]. mask: [B, Q].
    std::vector<double> naive_mass(int64_t granularity, MassScore score, MassNorm norm, const std::vector<char>& mask,
                                   const std::vector<int32_t>& prefix_lens) const {
        const AttentionCase& c = test;
        const int64_t group = c.num_heads / c.num_kv_heads;
        const int64_t units = (params.max_seq_len + granularity - 1) / granularity;
        std::vector<double> mass(shares.size() * units, 0.0);
        for (size_t stream = 0; stream < shares.size(); ++stream) {
            const size_t b = stream / c.num_kv_heads;
            const bool prefix = norm == MassNorm::kPrefix;
            const int64_t end = prefix ? std::clamp(prefix_lens[b], 0, c.seq_lens[b]) : c.seq_lens[b];
            const std::vector<double>& share = shares[stream];
            double* expected = mass.data() + stream * units;
            int64_t kept = 0;
            for (int64_t r = 0; r < rows(); ++r) {
                if (!mask[b * c.num_queries + r / group]) continue;
                ++kept;
                double total = prefix ? 0.0 : 1.0;
                for (int64_t t = 0; t < end && prefix; ++t) total += share[t * rows() + r];
                if (total == 0.0) continue;
                for (int64_t u = 0; u * granularity < end; ++u) {
                    double sum = 0.0;
                    for (int64_t t = u * granularity; t < std::min(end, (u + 1) * granularity); ++t)
                        sum += share[t * rows() + r];
                    expected[u] =
                        score == MassScore::kMax ? std::max(expected[u], sum / total) : expected[u] + sum / total;
                }
            }
            if (score == MassScore::kMax || kept == 0) continue;
            for (int64_t u = 0; u < units; ++u) expected[u] /= static_cast<double>(kept);
        }
        return mass;
    }

    float out_value(int64_t i) const { return load_exact(test.dtype, out.data() + i * dtype_bytes(test.dtype)); }
};

}  // namespace mage::test

// Compares out and lse of AttentionBuffers with the naive loop.
#define MAGE_EXPECT_ATTENTION(buffers)                                                                             \
    do {                                                                                                           \
        for (size_t i = 0; i < (buffers).naive_out.size(); ++i) {                                                  \
            ASSERT_NEAR((buffers).out_value(i), (buffers).naive_out[i], (buffers).out_tolerance()) << "out " << i; \
        }                                                                                                          \
        for (size_t i = 0; i < (buffers).naive_lse.size(); ++i) {                                                  \
            const double exact = (buffers).naive_lse[i];                                                           \
            if (exact == -INFINITY) {                                                                              \
                ASSERT_EQ((buffers).lse[i], -INFINITY) << "lse " << i;                                             \
            } else {                                                                                               \
                ASSERT_NEAR((buffers).lse[i], exact, 1e-4 * std::max(1.0, std::abs(exact))) << "lse " << i;        \
            }                                                                                                      \
        }                                                                                                          \
    } while (0)
