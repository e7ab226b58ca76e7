#include "core/token_mass_plan.h"

#include <algorithm>

#include "core/attention_schedule.h"

namespace mage::core {

namespace {

int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

}  // namespace

TokenMassPlan plan_token_mass(const TokenMassParams& p) {
    TokenMassPlan plan;
    plan.rows = p.num_queries * (p.num_heads / p.num_kv_heads);
    plan.chunks = divide_up(plan.rows, kMassShapes[kNumMassShapes - 1]);
    plan.chunk_rows = divide_up(divide_up(plan.rows, plan.chunks), 8) * 8;
    while (kMassShapes[plan.shape] < plan.chunk_rows) ++plan.shape;
    plan.list_tiles = divide_up(p.num_candidates * p.granularity, kMassTile);
    const int64_t streams = p.num_requests * p.num_kv_heads;
    plan.max_tiles = streams * divide_up(p.max_seq_len, kMassTile);
    plan.padded_rows = divide_up(plan.rows, 16) * 16;
    plan.slots = streams + std::min(kMaxSms, plan.max_tiles);
    return plan;
}

}  // namespace mage::core

namespace mage::cuda {

int64_t token_mass_workspace(const TokenMassParams& params) {
    if (params.norm == MassNorm::kContext) return 0;
    const core::TokenMassPlan plan = core::plan_token_mass(params);
    return 4 * plan.padded_rows * plan.slots + 8 * params.num_requests * params.num_kv_heads;
}

}  // namespace mage::cuda
