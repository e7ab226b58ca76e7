#pragma once

#include <cstdint>

#include "core/attention_schedule.h"
#include "core/token_mass_plan.h"

// What the kernel of token_mass is given. Strides in elements.
namespace mage::cuda {

// What becomes of the shares of a tile: added or compared over the rows, stored as logarithms, or added over the
// tokens.
enum class MassMode : int32_t { kMean = 0, kMax = 1, kRows = 2, kTotals = 3 };

// Where the sums of a stream's rows lie: in `count` slots from stream + worker on.
struct StreamParts {
    int32_t worker, count;
};

// Workers of each stream, where all streams have as many tiles: as many as there are for each, if none then gets more
// tiles than by an even cut over all of them, and no worker has two streams; else 0.
MAGE_BOTH int32_t own_workers_of(int32_t tiles, int32_t streams, int32_t stream_workers, int32_t workers) {
    const int32_t own = stream_workers < tiles ? stream_workers : tiles;
    if (own == 0) return 0;
    const int32_t most = (tiles - 1) / own + 1;
    return int64_t{most - 1} * workers < int64_t{tiles} * streams ? own : 0;
}

struct TokenMassArgs {
    const void* q;  // [B, Q, H, D]
    int64_t stride_q_request, stride_q_query, stride_q_head;
    const int32_t* block_table;
    int64_t stride_table;
    const int32_t* seq_lens;     // [B]
    const int32_t* kv_lens;      // [B, Q] or null
    const int32_t* prefix_lens;  // [B] or null: tokens count up to S
    const float* lse;            // [B, H, Q]
    const bool* row_mask;        // [B, Q] or null
    const int32_t* units;        // [B, Hkv, C] or null: all of [0, length)
    int64_t num_pages;
    int32_t num_candidates;
    int32_t unit_shift;      // g = 1 << unit_shift
    int32_t list_tiles;      // of every stream, with units
    bool alike;              // all streams have as many tiles: those of one request, or lists
    int32_t stream_workers;  // there are so many workers for each stream
    // A stream's tiles, and its own workers (0: an even cut), if all requests are max_seq_len long.
    int32_t guess_tiles, guess_workers;
    int32_t max_seq_len;
    int32_t page_shift;
    int32_t box_shift;  // a box of the copy engine has 1 << box_shift tokens
    int32_t num_requests, num_queries, num_heads, num_kv_heads, group;
    uint32_t group_reciprocal;  // ceil(2^32 / G), unless G is 1
    int32_t rows;               // R
    int32_t chunks, chunk_rows;
    float scale_log2;  // softmax_scale * log2(e), never 0
    float hidden;      // a score whose share is 0: infinite, of the other sign than the scale

    MassMode mode;
    int32_t length;         // N
    float* mass;            // [B, Hkv, N] or [B, Hkv, N, R]
    bool pairs;             // two rows' logarithms can be stored at once
    bool divides;           // by the sums in the slots
    float* totals;          // [slots, stride_totals]; kTotals writes, `divides` reads
    int64_t stride_totals;  // R up to a multiple of 16
    StreamParts* parts;     // [B * Hkv]; not written for streams without tokens
};

}  // namespace mage::cuda
