#pragma once

#include <cuda.h>

#include "core/attention_schedule.h"
#include "kernels/block_attention/arguments.h"
#include "mage/types.h"

// The compiled instances of the attention kernel: dtype x head dim x row shape (core/attention_schedule.h) x what it
// reads, a range of tokens or lists. Lists of the first shape are those of short_lists.cuh, for any number of rows.
namespace mage::cuda {

using AttentionKernel = void (*)(AttentionArgs, CUtensorMap, CUtensorMap);
using MergeKernel = void (*)(AttentionArgs);

constexpr int kMaxUnitRows = 1024;  // rows per KV head where masses are emitted

struct AttentionVariant {
    const char* name;
    AttentionKernel attention;
    int threads, shared_bytes;
    int rows, ctas, keys;  // of a CTA; of a worker, 0: as the launch says; of a tile
};

// The launch after attention: merges pieces and, with masses, finishes these too.
struct MergeVariant {
    const char* name;
    MergeKernel merge;
    int threads, warps;
};

const MergeVariant& merge_variant(bool mass);

const AttentionVariant& attention_variant_bf16_d128(int row_shape, bool lists);
const AttentionVariant& attention_variant_bf16_d64(int row_shape, bool lists);
const AttentionVariant& attention_variant_fp16_d128(int row_shape, bool lists);
const AttentionVariant& attention_variant_fp16_d64(int row_shape, bool lists);

}  // namespace mage::cuda
