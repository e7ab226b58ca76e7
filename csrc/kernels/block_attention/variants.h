#pragma once

#include <cuda.h>

#include "core/attention_schedule.h"
#include "kernels/block_attention/arguments.h"
#include "mage/types.h"

// The compiled instances of the attention kernel: dtype x head dim x row shape (core/attention_schedule.h).
namespace mage::cuda {

using AttentionKernel = void (*)(AttentionArgs, CUtensorMap, CUtensorMap);
using MergeKernel = void (*)(AttentionArgs);

constexpr int kMaxUnitRows = 1024;  // rows per KV head where masses are emitted

struct AttentionVariant {
    const char* name;
    AttentionKernel attention;
    int threads, shared_bytes;
    int rows, ctas, keys;  // as the row shape says
};

// What the launch after attention does: merge pieces; finish masses too; the same with four units to a warp.
enum class MergeWork { kMerge = 0, kMass = 1, kMass4 = 2 };
constexpr int kMergeWorks = 3;

struct MergeVariant {
    const char* name;
    MergeKernel merge;
    int threads, warps;
    int units;  // that a warp takes at once
};

const MergeVariant& merge_variant(MergeWork work);

const AttentionVariant& attention_variant_bf16_d128(int row_shape);
const AttentionVariant& attention_variant_bf16_d64(int row_shape);
const AttentionVariant& attention_variant_fp16_d128(int row_shape);
const AttentionVariant& attention_variant_fp16_d64(int row_shape);

}  // namespace mage::cuda
