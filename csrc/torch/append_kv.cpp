#include "mage/append_kv.h"

#include "debug_checks.h"
#include "tensor_checks.h"

namespace mage::binding {

namespace {

constexpr char kOp[] = "append_kv";

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& block_table, const Tensor& start) {
    // Check.
    check_rank(kOp, "k", k, 4);
    AppendKvParams params;
    params.dtype = check_float(kOp, "k", k);
    params.num_requests = k.size(0);
    params.num_rows = k.size(1);
    params.num_kv_heads = k.size(2);
    params.head_dim = k.size(3);
    check_vector_rows(kOp, "k", k);
    check_device(kOp, "v", v, k);
    check_dtype(kOp, "v", v, k.scalar_type());
    check_shape(kOp, "v", v, "[B, Q, Hkv, D]", {k.size(0), k.size(1), k.size(2), k.size(3)});
    check_vector_rows(kOp, "v", v);
    const PagedPool k_pool = check_mutable_pool(kOp, "k_cache", k_cache, k);
    const PagedPool v_pool = check_mutable_pool(kOp, "v_cache", v_cache, k);
    check_shape(kOp, "k_cache", k_cache, "[pages, page, Hkv, D]",
                {k_cache.size(0), k_cache.size(1), params.num_kv_heads, params.head_dim});
    check_shape(kOp, "v_cache", v_cache, "[pages, page, Hkv, D]",
                {k_cache.size(0), k_cache.size(1), params.num_kv_heads, params.head_dim});
    MAGE_CHECK(k_cache.numel() == 0 || k_cache.const_data_ptr() != v_cache.const_data_ptr(), kOp,
               ": v_cache must be another tensor than k_cache, got one that begins where k_cache does");
    params.pages = check_page_table(kOp, block_table, k_cache, params.num_requests);
    params.start = check_int32_vector(kOp, "start", start, k, params.num_requests);

    if (debug_enabled()) debug_check_written_pages(kOp, params.pages, block_table, start, params.num_rows);

    // Fill.
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    params.stride_k_request = used_stride(k, 0);
    params.stride_k_row = used_stride(k, 1);
    params.stride_k_head = used_stride(k, 2);
    params.stride_v_request = used_stride(v, 0);
    params.stride_v_row = used_stride(v, 1);
    params.stride_v_head = used_stride(v, 2);
    params.k_cache = k_cache.mutable_data_ptr();
    params.v_cache = v_cache.mutable_data_ptr();
    params.stride_k_cache_page = k_pool.stride_page;
    params.stride_k_cache_token = k_pool.stride_token;
    params.stride_k_cache_head = k_pool.stride_head;
    params.stride_v_cache_page = v_pool.stride_page;
    params.stride_v_cache_token = v_pool.stride_token;
    params.stride_v_cache_head = v_pool.stride_head;

    // Call.
#if defined(MAGE_BACKEND_CUDA)
    const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
    cuda::append_kv(params, current_stream(k));
#else
    cpu::append_kv(params);
#endif
}

}  // namespace

MAGE_BACKEND_IMPL(m) { m.impl("append_kv", TORCH_BOX(&append_kv)); }

}  // namespace mage::binding
