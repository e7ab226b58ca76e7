#pragma once

#include "mage/stream.h"
#include "mage/types.h"

// block_attention: exact attention of each request's query rows over its cached tokens.
//
//   s[r, t] = softmax_scale * q[r] . k[t]          for t in [0, L_r),  L_r = S, or min(S, kv_lens[b, q])
//   out[r]  = sum_t exp(s[r, t] - lse[r]) v[t]     lse[r] = ln sum_t exp(s[r, t])
//
//   q               [B, Q, H, D]            in    last stride 1; H % Hkv == 0; head h reads KV head h / G
//   k_cache, v_cache[pages, page, Hkv, D]   in    strided pools (see PagedPool); the block's K/V are already there
//   block_table     [B, max_pages] int32    in
//   seq_lens        [B] int32               in    S, clamped to [0, min(max_seq_len, max_pages * page)]
//   kv_lens         [B, Q] int32, optional  in    nondecreasing along Q; clamped to [0, S]
//   out             [B, Q, H, D]            out   contiguous, q's dtype
//   lse             [B, H, Q] float32       out   contiguous, natural log
//
// A token whose page is outside [0, num_pages) weighs 0 and is never read; nothing is read at or past S. A row without
// any token (an empty slot, say) gets out 0 and lse -inf. Q may exceed S. All of [0, S) must hold finite K and V: a row
// weighs the tokens past its own L_r with 0, and 0 times NaN is NaN.
//
// The KV stream may be cut into splits whose partial results are merged. split_tokens > 0 (a multiple of 64) puts the
// cuts at its multiples: a request's results then don't depend on its batch. 0 lets the backend choose: the CPU from
// the shapes alone, CUDA from the lengths on the device too, so that all multiprocessors have the same work. Results
// are bitwise equal from run to run and for any number of threads. float32 arithmetic whatever the dtype, exponent and
// sums included: weights are right to a factor of 2^u, u half a unit in the last place of score * log2(e), which is
// 2^-14 for scores around 1000.
//
// Limits: D a multiple of 8, at most 512 (64 and 128 are fast); page 1, 16, 32, 64, 128 or 256.
// Cost: 4 * B * H * Q * S * D flops; reads 2 * B * Hkv * S * D * dtype_bytes bytes per 240 rows of G * Q.
namespace mage {

struct BlockAttentionParams {
    int64_t num_requests = 0;  // B
    int64_t num_queries = 0;   // Q
    int64_t num_heads = 0;     // H
    int64_t num_kv_heads = 0;  // Hkv
    int64_t head_dim = 0;      // D
    int64_t max_seq_len = 0;   // no request is longer; every shape follows from it
    DType dtype = DType::kBFloat16;

    const void* q = nullptr;                                              // [B, Q, H, D]
    int64_t stride_q_request = 0, stride_q_query = 0, stride_q_head = 0;  // elements
    PagedPool k_cache, v_cache;
    PageTable pages;
    const int32_t* seq_lens = nullptr;  // [B]
    const int32_t* kv_lens = nullptr;   // [B, Q], contiguous, or null

    double softmax_scale = 1.0;
    int64_t split_tokens = 0;

    void* out = nullptr;   // [B, Q, H, D], on CUDA aligned to 16 bytes
    float* lse = nullptr;  // [B, H, Q]

    void* workspace = nullptr;  // workspace_bytes, aligned to 16 bytes; contents neither read before written nor kept
    int64_t workspace_bytes = 0;
};

// Bytes of workspace, enough for every backend: the larger of
//   CPU   B * Hkv * tiles * splits * tile rows * (D + 2) * 4, the R = G * Q rows in tiles of at most 240
//   CUDA  slots * tile rows * (3 * D + 12) + 8 * B * Hkv * tiles up to a multiple of 16, the rows in tiles of 64, 128,
//         192 or 256; fixed splits have B * Hkv * tiles * splits slots, others at most 264 (132 for tiles of 256)
// A backend itself asks for no more than its own.
int64_t block_attention_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads,
                                  int64_t head_dim, int64_t max_seq_len, int64_t split_tokens);

// Throws mage::Error if a dimension or a scalar does not hold; pointers and the workspace are not looked at. `op` names
// the caller. Backends call it; a binding calls it before it allocates.
void check_block_attention(const BlockAttentionParams& params, const char* op = "block_attention");

namespace cpu {

// Returns when the outputs are written. Throws as check_block_attention does, and if the workspace is too small.
void block_attention(const BlockAttentionParams& params);

// What this backend needs of workspace.
int64_t block_attention_workspace(const BlockAttentionParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`; allocates nothing; can be captured in a graph, which then follows new lengths and tables.
// Throws for what the kernels do not serve: dtypes other than bf16 and fp16, head dims other than 64 and 128.
void block_attention(const BlockAttentionParams& params, CudaStream stream);

int64_t block_attention_workspace(const BlockAttentionParams& params);

}  // namespace cuda
}  // namespace mage
