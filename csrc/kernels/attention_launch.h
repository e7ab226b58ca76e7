#pragma once

#include "core/attention_schedule.h"
#include "core/check.h"
#include "mage/block_attention_mass.h"
#include "mage/stream.h"

// How the ops that are attention reach its one kernel, and what token_mass shares with them.
namespace mage::cuda {

// What is emitted beside out and lse.
struct UnitOutputs {
    int64_t granularity = 0;  // 0: nothing
    MassScore score = MassScore::kMean;
    const bool* row_mask = nullptr;
    const int32_t* prefix_lens = nullptr;  // null: norm context
    float* mass = nullptr;                 // [B, Hkv, n]; null: natural logs of the rows' shares, in `units`
    float* units = nullptr;                // [B, Hkv, n, R]; null: in the workspace
    int64_t pack_from = core::kPackFrom;   // bytes of unit sums that are packed
};

// What is read where it is not the whole cache; mage/sparse_block_attention.h.
struct ListInputs {
    const int32_t* indices = nullptr;
    const int32_t* counts = nullptr;
    const int32_t* tail_start = nullptr;
    int64_t capacity = 0, granularity = 0;
};

// What the kernels over K and V serve.
inline void check_served(const char* op, DType dtype, int64_t head_dim) {
    MAGE_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16, op,
               ": q must be bfloat16 or float16 on CUDA, got float32");
    MAGE_CHECK(head_dim == 64 || head_dim == 128, op, ": the head dim of q must be 64 or 128 on CUDA, got ", head_dim);
}

// One launch where clusters merge the pieces of their segment; else two: attention, and the merge of what it left in
// pieces. Either finishes units.
void launch_block_attention(const char* op, const BlockAttentionParams& params, const UnitOutputs& outputs,
                            const ListInputs* lists, CudaStream stream);

}  // namespace mage::cuda
