#include "mage/row_votes.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "debug_checks.h"
#include "tensor_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "row_votes";

// Checks the inputs and fills in everything but the outputs.
RowVotesParams check_inputs(const Tensor& row_mass, const Tensor& prefix_lens, int64_t k, int64_t g,
                            const std::optional<Tensor>& row_mask) {
    RowVotesParams params;
    check_rank(kOp, "row_mass", row_mass, 4);
    check_dtype(kOp, "row_mass", row_mass, ScalarType::Float);
    check_contiguous(kOp, "row_mass", row_mass);
    params.num_requests = row_mass.size(0);
    params.num_kv_heads = row_mass.size(1);
    params.num_units = row_mass.size(2);
    params.num_rows = row_mass.size(3);
    params.granularity = g;
    params.k = k;
    params.row_mass = static_cast<const float*>(row_mass.const_data_ptr());
    params.prefix_lens = check_int32_vector(kOp, "prefix_lens", prefix_lens, row_mass, params.num_requests);
    if (row_mask.has_value()) {
        check_device(kOp, "row_mask", *row_mask, row_mass);
        check_dtype(kOp, "row_mask", *row_mask, ScalarType::Bool);
        check_rank(kOp, "row_mask", *row_mask, 2);
        check_shape(kOp, "row_mask", *row_mask, "[B, Q]", {params.num_requests, row_mask->size(1)});
        // A tensor without elements has no address, which would be no mask.
        MAGE_CHECK(row_mask->size(1) >= 1, kOp, ": row_mask must have Q positions that divide the rows (",
                   params.num_rows, "), got 0");
        check_contiguous(kOp, "row_mask", *row_mask);
        params.num_positions = row_mask->size(1);
        params.row_mask = static_cast<const bool*>(row_mask->const_data_ptr());
    }
    check_row_votes(params);
    if (debug_enabled()) {
        debug_check_lengths(kOp, "prefix_lens", prefix_lens, params.num_units * g);
        const HostCopy shares(row_mass);
        core::check_shares(kOp, "row_mass", shares.floats(), shares.count(), -INFINITY);
    }
    return params;
}

int64_t workspace_of(const RowVotesParams& p) {
    return mage::row_votes_workspace(p.num_requests, p.num_kv_heads, p.num_units, p.num_rows);
}

void call(RowVotesParams& params, const Tensor& votes, const Tensor& union_size, const Tensor& coverage,
          const Tensor& workspace) {
    params.votes = static_cast<int32_t*>(votes.mutable_data_ptr());
    params.union_size = static_cast<int32_t*>(union_size.mutable_data_ptr());
    params.coverage = static_cast<float*>(coverage.mutable_data_ptr());
    params.workspace = workspace.mutable_data_ptr();
    params.workspace_bytes = workspace.numel();
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(votes.get_device_index());
    cuda::row_votes(params, current_stream(votes));
#else
    cpu::row_votes(params);
#endif
}

std::tuple<Tensor, Tensor, Tensor> row_votes(const Tensor& row_mass, const Tensor& prefix_lens, int64_t k, int64_t g,
                                             const std::optional<Tensor>& row_mask) {
    RowVotesParams params = check_inputs(row_mass, prefix_lens, k, g, row_mask);
    const int64_t requests = params.num_requests, heads = params.num_kv_heads;
    Tensor votes = torch::stable::new_empty(row_mass, {requests, heads, params.num_units}, ScalarType::Int);
    Tensor union_size = torch::stable::new_empty(row_mass, {requests, heads}, ScalarType::Int);
    Tensor coverage = torch::stable::new_empty(row_mass, {requests, heads}, ScalarType::Float);
    Tensor workspace = torch::stable::new_empty(row_mass, {workspace_of(params)}, ScalarType::Byte);
    call(params, votes, union_size, coverage, workspace);
    return {votes, union_size, coverage};
}

void row_votes_out(const Tensor& row_mass, const Tensor& prefix_lens, const Tensor& votes, const Tensor& union_size,
                   const Tensor& coverage, const Tensor& workspace, int64_t k, int64_t g,
                   const std::optional<Tensor>& row_mask) {
    RowVotesParams params = check_inputs(row_mass, prefix_lens, k, g, row_mask);
    const int64_t requests = params.num_requests, heads = params.num_kv_heads;
    const auto check_output = [&](const char* name, const Tensor& t, ScalarType dtype) {
        check_device(kOp, name, t, row_mass);
        check_dtype(kOp, name, t, dtype);
        check_contiguous(kOp, name, t);
    };
    check_shape(kOp, "votes", votes, "[B, Hkv, n]", {requests, heads, params.num_units});
    check_output("votes", votes, ScalarType::Int);
    check_shape(kOp, "union_size", union_size, "[B, Hkv]", {requests, heads});
    check_output("union_size", union_size, ScalarType::Int);
    check_shape(kOp, "coverage", coverage, "[B, Hkv]", {requests, heads});
    check_output("coverage", coverage, ScalarType::Float);
    check_workspace(kOp, workspace, row_mass, workspace_of(params));
    check_own_memory(kOp,
                     {{"votes", votes}, {"union_size", union_size}, {"coverage", coverage}, {"workspace", workspace}},
                     {{"row_mass", row_mass}, {"prefix_lens", prefix_lens}, {"row_mask", row_mask}});
    call(params, votes, union_size, coverage, workspace);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("row_votes", TORCH_BOX(&row_votes));
    m.impl("row_votes_out", TORCH_BOX(&row_votes_out));
}

MAGE_HOST_IMPL(m) { m.impl("row_votes_workspace", TORCH_BOX(&row_votes_workspace)); }

}  // namespace mage::binding
