#pragma once

#include "mage/stream.h"
#include "mage/types.h"

// row_votes: what each row of one layer would select on its own (MAGE v1), from the log-shares of block_attention_rows.
//
// Per (b, KV head), with E = floor(P / g) units below the tail (P = prefix_lens[b] clamped to [0, n * g]) and r over
// the kept rows:
//   T_r      = top min(k / g, E) units of [0, E) by row_mass[:, r], only those with a share > 0; ties to the lowest
//              unit
//   votes[u] = number of kept rows r with u in T_r
//   union    = units with a vote;  union_size = their number
//   coverage = mean over the kept rows of  (sum over u in union of share[u, r]) / (sum over all n units of share[u, r])
// A row without any mass contributes 0 to the mean. No kept row: votes 0, union_size 0, coverage 0. NaN shares count as
// 0, log-shares above 0 as 0 in sums.
//
// Rows are R = G * Q, row r = q * G + head in group; row_mask keeps query position q = r / G, G = R / Q.
// Every sum runs in one fixed order, so results are bit-reproducible for any number of threads. The order of a GPU is
// not that of the CPU: coverage agrees within the rounding of float32 sums, votes and union_size exactly.
//
// Cost: O(B * Hkv * n * R). On a GPU row_mass is read once, in one launch, if R <= 256, n <= 2176 and B < 65536, where
// a cluster of multiprocessors holds the shares of a KV head, and otherwise at least twice, in two launches.
namespace mage {

// Rows (G * Q) that share one KV stream.
constexpr int64_t kMaxVoteRows = 1024;

struct RowVotesParams {
    int64_t num_requests = 0;   // B
    int64_t num_kv_heads = 0;   // Hkv
    int64_t num_units = 0;      // n
    int64_t num_rows = 0;       // R = G * Q, 1 to kMaxVoteRows
    int64_t num_positions = 0;  // Q, divides R; read with row_mask alone
    int64_t granularity = 0;    // g: 1, 16, 32 or 64
    int64_t k = 0;              // tokens per row, multiple of g, >= 0

    const float* row_mass = nullptr;       // [B, Hkv, n, R], contiguous; natural log of the unit's share in the row
    const int32_t* prefix_lens = nullptr;  // [B]
    const bool* row_mask = nullptr;        // [B, Q], contiguous, or null: all rows are kept

    // Outputs, contiguous.
    int32_t* votes = nullptr;       // [B, Hkv, n]
    int32_t* union_size = nullptr;  // [B, Hkv], units
    float* coverage = nullptr;      // [B, Hkv]

    void* workspace = nullptr;  // workspace_bytes, aligned to 16 bytes; contents neither read before written nor kept
    int64_t workspace_bytes = 0;
};

// Bytes of workspace, for every backend the same: 8 * B * Hkv * (1 + R * (1 + min(64, ceil(n / 32)))). Two
// launches keep in it the last unit that each row takes and sums of tiles of units; one launch and the CPU backend do
// not look at it.
int64_t row_votes_workspace(int64_t num_requests, int64_t num_kv_heads, int64_t num_units, int64_t num_rows);

// Throws mage::Error if a dimension or k does not hold. Backends call it; a binding calls it before it allocates.
void check_row_votes(const RowVotesParams& params);

namespace cpu {

// Throws mage::Error if an argument does not hold.
void row_votes(const RowVotesParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`, one or two launches; allocates nothing; can be captured in a graph, which then follows new
// shares, lengths and masks. Throws mage::Error if an argument does not hold.
void row_votes(const RowVotesParams& params, CudaStream stream);

}  // namespace cuda
}  // namespace mage
