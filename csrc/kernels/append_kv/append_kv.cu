// Purpose   k_cache[page, slot] = k[b, i], v_cache likewise; see mage/append_kv.h. A copy of bytes, so one kernel for
// all
//           dtypes.
// Schedule  one thread per 16-byte vector of a row, K and V both; consecutive threads take consecutive vectors, then
//           heads, then rows, so that a warp reads and writes whole 128-byte lines. blockIdx.x counts requests x blocks
//           of a request; no thread looks at another.
// Memory    registers only. The page lookup is one 4-byte read per thread, the same address within a row.
// Sync      none.
// Ceiling   4 * B * Q * Hkv * D * bytes moved; at B = 1, Q = 32, Hkv = 4, D = 128 that is 128 KB: launch bound.
#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "kernels/kernel_list.h"
#include "mage/append_kv.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "append_kv";
constexpr uint32_t kThreads = 256;
constexpr int64_t kVectorBytes = 16;

// Strides in vectors of 16 bytes, which the contract makes whole.
struct AppendKvArgs {
    const uint4* k;
    const uint4* v;
    uint4* k_cache;
    uint4* v_cache;
    const int32_t* block_table;
    const int32_t* start;
    int64_t k_request, k_row, k_head;
    int64_t v_request, v_row, v_head;
    int64_t k_cache_page, k_cache_token, k_cache_head;
    int64_t v_cache_page, v_cache_token, v_cache_head;
    int64_t table_request;
    int64_t num_pages;
    int64_t capacity;  // tokens that a row of the table spans
    uint32_t page_size;
    uint32_t num_kv_heads;
    uint32_t row_vectors;
    uint32_t request_vectors;  // Q * Hkv * row_vectors
    uint32_t request_blocks;
};

__global__ void __launch_bounds__(kThreads) mage_append_kv_kernel(const __grid_constant__ AppendKvArgs args) {
    const uint32_t b = blockIdx.x / args.request_blocks;
    const uint32_t item = (blockIdx.x % args.request_blocks) * kThreads + threadIdx.x;
    if (item >= args.request_vectors) return;
    const uint32_t vector = item % args.row_vectors;
    const uint32_t row_head = item / args.row_vectors;
    const uint32_t head = row_head % args.num_kv_heads;
    const uint32_t row = row_head / args.num_kv_heads;

    const int64_t position = int64_t{args.start[b]} + row;
    if (position < 0 || position >= args.capacity) return;
    const uint32_t page_idx = static_cast<uint32_t>(position) / args.page_size;  // position < capacity <= 2^30
    const uint32_t slot = static_cast<uint32_t>(position) % args.page_size;
    const int64_t page = args.block_table[b * args.table_request + page_idx];
    if (page < 0 || page >= args.num_pages) return;

    const uint4 k = args.k[b * args.k_request + row * args.k_row + head * args.k_head + vector];
    const uint4 v = args.v[b * args.v_request + row * args.v_row + head * args.v_head + vector];
    args.k_cache[page * args.k_cache_page + slot * args.k_cache_token + head * args.k_cache_head + vector] = k;
    args.v_cache[page * args.v_cache_page + slot * args.v_cache_token + head * args.v_cache_head + vector] = v;
}

}  // namespace

KernelEntry append_kv_kernel() {
    return {"mage_append_kv_kernel", reinterpret_cast<const void*>(&mage_append_kv_kernel), kThreads, 0};
}

LaunchPlan append_kv_plan(const AppendKvParams& params) {
    const int64_t row_bytes = params.head_dim * dtype_bytes(params.dtype);
    const int64_t request_vectors = params.num_rows * params.num_kv_heads * (row_bytes / kVectorBytes);
    MAGE_CHECK(request_vectors < (int64_t{1} << 31), kOp, ": k must have fewer than 2^35 bytes per request, got ",
               request_vectors * kVectorBytes);
    const int64_t blocks = params.num_requests * ((request_vectors + kThreads - 1) / kThreads);
    MAGE_CHECK(blocks < (int64_t{1} << 31), kOp, ": k must need fewer than 2^31 blocks of ", kThreads, " vectors, got ",
               blocks);
    LaunchPlan plan;
    plan.grid[0] = static_cast<uint32_t>(blocks);
    plan.block[0] = kThreads;
    return plan;
}

void append_kv(const AppendKvParams& params, CudaStream stream) {
    core::require_hopper(kOp);
    const LaunchPlan plan = append_kv_plan(params);
    if (plan.grid[0] == 0) return;

    const int64_t vector_elems = kVectorBytes / dtype_bytes(params.dtype);
    AppendKvArgs args;
    args.k = static_cast<const uint4*>(params.k);
    args.v = static_cast<const uint4*>(params.v);
    args.k_cache = static_cast<uint4*>(params.k_cache);
    args.v_cache = static_cast<uint4*>(params.v_cache);
    args.block_table = params.pages.block_table;
    args.start = params.start;
    args.k_request = params.stride_k_request / vector_elems;
    args.k_row = params.stride_k_row / vector_elems;
    args.k_head = params.stride_k_head / vector_elems;
    args.v_request = params.stride_v_request / vector_elems;
    args.v_row = params.stride_v_row / vector_elems;
    args.v_head = params.stride_v_head / vector_elems;
    args.k_cache_page = params.stride_k_cache_page / vector_elems;
    args.k_cache_token = params.stride_k_cache_token / vector_elems;
    args.k_cache_head = params.stride_k_cache_head / vector_elems;
    args.v_cache_page = params.stride_v_cache_page / vector_elems;
    args.v_cache_token = params.stride_v_cache_token / vector_elems;
    args.v_cache_head = params.stride_v_cache_head / vector_elems;
    args.table_request = params.pages.stride_request;
    args.num_pages = params.pages.num_pages;
    args.capacity = int64_t{params.pages.max_pages} * params.pages.page_size;
    args.page_size = static_cast<uint32_t>(params.pages.page_size);
    args.num_kv_heads = static_cast<uint32_t>(params.num_kv_heads);
    args.row_vectors = static_cast<uint32_t>(params.head_dim / vector_elems);
    args.request_vectors = static_cast<uint32_t>(params.num_rows * params.num_kv_heads * args.row_vectors);
    args.request_blocks = plan.grid[0] / static_cast<uint32_t>(params.num_requests);
    core::launch(kOp, mage_append_kv_kernel, plan, stream, args);
}

}  // namespace mage::cuda
