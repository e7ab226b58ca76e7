#include "mage/select_kv.h"

#include <optional>
#include <tuple>

#include "debug_checks.h"
#include "tensor_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "select_kv";

SelectRule rule_of(const std::string& rule) {
    if (rule == "fixed") return SelectRule::kFixed;
    if (rule == "layer") return SelectRule::kLayer;
    if (rule == "mass") return SelectRule::kMass;
    if (rule == "joint") return SelectRule::kJoint;
    core::throw_error(kOp, ": rule must be fixed, layer, mass or joint, got ", rule);
}

// A per-head statistic of rule "layer": [L, B, Hkv], or [L, B, Hkv, n] with `per_unit`.
const void* check_statistic(const char* name, const std::optional<Tensor>& t, const Tensor& mass, ScalarType dtype,
                            bool per_unit) {
    MAGE_CHECK(t.has_value(), kOp, ": ", name, " must be given with rule \"layer\", got None");
    check_device(kOp, name, *t, mass);
    check_dtype(kOp, name, *t, dtype);
    if (per_unit) {
        check_shape(kOp, name, *t, "[L, B, Hkv, n]", {mass.size(0), mass.size(1), mass.size(2), mass.size(3)});
    } else {
        check_shape(kOp, name, *t, "[L, B, Hkv]", {mass.size(0), mass.size(1), mass.size(2)});
    }
    check_contiguous(kOp, name, *t);
    return t->const_data_ptr();
}

void check_output(const char* name, const Tensor& t, const Tensor& mass, ScalarType dtype) {
    check_device(kOp, name, t, mass);
    check_dtype(kOp, name, t, dtype);
    check_contiguous(kOp, name, t);
}

// Checks the inputs and fills in everything but the outputs.
SelectKvParams check_inputs(const Tensor& mass, const Tensor& prefix_lens, int64_t g, int64_t capacity,
                            const std::string& rule, int64_t k, int64_t k_min, double p, int64_t sinks, int64_t recents,
                            const std::optional<Tensor>& votes, const std::optional<Tensor>& union_size,
                            const std::optional<Tensor>& coverage) {
    SelectKvParams params;
    check_rank(kOp, "mass", mass, 4);
    check_dtype(kOp, "mass", mass, ScalarType::Float);
    check_last_stride(kOp, "mass", mass);
    params.num_layers = mass.size(0);
    params.num_requests = mass.size(1);
    params.num_kv_heads = mass.size(2);
    params.num_units = mass.size(3);
    params.mass = static_cast<const float*>(mass.const_data_ptr());
    params.stride_mass_layer = used_stride(mass, 0);
    params.stride_mass_request = used_stride(mass, 1);
    params.stride_mass_head = used_stride(mass, 2);
    params.prefix_lens = check_int32_vector(kOp, "prefix_lens", prefix_lens, mass, params.num_requests);
    params.granularity = g;
    params.capacity = capacity;
    params.rule = rule_of(rule);
    params.k = k;
    params.k_min = k_min;
    params.p = p;
    params.sinks = sinks;
    params.recents = recents;
    if (params.rule == SelectRule::kLayer) {
        params.votes = static_cast<const int32_t*>(check_statistic("votes", votes, mass, ScalarType::Int, true));
        params.union_size =
            static_cast<const int32_t*>(check_statistic("union_size", union_size, mass, ScalarType::Int, false));
        params.coverage =
            static_cast<const float*>(check_statistic("coverage", coverage, mass, ScalarType::Float, false));
    }
    check_select_kv(params);
    if (debug_enabled()) {
        debug_check_lengths(kOp, "prefix_lens", prefix_lens, params.num_units * g);
        const HostCopy shares(mass);
        core::check_shares(kOp, "mass", shares.floats(), shares.count(), 0.0f);
        if (params.rule == SelectRule::kLayer) {
            debug_check_lengths(kOp, "votes", *votes, INT32_MAX);
            debug_check_lengths(kOp, "union_size", *union_size, params.num_units);
            const HostCopy covered(*coverage);
            core::check_shares(kOp, "coverage", covered.floats(), covered.count(), 0.0f);
        }
    }
    return params;
}

