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
    const char* merge_name;
    AttentionKernel attention;
    MergeKernel merge;
    int threads, shared_bytes;
    int rows, ctas, keys;  // as the row shape says
    int merge_warps;
};

struct FinishVariant {
    const char* name;
    MergeKernel finish;
    int threads, units;  // of a block
};

// many_units: four units to a warp instead of one.
const FinishVariant& finish_variant(bool many_units);

const AttentionVariant& attention_variant_bf16_d128(int row_shape);
const AttentionVariant& attention_variant_bf16_d64(int row_shape);
const AttentionVariant& attention_variant_fp16_d128(int row_shape);
const AttentionVariant& attention_variant_fp16_d64(int row_shape);

}  // namespace mage::cuda
