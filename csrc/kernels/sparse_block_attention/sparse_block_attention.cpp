#include "mage/sparse_block_attention.h"

#include "core/attention_schedule.h"
#include "core/check.h"
#include "kernels/attention_launch.h"

namespace mage::cuda {

void sparse_block_attention(const SparseBlockAttentionParams& params, CudaStream stream) {
    constexpr char kOp[] = "sparse_block_attention";
    check_sparse_block_attention(params);
    const BlockAttentionParams& p = params.attention;
    const int64_t needed = sparse_block_attention_workspace(params);
    MAGE_CHECK(p.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed, " bytes, got ",
               p.workspace_bytes);
    ListInputs lists;
    lists.indices = params.indices;
    lists.counts = params.counts;
    lists.tail_start = params.tail_start;
    lists.capacity = params.capacity;
    lists.granularity = params.granularity;
    launch_block_attention(kOp, p, UnitOutputs(), &lists, stream);
}

}  // namespace mage::cuda
