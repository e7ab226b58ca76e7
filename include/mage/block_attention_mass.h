#pragma once

#include "mage/block_attention.h"

// block_attention_mass: block_attention, and how much attention each unit of g tokens received.
//
//   share[r, j] = sum over tokens t of unit j of exp(s[r, t] - lse[r]);  unit j holds tokens [j * g, (j + 1) * g)
//   score mean:  mass[j] = sum over kept rows of share[r, j] / number of kept rows
//   score max:   mass[j] = max over kept rows of share[r, j]
//   norm prefix: shares count tokens below P only and are divided by the row's own total below P
//
//   row_mask     [B, Q] bool, optional   in    rows that count for mass; without it all do
//   prefix_lens  [B] int32               in    P, clamped to [0, S]; norm prefix only
//   mass         [B, Hkv, n] float32     out   contiguous, n = ceil(max_seq_len / g); 0 past the last token
//
// The rows are the R = G * Q rows of a KV head. Exact for any number of splits: unit sums are kept per row and finished
// with the final lse. They are kept in float32, but on CUDA, where they would take 12 MB and more, R <= 192 and
// split_tokens 0, in 16 bits, with an error of up to 2^-10 of each, and then shares below 2^-33 may count as 0. A
// request whose rows are all masked, or that is empty, has mass 0. A kept row that sees no token (kv_lens 0), or, under
// norm prefix, whose total below P is smaller than 2^-126 of its whole, adds nothing but is counted in the mean. Masses
// of score mean sum to 1 over [0, S), or over [0, P). A masked row may hold anything, NaN included.
//
// g is 16, 32 or 64, and on the CPU also 1, which costs a second pass over K (token_mass).
namespace mage {

enum class MassScore : int32_t { kMean = 0, kMax = 1, kRows = 2 };  // kRows: token_mass only
enum class MassNorm : int32_t { kContext = 0, kPrefix = 1 };

struct BlockAttentionMassParams {
    BlockAttentionParams attention;  // its workspace is the op's whole workspace
    int64_t granularity = 64;        // g
    MassScore score = MassScore::kMean;
    MassNorm norm = MassNorm::kContext;
    const bool* row_mask = nullptr;        // [B, Q], contiguous, or null
    const int32_t* prefix_lens = nullptr;  // [B]; kPrefix only
    float* mass = nullptr;                 // [B, Hkv, n]
};

// Bytes of workspace, enough for every backend: the larger of what each needs for block_attention and for this,
//   CPU   4 * B * Hkv * Rp * (n + ceil(max_seq_len / 64) + 2), Rp = R up to a multiple of 16
//   CUDA  8 * B * Hkv * R up to a multiple of 16, and 4 * B * Hkv * R * n or, where sums are kept in 16 bits,
//         2 * B * Hkv * n * (R up to a multiple of 8) + 16 * T * (264 + B * Hkv), T = R up to 64, 128 or 192
// For g = 1 the CPU needs the larger one of block_attention's and token_mass's.
int64_t block_attention_mass_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                       int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t granularity,
                                       int64_t split_tokens);

// As check_block_attention.
void check_block_attention_mass(const BlockAttentionMassParams& params);

namespace cpu {

// Returns when the outputs are written. Throws as check_block_attention_mass does, and if the workspace is too small.
void block_attention_mass(const BlockAttentionMassParams& params);

int64_t block_attention_mass_workspace(const BlockAttentionMassParams& params);

}  // namespace cpu

namespace cuda {

// As block_attention; at most 1024 rows, g of 16, 32 or 64.
void block_attention_mass(const BlockAttentionMassParams& params, CudaStream stream);

int64_t block_attention_mass_workspace(const BlockAttentionMassParams& params);

}  // namespace cuda
}  // namespace mage
