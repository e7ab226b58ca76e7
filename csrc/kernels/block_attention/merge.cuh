#pragma once

#include "kernels/block_attention/mainloop.cuh"

// Purpose   what the attention kernel left in pieces: out and lse of cut segments, zeros of empty ones; and the masses,
// whose
//           last factor is the final lse: share[r, j] = 2^(unit[j, r] - log2 sum[r]).
// Schedule  two kinds of blocks in one launch. Merging: one or more warps per row, each over its own pieces, in their
// order. Masses: a block takes some
//           units of one stream, first finds the final sums of all rows (from the pieces or from row_stats), then a
//           warp per unit adds over the rows.
// Memory    the final sums of at most kMaxMassRows rows in shared memory.
// Ceiling   reads all partial results and unit sums once, from L2 where they fit.
namespace mage::cuda {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kMaxMassRows = 4096;

// The pieces of a row's segment.
struct RowPieces {
    core::Pieces pieces;
    int32_t tile_row;
};

__device__ __forceinline__ RowPieces row_pieces(const AttentionArgs& args, int32_t total, int32_t before, int32_t units,
                                                int32_t kv_head, int32_t row) {
    const int32_t tile = row / args.tile_rows;
    RowPieces found;
    found.tile_row = row - tile * args.tile_rows;
    const int32_t begin = before + (kv_head * args.row_tiles + tile) * units;
    found.pieces = core::pieces_of(args.schedule, total, begin, units);
    return found;
}

// What a piece says about a row: reference, sum, sum below P; kStats apart.
__device__ __forceinline__ const float* piece_stats(const AttentionArgs& args, const RowPieces& row, int32_t i) {
    const int64_t slot = core::slot_of_piece(args.schedule, row.pieces, i);
    return args.partial_rows + slot * 3 * args.tile_rows + row.tile_row;
}

constexpr int kInFlight = 8;  // pieces that are read at once

// merge_warps warps share the pieces of a row: each adds its own, relative to the largest reference that it saw, and
// the first adds the others' in their order.
template <typename T, int kDim>
__device__ __forceinline__ void merge_rows(const AttentionArgs& args, float* shared) {
    constexpr int kOwn = kDim / kWarp;  // elements per lane
    constexpr int kRecord = kDim + 2;
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t rows_per_block = kMergeWarps / args.merge_warps;
    const int32_t blocks_per_stream = (args.rows + rows_per_block - 1) / rows_per_block;
    const int32_t stream = blockIdx.x / blocks_per_stream;
    const int32_t row = (blockIdx.x - stream * blocks_per_stream) * rows_per_block + warp / args.merge_warps;
    const int32_t part = warp % args.merge_warps;
    const int32_t request = stream / args.num_kv_heads, kv_head = stream - request * args.num_kv_heads;
    int32_t before;
    const int32_t total = count_units(args, request, &before);
    const int32_t units = core::units_of(args.schedule, clamped_length(args, request));
    RowPieces found = row_pieces(args, total, before, units, kv_head, min(row, args.rows - 1));
    if (row >= args.rows) found.pieces.count = 1;  // nothing to do

    float reference = -INFINITY, sum = 0.0f;
    float result[kOwn] = {};
    for (int32_t base = part; base < found.pieces.count && found.pieces.count > 1;
         base += kInFlight * args.merge_warps) {
        float references[kInFlight], sums[kInFlight], values[kInFlight][kOwn];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int32_t piece = base + i * args.merge_warps;
            references[i] = -INFINITY;
            sums[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < kOwn; ++j) values[i][j] = 0.0f;
            if (piece >= found.pieces.count) continue;
            const float* stats = piece_stats(args, found, piece);
            references[i] = stats[0];
            sums[i] = stats[args.tile_rows];
            const int64_t slot = core::slot_of_piece(args.schedule, found.pieces, piece);
            const float* from = args.partial + (slot * args.tile_rows + found.tile_row) * kDim + lane * kOwn;
#pragma unroll
            for (int j = 0; j < kOwn; j += 2) {
                const float2 pair = *reinterpret_cast<const float2*>(from + j);
                values[i][j] = pair.x;
                values[i][j + 1] = pair.y;
            }
        }
        float highest = reference;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) highest = fmaxf(highest, references[i]);
        if (highest == -INFINITY) continue;
        const float scale = exp2_fast(reference - highest);
        sum *= scale;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) result[j] *= scale;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const float weight = exp2_fast(references[i] - highest);
            sum += weight * sums[i];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) result[j] += weight * values[i][j];
        }
        reference = highest;
    }
    if (args.merge_warps > 1) {
        if (part > 0) {
            float* to = shared + warp * kRecord;
#pragma unroll
            for (int j = 0; j < kOwn; ++j) to[j * kWarp + lane] = result[j];
            if (lane == 0) {
                to[kDim] = reference;
                to[kDim + 1] = sum;
            }
        }
        __syncthreads();
        for (int32_t i = 1; i < args.merge_warps && part == 0; ++i) {
            const float* from = shared + (warp + i) * kRecord;
            const float highest = fmaxf(reference, from[kDim]);
            if (highest == -INFINITY) continue;
            const float scale = exp2_fast(reference - highest), weight = exp2_fast(from[kDim] - highest);
            sum = sum * scale + weight * from[kDim + 1];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) result[j] = result[j] * scale + weight * from[j * kWarp + lane];
            reference = highest;
        }
    }
    if (found.pieces.count == 1 || part != 0) return;
    const int32_t query = row / args.group;
    const int32_t head = kv_head * args.group + row - query * args.group;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    uint32_t* out = static_cast<uint32_t*>(args.out) +
                    (((int64_t{request} * args.num_queries + query) * args.num_heads + head) * kDim + lane * kOwn) / 2;
