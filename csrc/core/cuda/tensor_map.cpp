#include "core/cuda/tensor_map.h"

#include <algorithm>

#include "core/cuda/cuda_check.h"

namespace mage::core {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: libcuda is never linked.
Encode encode_function(const char* op) {
    static const Encode encode = [op] {
        void* address = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        MAGE_CUDA_CHECK(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                             cudaEnableDefault, &result));
        MAGE_CHECK(result == cudaDriverEntryPointSuccess && address != nullptr, op,
                   ": the driver must offer cuTensorMapEncodeTiled (CUDA 12), got none");
        return reinterpret_cast<Encode>(address);
    }();
    return encode;
}

}  // namespace

CUtensorMap paged_pool_map(const char* op, const char* name, const PagedPool& pool, const PageTable& pages,
                           int64_t num_kv_heads, int64_t head_dim, DType dtype, int32_t box_tokens) {
    // A dimension of one element may come with any stride; the copy engine wants a multiple of 16 bytes above 0.
    const auto stride_bytes = [&](int64_t size, int64_t stride) {
        return static_cast<cuuint64_t>((size > 1 ? stride : head_dim) * dtype_bytes(dtype));
    };
    const int64_t page_count = std::max<int64_t>(pages.num_pages, 1);
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(pages.page_size),
                                 static_cast<cuuint64_t>(num_kv_heads), static_cast<cuuint64_t>(page_count)};
    const cuuint64_t strides[3] = {stride_bytes(pages.page_size, pool.stride_token),
                                   stride_bytes(num_kv_heads, pool.stride_head),
                                   stride_bytes(page_count, pool.stride_page)};
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode_function(op)(
        &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
        const_cast<void*>(pool.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    MAGE_CHECK(result == CUDA_SUCCESS, op, ": ", name, " must be a pool that the copy engine can read, got ",
               page_count, " pages with strides of ", strides[0], ", ", strides[1], " and ", strides[2],
               " bytes (driver error ", static_cast<int>(result), ")");
    return map;
}

CUtensorMap row_mass_map(const char* op, const char* name, const float* data, const int64_t (&sizes)[4],
                         int32_t box_rows, int32_t box_units) {
    const cuuint64_t dimensions[4] = {static_cast<cuuint64_t>(sizes[3]), static_cast<cuuint64_t>(sizes[2]),
                                      static_cast<cuuint64_t>(sizes[1]), static_cast<cuuint64_t>(sizes[0])};
    cuuint64_t strides[3];
    cuuint64_t bytes = sizeof(float);
    for (int i = 0; i < 3; ++i) strides[i] = bytes *= dimensions[i];
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_units), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result =
        encode_function(op)(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, const_cast<float*>(data), dimensions, strides,
                            box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    MAGE_CHECK(result == CUDA_SUCCESS, op, ": ", name, " must be a tensor that the copy engine can read, got [",
               sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "] (driver error ", static_cast<int>(result),
               ")");
    return map;
}

}  // namespace mage::core
