#include "mage/block_attention_rows.h"

#include <tuple>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "block_attention_rows";

BlockAttentionRowsParams check_inputs(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len, int64_t g,
                                      std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                      int64_t split_tokens) {
    auto params = check_unit_attention<BlockAttentionRowsParams>(kOp, q, k_cache, v_cache, block_table, seq_lens,
                                                                 max_seq_len, g, softmax_scale, kv_lens, split_tokens);
    check_block_attention_rows(params);
    return params;
}

int64_t num_rows(const Tensor& q, const Tensor& k_cache) { return q.size(1) * (q.size(2) / k_cache.size(2)); }

void call(BlockAttentionRowsParams& params, const Tensor& out, const Tensor& lse, const Tensor& row_mass,
          const Tensor& workspace) {
    set_outputs(out, lse, workspace, &params.attention);
    params.row_mass = static_cast<float*>(row_mass.mutable_data_ptr());
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    cuda::block_attention_rows(params, current_stream(out));
#else
    cpu::block_attention_rows(params);
#endif
}

std::tuple<Tensor, Tensor, Tensor> block_attention_rows(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                        const Tensor& block_table, const Tensor& seq_lens,
                                                        int64_t max_seq_len, int64_t g,
                                                        std::optional<double> softmax_scale,
                                                        const std::optional<Tensor>& kv_lens, int64_t split_tokens) {
    BlockAttentionRowsParams params =
        check_inputs(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, g, softmax_scale, kv_lens, split_tokens);
    Tensor out = new_out(q);
    Tensor lse = new_lse(q);
    Tensor row_mass = torch::stable::new_empty(q, {q.size(0), k_cache.size(2), num_units(params), num_rows(q, k_cache)},
                                               ScalarType::Float);
    Tensor workspace = new_workspace(q, backend::block_attention_rows_workspace(params));
    call(params, out, lse, row_mass, workspace);
    return {out, lse, row_mass};
}

void block_attention_rows_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                              const Tensor& seq_lens, const Tensor& out, const Tensor& lse, const Tensor& row_mass,
                              const Tensor& workspace, int64_t max_seq_len, int64_t g,
                              std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                              int64_t split_tokens) {
    BlockAttentionRowsParams params =
        check_inputs(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, g, softmax_scale, kv_lens, split_tokens);
    check_unit_outputs(kOp, out, lse, "row_mass", row_mass, "[B, Hkv, n, R]",
                       {q.size(0), k_cache.size(2), num_units(params), num_rows(q, k_cache)}, workspace, q,
                       backend::block_attention_rows_workspace(params));
    check_own_memory(kOp, {{"out", out}, {"lse", lse}, {"row_mass", row_mass}, {"workspace", workspace}},
                     {{"q", q},
                      {"k_cache", k_cache},
                      {"v_cache", v_cache},
                      {"block_table", block_table},
                      {"seq_lens", seq_lens},
                      {"kv_lens", kv_lens}});
    call(params, out, lse, row_mass, workspace);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("block_attention_rows", TORCH_BOX(&block_attention_rows));
    m.impl("block_attention_rows_out", TORCH_BOX(&block_attention_rows_out));
}

MAGE_HOST_IMPL(m) { m.impl("block_attention_rows_workspace", TORCH_BOX(&mage::block_attention_rows_workspace)); }

}  // namespace mage::binding
