#pragma once

#include "mage/block_attention.h"

// block_attention_rows: block_attention, and every row's own share of every unit of g tokens.
//
//   row_mass[r, j] = ln sum over tokens t of unit j of exp(s[r, t] - lse[r]);  unit j holds tokens [j * g, (j + 1) * g)
//
//   row_mass   [B, Hkv, n, R] float32   out   contiguous; n = ceil(max_seq_len / g); row r = q * G + head in group
//
// -inf where a row gives a unit nothing: past its last token, and where its share is smaller than about 2^-126.
// exp(row_mass) sums to 1 over n in a row that sees a token.
//
// g is 16, 32 or 64, and on the CPU also 1, which costs a second pass over K (token_mass).
namespace mage {

struct BlockAttentionRowsParams {
    BlockAttentionParams attention;  // its workspace is the op's whole workspace
    int64_t granularity = 64;        // g
    float* row_mass = nullptr;       // [B, Hkv, n, R]
};

// Bytes of workspace, enough for every backend: the larger of what each needs for block_attention and for this,
//   CPU   4 * B * Hkv * Rp * (ceil(max_seq_len / 64) + 1), Rp = R up to a multiple of 16
//   CUDA  8 * B * Hkv * R up to a multiple of 16
// For g = 1 the CPU needs the larger one of block_attention's and token_mass's.
int64_t block_attention_rows_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                       int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t granularity,
                                       int64_t split_tokens);

// As check_block_attention.
void check_block_attention_rows(const BlockAttentionRowsParams& params);

namespace cpu {

// Returns when the outputs are written. Throws as check_block_attention_rows does, and if the workspace is too small.
void block_attention_rows(const BlockAttentionRowsParams& params);

int64_t block_attention_rows_workspace(const BlockAttentionRowsParams& params);

}  // namespace cpu

namespace cuda {

// As block_attention; at most 1024 rows, g of 16, 32 or 64.
void block_attention_rows(const BlockAttentionRowsParams& params, CudaStream stream);

int64_t block_attention_rows_workspace(const BlockAttentionRowsParams& params);

}  // namespace cuda
}  // namespace mage
