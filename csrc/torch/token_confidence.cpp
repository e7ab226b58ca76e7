#include "mage/token_confidence.h"

#include <cmath>
#include <tuple>

#include "debug_checks.h"
#include "tensor_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "token_confidence";

// Checks the input and fills in everything but the outputs.
TokenConfidenceParams check_inputs(const Tensor& logits) {
    TokenConfidenceParams params;
    check_rank(kOp, "logits", logits, 2);
    params.dtype = check_float(kOp, "logits", logits);
    check_last_stride(kOp, "logits", logits);
    params.num_rows = logits.size(0);
    params.vocab_size = logits.size(1);
    params.logits = logits.const_data_ptr();
    params.stride_logits_row = used_stride(logits, 0);
    check_token_confidence(params);
    if (debug_enabled()) {
        const HostCopy values(torch::stable::to(logits, ScalarType::Float));
        core::check_shares(kOp, "logits", values.floats(), values.count(), -INFINITY);
    }
    return params;
}

void call(TokenConfidenceParams& params, const Tensor& token, const Tensor& prob, const Tensor& entropy) {
    params.token = static_cast<int64_t*>(token.mutable_data_ptr());
    params.prob = static_cast<float*>(prob.mutable_data_ptr());
    params.entropy = static_cast<float*>(entropy.mutable_data_ptr());
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(token.get_device_index());
    cuda::token_confidence(params, current_stream(token));
#else
    cpu::token_confidence(params);
#endif
}

std::tuple<Tensor, Tensor, Tensor> token_confidence(const Tensor& logits) {
    TokenConfidenceParams params = check_inputs(logits);
    Tensor token = torch::stable::new_empty(logits, {params.num_rows}, ScalarType::Long);
    Tensor prob = torch::stable::new_empty(logits, {params.num_rows}, ScalarType::Float);
    Tensor entropy = torch::stable::new_empty(logits, {params.num_rows}, ScalarType::Float);
    call(params, token, prob, entropy);
    return {token, prob, entropy};
}

void token_confidence_out(const Tensor& logits, const Tensor& token, const Tensor& prob, const Tensor& entropy,
                          const Tensor& workspace) {
    TokenConfidenceParams params = check_inputs(logits);
    const auto check_output = [&](const char* name, const Tensor& t, ScalarType dtype) {
        check_device(kOp, name, t, logits);
        check_dtype(kOp, name, t, dtype);
        check_shape(kOp, name, t, "[N]", {params.num_rows});
        check_contiguous(kOp, name, t);
    };
    check_output("token", token, ScalarType::Long);
    check_output("prob", prob, ScalarType::Float);
    check_output("entropy", entropy, ScalarType::Float);
    check_workspace(kOp, workspace, logits, mage::token_confidence_workspace(params.num_rows, params.vocab_size));
    check_own_memory(kOp, {{"token", token}, {"prob", prob}, {"entropy", entropy}, {"workspace", workspace}},
                     {{"logits", logits}});
    call(params, token, prob, entropy);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("token_confidence", TORCH_BOX(&token_confidence));
    m.impl("token_confidence_out", TORCH_BOX(&token_confidence_out));
}

MAGE_HOST_IMPL(m) { m.impl("token_confidence_workspace", TORCH_BOX(&token_confidence_workspace)); }

}  // namespace mage::binding
