#pragma once

#include <cstdint>

#include "core/attention_schedule.h"
#include "core/unit_sums.h"

// What the attention kernel and those that follow it are given. Strides in elements.
namespace mage::cuda {

// A pool in bytes, where tokens are gathered one by one.
struct PoolBytes {
    const uint8_t* data;
    int64_t stride_page, stride_token, stride_head;
};

struct AttentionArgs {
    core::Schedule schedule;
    int32_t guess_workers;  // of a segment, if all requests are as long as they may be; 0: the guess is not worth it
    // Of lists: parts of a segment that a cluster has and merges itself; 1: a segment has one worker; 0: workers and
    // pieces are as the schedule says, and a merge follows.
    int32_t splits;
    uint32_t splits_reciprocal;  // ceil(2^32 / splits), unless that is 1
    int32_t ctas;                // that share the rows of a segment: 1, 2 or 4 where lists are short
    const void* q;               // [B, Q, H, D]
    int64_t stride_q_request, stride_q_query, stride_q_head;
    const int32_t* block_table;
    int64_t stride_table;
    const int32_t* seq_lens;     // [B]
    const int32_t* kv_lens;      // [B, Q] or null
    const int32_t* prefix_lens;  // [B] or null: mass counts all of [0, S)
    int64_t num_pages;
    PoolBytes k_pool, v_pool;
    int32_t max_seq_len;
    int32_t page_shift;
    int32_t box_shift;  // a box of the copy engine has 1 << box_shift tokens
    int32_t num_queries, num_heads, num_kv_heads, group;
    uint32_t group_reciprocal;  // ceil(2^32 / G), unless G is 1
    int32_t rows;               // R = G * Q
    int32_t row_tiles;          // tiles of the kernel's rows per (request, KV head)
    const int32_t* indices;     // [B, Hkv, Kmax] or null: all of [0, S)
    const int32_t* counts;      // [B, Hkv]
    const int32_t* tail_start;  // [B]
    int32_t capacity;           // Kmax
    int32_t list_shift;         // a listed unit has 1 << list_shift tokens
    float scale_log2;           // |softmax_scale| * log2(e)
    uint32_t flip;              // sign bits to flip in two elements of q: a negative scale
    uint32_t keep;              // all ones, or 0: a scale of 0

    void* out;   // [B, Q, H, D]
    float* lse;  // [B, H, Q]

    uint8_t* partial;      // [slots, tile rows, 3 D]: O, unnormalised, as store_partial says
    float* partial_rows;   // [slots, 3, tile rows]: log2 of the piece's sums, all and below P; what O is divided by,
                           // inverted
    core::Pieces* pieces;  // [B * Hkv * row tiles]; not written for empty requests
    float* row_stats;      // [B * Hkv, R, 2]: log2 of the sums, all and below P, of segments that are not in pieces
    // Sums over units; null: none. Log2 in float32, [B * Hkv, n, R], or packed (core/unit_sums.h), 16 bits each,
    // [B * Hkv, n, unit_rows]: R up to 8s.
    void* units;
    int32_t unit_rows;
    int32_t unit_shift;             // g = 1 << unit_shift
    int32_t num_units;              // n
    core::UnitLevels* unit_levels;  // [slots + B * Hkv, tile rows]: of every row of a piece; packed sums alone
    int32_t slots;                  // levels of pieces; those of whole segments follow

    // The merge alone.
    int32_t tile_rows, head_dim;
    bool is_half;          // fp16, not bf16
    int32_t merge_shift;   // 1 << merge_shift warps share a row: 1, 2, 4 or 8
    int32_t merge_blocks;  // of a stream; those behind them finish masses
    int32_t finish_parts;  // blocks that finish what a worker of the attention kernel has packed
    float* mass;           // [B, Hkv, n]; null: units become natural logs of shares, in place
    const bool* row_mask;  // [B, Q] or null
    int32_t score_max;     // the largest share instead of the mean
};

}  // namespace mage::cuda
