#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/attention_schedule.h"
#include "mage/block_attention_mass.h"
#include "mage/block_attention_rows.h"

namespace mage::test {
namespace {

struct Piece {
    int32_t request, segment;
    int32_t first, last;  // units of the segment
    int32_t worker;
    int64_t slot;         // -1: the piece is a whole segment
    core::Pieces pieces;  // of the segment, if this is the first of them
};

int32_t aligned_units_of(const core::Schedule& s, const std::vector<int32_t>& lens) {
    int32_t total = 0;
    for (const int32_t len : lens) total += core::units_of(s, len) * s.segments_per_request;
    return core::aligned_units(s, total, [&](int32_t most) {
        int32_t workers = 0;
        for (const int32_t len : lens) workers += core::ceil_div(core::units_of(s, len), most) * s.segments_per_request;
        return workers;
    });
}

// Workers of one segment each, in the order of the segments.
std::vector<Piece> walk_aligned(const core::Schedule& s, const std::vector<int32_t>& lens, int32_t most) {
    std::vector<Piece> pieces;
    int32_t worker = 0;
    for (int32_t request = 0; request < s.num_requests; ++request) {
        const int32_t units = core::units_of(s, lens[request]);
        const int32_t workers = core::ceil_div(units, most);
        for (int32_t segment = 0; segment < s.segments_per_request; ++segment) {
            for (int32_t i = 0; i < workers; ++i, ++worker) {
                const core::Pieces named = {i == 0 ? workers : 0, worker};
                pieces.push_back({request, segment, core::first_unit(units, workers, i),
                                  core::first_unit(units, workers, i + 1), worker,
                                  workers == 1 ? -1 : core::slot_of(s, 0, worker, i == 0), named});
            }
        }
    }
    return pieces;
}

bool takes_whole(const core::Schedule& s, const std::vector<int32_t>& lens) {
    if (aligned_units_of(s, lens) > 0) return false;
    int32_t total = 0, longest = 0;
    for (const int32_t len : lens) {
        total += core::units_of(s, len) * s.segments_per_request;
        longest = std::max(longest, core::units_of(s, len));
    }
    return core::takes_whole(s, total, longest);
}

// Whole segments, in their order: every worker takes each max_workers-th, whether it is empty or not.
std::vector<Piece> walk_whole(const core::Schedule& s, const std::vector<int32_t>& lens) {
    std::vector<Piece> pieces;
    for (int32_t at = 0; at < s.num_requests * s.segments_per_request; ++at) {
        const int32_t request = at / s.segments_per_request, units = core::units_of(s, lens[request]);
        const int32_t worker = at % s.max_workers;
        if (units > 0) pieces.push_back({request, at % s.segments_per_request, 0, units, worker, -1, {1, worker}});
    }
    return pieces;
}

// What the workers of a launch do, one after the other, as the attention kernel's walk does it: a worker finds the
// request of its first unit, then takes pieces until its units are used up.
std::vector<Piece> walk(const core::Schedule& s, const std::vector<int32_t>& lens) {
    std::vector<Piece> pieces;
    int32_t total = 0;
    for (const int32_t len : lens) total += core::units_of(s, len) * s.segments_per_request;
    if (total == 0) return pieces;
    const int32_t most = aligned_units_of(s, lens);
    if (most > 0) return walk_aligned(s, lens, most);
    if (takes_whole(s, lens)) return walk_whole(s, lens);
    const int32_t workers = core::workers_of(s, total);
    for (int32_t worker = 0; worker < workers; ++worker) {
        int32_t at = core::first_unit(total, workers, worker);
        const int32_t end = core::first_unit(total, workers, worker + 1);
        int32_t request = 0, request_begin = 0;
        while (at < end) {
            int32_t units = core::units_of(s, lens[request]);
            while (at >= request_begin + units * s.segments_per_request) {
                request_begin += units * s.segments_per_request;
                units = core::units_of(s, lens[++request]);
            }
            const int32_t segment = (at - request_begin) / units;
            const int32_t first = at - request_begin - segment * units;
            const int32_t last = s.fixed ? first + 1 : std::min(units, first + (end - at));
            const bool whole = first == 0 && last == units;
            core::Pieces named = {0, s.fixed ? at : worker};
            if (first == 0) {
                named.count = whole     ? 1
                              : s.fixed ? units
                                        : core::worker_of(total, workers, at + units - 1) - worker + 1;
            }
            pieces.push_back(
                {request, segment, first, last, worker, whole ? -1 : core::slot_of(s, at, worker, first == 0), named});
            at += last - first;
        }
    }
    return pieces;
}

std::string describe(const core::Schedule& s, const std::vector<int32_t>& lens) {
    std::string text = "segments " + std::to_string(s.segments_per_request) + " workers " +
                       std::to_string(s.max_workers) + " min_units " + std::to_string(s.min_units) + " unit_tokens " +
                       std::to_string(s.unit_tokens) + (s.fixed ? " fixed" : "") + " lens";
    for (const int32_t len : lens) text += ' ' + std::to_string(len);
    return text;
}

// Every unit belongs to one piece, and the merge names the pieces that there are, in their order, by distinct slots.
void expect_sound(const core::Schedule& s, const std::vector<int32_t>& lens, int32_t max_seq_len) {
    SCOPED_TRACE(describe(s, lens));
    const std::vector<Piece> pieces = walk(s, lens);
    int32_t total = 0;
    for (const int32_t len : lens) total += core::units_of(s, len) * s.segments_per_request;
    ASSERT_LE(total, core::max_units(s, max_seq_len));
    const int64_t slots = core::max_slots(s, max_seq_len);

    std::set<int64_t> used;
    size_t next = 0;  // pieces lie in the order of their units
    for (int32_t request = 0; request < s.num_requests; ++request) {
        const int32_t units = core::units_of(s, lens[request]);
        for (int32_t segment = 0; segment < s.segments_per_request; ++segment) {
            if (units == 0) continue;
            ASSERT_LT(next, pieces.size());
            const core::Pieces named = pieces[next].pieces;
            ASSERT_GE(named.count, 1);
            int32_t reached = 0;
            for (int32_t i = 0; i < named.count; ++i, ++next) {
                ASSERT_LT(next, pieces.size());
                const Piece& piece = pieces[next];
                ASSERT_EQ(piece.request, request);
                ASSERT_EQ(piece.segment, segment);
                ASSERT_EQ(piece.first, reached);
                ASSERT_GT(piece.last, piece.first);
                reached = piece.last;
                ASSERT_EQ(piece.pieces.count, i == 0 ? named.count : 0) << "the first piece alone names all";
                if (named.count == 1) {
                    ASSERT_EQ(piece.slot, -1);
                    continue;
                }
                ASSERT_EQ(piece.slot, core::slot_of_piece(s, named, i));
                ASSERT_GE(piece.slot, 0);
                ASSERT_LT(piece.slot, slots);
                ASSERT_TRUE(used.insert(piece.slot).second) << "slot " << piece.slot << " is written twice";
            }
            ASSERT_EQ(reached, units);
        }
    }
    ASSERT_EQ(next, pieces.size());

    if (total == 0) return;
    const int32_t most = aligned_units_of(s, lens);
    if (most > 0) {
        // Aligned: a worker has one piece, of hardly more units than an even share.
        const int32_t least = std::max(s.min_units, core::ceil_div(total, s.max_workers));
        ASSERT_LE(most, least + std::max(s.piece_units, least / core::kAlignedShare));
        ASSERT_LE(pieces.back().worker, s.max_workers - 1);
        for (size_t i = 0; i < pieces.size(); ++i) {
            ASSERT_EQ(pieces[i].worker, static_cast<int32_t>(i));
            ASSERT_LE(pieces[i].last - pieces[i].first, most);
        }
        return;
    }
    std::vector<int32_t> load(s.max_workers, 0);
    for (const Piece& piece : pieces) load[piece.worker] += piece.last - piece.first;
    if (takes_whole(s, lens)) {
        // A launch has as many workers as there are units at most, and these have all segments.
        const int32_t least = core::ceil_div(total, s.max_workers);
        ASSERT_LE(*std::max_element(load.begin(), load.end()), least + least / core::kWholeShare + s.piece_units);
        for (const Piece& piece : pieces) ASSERT_LT(piece.worker, core::max_units(s, max_seq_len));
        return;
    }
    // Balanced: the units of two workers differ by at most one; few units have few workers.
    const int32_t workers = core::workers_of(s, total);
    ASSERT_EQ(workers, std::min(s.max_workers, (total + s.min_units - 1) / s.min_units));
    load.resize(workers);
    const auto range = std::minmax_element(load.begin(), load.end());
    ASSERT_LE(*range.second - *range.first, 1);
}

core::Schedule make_schedule(size_t requests, int32_t segments, int32_t unit_tokens, int32_t workers, int32_t min_units,
                             bool fixed, int32_t piece_units = 0) {
    core::Schedule s;
    s.num_requests = static_cast<int32_t>(requests);
    s.segments_per_request = segments;
    s.unit_tokens = unit_tokens;
    s.max_workers = workers;
    s.min_units = min_units;
    s.piece_units = piece_units;
    s.fixed = fixed;
    return s;
}

TEST(AttentionSchedule, EveryUnitHasOneWorkerAndTheMergeFindsIt) {
    const std::vector<std::vector<int32_t>> batches = {{1},
                                                       {64},
                                                       {65},
                                                       {1000},
                                                       {0},
                                                       {0, 0},
                                                       {0, 1, 0, 129},
                                                       {20000, 1},
                                                       {1, 20000},
                                                       {63, 64, 65, 127, 128, 129, 191, 192, 193},
                                                       {0, 0, 5000, 0, 0, 1, 0}};
    for (const auto& lens : batches) {
        const int32_t longest = std::max(1, *std::max_element(lens.begin(), lens.end()));
        for (const int32_t segments : {1, 2, 3, 8, 32}) {
            for (const int32_t workers : {1, 2, 3, 66, 132}) {
                for (const int32_t unit_tokens : {64, 128, 320}) {
                    for (const int32_t min_units : {1, 2}) {
                        for (const int32_t piece_units : {0, 3, 6}) {
                            expect_sound(make_schedule(lens.size(), segments, unit_tokens, workers, min_units, false,
                                                       piece_units),
                                         lens, longest);
                            if (HasFatalFailure()) return;
                        }
                    }
                    expect_sound(make_schedule(lens.size(), segments, unit_tokens, workers, 1, true), lens, longest);
                    if (HasFatalFailure()) return;
                }
            }
        }
    }
}

TEST(AttentionSchedule, EveryUnitHasOneWorkerInRandomBatches) {
    std::mt19937 random(1);
    for (int i = 0; i < 3000; ++i) {
        std::vector<int32_t> lens(1 + random() % 70);  // more than a warp, for the search of the first request
        const auto longest = static_cast<int32_t>(1 + random() % (i % 7 == 0 ? 30000 : 700));
        for (int32_t& len : lens) len = random() % 4 == 0 ? 0 : static_cast<int32_t>(random() % (longest + 1));
        const int32_t tiles[] = {64, 128, 192, 320};
        const core::Schedule s =
            make_schedule(lens.size(), static_cast<int32_t>(1 + random() % 12), tiles[random() % 4],
                          static_cast<int32_t>(1 + random() % 132), static_cast<int32_t>(1 + random() % 4),
                          random() % 3 == 0, static_cast<int32_t>(random() % 7));
        expect_sound(s, lens, longest);
        if (HasFatalFailure()) return;
    }
}

// 16 requests of 32K and a block, 8 heads: 257 units where an even share of 132 workers is 250. Of 15 it is 234.
TEST(AttentionSchedule, WholeSegmentsWhereTheyTakeLittleLonger) {
    for (const auto& [requests, units] : {std::pair<size_t, int32_t>{16, 257}, {15, 0}}) {
        const std::vector<int32_t> lens(requests, 32768 + 32);
        const core::Schedule s = make_schedule(requests, 8, 128, 132, 1, false, 3);
        EXPECT_EQ(aligned_units_of(s, lens), units) << requests;
        expect_sound(s, lens, lens[0]);
        int64_t in_pieces = 0;
        for (const Piece& piece : walk(s, lens)) in_pieces += piece.slot >= 0;
        EXPECT_EQ(in_pieces > 0, units == 0) << requests;
    }
}

// 64 requests of 4K and a block: 256 segments of 33 units on 66 workers take 132 where an even share is 128; of 40 they
// take 99 for 80. 128 segments have a worker each, but more requests than a warp looks at.
TEST(AttentionSchedule, WholeSegmentsInTurnsOfAllWorkers) {
    struct Batch {
        size_t requests;
        int32_t segments, workers;
        bool whole;
    };
    for (const auto& [requests, segments, workers, whole] :
         {Batch{64, 4, 66, true}, {40, 4, 66, false}, {64, 8, 132, true}, {64, 2, 132, true}, {66, 2, 132, true}}) {
        std::vector<int32_t> lens(requests, 4096 + 32);
        const core::Schedule s = make_schedule(requests, segments, 128, workers, 1, false, 3);
        EXPECT_EQ(takes_whole(s, lens), whole) << requests;
        expect_sound(s, lens, lens[0]);
        lens[0] = 100000;
        EXPECT_FALSE(takes_whole(s, lens)) << requests;
        expect_sound(s, lens, lens[0]);
    }
}

// The workspace is sized for requests that are all as long as they may be; shorter ones must not need more.
TEST(AttentionSchedule, ShorterRequestsNeedNoMoreSlots) {
    for (const int32_t workers : {1, 5, 66, 132}) {
        for (const int32_t min_units : {1, 2, 3}) {
            const core::Schedule s = make_schedule(1, 1, 64, workers, min_units, false);
            int32_t most = 0;
            for (int32_t total = 1; total < 1000; ++total) {
                ASSERT_GE(core::workers_of(s, total), most);
                most = core::workers_of(s, total);
                ASSERT_GE(core::max_slots(s, total * 64), 2 * most);
                ASSERT_EQ(core::max_slots(s, total * 64), 2 * std::min(total, workers));
            }
        }
    }
    EXPECT_EQ(core::max_slots(make_schedule(0, 8, 64, 132, 2, false), 4096), 0);
    EXPECT_EQ(core::max_slots(make_schedule(3, 8, 320, 132, 1, true), 641), 3 * 8 * 3);
}

// worker_of is the inverse of first_unit, without overflow up to the largest number of units that a launch may have.
TEST(AttentionSchedule, WorkersOfUnits) {
    for (const int32_t total : {1, 2, 131, 132, 133, 1000, 1 << 20, INT32_MAX - 1, INT32_MAX}) {
        for (const int32_t most : {1, 2, 66, 131, 132}) {
            const int32_t workers = std::min(total, most);
            EXPECT_EQ(core::first_unit(total, workers, 0), 0);
            EXPECT_EQ(core::first_unit(total, workers, workers), total);
            for (int32_t worker = 0; worker < workers; ++worker) {
                const int32_t begin = core::first_unit(total, workers, worker);
                const int32_t end = core::first_unit(total, workers, worker + 1);
                ASSERT_LT(begin, end);
                ASSERT_EQ(core::worker_of(total, workers, begin), worker) << total;
                ASSERT_EQ(core::worker_of(total, workers, end - 1), worker) << total;
            }
        }
    }
}

TEST(AttentionSchedule, RowShapes) {
    for (int64_t rows = 1; rows <= 4096; ++rows) {
        const core::RowShape shape = core::row_shape(core::choose_row_shape(rows));
        const int64_t padded = (rows + shape.rows - 1) / shape.rows * shape.rows;
        if (rows <= 256) {
            ASSERT_EQ(shape.rows, (rows + 63) / 64 * 64);
            continue;
        }
        ASSERT_GE(shape.rows, 128) << rows;
        for (const int64_t other : {128, 192, 256}) {
            const int64_t other_padded = (rows + other - 1) / other * other;
            ASSERT_LE(padded, other_padded) << rows;
            if (other > shape.rows) {
                ASSERT_LT(padded, other_padded) << rows;
            }
        }
    }
    for (int i = 0; i < core::kRowShapes; ++i) {
        const core::RowShape shape = core::row_shape(i);
        EXPECT_EQ(shape.rows, 64 * (i + 1));
        EXPECT_EQ(shape.ctas, i == 3 ? 2 : 1);
        EXPECT_EQ(shape.keys % 64, 0) << "a unit must not lie in two tiles";
    }
    // Blocks of 8B, 7B and 1.5B models, and two that are cut.
    EXPECT_EQ(core::row_shape(core::choose_row_shape(4 * 32)).rows, 128);
    EXPECT_EQ(core::row_shape(core::choose_row_shape(7 * 32)).rows, 256);
    EXPECT_EQ(core::row_shape(core::choose_row_shape(6 * 32)).rows, 192);
    EXPECT_EQ(core::row_shape(core::choose_row_shape(384)).rows, 192);
    EXPECT_EQ(core::row_shape(core::choose_row_shape(1024)).rows, 256);
}

BlockAttentionParams dimensions(int64_t requests, int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                int64_t max_seq_len, int64_t split_tokens) {
    BlockAttentionParams params;
    params.num_requests = requests;
    params.num_queries = queries;
    params.num_heads = heads;
    params.num_kv_heads = kv_heads;
    params.head_dim = head_dim;
    params.max_seq_len = max_seq_len;
    params.split_tokens = split_tokens;
    return params;
}

TEST(AttentionPlan, BoundsItsSlots) {
    for (const int64_t queries : {1, 8, 32, 64, 100}) {
        for (const int64_t heads : {4, 12, 28}) {
            for (const int64_t max_seq_len : {1, 64, 65, 1000, 40000}) {
                for (const int64_t split_tokens : {0, 64, 320, 65536}) {
                    const BlockAttentionParams params =
                        dimensions(3, queries, heads, 4, 128, max_seq_len, split_tokens);
                    const core::AttentionPlan plan = core::plan_attention(params, core::kMaxSms);
                    ASSERT_EQ(plan.rows, queries * heads / 4);
                    ASSERT_GE(plan.row_tiles * plan.shape.rows, plan.rows);
                    ASSERT_LT((plan.row_tiles - 1) * plan.shape.rows, plan.rows);
                    ASSERT_EQ(plan.schedule.segments_per_request, 4 * plan.row_tiles);
                    ASSERT_EQ(plan.schedule.fixed, split_tokens > 0);
                    if (split_tokens > 0) {
                        ASSERT_EQ(plan.schedule.unit_tokens, split_tokens);
                        ASSERT_EQ(plan.slots,
                                  3 * 4 * plan.row_tiles * ((max_seq_len + split_tokens - 1) / split_tokens));
                    } else {
                        ASSERT_EQ(plan.schedule.unit_tokens, plan.shape.keys);
                        ASSERT_LE(plan.slots, plan.shape.ctas == 2 ? 132 : 264);
                    }
                    // A device of fewer multiprocessors fits what was allocated; one of more uses no more.
                    for (const int64_t sms : {2, 78, 114})
                        ASSERT_LE(core::plan_attention(params, sms).slots, plan.slots);
                    ASSERT_EQ(core::plan_attention(params, 500).slots, plan.slots);
                    ASSERT_EQ(core::plan_attention(params, 500).schedule.max_workers, 132 / plan.shape.ctas);
                }
            }
        }
    }
}

TEST(AttentionPlan, WorkspaceInNumbers) {
    // 7B, a block of 32: R = 224, a pair of CTAs, 66 workers with two slots of 256 rows.
    BlockAttentionMassParams mass;
    mass.attention = dimensions(1, 32, 28, 4, 128, 16384, 0);
    mass.granularity = 64;
    // 8 bytes name the pieces of a segment.
    const int64_t partials = int64_t{2} * 66 * 256 * (3 * 128 + 12) + 4 * 8;
    EXPECT_EQ(cuda::block_attention_workspace(mass.attention), partials);
    BlockAttentionRowsParams rows;
    rows.attention = mass.attention;
    EXPECT_EQ(cuda::block_attention_rows_workspace(rows), partials + 8 * 4 * 224);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass), partials + 8 * 4 * 224 + 4 * 4 * 224 * 256);
    // 8B, 16 of 32K, R = 128: unit sums of 33.5 MB are packed: 2 bytes for every row and unit, 8 for every row of a
    // slot and a segment. Those of one request, of fixed splits, and of a pair of CTAs, are not.
    const int64_t slot = 128 * (3 * 128 + 12);
    mass.attention = dimensions(16, 32, 32, 8, 128, 32768, 0);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass),
              264 * slot + 128 * 8 + 8 * 128 * 128 + 16 * 128 * (264 + 128) + 2 * int64_t{128} * 512 * 128);
    mass.attention = dimensions(1, 32, 32, 8, 128, 32768, 0);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass),
              264 * slot + 8 * 8 + 8 * 8 * 128 + 4 * int64_t{8} * 512 * 128);
    mass.attention = dimensions(16, 32, 32, 8, 128, 32768, 16384);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass),
              256 * slot + 128 * 8 + 8 * 128 * 128 + 4 * int64_t{128} * 512 * 128);
    mass.attention = dimensions(16, 32, 28, 4, 128, 32768, 0);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass),
              132 * int64_t{256} * (3 * 128 + 12) + 64 * 8 + 8 * 64 * 224 + 4 * int64_t{64} * 512 * 224);
    // 1.5B: R = 192 in tiles of 64 tokens: 3 * 2 * 4 tiles for as many workers.
    EXPECT_EQ(cuda::block_attention_workspace(dimensions(3, 32, 12, 2, 128, 200, 0)),
              2 * 24 * 192 * (3 * 128 + 12) + 3 * 2 * 8);
    // Fixed: a slot per split of 320.
    EXPECT_EQ(cuda::block_attention_workspace(dimensions(3, 32, 12, 2, 64, 1000, 320)),
              int64_t{3} * 2 * 4 * 192 * (3 * 64 + 12) + 3 * 2 * 8);
    // One row of one request: its pieces and its statistics take 8 bytes each, up to 16 for what follows.
    rows.attention = dimensions(1, 1, 1, 1, 64, 64, 0);
    mass.attention = rows.attention;
    EXPECT_EQ(cuda::block_attention_rows_workspace(rows), 2 * 64 * (3 * 64 + 12) + 16 + 16);
    EXPECT_EQ(cuda::block_attention_mass_workspace(mass), 2 * 64 * (3 * 64 + 12) + 16 + 16 + 4);
    rows.attention = dimensions(0, 1, 1, 1, 64, 64, 0);
    EXPECT_EQ(cuda::block_attention_rows_workspace(rows), 0);
}

}  // namespace
}  // namespace mage::test
