#include "mage/block_attention.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cpu/attention.h"

namespace mage {

namespace {

constexpr char kOp[] = "block_attention";

}  // namespace

int64_t block_attention_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads,
                                  int64_t head_dim, int64_t max_seq_len, int64_t split_tokens) {
    const BlockAttentionParams dims = cpu::attention_dims(kOp, num_requests, num_queries, num_heads, num_kv_heads,
                                                          head_dim, max_seq_len, split_tokens);
    return std::max(cpu::block_attention_workspace(dims), cuda::block_attention_workspace(dims));
}

void check_block_attention(const BlockAttentionParams& p, const char* op) {
    cpu::check_attention_dims(op, p);
    core::check_page_size(op, "k_cache", p.pages.page_size);
    MAGE_CHECK(p.max_seq_len <= int64_t{p.pages.max_pages} * p.pages.page_size, op,
               ": block_table must have pages for max_seq_len = ", p.max_seq_len, " tokens, got ", p.pages.max_pages,
               " pages of ", p.pages.page_size);
    MAGE_CHECK(std::isfinite(p.softmax_scale), op, ": softmax_scale must be finite, got ", p.softmax_scale);
}

namespace cpu {

int64_t block_attention_workspace(const BlockAttentionParams& p) {
    return 4 * plan_attention(p, p.max_seq_len).workspace_floats();
}

void block_attention(const BlockAttentionParams& p) {
    check_block_attention(p);
    check_workspace(kOp, p.workspace_bytes, block_attention_workspace(p));
    const AttentionPlan plan = plan_attention(p, p.max_seq_len);
    run_attention(p, plan, UnitBuffers(), RunsOf());
}

}  // namespace cpu
}  // namespace mage
