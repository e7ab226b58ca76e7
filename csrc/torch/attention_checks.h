#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "debug_checks.h"
#include "mage/block_attention.h"
#include "mage/block_attention_mass.h"
#include "tensor_checks.h"

// Checks and filling that the bindings of the attention ops share.
namespace mage::binding {

// Where the ops of this library run.
#if defined(MAGE_BACKEND_CUDA)
namespace backend = mage::cuda;
#else
namespace backend = mage::cpu;
#endif

// q [B, Q, H, D] and what goes with it, into any of the params structs.
template <typename Params>
void fill_query(const char* op, const Tensor& q, Params* params) {
    check_rank(op, "q", q, 4);
    params->dtype = check_float(op, "q", q);
    check_vector_rows(op, "q", q);
    params->num_requests = q.size(0);
    params->num_queries = q.size(1);
    params->num_heads = q.size(2);
    params->head_dim = q.size(3);
    params->q = q.const_data_ptr();
    params->stride_q_request = used_stride(q, 0);
    params->stride_q_query = used_stride(q, 1);
    params->stride_q_head = used_stride(q, 2);
}

inline PagedPool check_attention_pool(const char* op, const char* name, const Tensor& pool, const Tensor& q,
                                      const Tensor& k_cache) {
    const PagedPool checked = check_pool(op, name, pool, q);
    check_shape(op, name, pool, "[pages, page, Hkv, D]",
                {k_cache.size(0), k_cache.size(1), k_cache.size(2), q.size(3)});
    return checked;
}

inline const int32_t* check_kv_lens(const char* op, const std::optional<Tensor>& kv_lens, const Tensor& q) {
    if (!kv_lens.has_value()) return nullptr;
    check_device(op, "kv_lens", *kv_lens, q);
    check_dtype(op, "kv_lens", *kv_lens, ScalarType::Int);
    check_shape(op, "kv_lens", *kv_lens, "[B, Q]", {q.size(0), q.size(1)});
    check_contiguous(op, "kv_lens", *kv_lens);
    return static_cast<const int32_t*>(kv_lens->const_data_ptr());
}

inline const bool* check_row_mask(const char* op, const std::optional<Tensor>& row_mask, const Tensor& q) {
    if (!row_mask.has_value()) return nullptr;
    check_device(op, "row_mask", *row_mask, q);
    check_dtype(op, "row_mask", *row_mask, ScalarType::Bool);
    check_shape(op, "row_mask", *row_mask, "[B, Q]", {q.size(0), q.size(1)});
    check_contiguous(op, "row_mask", *row_mask);
    return static_cast<const bool*>(row_mask->const_data_ptr());
}

inline MassScore score_of(const char* op, const std::string& score, bool rows_too) {
    if (score == "mean") return MassScore::kMean;
    if (score == "max") return MassScore::kMax;
    if (score == "rows" && rows_too) return MassScore::kRows;
    core::throw_error(op, ": score must be mean", rows_too ? ", max or rows" : " or max", ", got ", score);
}

inline MassNorm norm_of(const char* op, const std::string& norm) {
    if (norm == "context") return MassNorm::kContext;
    if (norm == "prefix") return MassNorm::kPrefix;
    core::throw_error(op, ": norm must be context or prefix, got ", norm);
}

// prefix_lens [B], given with norm prefix and only then.
inline const int32_t* check_prefix_lens(const char* op, const std::optional<Tensor>& prefix_lens, MassNorm norm,
                                        const Tensor& q) {
    if (norm == MassNorm::kContext) {
        MAGE_CHECK(!prefix_lens.has_value(), op, ": prefix_lens must be None with norm context, got a tensor");
        return nullptr;
    }
    MAGE_CHECK(prefix_lens.has_value(), op, ": prefix_lens must be given with norm prefix, got None");
    return check_int32_vector(op, "prefix_lens", *prefix_lens, q, q.size(0));
}

// Scores are float32, and from about 2^31 on their rounding alone carries exp past its range, which gives NaN. This
// bound leaves 2^15 to q . k.
constexpr int64_t kMaxSoftmaxScale = 65536;

inline double scale_of(const char* op, std::optional<double> softmax_scale, int64_t head_dim) {
    if (!softmax_scale.has_value()) return 1.0 / std::sqrt(static_cast<double>(head_dim));
    MAGE_CHECK(std::isfinite(*softmax_scale), op, ": softmax_scale must be finite, got ", *softmax_scale);
    MAGE_CHECK(std::abs(*softmax_scale) <= static_cast<double>(kMaxSoftmaxScale), op, ": softmax_scale must be in [",
               -kMaxSoftmaxScale, ", ", kMaxSoftmaxScale, "], got ", *softmax_scale);
    return *softmax_scale;
}

// Device values, if the debug switch is on.
inline void debug_check_attention(const char* op, const PageTable& pages, const Tensor& block_table,
                                  const Tensor& seq_lens, int64_t max_seq_len, const std::optional<Tensor>& kv_lens) {
    if (!debug_enabled()) return;
    debug_check_lengths(op, "seq_lens", seq_lens, max_seq_len);
    debug_check_pages(op, pages, block_table, seq_lens);
    if (!kv_lens.has_value()) return;
    debug_check_lengths(op, "kv_lens", *kv_lens, max_seq_len);
    const HostCopy lens(*kv_lens);
    core::check_nondecreasing(op, "kv_lens", lens.ints(), kv_lens->size(0), kv_lens->size(1));
}

// Everything but outputs, workspace and what an op adds.
inline BlockAttentionParams check_attention(const char* op, const Tensor& q, const Tensor& k_cache,
                                            const Tensor& v_cache, const Tensor& block_table, const Tensor& seq_lens,
                                            int64_t max_seq_len, std::optional<double> softmax_scale,
                                            const std::optional<Tensor>& kv_lens, int64_t split_tokens) {
    BlockAttentionParams params;
    fill_query(op, q, &params);
    params.k_cache = check_attention_pool(op, "k_cache", k_cache, q, k_cache);
    params.v_cache = check_attention_pool(op, "v_cache", v_cache, q, k_cache);
    params.num_kv_heads = k_cache.size(2);
    params.pages = check_page_table(op, block_table, k_cache, q.size(0));
    params.seq_lens = check_int32_vector(op, "seq_lens", seq_lens, q, q.size(0));
    params.kv_lens = check_kv_lens(op, kv_lens, q);
    params.max_seq_len = max_seq_len;
    params.softmax_scale = scale_of(op, softmax_scale, q.size(3));
    params.split_tokens = split_tokens;
    check_block_attention(params, op);
    debug_check_attention(op, params.pages, block_table, seq_lens, max_seq_len, kv_lens);
    return params;
}

// What emits one number per unit of g tokens: Params has `attention` and `granularity`.
template <typename Params>
Params check_unit_attention(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& block_table, const Tensor& seq_lens, int64_t max_seq_len, int64_t g,
                            std::optional<double> softmax_scale, const std::optional<Tensor>& kv_lens,
                            int64_t split_tokens) {
    Params params;
    params.attention = check_attention(op, q, k_cache, v_cache, block_table, seq_lens, max_seq_len, softmax_scale,
                                       kv_lens, split_tokens);
    params.granularity = g;
    return params;
}

template <typename Params>
int64_t num_units(const Params& params) {
    return (params.attention.max_seq_len + params.granularity - 1) / params.granularity;
}

// How the rows of a KV head become mass: score, row_mask, norm and prefix_lens, into any of the params structs.
template <typename Params>
void check_mass_options(const char* op, const std::string& score, bool rows_too, const std::optional<Tensor>& row_mask,
                        const std::string& norm, const std::optional<Tensor>& prefix_lens, const Tensor& q,
                        Params* params) {
    params->score = score_of(op, score, rows_too);
    params->norm = norm_of(op, norm);
    params->row_mask = check_row_mask(op, row_mask, q);
    params->prefix_lens = check_prefix_lens(op, prefix_lens, params->norm, q);
}

// A contiguous output of an _out twin.
inline void check_output(const char* op, const char* name, const Tensor& t, const Tensor& q, ScalarType dtype,
                         const char* dims, std::initializer_list<int64_t> shape) {
    check_device(op, name, t, q);
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, dims, shape);
    check_contiguous(op, name, t);
}

