#include "mage/block_attention_rows.h"

#include "core/check.h"
#include "kernels/attention_launch.h"

namespace mage::cuda {

void block_attention_rows(const BlockAttentionRowsParams& params, CudaStream stream) {
    constexpr char kOp[] = "block_attention_rows";
    check_block_attention_rows(params);
    const int64_t needed = block_attention_rows_workspace(params);
    MAGE_CHECK(params.attention.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed,
               " bytes, got ", params.attention.workspace_bytes);
    UnitOutputs outputs;
    outputs.granularity = params.granularity;
    outputs.units = params.row_mass;
    launch_block_attention(kOp, params.attention, outputs, nullptr, stream);
}

}  // namespace mage::cuda
