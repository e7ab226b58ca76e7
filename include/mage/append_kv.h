#pragma once

#include "mage/kernel_info.h"
#include "mage/stream.h"
#include "mage/types.h"

// append_kv: writes the K and V of a block of tokens into a paged pool.
//
//   for b < B, i < Q:  position = start[b] + i
//                      page = block_table[b, position / page_size],  slot = position % page_size
//                      k_cache[page, slot] = k[b, i],  v_cache[page, slot] = v[b, i]
//
//   k, v         [B, Q, Hkv, D]             in       last stride 1
//   k_cache      [pages, page, Hkv, D]      out      strided pool, see PagedPool
//   v_cache      as k_cache, may be the other half of an interleaved pool
//   block_table  [B, max_pages] int32       in
//   start        [B] int32                  in
//
// A token whose position is < 0 or >= max_pages * page_size, or whose page is outside [0, num_pages), is dropped:
// nothing outside a request's own pages is written. Two tokens that name the same slot are a caller's error (one of
// them wins). Bases and strides are multiples of 16 bytes and so is D; Q * Hkv * D * dtype_bytes < 2^35.
// Bit-exact copy of any dtype, deterministic, no workspace. Traffic: 4 * B * Q * Hkv * D * dtype_bytes bytes.
namespace mage {

struct AppendKvParams {
    int64_t num_requests = 0;  // B
    int64_t num_rows = 0;      // Q
    int64_t num_kv_heads = 0;  // Hkv
    int64_t head_dim = 0;      // D
    DType dtype = DType::kBFloat16;

    const void* k = nullptr;                                            // [B, Q, Hkv, D]
    const void* v = nullptr;                                            // [B, Q, Hkv, D]
    int64_t stride_k_request = 0, stride_k_row = 0, stride_k_head = 0;  // elements
    int64_t stride_v_request = 0, stride_v_row = 0, stride_v_head = 0;  // elements

    void* k_cache = nullptr;                                                             // [pages, page, Hkv, D]
    void* v_cache = nullptr;                                                             // [pages, page, Hkv, D]
    int64_t stride_k_cache_page = 0, stride_k_cache_token = 0, stride_k_cache_head = 0;  // elements
    int64_t stride_v_cache_page = 0, stride_v_cache_token = 0, stride_v_cache_head = 0;  // elements

    PageTable pages;
    const int32_t* start = nullptr;  // [B]
};

namespace cpu {

// Returns when the copy is done.
void append_kv(const AppendKvParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`; allocates nothing; can be captured in a graph, which then follows new tables and starts.
void append_kv(const AppendKvParams& params, CudaStream stream);

// How it is launched: looks at the dims and the dtype only.
LaunchPlan append_kv_plan(const AppendKvParams& params);

}  // namespace cuda

}  // namespace mage
