#pragma once

#include <cuda.h>

#include "core/attention_schedule.h"
#include "kernels/block_attention/arguments.h"
#include "mage/types.h"

// The compiled instances of the attention kernel: dtype x head dim x row shape (core/attention_schedule.h) x what it
// serves, a range of tokens, the same with packed unit sums, or lists. Lists of the first shape are those of
// short_lists.cuh, for any number of rows.
namespace mage::cuda {

enum class Serves { kRange, kPacked, kLists };

using AttentionKernel = void (*)(AttentionArgs, CUtensorMap, CUtensorMap);
using MergeKernel = void (*)(AttentionArgs);

constexpr int kMaxUnitRows = 1024;   // rows per KV head where masses are emitted
constexpr int kMaxPackedRows = 256;  // that the lanes of a warp have, eight each

struct AttentionVariant {
    const char* name;
    AttentionKernel attention;
    int threads, shared_bytes;
    int rows, ctas, keys;  // of a CTA; of a worker, 0: as the launch says; of a tile
};

// What the launch after attention does beside merging pieces: finish unit sums that are logarithms, or packed ones.
enum class Finish { kNothing, kUnits, kPacked };
constexpr int kFinishes = 3;

struct MergeVariant {
    const char* name;
    MergeKernel merge;
    int threads, warps;
};

const MergeVariant& merge_variant(Finish finish);

const AttentionVariant& attention_variant_bf16_d128(int row_shape, Serves serves);
const AttentionVariant& attention_variant_bf16_d64(int row_shape, Serves serves);
const AttentionVariant& attention_variant_fp16_d128(int row_shape, Serves serves);
const AttentionVariant& attention_variant_fp16_d64(int row_shape, Serves serves);

}  // namespace mage::cuda
