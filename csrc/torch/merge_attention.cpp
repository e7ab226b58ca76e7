#include "mage/merge_attention.h"

#include <tuple>
#include <vector>

#include "attention_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "merge_attention";

MergeAttentionParams check_inputs(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, bool log2_in,
                                  bool log2_out) {
    MAGE_CHECK(!outs.empty(), kOp, ": outs must hold at least one tensor, got none");
    MAGE_CHECK(outs.size() == lses.size(), kOp, ": lses must hold one tensor per tensor of outs (", outs.size(),
               "), got ", lses.size());
    const Tensor& first = outs[0];
    check_rank(kOp, "outs[0]", first, 4);
    MergeAttentionParams params;
    params.dtype = check_float(kOp, "outs[0]", first);
    params.num_requests = first.size(0);
    params.num_queries = first.size(1);
    params.num_heads = first.size(2);
    params.head_dim = first.size(3);
    params.log2_in = log2_in;
    params.log2_out = log2_out;
    for (size_t i = 0; i < outs.size(); ++i) {
        const std::string index = "[" + std::to_string(i) + "]";
        const std::string out_name = "outs" + index, lse_name = "lses" + index;
        check_device(kOp, out_name.c_str(), outs[i], first);
        check_dtype(kOp, out_name.c_str(), outs[i], first.scalar_type());
        check_shape(kOp, out_name.c_str(), outs[i], "[B, Q, H, D]",
                    {first.size(0), first.size(1), first.size(2), first.size(3)});
        check_last_stride(kOp, out_name.c_str(), outs[i]);
        check_output(kOp, lse_name.c_str(), lses[i], first, ScalarType::Float, "[B, H, Q]",
                     {first.size(0), first.size(2), first.size(1)});
        params.parts.push_back({outs[i].const_data_ptr(), used_stride(outs[i], 0), used_stride(outs[i], 1),
                                used_stride(outs[i], 2), static_cast<const float*>(lses[i].const_data_ptr())});
    }
    check_merge_attention(params);
    return params;
}

int64_t workspace_of(const MergeAttentionParams& p) {
    return merge_attention_workspace(static_cast<int64_t>(p.parts.size()), p.num_requests, p.num_queries, p.num_heads,
                                     p.head_dim);
}

void call(MergeAttentionParams& params, const Tensor& out, const Tensor& lse) {
    params.out = out.mutable_data_ptr();
    params.lse = static_cast<float*>(lse.mutable_data_ptr());
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    cuda::merge_attention(params, current_stream(out));
#else
    cpu::merge_attention(params);
#endif
}

std::tuple<Tensor, Tensor> merge_attention(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                                           bool log2_in, bool log2_out) {
    MergeAttentionParams params = check_inputs(outs, lses, log2_in, log2_out);
    Tensor out = new_out(outs[0]);
    Tensor lse = new_lse(outs[0]);
    call(params, out, lse);
    return {out, lse};
}

void merge_attention_out(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, const Tensor& out,
                         const Tensor& lse, const Tensor& workspace, bool log2_in, bool log2_out) {
    MergeAttentionParams params = check_inputs(outs, lses, log2_in, log2_out);
    check_out_and_lse(kOp, out, lse, outs[0]);
    check_workspace(kOp, workspace, outs[0], workspace_of(params));
    for (size_t i = 0; i < outs.size(); ++i) {
        const std::string out_name = "outs[" + std::to_string(i) + "]", lse_name = "lses[" + std::to_string(i) + "]";
        check_own_memory(kOp, {{"out", out}, {"lse", lse}, {"workspace", workspace}},
                         {{out_name.c_str(), outs[i]}, {lse_name.c_str(), lses[i]}});
    }
    call(params, out, lse);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("merge_attention", TORCH_BOX(&merge_attention));
    m.impl("merge_attention_out", TORCH_BOX(&merge_attention_out));
}

MAGE_HOST_IMPL(m) { m.impl("merge_attention_workspace", TORCH_BOX(&mage::merge_attention_workspace)); }

}  // namespace mage::binding
