#pragma once

#include "kernels/block_attention/mainloop.cuh"

// Purpose   out and lse of the segments that the attention kernel left in pieces, zeros of empty ones.
// Schedule  merge_warps warps per row, each over its own pieces, kInFlight of them read at once; the first adds the
//           others' results in their order.
// Memory    results of the warps of a row in shared memory.
// Ceiling   reads all partial results once, from L2 where they fit.
namespace mage::cuda {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kInFlight = 4;

// Grid (rows / rows per block, Hkv, B).
template <typename T, int kDim>
__global__ void __launch_bounds__(kMergeThreads)
    mage_block_attention_merge_kernel(const __grid_constant__ AttentionArgs args) {
    constexpr int kOwn = kDim / kWarp;  // elements per lane
    constexpr int kRecord = kDim + 3;
    __shared__ float shared[kMergeWarps * kRecord];
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t request = blockIdx.z, kv_head = blockIdx.y;
    const int32_t stream = request * args.num_kv_heads + kv_head;
    const int32_t group = warp / args.merge_warps, part = warp - group * args.merge_warps;
    const int32_t row = blockIdx.x * (kMergeWarps / args.merge_warps) + group;
    const int32_t tile = args.row_tiles == 1 ? 0 : row / args.tile_rows;
    const int32_t tile_row = row - tile * args.tile_rows;
    device::dependency_wait();
    device::dependency_release();

    core::Pieces pieces = {1, 0};
    if (row < args.rows) {
        pieces = args.pieces[stream * args.row_tiles + tile];
        if (args.seq_lens[request] <= 0) pieces.count = 0;
    }
    float reference = -INFINITY, sum = 0.0f, prefix_sum = 0.0f;
    float result[kOwn] = {};
    // Returns by what exponents are reduced: the largest reference, 0 where nothing was seen.
    const auto rebase = [&](float highest) {
        const float base = highest == -INFINITY ? 0.0f : highest;
        const float scale = exp2_fast(reference - base);
        reference = highest;
        sum *= scale;
        prefix_sum *= scale;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) result[j] *= scale;
        return base;
    };
    for (int32_t base = part; base < pieces.count && pieces.count > 1; base += kInFlight * args.merge_warps) {
        float stats[kInFlight][3], values[kInFlight][kOwn];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int32_t piece = base + i * args.merge_warps;
            stats[i][0] = -INFINITY;
            stats[i][1] = stats[i][2] = 0.0f;
#pragma unroll
            for (int j = 0; j < kOwn; ++j) values[i][j] = 0.0f;
            if (piece >= pieces.count) continue;
            const int64_t slot = core::slot_of_piece(args.schedule, pieces, piece);
            const float* own = args.partial_rows + slot * 3 * args.tile_rows + tile_row;
#pragma unroll
            for (int j = 0; j < 3; ++j) stats[i][j] = own[j * args.tile_rows];
            const float* from = args.partial + (slot * args.tile_rows + tile_row) * kDim + lane * kOwn;
#pragma unroll
            for (int j = 0; j < kOwn; j += 2) {
                const float2 pair = *reinterpret_cast<const float2*>(from + j);
                values[i][j] = pair.x;
                values[i][j + 1] = pair.y;
            }
        }
        float highest = reference;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) highest = fmaxf(highest, stats[i][0]);
        const float base_reference = rebase(highest);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const float weight = exp2_fast(stats[i][0] - base_reference);
            sum += weight * stats[i][1];
            prefix_sum += weight * stats[i][2];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) result[j] += weight * values[i][j];
        }
    }
    if (args.merge_warps > 1) {
        float* own = shared + warp * kRecord;
        if (part > 0) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) own[j * kWarp + lane] = result[j];
            if (lane == 0) {
                own[kDim] = reference;
                own[kDim + 1] = sum;
                own[kDim + 2] = prefix_sum;
            }
        }
        __syncthreads();
        for (int32_t i = 1; i < args.merge_warps && part == 0; ++i) {
            const float* other = own + i * kRecord;
            const float weight_reference = other[kDim];
            const float weight = exp2_fast(weight_reference - rebase(fmaxf(reference, weight_reference)));
            sum += weight * other[kDim + 1];
            prefix_sum += weight * other[kDim + 2];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) result[j] += weight * other[j * kWarp + lane];
        }
    }
    if (pieces.count == 1 || part != 0) return;
    const int32_t query = query_of(args, row);
    const int32_t head = kv_head * args.group + row - query * args.group;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    uint32_t* out = static_cast<uint32_t*>(args.out) +
                    (((int64_t{request} * args.num_queries + query) * args.num_heads + head) * kDim + lane * kOwn) / 2;
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) out[j / 2] = pack(result[j] * inverse, result[j + 1] * inverse, T());
    if (lane == 0) {
        const float log2_sum = sum == 0.0f ? -INFINITY : reference + log2f(sum);
        args.lse[(int64_t{request} * args.num_heads + head) * args.num_queries + query] = log2_sum * kLn2;
        if (args.units != nullptr) {
            float* stats = args.row_stats + (int64_t{stream} * args.rows + row) * 2;
            stats[0] = log2_sum;
            stats[1] = prefix_sum == 0.0f ? -INFINITY : reference + log2f(prefix_sum);
        }
    }
}

}  // namespace mage::cuda
