#include "mage/block_attention_mass.h"

#include <algorithm>

#include "core/check.h"
#include "cpu/attention.h"
#include "mage/token_mass.h"

namespace mage {

namespace {

constexpr char kOp[] = "block_attention_mass";

// The workspace after the partial results, in floats per (request, KV head).
struct Layout {
    int64_t num_units, unit_tiles, padded_rows;
    int64_t sums() const { return num_units * padded_rows; }
    int64_t reference() const { return unit_tiles * padded_rows; }
    int64_t total() const { return sums() + reference() + 2 * padded_rows; }
};

Layout make_layout(const cpu::AttentionPlan& plan, int64_t max_seq_len, int64_t granularity) {
    return {cpu::divide_up(max_seq_len, granularity), cpu::divide_up(max_seq_len, cpu::kTileTokens), plan.padded_rows};
}

// Weights of the rows of a request: 1 for kept ones. Returns how many rows are kept.
int64_t row_weights(const bool* row_mask, int64_t num_queries, int64_t group, int64_t padded_rows, float* weights) {
    int64_t kept = 0;
    std::fill(weights, weights + padded_rows, 0.0f);
    for (int64_t r = 0; r < num_queries * group; ++r) {
        if (row_mask != nullptr && !row_mask[r / group]) continue;
        weights[r] = 1.0f;
        ++kept;
    }
    return kept;
}

}  // namespace

int64_t block_attention_mass_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                       int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t granularity,
                                       int64_t split_tokens) {
    BlockAttentionMassParams params;
    params.attention = cpu::attention_dims(kOp, num_requests, num_queries, num_heads, num_kv_heads, head_dim,
                                           max_seq_len, split_tokens);
    params.granularity = granularity;
    cpu::check_granularity(kOp, granularity);
    return std::max(cpu::block_attention_mass_workspace(params), cuda::block_attention_mass_workspace(params));
}

void check_block_attention_mass(const BlockAttentionMassParams& params) {
    check_block_attention(params.attention, kOp);
    cpu::check_granularity(kOp, params.granularity);
    MAGE_CHECK(params.score != MassScore::kRows, kOp, ": score must be mean or max, got rows");
    MAGE_CHECK(params.norm == MassNorm::kContext || params.prefix_lens != nullptr || params.attention.num_requests == 0,
               kOp, ": prefix_lens must be given with norm prefix");
}

namespace cpu {

int64_t block_attention_mass_workspace(const BlockAttentionMassParams& params) {
    const BlockAttentionParams& p = params.attention;
    const AttentionPlan plan = plan_attention(p, p.max_seq_len);
    const int64_t partials = 4 * plan.workspace_floats();
    if (params.granularity == 1) {
        return std::max(partials, token_mass_workspace(token_mass_params(p)));
    }
    return partials +
           4 * p.num_requests * p.num_kv_heads * make_layout(plan, p.max_seq_len, params.granularity).total();
}

void block_attention_mass(const BlockAttentionMassParams& params) {
    check_block_attention_mass(params);
    const BlockAttentionParams& p = params.attention;
    const int64_t g = params.granularity;
    check_workspace(kOp, p.workspace_bytes, block_attention_mass_workspace(params));
    const AttentionPlan plan = plan_attention(p, p.max_seq_len);
    if (g == 1) {
        // Keeping every row's every score would take as much memory as the scores; a second pass over K takes none.
        run_attention(p, plan, UnitBuffers(), RunsOf());
        TokenMassParams tokens = token_mass_params(p);
        tokens.score = params.score;
        tokens.norm = params.norm;
        tokens.row_mask = params.row_mask;
        tokens.prefix_lens = params.prefix_lens;
        tokens.mass = params.mass;
        token_mass(tokens);
        return;
    }

    const Layout layout = make_layout(plan, p.max_seq_len, g);
    const int64_t num_streams = p.num_requests * p.num_kv_heads;
    float* sums = static_cast<float*>(p.workspace) + plan.workspace_floats();
    float* reference = sums + num_streams * layout.sums();
    float* lse_log2 = reference + num_streams * layout.reference();
    float* weights = lse_log2 + num_streams * layout.padded_rows;
    UnitBuffers units;
    units.granularity = g;
    units.num_units = layout.num_units;
    units.sums = sums;
    units.sums_stride = layout.padded_rows;
    units.reference = reference;
    units.lse_log2 = lse_log2;
    units.end = params.norm == MassNorm::kPrefix ? params.prefix_lens : nullptr;
    std::fill(lse_log2, lse_log2 + num_streams * layout.padded_rows, 0.0f);

    const int64_t group = p.num_heads / p.num_kv_heads;
    const auto row_totals = MAGE_CPU_PICK(unit_row_totals);
    const auto emit = MAGE_CPU_PICK(unit_mass);
    const auto stream_done = [&](int64_t stream, float* totals) {
        const int64_t request = stream / p.num_kv_heads;
        const int64_t used = divide_up(clamped_seq_len(p.seq_lens, request, p.max_seq_len, p.pages), g);
        float* weight = weights + stream * layout.padded_rows;
        const bool* mask = params.row_mask == nullptr ? nullptr : params.row_mask + request * p.num_queries;
        const int64_t kept = row_weights(mask, p.num_queries, group, layout.padded_rows, weight);
        UnitItem item;
        item.units.unit_tokens = static_cast<int32_t>(g);
        item.units.sums = sums + stream * layout.sums();
        item.units.sums_stride = layout.padded_rows;
        item.units.reference = reference + stream * layout.reference();
        item.units.reference_stride = layout.padded_rows;
        item.num_rows = static_cast<int32_t>(plan.rows);
        item.unit_end = static_cast<int32_t>(kept == 0 ? 0 : used);
        item.lse_log2 = lse_log2 + stream * layout.padded_rows;
        item.weight = weight;
        item.maximum = params.score == MassScore::kMax;
        item.factor = item.maximum || kept == 0 ? 1.0f : 1.0f / static_cast<float>(kept);
        item.mass = params.mass + stream * layout.num_units;
        item.row_total = totals;
        if (params.norm == MassNorm::kPrefix) {
            row_totals(item);
            for (int64_t r = 0; r < plan.rows; ++r) {
                if (weight[r] > 0.0f) weight[r] = totals[r] == 0.0f ? 0.0f : 1.0f / totals[r];
            }
        }
        emit(item);
        std::fill(item.mass + item.unit_end, item.mass + layout.num_units, 0.0f);
    };
    run_attention(p, plan, units, RunsOf(), nullptr, stream_done);
}

}  // namespace cpu
}  // namespace mage
