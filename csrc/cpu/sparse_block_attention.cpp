#include "mage/sparse_block_attention.h"

#include <algorithm>

#include "core/check.h"
#include "cpu/attention.h"

namespace mage {

namespace {

constexpr char kOp[] = "sparse_block_attention";

// Splits are made for lists that are full and a tail of a few blocks; a longer tail gets longer splits.
constexpr int64_t kExpectedTail = 256;

cpu::AttentionPlan make_plan(const BlockAttentionParams& p, int64_t granularity, int64_t capacity) {
    return cpu::plan_attention(p, std::min(p.max_seq_len, capacity * granularity + kExpectedTail));
}

// Adds tokens [begin, end), as part of the last run where they follow it.
void add_run(int64_t begin, int64_t end, std::vector<cpu::TokenRun>* runs) {
    if (begin >= end) return;
    if (!runs->empty() && runs->back().begin + runs->back().count == begin) {
        runs->back().count += static_cast<int32_t>(end - begin);
        return;
    }
    const int64_t offset = runs->empty() ? 0 : runs->back().offset + runs->back().count;
    runs->push_back({offset, static_cast<int32_t>(begin), static_cast<int32_t>(end - begin)});
}

}  // namespace

int64_t sparse_block_attention_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                         int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len,
                                         int64_t granularity, int64_t capacity, int64_t split_tokens) {
    const BlockAttentionParams dims = cpu::attention_dims(kOp, num_requests, num_queries, num_heads, num_kv_heads,
                                                          head_dim, max_seq_len, split_tokens);
    cpu::check_granularity(kOp, granularity);
    MAGE_CHECK(capacity >= 0 && capacity <= (int64_t{1} << 30) / granularity, kOp, ": capacity must be in [0, ",
               (int64_t{1} << 30) / granularity, "] units of ", granularity, " tokens, got ", capacity);
    SparseBlockAttentionParams params;
    params.attention = dims;
    params.granularity = granularity;
    params.capacity = capacity;
    return std::max(4 * make_plan(dims, granularity, capacity).workspace_floats(),
                    cuda::sparse_block_attention_workspace(params));
}

void check_sparse_block_attention(const SparseBlockAttentionParams& params) {
    check_block_attention(params.attention, kOp);
    cpu::check_granularity(kOp, params.granularity);
    MAGE_CHECK(params.capacity >= 0, kOp, ": indices must be of shape [B, Hkv, Kmax], got Kmax = ", params.capacity);
}

namespace cpu {

void sparse_block_attention(const SparseBlockAttentionParams& params) {
    check_sparse_block_attention(params);
    const BlockAttentionParams& p = params.attention;
    const int64_t g = params.granularity;
    const AttentionPlan plan = make_plan(p, g, params.capacity);
    check_workspace(kOp, p.workspace_bytes, 4 * plan.workspace_floats());
    run_attention(p, plan, UnitBuffers(), [&](int64_t request, int64_t kv_head, int32_t seq_len) {
        std::vector<TokenRun> runs;
        const int64_t tail_start = std::clamp<int64_t>(params.tail_start[request], 0, seq_len);
        const int64_t head = request * p.num_kv_heads + kv_head;
        const int64_t count = std::clamp<int64_t>(params.counts[head], 0, params.capacity);
        const int32_t* list = params.indices + head * params.capacity;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t unit = list[i];
            if (unit < 0 || (i > 0 && unit <= list[i - 1]) || unit * g >= tail_start) continue;
            add_run(unit * g, std::min((unit + 1) * g, tail_start), &runs);
        }
        add_run(tail_start, seq_len, &runs);
        return runs;
    });
}

}  // namespace cpu
}  // namespace mage
