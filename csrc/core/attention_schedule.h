#pragma once

#include <cstdint>

#include "mage/block_attention.h"

// Who does what: the split of all KV streams of a launch over its workers. Pure arithmetic, the same on the host
// (tests, plans), in the attention kernel and in the merge.
//
// A segment is one row tile of one (request, KV head): its stream is cut into units of one tile of keys.
//   aligned   every segment has workers of its own, as many as it has times a number of units, the last fraction
//             included, and they share its units evenly: a worker has one piece. That number is the least with which
//             the workers suffice.
//   whole     where there are more segments than workers and requests are about as long as one another: every worker
//             takes each max_workers-th segment, whole. Of a range alone; more lists than workers have a launch of
//             their own.
//   balanced  where these take much more than an even share of all units: every worker takes as many units in a row, or
//             one more, whatever they belong to, so that it holds whole segments and at most two pieces: the end of
//             one, the start of another.
//   fixed     a unit is a split, and a piece is always one unit, whoever takes it: results then depend on nothing but
//             the request itself.
#if defined(__CUDACC__)
#define MAGE_BOTH __host__ __device__ __forceinline__
#else
#define MAGE_BOTH inline
#endif

namespace mage::core {

struct Schedule {
    int32_t num_requests = 0;
    int32_t segments_per_request = 0;  // Hkv * row tiles
    int32_t unit_tokens = 0;           // tokens of a tile, or of a split
    int32_t unit_shift = 0;            // 1 << unit_shift tokens, or 0: not a power of two
    int32_t max_workers = 0;
    int32_t min_units = 1;    // that a worker should have
    int32_t piece_units = 0;  // what starting and ending a piece takes, in units
    bool fixed = false;
};

constexpr int32_t kAlignedShare = 32;  // one part in so many of a worker's units more is less than what balance costs
constexpr int32_t kWholeShare = 16;    // the same of whole segments, where it costs a merge and a piece more
constexpr int32_t kMaxAligned = 32;    // requests: one per lane of the warp that looks

MAGE_BOTH int32_t units_of(const Schedule& s, int32_t seq_len) {
    const int32_t rounded = seq_len + s.unit_tokens - 1;
    return s.unit_shift > 0 ? rounded >> s.unit_shift : rounded / s.unit_tokens;
}

MAGE_BOTH int32_t workers_of(const Schedule& s, int32_t total_units) {
    const int32_t useful = (total_units - 1) / s.min_units + 1;
    return useful < s.max_workers ? useful : s.max_workers;
}

// The first total % workers workers have one unit more than the others.
MAGE_BOTH int32_t first_unit(int32_t total_units, int32_t workers, int32_t worker) {
    const int32_t each = total_units / workers, more = total_units - each * workers;
    return worker * each + (worker < more ? worker : more);
}

MAGE_BOTH int32_t worker_of(int32_t total_units, int32_t workers, int32_t unit) {
    const int32_t each = total_units / workers, more = total_units - each * workers;
    const int32_t longer = more * (each + 1);
    return unit < longer ? unit / (each + 1) : more + (unit - longer) / each;
}

// Of a power of two; of others that of the next one.
inline int32_t log2_of(int64_t value) {
    int32_t shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    return shift;
}

MAGE_BOTH int32_t ceil_div(int32_t value, int32_t by) { return (value + by - 1) / by; }

// Units of a worker where every segment has its own workers, or 0: that takes too many. `workers_with(t)` counts the
// workers that segments need with at most t units each.
template <typename CountT>
MAGE_BOTH int32_t aligned_units(const Schedule& s, int32_t total_units, const CountT& workers_with) {
    if (s.fixed || s.num_requests > kMaxAligned || total_units == 0) return 0;
    int32_t least = ceil_div(total_units, s.max_workers);
    least = least < s.min_units ? s.min_units : least;
    // A worker with two pieces pays for one more than a worker with one. And where heads of a request run side by side,
    // the memory serves their tokens, which lie next to each other, together.
    const int32_t share = least / kAlignedShare;
    const int32_t slack = share > s.piece_units ? share : s.piece_units;
    for (int32_t most = least; most <= least + slack; ++most) {
        if (workers_with(most) <= s.max_workers) return most;
    }
    return 0;
}

// Whether there are more segments than workers, or more requests than can be given workers of their own.
MAGE_BOTH bool may_take_whole(const Schedule& s) {
    return !s.fixed && (s.num_requests * s.segments_per_request > s.max_workers || s.num_requests > kMaxAligned);
}

// Whether workers take segments whole, each its share of them; the longest has `longest` units.
MAGE_BOTH bool takes_whole(const Schedule& s, int32_t total_units, int32_t longest) {
    if (!may_take_whole(s) || total_units == 0) return false;
    const int32_t least = ceil_div(total_units, s.max_workers);
    const int64_t rounds = ceil_div(s.num_requests * s.segments_per_request, s.max_workers);
    return rounds * longest <= least + least / kWholeShare + s.piece_units;
}

// Where a piece that is not a whole segment leaves its partial result.
MAGE_BOTH int32_t slot_of(const Schedule& s, int32_t first_unit_of_piece, int32_t worker, bool starts_segment) {
    return s.fixed ? first_unit_of_piece : 2 * worker + (starts_segment ? 1 : 0);
}

// The pieces of a segment, as the worker that has the first one writes them down for the merge.
struct Pieces {
    int32_t count;  // 1: the segment is whole, and no slot is used
    int32_t first;  // worker of the first piece; with fixed splits its unit
};

// Of the segment that has `units` units from `begin` on; `worker` has the first of them.
MAGE_BOTH Pieces pieces_of(const Schedule& s, int32_t total_units, int32_t workers, int32_t worker, int32_t begin,
                           int32_t units) {
    if (s.fixed) return {units, begin};
    return {worker_of(total_units, workers, begin + units - 1) - worker + 1, worker};
}

MAGE_BOTH int32_t slot_of_piece(const Schedule& s, const Pieces& pieces, int32_t i) {
    return slot_of(s, pieces.first + i, pieces.first + i, i == 0);
}

// Units of a launch whose requests are all max_seq_len long; must be below 2^31.
inline int64_t max_units(const Schedule& s, int64_t max_seq_len) {
    return (max_seq_len + s.unit_tokens - 1) / s.unit_tokens * s.num_requests * s.segments_per_request;
}

// Slots that a launch may need: two per worker, or one per split.
inline int64_t max_slots(const Schedule& s, int64_t max_seq_len) {
    const int64_t units = max_units(s, max_seq_len);
    if (s.fixed || units == 0) return units;
    return 2 * (units < s.max_workers ? units : s.max_workers);
}

// --- The plan of a launch of the attention kernel: host only ---------------------------------------------------------

// Rows of a tile, CTAs that share them, tokens of a tile of keys.
struct RowShape {
    int32_t rows, ctas, keys;
};

// 0: 64 rows, 1: 128, 2: 192, 3: 256 in a pair of CTAs.
constexpr int kRowShapes = 4;
constexpr int kPackedShapes = 3;  // that have kernels which pack unit sums
RowShape row_shape(int index);

// The shape with the least padding for R rows; among equals the largest. Up to 256 rows take one tile.
int choose_row_shape(int64_t rows);

constexpr int64_t kMaxSms = 132;  // that a launch uses; the workspace is sized for them

constexpr int64_t kPackFrom = 12'000'000;

// Of block_attention and its kin. max_seq_len bounds the lengths, so that the slots are known on the host.
struct AttentionPlan {
    int shape_index = 0;
    RowShape shape = {};
    int64_t rows = 0;  // R
    int64_t row_tiles = 0;
    int64_t slots = 0;  // partial results
    Schedule schedule;