void call(SelectKvParams& params, const Tensor& indices, const Tensor& counts, const Tensor& kept_mass,
          const Tensor& tail_start, const Tensor& overflow) {
    params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    params.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
    params.kept_mass = static_cast<float*>(kept_mass.mutable_data_ptr());
    params.tail_start = static_cast<int32_t*>(tail_start.mutable_data_ptr());
    params.overflow = static_cast<bool*>(overflow.mutable_data_ptr());
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
    cuda::select_kv(params, current_stream(indices));
#else
    cpu::select_kv(params);
#endif
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_kv(const Tensor& mass, const Tensor& prefix_lens, int64_t g,
                                                             int64_t capacity, const std::string& rule, int64_t k,
                                                             int64_t k_min, double p, int64_t sinks, int64_t recents,
                                                             const std::optional<Tensor>& votes,
                                                             const std::optional<Tensor>& union_size,
                                                             const std::optional<Tensor>& coverage) {
    SelectKvParams params =
        check_inputs(mass, prefix_lens, g, capacity, rule, k, k_min, p, sinks, recents, votes, union_size, coverage);
    const int64_t layers = params.num_layers, requests = params.num_requests, heads = params.num_kv_heads;
    Tensor indices = torch::stable::new_empty(mass, {layers, requests, heads, capacity}, ScalarType::Int);
    Tensor counts = torch::stable::new_empty(mass, {layers, requests, heads}, ScalarType::Int);
    Tensor kept_mass = torch::stable::new_empty(mass, {layers, requests, heads}, ScalarType::Float);
    Tensor tail_start = torch::stable::new_empty(mass, {requests}, ScalarType::Int);
    Tensor overflow = torch::stable::new_empty(mass, {layers, requests, heads}, ScalarType::Bool);
    call(params, indices, counts, kept_mass, tail_start, overflow);
    return {indices, counts, kept_mass, tail_start, overflow};
}

void select_kv_out(const Tensor& mass, const Tensor& prefix_lens, const Tensor& indices, const Tensor& counts,
                   const Tensor& kept_mass, const Tensor& tail_start, const Tensor& overflow, const Tensor& workspace,
                   int64_t g, int64_t capacity, const std::string& rule, int64_t k, int64_t k_min, double p,
                   int64_t sinks, int64_t recents, const std::optional<Tensor>& votes,
                   const std::optional<Tensor>& union_size, const std::optional<Tensor>& coverage) {
    SelectKvParams params =
        check_inputs(mass, prefix_lens, g, capacity, rule, k, k_min, p, sinks, recents, votes, union_size, coverage);
    const int64_t layers = params.num_layers, requests = params.num_requests, heads = params.num_kv_heads;
    check_shape(kOp, "indices", indices, "[L, B, Hkv, capacity]", {layers, requests, heads, capacity});
    check_output("indices", indices, mass, ScalarType::Int);
    check_shape(kOp, "counts", counts, "[L, B, Hkv]", {layers, requests, heads});
    check_output("counts", counts, mass, ScalarType::Int);
    check_shape(kOp, "kept_mass", kept_mass, "[L, B, Hkv]", {layers, requests, heads});
    check_output("kept_mass", kept_mass, mass, ScalarType::Float);
    check_shape(kOp, "tail_start", tail_start, "[B]", {requests});
    check_output("tail_start", tail_start, mass, ScalarType::Int);
    check_shape(kOp, "overflow", overflow, "[L, B, Hkv]", {layers, requests, heads});
    check_output("overflow", overflow, mass, ScalarType::Bool);
    check_workspace(kOp, workspace, mass,
                    mage::select_kv_workspace(layers, requests, heads, params.num_units, capacity));
    check_own_memory(kOp,
                     {{"indices", indices},
                      {"counts", counts},
                      {"kept_mass", kept_mass},
                      {"tail_start", tail_start},
                      {"overflow", overflow},
                      {"workspace", workspace}},
                     {{"mass", mass},
                      {"prefix_lens", prefix_lens},
                      {"votes", votes},
                      {"union_size", union_size},
                      {"coverage", coverage}});
    call(params, indices, counts, kept_mass, tail_start, overflow);
}

}  // namespace

MAGE_BACKEND_IMPL(m) {
    m.impl("select_kv", TORCH_BOX(&select_kv));
    m.impl("select_kv_out", TORCH_BOX(&select_kv_out));
}

MAGE_HOST_IMPL(m) { m.impl("select_kv_workspace", TORCH_BOX(&select_kv_workspace)); }

}  // namespace mage::binding
