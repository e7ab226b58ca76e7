#include "mage/block_attention_rows.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cpu/attention.h"
#include "mage/token_mass.h"

namespace mage {

namespace {

constexpr char kOp[] = "block_attention_rows";

}  // namespace

int64_t block_attention_rows_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                       int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t granularity,
                                       int64_t split_tokens) {
    BlockAttentionRowsParams params;
    params.attention = cpu::attention_dims(kOp, num_requests, num_queries, num_heads, num_kv_heads, head_dim,
                                           max_seq_len, split_tokens);
    params.granularity = granularity;
    cpu::check_granularity(kOp, granularity);
    return std::max(cpu::block_attention_rows_workspace(params), cuda::block_attention_rows_workspace(params));
}

void check_block_attention_rows(const BlockAttentionRowsParams& params) {
    check_block_attention(params.attention, kOp);
    cpu::check_granularity(kOp, params.granularity);
}

namespace cpu {

int64_t block_attention_rows_workspace(const BlockAttentionRowsParams& params) {
    const BlockAttentionParams& p = params.attention;
    const AttentionPlan plan = plan_attention(p, p.max_seq_len);
    const int64_t partials = 4 * plan.workspace_floats();
    if (params.granularity == 1) {
        return std::max(partials, token_mass_workspace(token_mass_params(p)));
    }
    return partials +
           4 * p.num_requests * p.num_kv_heads * plan.padded_rows * (divide_up(p.max_seq_len, kTileTokens) + 1);
}

void block_attention_rows(const BlockAttentionRowsParams& params) {
    check_block_attention_rows(params);
    const BlockAttentionParams& p = params.attention;
    const int64_t g = params.granularity;
    check_workspace(kOp, p.workspace_bytes, block_attention_rows_workspace(params));
    const AttentionPlan plan = plan_attention(p, p.max_seq_len);
    if (g == 1) {
        run_attention(p, plan, UnitBuffers(), RunsOf());
        TokenMassParams tokens = token_mass_params(p);
        tokens.score = MassScore::kRows;
        tokens.mass = params.row_mass;
        token_mass(tokens);
        return;
    }

    const int64_t num_streams = p.num_requests * p.num_kv_heads;
    const int64_t num_units = divide_up(p.max_seq_len, g);
    const int64_t unit_tiles = divide_up(p.max_seq_len, kTileTokens);
    UnitBuffers units;
    units.granularity = g;
    units.num_units = num_units;
    units.sums = params.row_mass;  // holds the sums until the final lse is known
    units.sums_stride = plan.rows;
    units.reference = static_cast<float*>(p.workspace) + plan.workspace_floats();
    units.lse_log2 = units.reference + num_streams * unit_tiles * plan.padded_rows;

    const auto to_log_shares = MAGE_CPU_PICK(unit_log_shares);
    run_attention(p, plan, units, RunsOf(), [&](int64_t stream, int64_t row_begin, int64_t row_end) {
        const int32_t seq_len = clamped_seq_len(p.seq_lens, stream / p.num_kv_heads, p.max_seq_len, p.pages);
        UnitItem item;
        item.units.unit_tokens = static_cast<int32_t>(g);
        item.units.sums = units.sums + stream * num_units * plan.rows;
        item.units.sums_stride = plan.rows;
        item.units.reference = units.reference + stream * unit_tiles * plan.padded_rows;
        item.units.reference_stride = plan.padded_rows;
        item.row_begin = static_cast<int32_t>(row_begin);
        item.num_rows = static_cast<int32_t>(row_end);
        item.unit_end = static_cast<int32_t>(divide_up(seq_len, g));
        item.lse_log2 = units.lse_log2 + stream * plan.padded_rows;
        to_log_shares(item);
        for (int64_t unit = item.unit_end; unit < num_units; ++unit) {
            float* row = item.units.sums + unit * plan.rows;
            std::fill(row + row_begin, row + row_end, -INFINITY);
        }
    });
}

}  // namespace cpu
}  // namespace mage
