#include "mage/block_attention.h"

#include <tuple>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "block_attention";

void run(const BlockAttentionParams& params, const Tensor& q) {
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    cuda::block_attention(params, current_stream(q));
#else
    static_cast<void>(q);
    cpu::block_attention(params);
#endif
}

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len,
                                           std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                           int64_t split_tokens) {
    BlockAttentionParams params = check_attention(kOp, q, k_cache, v_cache, block_table, seq_lens, max_seq_len,
                                                  softmax_scale, kv_lens, split_tokens);
    Tensor out = new_out(q);
    Tensor lse = new_lse(q);
    Tensor workspace = new_workspace(q, backend::block_attention_workspace(params));
    set_outputs(out, lse, workspace, &params);
    run(params, q);
    return {out, lse};
}

void block_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                         const Tensor& seq_lens, const Tensor& out, const Tensor& lse, const Tensor& workspace,
                         int64_t max_seq_len, std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                         int64_t split_tokens) {
    BlockAttentionParams params = check_attention(kOp, q, k_cache, v_cache, block_table, seq_lens, max_seq_len,
                                                  softmax_scale, kv_lens, split_tokens);
    check_out_and_lse(kOp, out, lse, q);
    check_attention_workspace(kOp, workspace, q, backend::block_attention_workspace(params));
    check_own_memory(kOp, {{"out", out}, {"lse", lse}, {"workspace", workspace}},
                     {{"q", q},
                      {"k_cache", k_cache},
                      {"v_cache", v_cache},
                      {"block_table", block_table},
                      {"seq_lens", seq_lens},
                      {"kv_lens", kv_lens}});
    set_outputs(out, lse, workspace, &params);
    run(params, q);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("block_attention", TORCH_BOX(&block_attention));
    m.impl("block_attention_out", TORCH_BOX(&block_attention_out));
}

MAGE_HOST_IMPL(m) { m.impl("block_attention_workspace", TORCH_BOX(&mage::block_attention_workspace)); }

}  // namespace mage::binding
