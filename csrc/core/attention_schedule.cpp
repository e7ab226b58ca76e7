#include "core/attention_schedule.h"

#include <algorithm>

#include "mage/block_attention_mass.h"
#include "mage/block_attention_rows.h"
#include "mage/sparse_block_attention.h"

namespace mage::core {

namespace {

constexpr int64_t kMinKeys = 128;   // tokens that a worker should have: below, its result costs more
constexpr int kLeastListShape = 1;  // the kernel of 64 rows of lists is that of short ones, which has a plan of its own
constexpr int64_t kPieceKeys = 384;  // as many tokens as take as long as starting and ending a piece

}  // namespace

RowShape row_shape(int index) {
    constexpr RowShape kShapes[kRowShapes] = {{64, 1, 64}, {128, 1, 128}, {192, 1, 64}, {256, 2, 128}};
    return kShapes[index];
}

int choose_row_shape(int64_t rows) {
    int best = 0;
    int64_t best_rows = 0;
    for (int i = 0; i < kRowShapes; ++i) {
        const int64_t tile = row_shape(i).rows;
        if (rows <= tile) return i;
        const int64_t padded = (rows + tile - 1) / tile * tile;
        // A tile of 64 rows would read K and V once more for every 64.
        if (i > 0 && (best == 0 || padded <= best_rows)) {
            best = i;
            best_rows = padded;
        }
    }
    return best;
}

namespace {

AttentionPlan plan(const BlockAttentionParams& p, int64_t requests, int64_t heads_per_request, int64_t max_length,
                   int64_t sms, int least_shape) {
    AttentionPlan plan;
    plan.rows = p.num_queries * (p.num_heads / p.num_kv_heads);
    plan.shape_index = std::max(choose_row_shape(plan.rows), least_shape);
    plan.shape = row_shape(plan.shape_index);
    plan.row_tiles = (plan.rows + plan.shape.rows - 1) / plan.shape.rows;
    Schedule& s = plan.schedule;
    s.num_requests = static_cast<int32_t>(requests);
    s.segments_per_request = static_cast<int32_t>(heads_per_request * plan.row_tiles);
    s.fixed = p.split_tokens > 0;
    s.max_workers = static_cast<int32_t>(std::min(sms, kMaxSms) / plan.shape.ctas);
    s.unit_tokens = static_cast<int32_t>(p.split_tokens);
    s.unit_shift = log2_of(s.unit_tokens);
    if (int64_t{1} << s.unit_shift != s.unit_tokens) s.unit_shift = 0;
    set_tile(&s, plan.shape.keys);
    plan.slots = max_slots(s, max_length);
    return plan;
}

}  // namespace

void set_tile(Schedule* schedule, int64_t keys) {
    if (schedule->fixed) return;
    schedule->unit_tokens = static_cast<int32_t>(keys);
    schedule->unit_shift = log2_of(keys);
    schedule->min_units = static_cast<int32_t>((kMinKeys + keys - 1) / keys);
    schedule->piece_units = static_cast<int32_t>(kPieceKeys / keys);
}

AttentionPlan plan_attention(const BlockAttentionParams& p, int64_t sms) {
    return plan(p, p.num_requests, p.num_kv_heads, p.max_seq_len, sms, 0);
}

AttentionPlan plan_list_attention(const BlockAttentionParams& p, int64_t list_tokens, int64_t sms) {
    return plan(p, p.num_requests * p.num_kv_heads, 1, max_list_positions(list_tokens, p.max_seq_len), sms,
                kLeastListShape);
}

}  // namespace mage::core

namespace mage::cuda {

int64_t block_attention_workspace(const BlockAttentionParams& p) {
    const core::AttentionPlan plan = core::plan_attention(p, core::kMaxSms);
    return 4 * (plan.partial_floats(p.head_dim) + plan.partial_row_floats() +
                plan.piece_floats(p.num_requests * p.num_kv_heads));
}

int64_t sparse_block_attention_workspace(const SparseBlockAttentionParams& params) {
    const BlockAttentionParams& p = params.attention;
    const core::AttentionPlan plan = core::plan_list_attention(p, params.capacity * params.granularity, core::kMaxSms);
    return 4 * (plan.partial_floats(p.head_dim) + plan.partial_row_floats() +
                plan.piece_floats(p.num_requests * p.num_kv_heads));
}

int64_t block_attention_rows_workspace(const BlockAttentionRowsParams& params) {
    const BlockAttentionParams& p = params.attention;
    const core::AttentionPlan plan = core::plan_attention(p, core::kMaxSms);
    return block_attention_workspace(p) + 4 * plan.stat_floats(p.num_requests * p.num_kv_heads);
}

int64_t block_attention_mass_workspace(const BlockAttentionMassParams& params) {
    BlockAttentionRowsParams rows;
    rows.attention = params.attention;
    const BlockAttentionParams& p = params.attention;
    core::AttentionPlan plan = core::plan_attention(p, core::kMaxSms);
    const int64_t streams = p.num_requests * p.num_kv_heads;
    const int64_t units = (p.max_seq_len + params.granularity - 1) / params.granularity;
    plan.pack_units(streams, units);
    return block_attention_rows_workspace(rows) + 4 * (plan.level_floats(streams) + plan.unit_floats(streams, units));
}

}  // namespace mage::cuda
