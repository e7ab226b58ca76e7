#pragma once

#include "mage/block_attention_mass.h"

// token_mass: how much attention each single token received, from q, K and the lse that block_attention gave.
//
//   share[r, t] = exp(s[r, t] - lse[r])
//   score mean:  mass[t] = sum over kept rows of share[r, t] / number of kept rows
//   score max:   mass[t] = max over kept rows of share[r, t]
//   score rows:  mass[t, r] = ln share[r, t], -inf for rows that are not kept
//   norm prefix: shares of tokens at or past P are 0, the others are divided by the row's own total below P
//
//   q, k_cache, block_table, seq_lens, kv_lens     as block_attention
//   lse          [B, H, Q] float32          in    contiguous, natural log; -inf: the row gives nothing
//   row_mask     [B, Q] bool, optional      in    rows that count
//   prefix_lens  [B] int32                  in    P, clamped to [0, S]; norm prefix only
//   units        [B, Hkv, C] int32, optional in   contiguous; candidate units of g tokens, -1 unused
//   mass         [B, Hkv, N] or [B, Hkv, N, R] float32   out   contiguous
//                N = max_seq_len, or C * g: token i of candidate c is at c * g + i
//
// Tokens at or past S, and those of unused candidates, get 0 (score rows: -inf). With units and norm prefix the rows'
// totals still run over the whole prefix, which costs a pass over all of K below P. Deterministic like block_attention.
// Cost: 2 * B * H * Q * N * D flops; reads K once, V never.
namespace mage {

struct TokenMassParams {
    int64_t num_requests = 0;  // B
    int64_t num_queries = 0;   // Q
    int64_t num_heads = 0;     // H
    int64_t num_kv_heads = 0;  // Hkv
    int64_t head_dim = 0;      // D
    int64_t max_seq_len = 0;
    DType dtype = DType::kBFloat16;

    const void* q = nullptr;                                              // [B, Q, H, D]
    int64_t stride_q_request = 0, stride_q_query = 0, stride_q_head = 0;  // elements
    PagedPool k_cache;
    PageTable pages;
    const int32_t* seq_lens = nullptr;  // [B]
    const int32_t* kv_lens = nullptr;   // [B, Q], contiguous, or null
    const float* lse = nullptr;         // [B, H, Q]

    MassScore score = MassScore::kMean;
    MassNorm norm = MassNorm::kContext;
    const bool* row_mask = nullptr;        // [B, Q], contiguous, or null
    const int32_t* prefix_lens = nullptr;  // [B]; kPrefix only
    bool has_units = false;                // walk candidates instead of [0, max_seq_len)
    const int32_t* units = nullptr;        // [B, Hkv, C], contiguous
    int64_t num_candidates = 0;            // C
    int64_t granularity = 1;               // g of the candidates; 1 without them
    double softmax_scale = 1.0;

    float* mass = nullptr;
    void* workspace = nullptr;  // workspace_bytes, aligned to 16 bytes; contents neither read before written nor kept
    int64_t workspace_bytes = 0;
};

// Bytes of workspace, enough for every backend: with Rp = R up to a multiple of 16, the larger of
//   CPU   4 * B * Hkv * Rp * (ceil(max_seq_len / 512) + 2)
//   CUDA  4 * Rp * (B * Hkv + min(132, B * Hkv * ceil(max_seq_len / 64))) + 8 * B * Hkv; 0 with norm context
// A backend itself asks for no more than its own.
int64_t token_mass_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads,
                             int64_t head_dim, int64_t max_seq_len);

// As check_block_attention.
void check_token_mass(const TokenMassParams& params);

namespace cpu {

// Returns when the outputs are written. Throws as check_token_mass does, and if the workspace is too small.
void token_mass(const TokenMassParams& params);

// What this backend needs of workspace.
int64_t token_mass_workspace(const TokenMassParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`; allocates nothing; can be captured in a graph, which then follows new lengths, tables and
// lists. One pass over K, two with norm prefix. Throws for what the kernels do not serve: dtypes other than bf16 and
// fp16, head dims other than 64 and 128.
void token_mass(const TokenMassParams& params, CudaStream stream);

int64_t token_mass_workspace(const TokenMassParams& params);

}  // namespace cuda
}  // namespace mage
