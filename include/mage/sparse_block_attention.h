#pragma once

#include "mage/block_attention.h"

// sparse_block_attention: block_attention over a list of units per KV head, and over everything from tail_start on.
//
//   tokens of (b, hkv) = [u * g, min((u + 1) * g, tail_start, S)) for each listed u, then [tail_start, S)
//
//   indices     [B, Hkv, Kmax] int32   in   contiguous; unit numbers, ascending
//   counts      [B, Hkv] int32         in   contiguous; clamped to [0, Kmax]; entries past it are not looked at
//   tail_start  [B] int32              in   logical position, as select_kv gives it; clamped to [0, S]
//
// An entry is skipped if it is negative, not larger than its predecessor in the list (which may itself be skipped), or
// if its unit starts at or past tail_start or S. So in an ascending list, repeats or not, no token counts twice, and
// one that holds every unit gives what block_attention gives. A list that falls is the caller's error, which the debug
// switch reports: a unit that comes again after a smaller one counts again. kv_lens limits rows as in block_attention.
// split_tokens > 0 cuts the list-then-tail stream at its multiples. g is 1, 16, 32 or 64. Everything else as
// block_attention; S is replaced by counts * g + tail in the cost. On CUDA the work is planned for full lists and short
// tails: in a large batch one stream with a tail far longer than its list may take as long as all others.
namespace mage {

struct SparseBlockAttentionParams {
    BlockAttentionParams attention;
    const int32_t* indices = nullptr;     // [B, Hkv, Kmax]
    const int32_t* counts = nullptr;      // [B, Hkv]
    const int32_t* tail_start = nullptr;  // [B]
    int64_t capacity = 0;                 // Kmax, units
    int64_t granularity = 64;             // g
};

// Bytes of workspace, enough for every backend: as block_attention_workspace says, with the splits of this op. On CUDA
// a stream may have capacity * g + max_seq_len + 64 tokens and is a request of its own, and tiles have at least 128
// rows.
int64_t sparse_block_attention_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                         int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len,
                                         int64_t granularity, int64_t capacity, int64_t split_tokens);

// As check_block_attention.
void check_sparse_block_attention(const SparseBlockAttentionParams& params);

namespace cpu {

// Returns when the outputs are written. Throws as check_sparse_block_attention does, and if the workspace is too small.
void sparse_block_attention(const SparseBlockAttentionParams& params);

}  // namespace cpu

namespace cuda {

// Bytes of workspace that the call asks for; pointers are not looked at.
int64_t sparse_block_attention_workspace(const SparseBlockAttentionParams& params);

// Asynchronous on `stream`, one launch where clusters merge the pieces of their segment, else two; allocates nothing;
// can be captured in a graph, which then follows new lists, counts, tails, lengths and tables. Throws as
// check_sparse_block_attention does, if the workspace is too small, and for what the kernels do not serve: dtypes other
// than bf16 and fp16, head dims other than 64 and 128.
void sparse_block_attention(const SparseBlockAttentionParams& params, CudaStream stream);

}  // namespace cuda
}  // namespace mage
