#include "mage/block_attention_mass.h"

#include "core/check.h"
#include "kernels/attention_launch.h"

namespace mage::cuda {

void block_attention_mass(const BlockAttentionMassParams& params, CudaStream stream) {
    constexpr char kOp[] = "block_attention_mass";
    check_block_attention_mass(params);
    const int64_t needed = block_attention_mass_workspace(params);
    MAGE_CHECK(params.attention.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed,
               " bytes, got ", params.attention.workspace_bytes);
    UnitOutputs outputs;
    outputs.granularity = params.granularity;
    outputs.score = params.score;
    outputs.row_mask = params.row_mask;
    outputs.prefix_lens = params.norm == MassNorm::kPrefix ? params.prefix_lens : nullptr;
    outputs.mass = params.mass;
    launch_block_attention(kOp, params.attention, outputs, nullptr, stream);
}

}  // namespace mage::cuda
