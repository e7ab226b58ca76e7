#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/attention_kernel.h"
#include "mage/block_attention.h"
#include "mage/token_mass.h"

// What the attention ops share: checks of the sizes, the plan of row tiles and splits, and the run of one call through
// the core. block_attention and its emissions walk [0, S); sparse_block_attention brings its own runs.
namespace mage::cpu {

// How the rows and tokens of a call are cut. A function of shapes alone, so results never depend on threads.
struct AttentionPlan {
    int64_t rows = 0;         // R
    int64_t padded_rows = 0;  // R up to a multiple of 16
    int64_t row_tile = 0;     // rows per tile, multiple of 16
    int64_t num_row_tiles = 0;
    int64_t split_tokens = 0;    // tokens per split, multiple of 64
    int64_t num_splits = 0;      // splits that a stream can have at most
    int64_t partial_floats = 0;  // of one (row tile, split)
    int64_t num_partials = 0;

    int64_t workspace_floats() const { return partial_floats * num_partials; }
};

// Params that hold the dimensions alone, for plans and workspace queries. Throws as check_attention_dims does.
BlockAttentionParams attention_dims(const char* op, int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                    int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t split_tokens);

// What check_block_attention asks of the dimensions and split_tokens.
void check_attention_dims(const char* op, const BlockAttentionParams& params);

// g is 1, 16, 32 or 64.
void check_granularity(const char* op, int64_t granularity);

// Looks at the dimensions and split_tokens only. `expected_tokens`: how long a stream is for all that the shapes tell;
// splits that are not given are made for it.
AttentionPlan plan_attention(const BlockAttentionParams& params, int64_t expected_tokens);

// Where the units of a call's rows are kept, over all requests and KV heads.
struct UnitBuffers {
    int64_t granularity = 0;  // 0: nothing is emitted
    int64_t num_units = 0;    // n
    float* sums = nullptr;    // [B, Hkv, n, sums_stride]
    int64_t sums_stride = 0;
    float* reference = nullptr;    // [B, Hkv, ceil(max_seq_len / 64), padded rows]
    float* lse_log2 = nullptr;     // [B, Hkv, padded rows]
    const int32_t* end = nullptr;  // [B]: tokens at or past it are not counted; null: all count
};

// Called by a worker of run_attention when a row tile (rows [row_begin, row_end)) of a stream, or all of a stream, is
// done: out, lse, lse_log2 and unit sums of those rows are written. `scratch` holds padded_rows floats. A stream is
// request * Hkv + KV head.
using TileDone = std::function<void(int64_t stream, int64_t row_begin, int64_t row_end)>;
using StreamDone = std::function<void(int64_t stream, float* scratch)>;

// The runs of (request, KV head), in stream order, with offsets; `seq_len` is clamped already.
using RunsOf = std::function<std::vector<TokenRun>(int64_t request, int64_t kv_head, int32_t seq_len)>;

// Runs one call. Without `runs` every stream is [0, S).
void run_attention(const BlockAttentionParams& params, const AttentionPlan& plan, const UnitBuffers& units,
                   const RunsOf& runs, const TileDone& tile_done = nullptr, const StreamDone& stream_done = nullptr);

// Throws if the workspace is smaller than needed.
void check_workspace(const char* op, int64_t workspace_bytes, int64_t needed);

// S of a request, clamped to [0, min(max_seq_len, max_pages * page)].
int32_t clamped_seq_len(const int32_t* seq_lens, int64_t request, int64_t max_seq_len, const PageTable& pages);

// The stream of (request, KV head) without its runs.
TokenStream token_stream(DType dtype, const PagedPool& k, const PagedPool& v, const PageTable& pages, int64_t request,
                         int64_t kv_head);

// token_mass over the tokens, rows and lse of an attention call that is done; its workspace is used again.
TokenMassParams token_mass_params(const BlockAttentionParams& params);

// Calls body(i, scratch) for every i < count on the threads of core::parallel_for; each thread takes the next free item
// and has `scratch_floats` of its own. `flops` of all items together: small calls get few threads, or none but the
// caller's. What an item computes must not depend on who computes it.
void for_each_item(int64_t count, int64_t scratch_floats, double flops,
                   const std::function<void(int64_t, float*)>& body);

inline int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

}  // namespace mage::cpu
