#include "mage/merge_attention.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cpu/attention.h"

namespace mage {

namespace {

constexpr char kOp[] = "merge_attention";
constexpr int64_t kRowsPerItem = 256;
constexpr float kLn2 = 0.693147180559945f;

}  // namespace

int64_t merge_attention_workspace(int64_t num_parts, int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                  int64_t head_dim) {
    const auto check = [](const char* name, int64_t value, int64_t low) {
        MAGE_CHECK(value >= low, kOp, ": ", name, " must be at least ", low, ", got ", value);
    };
    check("num_parts", num_parts, 1);
    check("batch", num_requests, 0);
    check("q_len", num_queries, 0);
    check("num_heads", num_heads, 0);
    check("head_dim", head_dim, 1);
    return 0;
}

void check_merge_attention(const MergeAttentionParams& p) {
    MAGE_CHECK(!p.parts.empty(), kOp, ": outs must hold at least one tensor, got none");
    MAGE_CHECK(p.head_dim >= 1, kOp, ": outs must have a head dim of at least 1, got ", p.head_dim);
}

namespace cpu {

void merge_attention(const MergeAttentionParams& p) {
    check_merge_attention(p);
    const auto num_parts = static_cast<int64_t>(p.parts.size());
    const auto merge = MAGE_CPU_PICK(merge_row);
    const int64_t bytes = dtype_bytes(p.dtype);
    const int64_t num_rows = p.num_requests * p.num_queries * p.num_heads;
    const double flops = 4.0 * static_cast<double>(num_rows * p.head_dim * num_parts);
    for_each_item(divide_up(num_rows, kRowsPerItem), p.head_dim, flops, [&](int64_t item, float* scratch) {
        std::vector<MergeRow> rows(num_parts);
        const int64_t end = std::min(num_rows, (item + 1) * kRowsPerItem);
        for (int64_t row = item * kRowsPerItem; row < end; ++row) {
            const int64_t head = row % p.num_heads;
            const int64_t query = row / p.num_heads % p.num_queries;
            const int64_t request = row / p.num_heads / p.num_queries;
            const int64_t lse_at = (request * p.num_heads + head) * p.num_queries + query;
            // Natural logs from here on; the largest one is the reference of the sums.
            const auto lse_of = [&](int64_t i) { return p.parts[i].lse[lse_at] * (p.log2_in ? kLn2 : 1.0f); };
            float highest = -INFINITY;
            for (int64_t i = 0; i < num_parts; ++i) {
                const float lse = lse_of(i);
                if (lse > highest || std::isnan(lse)) highest = lse;
            }
            float sum = 0.0f;
            for (int64_t i = 0; i < num_parts; ++i) {
                const float lse = lse_of(i);
                rows[i].weight = lse == -INFINITY ? 0.0f : std::exp(lse - highest);
                sum += rows[i].weight;
                const MergePart& part = p.parts[i];
                rows[i].out =
                    static_cast<const char*>(part.out) +
                    (request * part.stride_request + query * part.stride_query + head * part.stride_head) * bytes;
            }
            if (sum != 0.0f) {
                for (MergeRow& part : rows) part.weight /= sum;
            }
            const float lse = sum == 0.0f ? -INFINITY : highest + std::log(sum);
            p.lse[lse_at] = p.log2_out ? lse / kLn2 : lse;
            merge(p.dtype, static_cast<int>(p.head_dim), rows.data(), static_cast<int>(num_parts), scratch,
                  static_cast<char*>(p.out) + row * p.head_dim * bytes);
        }
    });
}

}  // namespace cpu
}  // namespace mage
