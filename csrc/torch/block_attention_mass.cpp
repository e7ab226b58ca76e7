#include "mage/block_attention_mass.h"

#include <tuple>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "block_attention_mass";

BlockAttentionMassParams check_inputs(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len, int64_t g,
                                      const std::string& score, const std::optional<Tensor>& row_mask,
                                      const std::string& norm, const std::optional<Tensor>& prefix_lens,
                                      std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                                      int64_t split_tokens) {
    auto params = check_unit_attention<BlockAttentionMassParams>(kOp, q, k_cache, v_cache, block_table, seq_lens,
                                                                 max_seq_len, g, softmax_scale, kv_lens, split_tokens);
    check_mass_options(kOp, score, false, row_mask, norm, prefix_lens, q, &params);
    check_block_attention_mass(params);
    if (debug_enabled() && prefix_lens.has_value()) debug_check_lengths(kOp, "prefix_lens", *prefix_lens, max_seq_len);
    return params;
}

void call(BlockAttentionMassParams& params, const Tensor& out, const Tensor& lse, const Tensor& mass,
          const Tensor& workspace) {
    set_outputs(out, lse, workspace, &params.attention);
    params.mass = static_cast<float*>(mass.mutable_data_ptr());
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    cuda::block_attention_mass(params, current_stream(out));
#else
    cpu::block_attention_mass(params);
#endif
}

std::tuple<Tensor, Tensor, Tensor> block_attention_mass(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                        const Tensor& block_table, const Tensor& seq_lens,
                                                        int64_t max_seq_len, int64_t g, const std::string& score,
                                                        const std::optional<Tensor>& row_mask, const std::string& norm,
                                                        const std::optional<Tensor>& prefix_lens,
                                                        std::optional<double> softmax_scale,
                                                        const std::optional<Tensor>& kv_lens, int64_t split_tokens) {
    BlockAttentionMassParams params = check_inputs(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, g, score,
                                                   row_mask, norm, prefix_lens, softmax_scale, kv_lens, split_tokens);
    Tensor out = new_out(q);
    Tensor lse = new_lse(q);
    Tensor mass = torch::stable::new_empty(q, {q.size(0), k_cache.size(2), num_units(params)}, ScalarType::Float);
    Tensor workspace = new_workspace(q, backend::block_attention_mass_workspace(params));
    call(params, out, lse, mass, workspace);
    return {out, lse, mass};
}

void block_attention_mass_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                              const Tensor& seq_lens, const Tensor& out, const Tensor& lse, const Tensor& mass,
                              const Tensor& workspace, int64_t max_seq_len, int64_t g, const std::string& score,
                              const std::optional<Tensor>& row_mask, const std::string& norm,
                              const std::optional<Tensor>& prefix_lens, std::optional<double> softmax_scale,
                              const std::optional<Tensor>& kv_lens, int64_t split_tokens) {
    BlockAttentionMassParams params = check_inputs(q, k_cache, v_cache, block_table, seq_lens, max_seq_len, g, score,
                                                   row_mask, norm, prefix_lens, softmax_scale, kv_lens, split_tokens);
    check_unit_outputs(kOp, out, lse, "mass", mass, "[B, Hkv, n]", {q.size(0), k_cache.size(2), num_units(params)},
                       workspace, q, backend::block_attention_mass_workspace(params));
    check_own_memory(kOp, {{"out", out}, {"lse", lse}, {"mass", mass}, {"workspace", workspace}},
                     {{"q", q},
                      {"k_cache", k_cache},
                      {"v_cache", v_cache},
                      {"block_table", block_table},
                      {"seq_lens", seq_lens},
                      {"kv_lens", kv_lens},
                      {"row_mask", row_mask},
                      {"prefix_lens", prefix_lens}});
    call(params, out, lse, mass, workspace);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("block_attention_mass", TORCH_BOX(&block_attention_mass));
    m.impl("block_attention_mass_out", TORCH_BOX(&block_attention_mass_out));
}

MAGE_HOST_IMPL(m) { m.impl("block_attention_mass_workspace", TORCH_BOX(&mage::block_attention_mass_workspace)); }

}  // namespace mage::binding
