#pragma once

#include "mage/block_attention_mass.h"
#include "mage/stream.h"

// How the ops that are attention reach its one kernel.
namespace mage::cuda {

// What is emitted beside out and lse.
struct UnitOutputs {
    int64_t granularity = 0;  // 0: nothing
    MassScore score = MassScore::kMean;
    const bool* row_mask = nullptr;
    const int32_t* prefix_lens = nullptr;  // null: norm context
    float* mass = nullptr;                 // [B, Hkv, n]; null: natural logs of the rows' shares, in `units`
    float* units = nullptr;                // [B, Hkv, n, R]; null: in the workspace
};

// Two launches: attention, and the merge of what it left in pieces, which also finishes units.
void launch_block_attention(const char* op, const BlockAttentionParams& params, const UnitOutputs& outputs,
                            CudaStream stream);

}  // namespace mage::cuda
