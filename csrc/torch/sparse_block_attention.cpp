#include "mage/sparse_block_attention.h"

#include <tuple>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "sparse_block_attention";

SparseBlockAttentionParams check_inputs(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                        const Tensor& block_table, const Tensor& seq_lens, const Tensor& indices,
                                        const Tensor& counts, const Tensor& tail_start, int64_t g, int64_t max_seq_len,
                                        std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                        int64_t split_tokens) {
    SparseBlockAttentionParams params;
    params.attention = check_attention(kOp, q, k_cache, v_cache, block_table, seq_lens, max_seq_len, softmax_scale,
                                       kv_lens, split_tokens);
    const int64_t requests = q.size(0), heads = k_cache.size(2);
    check_device(kOp, "indices", indices, q);
    check_dtype(kOp, "indices", indices, ScalarType::Int);
    check_rank(kOp, "indices", indices, 3);
    check_shape(kOp, "indices", indices, "[B, Hkv, Kmax]", {requests, heads, indices.size(2)});
    check_contiguous(kOp, "indices", indices);
    check_device(kOp, "counts", counts, q);
    check_dtype(kOp, "counts", counts, ScalarType::Int);
    check_shape(kOp, "counts", counts, "[B, Hkv]", {requests, heads});
    check_contiguous(kOp, "counts", counts);
    params.tail_start = check_int32_vector(kOp, "tail_start", tail_start, q, requests);
    params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    params.counts = static_cast<const int32_t*>(counts.const_data_ptr());
    params.capacity = indices.size(2);
    params.granularity = g;
    check_sparse_block_attention(params);
    if (debug_enabled()) {
        const HostCopy units(indices), lengths(counts), tails(tail_start);
        core::check_lists(kOp, units.ints(), lengths.ints(), tails.ints(), requests, heads, params.capacity, g);
    }
    return params;
}

int64_t workspace_of(const SparseBlockAttentionParams& params) {
    const BlockAttentionParams& p = params.attention;
    return sparse_block_attention_workspace(p.num_requests, p.num_queries, p.num_heads, p.num_kv_heads, p.head_dim,
                                            p.max_seq_len, params.granularity, params.capacity, p.split_tokens);
}

void call(SparseBlockAttentionParams& params, const Tensor& out, const Tensor& lse, const Tensor& workspace) {
    set_outputs(out, lse, workspace, &params.attention);
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    cuda::sparse_block_attention(params, current_stream(out));
#else
    cpu::sparse_block_attention(params);
#endif
}

std::tuple<Tensor, Tensor> sparse_block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                  const Tensor& block_table, const Tensor& seq_lens,
                                                  const Tensor& indices, const Tensor& counts, const Tensor& tail_start,
                                                  int64_t g, int64_t max_seq_len, std::optional<double> softmax_scale,
                                                  const std::optional<Tensor>& kv_lens, int64_t split_tokens) {
    SparseBlockAttentionParams params = check_inputs(q, k_cache, v_cache, block_table, seq_lens, indices, counts,
                                                     tail_start, g, max_seq_len, softmax_scale, kv_lens, split_tokens);
    Tensor out = new_out(q);
    Tensor lse = new_lse(q);
    Tensor workspace = new_workspace(q, workspace_of(params));
    call(params, out, lse, workspace);
    return {out, lse};
}

void sparse_block_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                const Tensor& block_table, const Tensor& seq_lens, const Tensor& indices,
                                const Tensor& counts, const Tensor& tail_start, const Tensor& out, const Tensor& lse,
                                const Tensor& workspace, int64_t g, int64_t max_seq_len,
                                std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                int64_t split_tokens) {
    SparseBlockAttentionParams params = check_inputs(q, k_cache, v_cache, block_table, seq_lens, indices, counts,
                                                     tail_start, g, max_seq_len, softmax_scale, kv_lens, split_tokens);
    check_out_and_lse(kOp, out, lse, q);
    check_attention_workspace(kOp, workspace, q, workspace_of(params));
    check_own_memory(kOp, {{"out", out}, {"lse", lse}, {"workspace", workspace}},
                     {{"q", q},
                      {"k_cache", k_cache},
                      {"v_cache", v_cache},
                      {"block_table", block_table},
                      {"seq_lens", seq_lens},
                      {"kv_lens", kv_lens},
                      {"indices", indices},
                      {"counts", counts},
                      {"tail_start", tail_start}});
    call(params, out, lse, workspace);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("sparse_block_attention", TORCH_BOX(&sparse_block_attention));
    m.impl("sparse_block_attention_out", TORCH_BOX(&sparse_block_attention_out));
}

MAGE_HOST_IMPL(m) { m.impl("sparse_block_attention_workspace", TORCH_BOX(&mage::sparse_block_attention_workspace)); }

}  // namespace mage::binding
