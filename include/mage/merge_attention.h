#pragma once

#include <vector>

#include "mage/kernel_info.h"
#include "mage/stream.h"
#include "mage/types.h"

// merge_attention: one attention result out of several over disjoint sets of tokens.
//
//   lse[r] = ln sum_i exp(lse_i[r])        out[r] = sum_i exp(lse_i[r] - lse[r]) out_i[r]
//
//   outs  N x [B, Q, H, D]          in    same dtype; last stride 1
//   lses  N x [B, H, Q] float32     in    contiguous; natural log, or log2 with log2_in
//   out   [B, Q, H, D]              out   contiguous, dtype of outs
//   lse   [B, H, Q] float32         out   contiguous; natural log, or log2 with log2_out
//
// A part with lse -inf has no say, whatever its out holds (NaN included). If all are -inf: out 0, lse -inf. Sums in
// float32, parts in the order given; deterministic; no workspace. D is at least 1. On a GPU at most kMaxMergeParts
// parts, and 2^31 vectors of 16 bytes in outs (2^31 elements, where D, a base or a stride is not a multiple of 16
// bytes).
namespace mage {

// Parts whose addresses are arguments of one kernel.
constexpr int kMaxMergeParts = 512;

struct MergePart {
    const void* out = nullptr;                                      // [B, Q, H, D]
    int64_t stride_request = 0, stride_query = 0, stride_head = 0;  // elements
    const float* lse = nullptr;                                     // [B, H, Q]
};

struct MergeAttentionParams {
    int64_t num_requests = 0;  // B
    int64_t num_queries = 0;   // Q
    int64_t num_heads = 0;     // H
    int64_t head_dim = 0;      // D
    DType dtype = DType::kBFloat16;
    std::vector<MergePart> parts;
    bool log2_in = false, log2_out = false;
    void* out = nullptr;
    float* lse = nullptr;
};

// Bytes of workspace, for every backend the same: 0, the sums need no memory of their own.
int64_t merge_attention_workspace(int64_t num_parts, int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                  int64_t head_dim);

// Throws mage::Error if a dimension does not hold. Backends call it; a binding calls it before it allocates.
void check_merge_attention(const MergeAttentionParams& params);

namespace cpu {

// Returns when the outputs are written. Throws as check_merge_attention does.
void merge_attention(const MergeAttentionParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`; allocates nothing; can be captured in a graph. Throws as check_merge_attention does, and
// where a limit of the GPU does not hold.
void merge_attention(const MergeAttentionParams& params, CudaStream stream);

// How it is launched: looks at the dims, the dtype and what is a multiple of 16 bytes.
LaunchPlan merge_attention_plan(const MergeAttentionParams& params);

}  // namespace cuda
}  // namespace mage
