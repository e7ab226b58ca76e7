#include "kernels/block_attention/mainloop.cuh"
#include "kernels/block_attention/variants.h"

// Purpose   masses from unit sums, whose last factor is the final lse: share[r, j] = 2^(unit[j, r] - log2 sum[r]).
// Schedule  a warp per unit adds over the rows; grid (units / units per block, Hkv, B).
// Memory    the final sums of at most kMaxUnitRows rows in shared memory.
// Ceiling   reads all unit sums once, from L2 where they fit.
namespace mage::cuda {

namespace {

constexpr int kFinishWarps = 8;
constexpr int kFinishThreads = kFinishWarps * kWarp;

__global__ void __launch_bounds__(kFinishThreads)
    mage_block_attention_finish_kernel(const __grid_constant__ AttentionArgs args) {
    __shared__ float sums[kMaxUnitRows];  // log2 of what a row's shares are divided by; -inf: the row does not count
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t request = blockIdx.z, kv_head = blockIdx.y;
    const int64_t stream = int64_t{request} * args.num_kv_heads + kv_head;
    const int32_t first = (blockIdx.x * kFinishWarps + warp) * args.units_per_warp;
    const int32_t last = min(first + args.units_per_warp, args.num_units);
    device::dependency_wait();
    device::dependency_release();

    const int32_t used = (clamped_length(args, request) + (1 << args.unit_shift) - 1) >> args.unit_shift;
    int32_t kept = 0;
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
    const float share = kept > 0 && args.score_max == 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
    for (int32_t unit = first; unit < last; ++unit) {
        float* from = args.units + (stream * args.num_units + unit) * args.rows;
        if (args.mass == nullptr) {
            for (int32_t row = lane; row < args.rows; row += kWarp) {
                const bool there = unit < used && sums[row] != -INFINITY;
                from[row] = there ? (from[row] - sums[row]) * kLn2 : -INFINITY;
            }
            continue;
        }
        float mass = 0.0f;
        if (unit < used) {
#pragma unroll 8
            for (int32_t row = lane; row < args.rows; row += kWarp) {
                const float value = from[row];
                const float own = sums[row] == -INFINITY ? 0.0f : exp2_fast(value - sums[row]);
                mass = args.score_max != 0 ? fmaxf(mass, own) : mass + own;
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const float other = __shfl_xor_sync(~0u, mass, step);
                mass = args.score_max != 0 ? fmaxf(mass, other) : mass + other;
            }
        }
        if (lane == 0) args.mass[stream * args.num_units + unit] = mass * share;
    }
}

}  // namespace

const FinishVariant& finish_variant() {
    static const FinishVariant variant = {"mage_block_attention_finish_kernel", &mage_block_attention_finish_kernel,
                                          kFinishThreads, kFinishWarps};
    return variant;
}

}  // namespace mage::cuda
