#include "kernels/block_attention/mainloop.cuh"
#include "kernels/block_attention/variants.h"

// Purpose   masses from unit sums, whose last factor is the final lse: share[r, j] = 2^(unit[j, r] - log2 sum[r]).
// Schedule  a warp adds over the rows of one or of four units; grid (units / units per block, Hkv, B). Blocks past a
//           request's last token read nothing.
// Memory    the final sums of at most kMaxUnitRows rows in shared memory.
// Ceiling   reads all unit sums once, from L2 where they fit.
namespace mage::cuda {

namespace {

constexpr int kFinishWarps = 8;
constexpr int kFinishThreads = kFinishWarps * kWarp;
constexpr int kRows = 4;  // of a lane that are read at once

template <int kUnits>
__global__ void __launch_bounds__(kFinishThreads)
    mage_block_attention_finish_kernel(const __grid_constant__ AttentionArgs args) {
    __shared__ float sums[kMaxUnitRows];  // log2 of what a row's shares are divided by; -inf: the row does not count
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t request = blockIdx.z, kv_head = blockIdx.y;
    const int64_t stream = int64_t{request} * args.num_kv_heads + kv_head;
    const int32_t first = (blockIdx.x * kFinishWarps + warp) * kUnits;
    float* units = args.units + (stream * args.num_units + first) * args.rows;
    device::dependency_wait();
    device::dependency_release();

    const int32_t used = (clamped_length(args, request) + (1 << args.unit_shift) - 1) >> args.unit_shift;
    int32_t kept = 0;
    if (static_cast<int32_t>(blockIdx.x) * kFinishWarps * kUnits < used) {
        for (int32_t base = 0; base < args.rows; base += kFinishThreads) {
            const int32_t row = base + threadIdx.x;
            bool counts = row < args.rows;
            if (counts) {
                const float2 stats = reinterpret_cast<const float2*>(args.row_stats)[stream * args.rows + row];
                if (args.row_mask != nullptr) counts = args.row_mask[request * args.num_queries + query_of(args, row)];
                // A prefix below 2^-126 of the whole is as good as nothing.
                const float below = stats.y - stats.x < -126.0f ? -INFINITY : stats.y;
                sums[row] = !counts ? -INFINITY : args.prefix_lens == nullptr ? stats.x : below;
            }
            kept += __syncthreads_count(counts);
        }
    }
    const int32_t there = max(0, min(kUnits, used - first));           // units that hold a token
    const int32_t last = max(0, min(kUnits, args.num_units - first));  // and that there is room for
    if (args.mass == nullptr) {
        for (int32_t unit = 0; unit < last; ++unit) {
            float* own = units + int64_t{unit} * args.rows;
            for (int32_t row = lane; row < args.rows; row += kWarp) {
                own[row] = unit < there && sums[row] != -INFINITY ? (own[row] - sums[row]) * kLn2 : -INFINITY;
            }
        }
        return;
    }
    // All loads of several units and rows are in flight together.
    float mass[kUnits] = {};
    for (int32_t base = lane; base < args.rows && there > 0; base += kRows * kWarp) {
        float values[kRows][kUnits];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kUnits; ++j) {
                const int32_t row = base + i * kWarp;
                values[i][j] = row < args.rows && j < there ? units[int64_t{j} * args.rows + row] : -INFINITY;
            }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int32_t row = base + i * kWarp;
            const float sum = row < args.rows ? sums[row] : -INFINITY;
            if (sum == -INFINITY) continue;
#pragma unroll
            for (int j = 0; j < kUnits; ++j) {
                const float share = exp2_fast(values[i][j] - sum);
                mass[j] = args.score_max != 0 ? fmaxf(mass[j], share) : mass[j] + share;
            }
        }
    }
    const float factor = kept > 0 && args.score_max == 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(~0u, mass[j], step);
            mass[j] = args.score_max != 0 ? fmaxf(mass[j], other) : mass[j] + other;
        }
        if (lane == 0 && j < last) args.mass[stream * args.num_units + first + j] = mass[j] * factor;
    }
}

}  // namespace

const FinishVariant& finish_variant(bool many_units) {
    static const FinishVariant one = {"mage_block_attention_finish_kernel", &mage_block_attention_finish_kernel<1>,
                                      kFinishThreads, kFinishWarps};
    static const FinishVariant four = {"mage_block_attention_finish_kernel_x4", &mage_block_attention_finish_kernel<4>,
                                       kFinishThreads, 4 * kFinishWarps};
    return many_units ? four : one;
}

}  // namespace mage::cuda
