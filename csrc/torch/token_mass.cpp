#include "mage/token_mass.h"

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "token_mass";

TokenMassParams check_inputs(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& seq_lens,
                             const Tensor& lse, int64_t max_seq_len, const std::string& score,
                             const std::optional<Tensor>& row_mask, const std::string& norm,
                             const std::optional<Tensor>& prefix_lens, const std::optional<Tensor>& units, int64_t g,
                             std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens) {
    TokenMassParams params;
    fill_query(kOp, q, &params);
    params.k_cache = check_attention_pool(kOp, "k_cache", k_cache, q, k_cache);
    params.num_kv_heads = k_cache.size(2);
    params.pages = check_page_table(kOp, block_table, k_cache, q.size(0));
    params.seq_lens = check_int32_vector(kOp, "seq_lens", seq_lens, q, q.size(0));
    params.kv_lens = check_kv_lens(kOp, kv_lens, q);
    check_output(kOp, "lse", lse, q, ScalarType::Float, "[B, H, Q]", {q.size(0), q.size(2), q.size(1)});
    params.lse = static_cast<const float*>(lse.const_data_ptr());
    params.max_seq_len = max_seq_len;
    params.softmax_scale = scale_of(kOp, softmax_scale, q.size(3));
    check_mass_options(kOp, score, true, row_mask, norm, prefix_lens, q, &params);
    params.granularity = g;
    if (units.has_value()) {
        check_device(kOp, "units", *units, q);
        check_dtype(kOp, "units", *units, ScalarType::Int);
        check_rank(kOp, "units", *units, 3);
        check_shape(kOp, "units", *units, "[B, Hkv, C]", {q.size(0), k_cache.size(2), units->size(2)});
        check_contiguous(kOp, "units", *units);
        params.has_units = true;
        params.units = static_cast<const int32_t*>(units->const_data_ptr());
        params.num_candidates = units->size(2);
    }
    check_token_mass(params);
    if (debug_enabled()) {
        debug_check_attention(kOp, params.pages, block_table, seq_lens, max_seq_len, kv_lens);
        if (prefix_lens.has_value()) debug_check_lengths(kOp, "prefix_lens", *prefix_lens, max_seq_len);
        if (units.has_value()) {
            const HostCopy candidates(*units);
            core::check_values(kOp, "units", candidates.ints(), candidates.count(), -1, (max_seq_len - 1) / g);
        }
    }
    return params;
}

int64_t num_tokens(const TokenMassParams& p) { return p.has_units ? p.num_candidates * p.granularity : p.max_seq_len; }

int64_t num_rows(const TokenMassParams& p) { return p.num_queries * (p.num_heads / p.num_kv_heads); }

void call(TokenMassParams& params, const Tensor& mass, const Tensor& workspace) {
    params.mass = static_cast<float*>(mass.mutable_data_ptr());
    params.workspace = workspace.mutable_data_ptr();
    params.workspace_bytes = workspace.numel();
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(mass.get_device_index());
    cuda::token_mass(params, current_stream(mass));
#else
    cpu::token_mass(params);
#endif
}

Tensor token_mass(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& seq_lens,
                  const Tensor& lse, int64_t max_seq_len, const std::string& score,
                  const std::optional<Tensor>& row_mask, const std::string& norm,
                  const std::optional<Tensor>& prefix_lens, const std::optional<Tensor>& units, int64_t g,
                  std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens) {
    TokenMassParams params = check_inputs(q, k_cache, block_table, seq_lens, lse, max_seq_len, score, row_mask, norm,
                                          prefix_lens, units, g, softmax_scale, kv_lens);
    const int64_t requests = params.num_requests, heads = params.num_kv_heads, tokens = num_tokens(params);
    Tensor mass = params.score == MassScore::kRows
                      ? torch::stable::new_empty(q, {requests, heads, tokens, num_rows(params)}, ScalarType::Float)
                      : torch::stable::new_empty(q, {requests, heads, tokens}, ScalarType::Float);
    Tensor workspace = new_workspace(q, backend::token_mass_workspace(params));
    call(params, mass, workspace);
    return mass;
}

void token_mass_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& seq_lens,
                    const Tensor& lse, const Tensor& mass, const Tensor& workspace, int64_t max_seq_len,
                    const std::string& score, const std::optional<Tensor>& row_mask, const std::string& norm,
                    const std::optional<Tensor>& prefix_lens, const std::optional<Tensor>& units, int64_t g,
                    std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens) {
    TokenMassParams params = check_inputs(q, k_cache, block_table, seq_lens, lse, max_seq_len, score, row_mask, norm,
                                          prefix_lens, units, g, softmax_scale, kv_lens);
    const int64_t requests = params.num_requests, heads = params.num_kv_heads, tokens = num_tokens(params);
    if (params.score == MassScore::kRows) {
        check_output(kOp, "mass", mass, q, ScalarType::Float, "[B, Hkv, N, R]",
                     {requests, heads, tokens, num_rows(params)});
    } else {
        check_output(kOp, "mass", mass, q, ScalarType::Float, "[B, Hkv, N]", {requests, heads, tokens});
    }
    check_attention_workspace(kOp, workspace, q, backend::token_mass_workspace(params));
    check_own_memory(kOp, {{"mass", mass}, {"workspace", workspace}},
                     {{"q", q},
                      {"k_cache", k_cache},
                      {"lse", lse},
                      {"block_table", block_table},
                      {"seq_lens", seq_lens},
                      {"row_mask", row_mask},
                      {"prefix_lens", prefix_lens},
                      {"units", units},
                      {"kv_lens", kv_lens}});
    call(params, mass, workspace);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("token_mass", TORCH_BOX(&token_mass));
    m.impl("token_mass_out", TORCH_BOX(&token_mass_out));
}

MAGE_HOST_IMPL(m) { m.impl("token_mass_workspace", TORCH_BOX(&mage::token_mass_workspace)); }

}  // namespace mage::binding