    bool packs_units = false;

    // Unit sums of masses are packed where they would take kPackFrom bytes and more: fewer take no longer in float32.
    // All rows of a unit are in one piece then, and pieces are few. Rows that a pair of CTAs has are bound by the
    // tensor cores, and gain nothing.
    void pack_units(int64_t streams, int64_t units, int64_t pack_from = kPackFrom) {
        packs_units =
            row_tiles == 1 && shape_index < kPackedShapes && !schedule.fixed && 4 * streams * units * rows >= pack_from;
    }

    // Workspace, in floats: O in 24 bits and three numbers of every row of every slot, the pieces of every segment; for
    // rows of masses two numbers of every row of the call; for masses the sums of every row and unit and, if these are
    // packed, four numbers of every row of every slot and segment.
    int64_t partial_floats(int64_t head_dim) const { return slots * shape.rows * head_dim * 3 / 4; }
    int64_t partial_row_floats() const { return slots * shape.rows * 3; }
    int64_t piece_floats(int64_t streams) const { return (streams * row_tiles * 2 + 3) / 4 * 4; }
    int64_t stat_floats(int64_t streams) const { return (streams * rows * 2 + 3) / 4 * 4; }
    int64_t level_floats(int64_t streams) const { return packs_units ? (slots + streams) * shape.rows * 4 : 0; }
    int64_t unit_floats(int64_t streams, int64_t units) const {
        return streams * units * unit_rows() / (packs_units ? 2 : 1);
    }
    int64_t unit_rows() const { return packs_units ? (rows + 7) / 8 * 8 : rows; }
};

AttentionPlan plan_attention(const BlockAttentionParams& params, int64_t sms);

// The same over lists of up to `list_tokens` tokens and a tail: the schedule's requests are the streams (request, KV
// head).
AttentionPlan plan_list_attention(const BlockAttentionParams& params, int64_t list_tokens, int64_t sms);

// Makes tiles of `keys` tokens the units of a schedule that has no fixed splits.
void set_tile(Schedule* schedule, int64_t keys);

// Positions that a stream may have: a list and a tail, which begins with a whole box of the copy engine.
inline int64_t max_list_positions(int64_t list_tokens, int64_t max_seq_len) { return list_tokens + max_seq_len + 64; }

}  // namespace mage::core
