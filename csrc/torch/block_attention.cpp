#include "mage/block_attention.h"

#include <tuple>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "block_attention";

int64_t workspace_of(const BlockAttentionParams& p) {
    return block_attention_workspace(p.num_requests, p.num_queries, p.num_heads, p.num_kv_heads, p.head_dim,
                                     p.max_seq_len, p.split_tokens);
}

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len,
                                           std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                           int64_t split_tokens) {
    BlockAttentionParams params = check_attention(kOp, q, k_cache, v_cache, block_table, seq_lens, max_seq_len,
                                                  softmax_scale, kv_lens, split_tokens);
    Tensor out = new_out(q);
    Tensor lse = new_lse(q);
    Tensor workspace = new_workspace(q, workspace_of(params));
    set_outputs(out, lse, workspace, &params);
    cpu::block_attention(params);
    return {out, lse};
}

void block_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                         const Tensor& seq_lens, const Tensor& out, const Tensor& lse, const Tensor& workspace,
                         int64_t max_seq_len, std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                         int64_t split_tokens) {
    BlockAttentionParams params = check_attention(kOp, q, k_cache, v_cache, block_table, seq_lens, max_seq_len,
                                                  softmax_scale, kv_lens, split_tokens);
    check_out_and_lse(kOp, out, lse, q);
    check_attention_workspace(kOp, workspace, q, workspace_of(params));
    set_outputs(out, lse, workspace, &params);
    cpu::block_attention(params);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("block_attention", TORCH_BOX(&block_attention));
    m.impl("block_attention_out", TORCH_BOX(&block_attention_out));
}

MAGE_HOST_IMPL(m) { m.impl("block_attention_workspace", TORCH_BOX(&mage::block_attention_workspace)); }

}  // namespace mage::binding
