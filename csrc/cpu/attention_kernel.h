#pragma once

#include <cstdint>

#include "cpu/simd/variants.h"
#include "mage/types.h"

// The attention core of the CPU backend: what one work item is. kernels/attention.cpp computes items,
// attention.cpp makes them. Exact and sparse attention, every emission and every page layout are the same core; they
// differ in the runs of tokens that an item walks.
//
// A work item is (request, KV head, row tile, split): some of the R = G * Q rows of a KV head against a part of its
// token stream. Tokens come in tiles of 64, copied through the page table into contiguous float32. Rows are the vector
// lanes: scores are held transposed, [token][row], so that maximum, exponential, sums and unit sums need no horizontal
// step, and both matrix products are the same micro-kernel (a broadcast of K or V times a vector of rows).
namespace mage::cpu {

constexpr int kTileTokens = 64;   // tokens per step of the online softmax; every unit size divides it
constexpr int kGroupTokens = 16;  // smallest unit whose sums the core keeps
constexpr int kMaxLanes = 16;     // rows are padded to a multiple of this

static constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// `count` tokens from logical position `begin` on; `offset` is the place of the first one in the stream.
struct TokenRun {
    int64_t offset = 0;
    int32_t begin = 0;
    int32_t count = 0;
};

// The tokens of one request as one KV head sees them. A stream walks its runs in order.
struct TokenStream {
    const void* k = nullptr;  // this KV head's row of slot 0 of page 0
    const void* v = nullptr;  // null for passes that need K alone
    int64_t stride_k_page = 0, stride_k_token = 0;
    int64_t stride_v_page = 0, stride_v_token = 0;
    const int32_t* pages = nullptr;  // the request's row of the block table
    int64_t num_pages = 0;
    int32_t page_shift = 0;  // log2 of the page size
    const TokenRun* runs = nullptr;
    int32_t num_runs = 0;
};

// Rows [row_begin, row_end) of one request and KV head; row r = q * G + (head within the group).
struct RowTile {
    const void* q = nullptr;  // query 0, first head of the group
    int64_t stride_q_query = 0, stride_q_head = 0;
    int32_t group = 1;  // G
    int32_t row_begin = 0, row_end = 0;
    const int32_t* kv_lens = nullptr;  // [Q] of this request, or null
    int32_t seq_len = 0;               // S, clamped
    float scale_log2 = 0.0f;           // softmax scale * log2(e); q k is multiplied by it after the sum
};

// Shared by all items of a call.
struct AttentionShape {
    DType dtype = DType::kFloat32;
    int32_t head_dim = 0;
};

// Unnormalised result of an item. Scores are in log2 units.
struct PartialTile {
    float* values = nullptr;   // padded rows * D: sum of 2^(s - row_max) V, in the core's own order
    float* row_max = nullptr;  // [padded rows]
    float* row_sum = nullptr;  // [padded rows]: sum of 2^(s - row_max)
};

// Per-row sums of units, kept until the final row sums are known. Columns are rows r of the KV head.
struct UnitSums {
    int32_t unit_tokens = 0;     // g: 16, 32 or 64; 0: nothing is emitted
    int32_t end = 0;             // tokens at or past it are not counted
    float* sums = nullptr;       // [n, stride]: sum over the unit of 2^(s - reference)
    float* reference = nullptr;  // [ceil(max_seq_len / 64), stride]: the reference of the 64 tokens
    int64_t sums_stride = 0, reference_stride = 0;
};

struct AttentionItem {
    AttentionShape shape;
    RowTile rows;
    TokenStream stream;
    int64_t stream_begin = 0, stream_end = 0;
    PartialTile partial;
    UnitSums units;            // needs a stream of one run that begins at token 0, and stream_begin % 64 == 0
    float* scratch = nullptr;  // attention_scratch_floats
};

static constexpr int64_t attention_scratch_floats(int64_t rows, int64_t head_dim) {
    return round_up(rows, kMaxLanes) * (head_dim + 1)  // packed Q, row lengths
           + 2 * kTileTokens * head_dim                // K and V of a tile
           + kTileTokens * 4 * kMaxLanes;              // scores of a row panel
}

// Merges the splits of a row tile and writes the tile's rows of out and lse.
struct FinishItem {
    AttentionShape shape;
    int32_t group = 1, row_begin = 0, row_end = 0;
    int32_t num_splits = 0;  // 0: no token at all
    const float* values = nullptr;
    const float* row_max = nullptr;
    const float* row_sum = nullptr;
    int64_t values_stride = 0, row_stride = 0;  // floats between splits
    void* out = nullptr;                        // query 0, first head of the group
    int64_t stride_out_query = 0, stride_out_head = 0;
    float* lse = nullptr;  // query 0, first head of the group; natural log
    int64_t stride_lse_query = 0, stride_lse_head = 0;
    float* lse_log2 = nullptr;  // [R] of this KV head (log2, +inf for a row without tokens), or null
    float* scratch = nullptr;   // finish_scratch_floats
};

static constexpr int64_t finish_scratch_floats(int64_t head_dim) { return (head_dim + 4) * 4 * kMaxLanes; }

// Units [unit_begin, unit_end) of one request and KV head from sums to mass, or to log shares in place.
struct UnitItem {
    UnitSums units;
    int32_t num_rows = 0;   // R
    int32_t row_begin = 0;  // first row, for unit_log_shares
    int32_t unit_begin = 0, unit_end = 0;
    const float* lse_log2 = nullptr;  // [padded R]
    const float* weight = nullptr;  // [padded R]: 0 for rows that don't count, else what their shares are multiplied by
    bool maximum = false;           // largest weighted share instead of the sum
    float factor = 1.0f;            // the result is multiplied by it
    float* mass = nullptr;          // [n]
    float* row_total = nullptr;     // [padded R], for unit_row_totals
};

// QK-only pass: shares of single tokens, given the final lse.
struct TokenMassItem {
    AttentionShape shape;
    RowTile rows;  // all R rows
    TokenStream stream;
    int64_t stream_begin = 0, stream_end = 0;
    int32_t end = 0;                  // tokens at or past it weigh 0
    const float* lse_log2 = nullptr;  // [padded R]
    const float* weight = nullptr;    // [padded R]: 0 for rows that don't count
    enum class Mode { kSum, kMaximum, kRows, kRowTotal } mode = Mode::kSum;
    float factor = 1.0f;
    float* mass = nullptr;       // kSum, kMaximum: [stream]; kRows: [stream, R] log shares
    float* row_total = nullptr;  // kRowTotal: [padded R], the sum of shares
    float* scratch = nullptr;    // attention_scratch_floats
};

// One part of a merge, at a row.
struct MergeRow {
    const void* out = nullptr;  // [D]
    float weight = 0.0f;        // out is not read where it is 0
};

}  // namespace mage::cpu

MAGE_CPU_VARIANTS(void attention_item(const AttentionItem& item))
MAGE_CPU_VARIANTS(void finish_item(const FinishItem& item))
MAGE_CPU_VARIANTS(void unit_mass(const UnitItem& item))
MAGE_CPU_VARIANTS(void unit_row_totals(const UnitItem& item))
MAGE_CPU_VARIANTS(void unit_log_shares(const UnitItem& item))
MAGE_CPU_VARIANTS(void token_mass_item(const TokenMassItem& item))
MAGE_CPU_VARIANTS(void merge_row(DType dtype, int head_dim, const MergeRow* parts, int num_parts, float* scratch,
                                 void* out))