inline void check_out_and_lse(const char* op, const Tensor& out, const Tensor& lse, const Tensor& q) {
    check_output(op, "out", out, q, q.scalar_type(), "[B, Q, H, D]", {q.size(0), q.size(1), q.size(2), q.size(3)});
    check_output(op, "lse", lse, q, ScalarType::Float, "[B, H, Q]", {q.size(0), q.size(2), q.size(1)});
}

inline void check_attention_workspace(const char* op, const Tensor& workspace, const Tensor& q, int64_t bytes) {
    check_workspace(op, workspace, q, bytes);
    const auto address = reinterpret_cast<uintptr_t>(workspace.const_data_ptr());
    MAGE_CHECK(address % 16 == 0, op, ": workspace must be aligned to 16 bytes, got a base ", address % 16,
               " bytes past it");
}

// out, lse and the third output of an op with units, and its workspace.
inline void check_unit_outputs(const char* op, const Tensor& out, const Tensor& lse, const char* name,
                               const Tensor& shares, const char* dims, std::initializer_list<int64_t> shape,
                               const Tensor& workspace, const Tensor& q, int64_t bytes) {
    check_out_and_lse(op, out, lse, q);
    check_output(op, name, shares, q, ScalarType::Float, dims, shape);
    check_attention_workspace(op, workspace, q, bytes);
}

inline Tensor new_out(const Tensor& q) {
    return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
}

inline Tensor new_lse(const Tensor& q) {
    return torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
}

inline Tensor new_workspace(const Tensor& q, int64_t bytes) {
    return torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
}

inline void set_outputs(const Tensor& out, const Tensor& lse, const Tensor& workspace, BlockAttentionParams* params) {
    params->out = out.mutable_data_ptr();
    params->lse = static_cast<float*>(lse.mutable_data_ptr());
    params->workspace = workspace.mutable_data_ptr();
    params->workspace_bytes = workspace.numel();
}

}  // namespace mage::binding