#pragma unroll
    for (int j = 0; j < kOwn; j += 2) out[j / 2] = pack(result[j] * inverse, result[j + 1] * inverse, T());
    if (lane == 0) {
        args.lse[(int64_t{request} * args.num_heads + head) * args.num_queries + query] =
            sum > 0.0f ? (reference + log2f(sum)) * 0.6931471805599453f : -INFINITY;
    }
}

// log2 of a row's final sums: over everything, or over the prefix (then -inf where that is below 2^-126 of everything).
__device__ __forceinline__ float final_sum(const AttentionArgs& args, const RowPieces& row, int64_t stat_row) {
    float all = -INFINITY, below = -INFINITY;
    if (row.pieces.count == 1) {
        all = args.row_stats[stat_row * 2];
        below = args.row_stats[stat_row * 2 + 1];
    } else {
        float reference = -INFINITY, sum = 0.0f, prefix_sum = 0.0f;
        for (int32_t base = 0; base < row.pieces.count; base += kInFlight) {
            float references[kInFlight], sums[kInFlight], prefix_sums[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                references[i] = -INFINITY;
                sums[i] = prefix_sums[i] = 0.0f;
                if (base + i >= row.pieces.count) continue;
                const float* stats = piece_stats(args, row, base + i);
                references[i] = stats[0];
                sums[i] = stats[args.tile_rows];
                if (args.prefix_lens != nullptr) prefix_sums[i] = stats[2 * args.tile_rows];
            }
            float highest = reference;
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) highest = fmaxf(highest, references[i]);
            if (highest == -INFINITY) continue;
            const float scale = exp2_fast(reference - highest);
            sum *= scale;
            prefix_sum *= scale;
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const float weight = exp2_fast(references[i] - highest);
                sum += weight * sums[i];
                prefix_sum += weight * prefix_sums[i];
            }
            reference = highest;
        }
        if (sum > 0.0f) all = reference + log2f(sum);
        if (prefix_sum > 0.0f) below = reference + log2f(prefix_sum);
    }
    if (args.prefix_lens == nullptr) return all;
    return below - all >= -126.0f ? below : -INFINITY;
}

__device__ __forceinline__ void finish_units(const AttentionArgs& args, float* sums) {
    const int32_t block = blockIdx.x - args.merge_blocks;
    const int32_t stream = block / args.unit_blocks;
    const int32_t request = stream / args.num_kv_heads, kv_head = stream - request * args.num_kv_heads;
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int32_t seq_len = clamped_length(args, request);
    const int32_t used = (seq_len + (1 << args.unit_shift) - 1) >> args.unit_shift;
    const int32_t first = ((block - stream * args.unit_blocks) * kMergeWarps + warp) * args.units_per_warp;
    const int32_t last = min(first + args.units_per_warp, args.num_units);

    int32_t before;
    const int32_t total = count_units(args, request, &before);
    const int32_t units = core::units_of(args.schedule, seq_len);
    int32_t kept = 0;
    for (int32_t base = 0; base < args.rows; base += kMergeThreads) {
        const int32_t row = base + threadIdx.x;
        const bool counts = row < args.rows &&
                            (args.row_mask == nullptr || args.row_mask[request * args.num_queries + row / args.group]);
        if (row < args.rows) {
            const RowPieces found = row_pieces(args, total, before, units, kv_head, row);
            sums[row] = counts ? final_sum(args, found, int64_t{stream} * args.rows + row) : -INFINITY;
        }
        kept += __syncthreads_count(counts);
    }
    const float share = kept > 0 && args.score_max == 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
    for (int32_t unit = first; unit < last; ++unit) {
        float* from = args.units + (int64_t{stream} * args.num_units + unit) * args.rows;
        if (args.mass == nullptr) {
            for (int32_t row = lane; row < args.rows; row += kWarp) {
                const bool there = unit < used && sums[row] > -INFINITY;
                from[row] = there ? (from[row] - sums[row]) * 0.6931471805599453f : -INFINITY;
            }
            continue;
        }
        float mass = 0.0f;
        if (unit < used) {
#pragma unroll 8
            for (int32_t row = lane; row < args.rows; row += kWarp) {
                const float value = from[row];
                const float own = sums[row] > -INFINITY ? exp2_fast(value - sums[row]) : 0.0f;
                mass = args.score_max != 0 ? fmaxf(mass, own) : mass + own;
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const float other = __shfl_xor_sync(~0u, mass, step);
                mass = args.score_max != 0 ? fmaxf(mass, other) : mass + other;
            }
        }
        if (lane == 0) args.mass[int64_t{stream} * args.num_units + unit] = mass * share;
    }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kMergeThreads)
    mage_block_attention_merge_kernel(const __grid_constant__ AttentionArgs args) {
    __shared__ float sums[kMaxMassRows];
    device::dependency_wait();
    device::dependency_release();
    if (static_cast<int32_t>(blockIdx.x) < args.merge_blocks) {
        merge_rows<T, kDim>(args, sums);
    } else {
        finish_units(args, sums);
    }
}

}  // namespace mage::cuda
