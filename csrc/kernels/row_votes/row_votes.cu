// Purpose   what each row would select on its own: votes per unit, size and coverage of their union; see
//           mage/row_votes.h.
// Schedule  two launches, the second of which starts, and reads its shares, while the first is searching.
//           select: a block of 512 threads per 8 rows (a sector of 32 bytes of row_mass); a thread holds 32 keys of one
//           row, or walks the row anew in each pass where there are more than 2048 units. Per row: a bound that at
//           least `budget` keys reach (the smallest of the largest keys of as many groups), a histogram of what is
//           above it in 256 bins between bound and maximum, the bin of the last unit taken, and the rank among the
//           keys of that bin; bins of more than 64 keys are cut into 256 again. More than 64 equal keys are cut by
//           their units in the same way. Result: the share and the unit of the last unit taken.
//           count: a thread per row and 32 units (core/row_votes_tiles.h). Bits of what the row takes, transposed
//           within the warp, are counted per unit; then the thread adds its shares, and those in the union. The last
//           block of a KV head adds the blocks' sums.
// Memory    select: keys in registers, [256 bins][8 rows] in shared memory, which spreads the rows over the banks.
//           count: shares in registers. row_mass is read past L1: the second launch reads it before it waits for the
//           first, when L1 may hold lines from before it was written.
// Sync      workspace: tickets[head], set to 0 by select; each block of count adds 1 and, in the upper half, its units
//           in the union (integers, so any order gives the same sum). Float sums: 32 units float32, then float64 along
//           the rounds, the slices, the tiles, the rows of a warp, and the warps, each in one fixed order; the sums of
//           a tile are rounded to float32 once.
// Ceiling   reads row_mass twice, from L2 where it fits: 2 * 7.3 MB at B = 1, Hkv = 4, n = 2048, R = 224.
#include <algorithm>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"
#include "core/row_votes_tiles.h"
#include "device/barrier.cuh"
#include "kernels/kernel_list.h"
#include "kernels/row_votes/cluster.cuh"
#include "kernels/row_votes/search.cuh"
#include "mage/row_votes.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "row_votes";

// select
constexpr int kRows = 8;  // of a block
constexpr int kSelectThreads = 512;
constexpr int kSlots = kSelectThreads / kRows;  // threads of a row
constexpr int kHeld = 32;                       // keys of a thread
constexpr int kHeldUnits = kHeld * kSlots;
constexpr int kAhead = 8;      // keys that a thread reads at once where it holds none
constexpr int kTiesAhead = 1;  // the same among ties, which are rare: beside the keys there are few registers left

// count
constexpr int kCountThreads = kMaxVoteRows;
constexpr int kGroup = core::kVoteGroup;
constexpr float kLeastExponent = -87.33654f;  // ln of the smallest normal number; shares below are 0

// --- select ----------------------------------------------------------------------------------------------------------

// The keys of a thread: units slot, slot + kSlots, ... of its row. visit calls f(key, unit, i), i known to the
// compiler.
template <bool kHolds>
struct Keys {
    const float* column;  // of the row; not read if `count` is 0
    int64_t stride;
    int32_t slot;
    int32_t count;  // units that can be chosen
    uint32_t held[kHolds ? kHeld : 1];

    __device__ __forceinline__ void load(bool has_row, int32_t units) {
        if constexpr (kHolds) {
            const float* from = column + slot * stride;
            const int32_t there = has_row ? units - slot : 0, chosen_from = count - slot;
            float shares[kHeld];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                shares[i] = i * kSlots < there ? __ldcg(from + i * kSlots * stride) : -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < kHeld; ++i) held[i] = i * kSlots < chosen_from ? share_key(shares[i]) : 0u;
        }
    }

    template <typename F>
    __device__ __forceinline__ void visit(F f) const {
        if constexpr (kHolds) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) f(held[i], slot + i * kSlots, i);
        } else {
            visit_anew<kAhead>(f);
        }
    }

    // Calls f(key, unit) where is_wanted(key), which is rare: one copy of f, not one for each key that is held.
    template <typename IsWanted, typename F>
    __device__ __forceinline__ void visit_rare(IsWanted is_wanted, F f) const {
        if constexpr (kHolds) {
            uint32_t wanted = 0;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                if (is_wanted(held[i])) wanted |= 1u << i;
            }
            for (; wanted != 0; wanted &= wanted - 1) {
                const int at = __ffs(wanted) - 1;
                uint32_t key = 0;
#pragma unroll
                for (int i = 0; i < kHeld; ++i) key = i == at ? held[i] : key;
                f(key, slot + at * kSlots);
            }
        } else {
            visit_anew<kAhead>([&](uint32_t key, int32_t unit, int) {
                if (is_wanted(key)) f(key, unit);
            });
        }
    }

    // The same as visit, the keys read again.
    template <int kCount, typename F>
    __device__ __forceinline__ void visit_anew(F f) const {
#pragma unroll 1
        for (int32_t first = slot; first < count; first += kCount * kSlots) {
            float shares[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const int32_t unit = first + i * kSlots;
                shares[i] = unit < count ? __ldcg(column + unit * stride) : -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) f(share_key(shares[i]), first + i * kSlots, i);
        }
    }
};

template <bool kHolds>
__global__ void __launch_bounds__(kSelectThreads, 2)
    mage_row_votes_select_kernel(const __grid_constant__ RowVotesArgs args) {
    __shared__ uint32_t bins[kBins * kRows];
    __shared__ uint2 candidates[kRows][kCandidates];  // key, unit
    __shared__ Search searches[kRows];
    __shared__ Pick picks[kRows];
    __shared__ uint32_t highest[kRows], bounds[kRows], listed[kRows];

    const int32_t head = blockIdx.x / args.row_blocks;
    const int32_t first_row = (blockIdx.x - head * args.row_blocks) * kRows;
    const int32_t own_row = threadIdx.x % kRows;
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

    for (uint32_t i = threadIdx.x; i < kBins * kRows; i += kSelectThreads) bins[i] = 0;
    if (threadIdx.x < kRows) {
        highest[threadIdx.x] = 0;
        bounds[threadIdx.x] = 0xffffffffu;
        listed[threadIdx.x] = 0;
    }
    device::dependency_wait();
    if (first_row == 0 && threadIdx.x == 0) args.tickets[head] = 0;
    const int32_t eligible = eligible_units(args, head / args.num_kv_heads);
    const bool has_row = first_row + own_row < args.rows;
    Keys<kHolds> keys;
    keys.column = args.row_mass + int64_t{head} * args.units * args.rows + first_row + own_row;
    keys.stride = args.rows;
    keys.slot = threadIdx.x / kRows;
    keys.count = has_row ? eligible : 0;
    keys.load(has_row, args.units);
    __syncthreads();

    // The largest key, and a bound that at least `budget` keys reach: groups are quarters of a thread's keys, halves,
    // all of them, those of two threads, or those of the row's threads in a warp.
    const int32_t budget = min(args.budget, eligible);
    uint32_t quarters[4] = {};
    keys.visit([&](uint32_t key, int32_t, int i) { quarters[i % 4] = max(quarters[i % 4], key); });
    const uint32_t halves[2] = {max(quarters[0], quarters[1]), max(quarters[2], quarters[3])};
    uint32_t high = max(halves[0], halves[1]);
    uint32_t bound = 0;
    if (budget <= kSlots) {
        bound = high;
    } else if (budget <= 2 * kSlots) {
        bound = min(halves[0], halves[1]);
    } else if (budget <= 4 * kSlots) {
        bound = min(min(quarters[0], quarters[1]), min(quarters[2], quarters[3]));
    }
#pragma unroll
    for (int step = kRows, groups = kSlots / 2; step < kWarp; step *= 2, groups /= 2) {
        high = max(high, __shfl_xor_sync(kAllLanes, high, step));
        const uint32_t other = __shfl_xor_sync(kAllLanes, bound, step);
        bound = budget <= groups ? max(bound, other) : min(bound, other);
    }
    if (lane < kRows) {
        atomicMax(&highest[lane], high);
        atomicMin(&bounds[lane], bound);
    }
    __syncthreads();
    device::dependency_release();

    // Every thread knows the search of its row; warp i < 8 leads that of row i.
    Search own = first_search(is_kept(args, head, first_row + own_row) ? budget : 0, highest[own_row], bounds[own_row]);
    if (threadIdx.x < kRows) {
        searches[threadIdx.x] = own;
        picks[threadIdx.x] = {INFINITY, -1};  // nothing
    }
    while (true) {
        if (own.stage == Stage::kKeys) {
            keys.visit([&](uint32_t key, int32_t, int) {
                const uint32_t offset = key - own.low;
                if (offset <= own.last) atomicAdd(&bins[(offset >> own.shift) * kRows + own_row], 1u);
            });
        } else if (own.stage == Stage::kUnits) {
            keys.template visit_anew<kTiesAhead>([&](uint32_t key, int32_t unit, int) {
                const uint32_t offset = static_cast<uint32_t>(eligible - 1 - unit) - own.low;
                if (key == own.key && offset <= own.last) atomicAdd(&bins[(offset >> own.shift) * kRows + own_row], 1u);
            });
        }
        __syncthreads();
        bool goes_on = false;
        if (warp < kRows) {
            Search led = searches[warp];
            if (is_searching(led.stage)) {
                narrow<kRows>(bins + warp, eligible, &led, &picks[warp]);
                __syncwarp();  // all lanes have read what is written now
                if (lane == 0) searches[warp] = led;
                goes_on = is_searching(led.stage);
            }
        }
        goes_on = __syncthreads_or(goes_on);
        if (is_searching(own.stage)) own = searches[own_row];
        if (!goes_on) break;
    }

    const auto list = [&](uint32_t key, int32_t unit) {
        const uint32_t at = atomicAdd(&listed[own_row], 1u);
        if (at < kCandidates) candidates[own_row][at] = make_uint2(key, static_cast<uint32_t>(unit));
    };
    if (own.stage == Stage::kListKeys) {
        keys.visit_rare([&](uint32_t key) { return key - own.low <= own.last; }, list);
    } else if (own.stage == Stage::kListUnits) {
        keys.template visit_anew<kTiesAhead>([&](uint32_t key, int32_t unit, int) {
            const uint32_t offset = static_cast<uint32_t>(eligible - 1 - unit) - own.low;
            if (key == own.key && offset <= own.last) list(key, unit);
        });
    }
    __syncthreads();
    if (warp >= kRows || first_row + warp >= args.rows) return;

    Pick pick = picks[warp];
    const Search search = searches[warp];
    if (search.stage == Stage::kListKeys || search.stage == Stage::kListUnits) {
        const uint2 last = last_taken(candidates[warp], listed[warp], search.need);
        pick = {share_of_key(last.x), static_cast<int32_t>(last.y)};
    }
    if (lane == 0) args.picks[int64_t{head} * args.rows + first_row + warp] = pick;
}

// --- count -----------------------------------------------------------------------------------------------------------

// Bit j of lane i's result is bit i of lane j's word.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t word) {
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t mask = 0x0000ffffu;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, word, step);
        word =
            (lane & step) == 0 ? (word & mask) | ((other & mask) << step) : (word & ~mask) | ((other & ~mask) >> step);
        mask ^= mask << (step / 2);
    }
    return word;
}

// Bits [0, count), for any count.
__device__ __forceinline__ uint32_t low_bits(int32_t count) {
    return count <= 0 ? 0u : count >= kGroup ? kAllLanes : (1u << count) - 1;
}

__device__ __forceinline__ void load_group(const RowVotesArgs& args, const float* column, int32_t first,
                                           float (&shares)[kGroup]) {
    const bool has_row = static_cast<int32_t>(threadIdx.x) < args.rows;
    const float* from = column + int64_t{first} * args.rows;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        shares[i] = has_row && first + i < args.units ? __ldcg(from + int64_t{i} * args.rows) : -INFINITY;
    }
}

__global__ void __launch_bounds__(kCountThreads)
    mage_row_votes_count_kernel(const __grid_constant__ RowVotesArgs args) {
    __shared__ int32_t counts[2][kCountThreads / kWarp][kGroup];  // of a warp; rounds take turns
    __shared__ double2 sums[kCountThreads];
    __shared__ int32_t slice_units[kCountThreads / kWarp];
    __shared__ double warp_coverage[kCountThreads / kWarp];
    __shared__ int32_t warp_kept[kCountThreads / kWarp];
    __shared__ unsigned long long arrived;

    const int32_t head = blockIdx.x / args.tiles;
    const int32_t tile = blockIdx.x - head * args.tiles;
    const int32_t row = threadIdx.x, slice = threadIdx.y;
    const int32_t slices = blockDim.y, row_warps = blockDim.x / kWarp;
    const int32_t warp = row / kWarp, lane = row % kWarp;
    const int32_t thread = slice * blockDim.x + row;
    const bool has_row = row < args.rows;
    const float* column = args.row_mass + int64_t{head} * args.units * args.rows + row;
    const auto first_unit = [&](int32_t round) { return ((tile * args.rounds + round) * slices + slice) * kGroup; };

    float shares[kGroup];
    load_group(args, column, first_unit(0), shares);
    device::dependency_wait();
    device::dependency_release();

    Pick pick = {INFINITY, -1};
    if (has_row) {
        const int2 words = __ldcg(reinterpret_cast<const int2*>(args.picks + int64_t{head} * args.rows + row));
        pick = {__int_as_float(words.x), words.y};
    }
    const int32_t eligible = eligible_units(args, head / args.num_kv_heads);
    sums[thread] = make_double2(0.0, 0.0);
    int32_t union_units = 0;
    for (int32_t round = 0; round < args.rounds; ++round) {
        const int32_t first = first_unit(round);
        if (round > 0) load_group(args, column, first, shares);
        uint32_t above = 0, equal = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (shares[i] > pick.share) above |= 1u << i;
            if (shares[i] == pick.share) equal |= 1u << i;
        }
        const int32_t last_equal = min(pick.unit, eligible - 1);
        const uint32_t chosen = (above & low_bits(eligible - first)) | (equal & low_bits(last_equal + 1 - first));
        int32_t (&round_counts)[kCountThreads / kWarp][kGroup] = counts[round % 2];
        round_counts[slice * row_warps + warp][lane] = __popc(transpose_bits(chosen));
        __syncthreads();
        int32_t votes = 0;
        for (int32_t i = 0; i < row_warps; ++i) votes += round_counts[slice * row_warps + i][lane];
        if (warp == 0 && first + lane < args.units) args.votes[int64_t{head} * args.units + first + lane] = votes;
        const uint32_t in_union = __ballot_sync(kAllLanes, votes > 0);
        union_units += __popc(in_union);
        float all = 0.0f, listed = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const float share = shares[i] > kLeastExponent ? expf(fminf(shares[i], 0.0f)) : 0.0f;  // NaN: 0
            all += share;
            if ((in_union >> i & 1) != 0) listed += share;
        }
        sums[thread] = make_double2(sums[thread].x + all, sums[thread].y + listed);
    }

    // Slices, in order.
    if (row == 0) slice_units[slice] = union_units;
    __syncthreads();
    if (slice == 0 && has_row) {
        double total = sums[row].x, inside = sums[row].y;
        for (int32_t i = 1; i < slices; ++i) {
            total += sums[i * blockDim.x + row].x;
            inside += sums[i * blockDim.x + row].y;
        }
        args.partials[(int64_t{head} * args.tiles + tile) * args.rows + row] =
            make_float2(static_cast<float>(total), static_cast<float>(inside));
    }
    __threadfence();
    __syncthreads();
    if (thread == 0) {
        unsigned long long own = 1;
        for (int32_t i = 0; i < slices; ++i) own += static_cast<unsigned long long>(slice_units[i]) << 32;
        arrived = atomicAdd(&args.tickets[head], own) + own;
    }
    __syncthreads();
    if (static_cast<uint32_t>(arrived) != static_cast<uint32_t>(args.tiles)) return;

    // The last block of the head: slice i adds tiles i, i + slices, ..., then slices are added, then rows.
    __threadfence();
    double total = 0.0, inside = 0.0;
    if (has_row) {
#pragma unroll 8
        for (int32_t i = slice; i < args.tiles; i += slices) {
            const float2 part = __ldcg(args.partials + (int64_t{head} * args.tiles + i) * args.rows + row);
            total += part.x;
            inside += part.y;
        }
    }
    sums[thread] = make_double2(total, inside);
    __syncthreads();
    if (slice == 0) {
        for (int32_t i = 1; i < slices; ++i) {
            total += sums[i * blockDim.x + row].x;
            inside += sums[i * blockDim.x + row].y;
        }
        const bool kept = is_kept(args, head, row);
        double coverage = kept && total > 0.0 ? inside / total : 0.0;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) coverage += __shfl_xor_sync(kAllLanes, coverage, step);
        const int32_t kept_rows = __popc(__ballot_sync(kAllLanes, kept));
        if (lane == 0) {
            warp_coverage[warp] = coverage;
            warp_kept[warp] = kept_rows;
        }
    }
    __syncthreads();
    if (thread == 0) {
        double coverage = 0.0;
        int32_t kept_rows = 0;
        for (int32_t i = 0; i < row_warps; ++i) {
            coverage += warp_coverage[i];
            kept_rows += warp_kept[i];
        }
        args.coverage[head] = kept_rows > 0 ? static_cast<float>(coverage / kept_rows) : 0.0f;
        args.union_size[head] = static_cast<int32_t>(arrived >> 32);
    }
}

}  // namespace

std::vector<KernelEntry> row_votes_kernels() {
    return {
        {"mage_row_votes_cluster_kernel", reinterpret_cast<const void*>(&mage_row_votes_cluster_kernel),
         kClusterThreads, sizeof(ClusterShared)},
        {"mage_row_votes_select_kernel", reinterpret_cast<const void*>(&mage_row_votes_select_kernel<true>),
         kSelectThreads, 0},
        {"mage_row_votes_select_long_kernel", reinterpret_cast<const void*>(&mage_row_votes_select_kernel<false>),
         kSelectThreads, 0},
        {"mage_row_votes_count_kernel", reinterpret_cast<const void*>(&mage_row_votes_count_kernel), kCountThreads, 0},
    };
}

void row_votes(const RowVotesParams& p, CudaStream stream) {
    core::require_hopper(kOp);
    check_row_votes(p);
    if (p.num_requests == 0) return;
    const int64_t heads = p.num_requests * p.num_kv_heads;
    const int64_t needed = row_votes_workspace(p.num_requests, p.num_kv_heads, p.num_units, p.num_rows);
    MAGE_CHECK(p.row_mass && p.prefix_lens && p.votes && p.union_size && p.coverage && p.workspace, kOp,
               ": row_mass, prefix_lens, the outputs and workspace must be given, got a null pointer");
    MAGE_CHECK(p.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed, " bytes, got ",
               p.workspace_bytes);
    const uintptr_t past = reinterpret_cast<uintptr_t>(p.workspace) % 16;
    MAGE_CHECK(past == 0, kOp, ": workspace must be aligned to 16 bytes, got a base ", past, " bytes past it");

    const core::VoteClusters clusters = core::vote_clusters(p.num_requests, p.num_units, p.num_rows);
    const core::VoteTiles tiles = core::vote_tiles(heads, p.num_units, p.num_rows);
    const int64_t row_blocks = clusters.ctas > 0 ? clusters.ctas : (p.num_rows + kRows - 1) / kRows;
    MAGE_CHECK(heads * std::max(row_blocks, tiles.tiles) < (int64_t{1} << 31), kOp,
               ": row_mass must need fewer than 2^31 blocks, got ", heads * std::max(row_blocks, tiles.tiles));
    RowVotesArgs args = {};
    args.row_mass = p.row_mass;
    args.prefix_lens = p.prefix_lens;
    args.row_mask = p.row_mask;
    args.votes = p.votes;
    args.union_size = p.union_size;
    args.coverage = p.coverage;
    args.tickets = static_cast<unsigned long long*>(p.workspace);
    args.picks = reinterpret_cast<Pick*>(args.tickets + heads);
    args.partials = reinterpret_cast<float2*>(args.picks + heads * p.num_rows);
    args.num_kv_heads = static_cast<int32_t>(p.num_kv_heads);
    args.units = static_cast<int32_t>(p.num_units);
    args.rows = static_cast<int32_t>(p.num_rows);
    if (p.row_mask != nullptr) {
        args.positions = static_cast<int32_t>(p.num_positions);
        args.group = static_cast<int32_t>(p.num_rows / p.num_positions);
    }
    while ((int64_t{1} << args.unit_shift) < p.granularity) ++args.unit_shift;
    args.budget = static_cast<int32_t>(std::min(p.k / p.granularity, p.num_units));
    args.row_blocks = static_cast<int32_t>(row_blocks);
    args.share = static_cast<int32_t>(clusters.share);
    args.tiles = static_cast<int32_t>(tiles.tiles);
    args.rounds = static_cast<int32_t>(tiles.rounds);

    if (clusters.ctas > 0) {
        args.vectors = p.num_rows % 4 == 0 && reinterpret_cast<uintptr_t>(p.row_mass) % 16 == 0;
        LaunchPlan plan;
        plan.grid[0] = static_cast<uint32_t>(p.num_kv_heads * clusters.ctas);
        plan.grid[1] = static_cast<uint32_t>(p.num_requests);
        plan.block[0] = kClusterThreads;
        plan.cluster = static_cast<uint32_t>(clusters.ctas);
        plan.shared_bytes = sizeof(ClusterShared);
        plan.overlap = true;
        const void* kernel = reinterpret_cast<const void*>(&mage_row_votes_cluster_kernel);
        core::allow_shared_memory(kOp, kernel, sizeof(ClusterShared));
        core::allow_large_clusters(kOp, kernel);
        CUtensorMap map = {};
        if (args.vectors) {
            map = core::row_mass_map(kOp, "row_mass", p.row_mass,
                                     {p.num_requests, p.num_kv_heads, p.num_units, p.num_rows}, kClusterRows, kSpan);
        }
        core::launch(kOp, mage_row_votes_cluster_kernel, plan, stream, map, args);
        return;
    }
    LaunchPlan select;
    select.grid[0] = static_cast<uint32_t>(heads * row_blocks);
    select.block[0] = kSelectThreads;
    select.overlap = true;
    LaunchPlan count;
    count.grid[0] = static_cast<uint32_t>(heads * tiles.tiles);
    count.block[0] = static_cast<uint32_t>(tiles.row_threads);
    count.block[1] = static_cast<uint32_t>(tiles.slices);
    count.overlap = true;
    const bool holds = p.num_units <= kHeldUnits;
    core::launch(kOp, holds ? mage_row_votes_select_kernel<true> : mage_row_votes_select_kernel<false>, select, stream,
                 args);
    core::launch(kOp, mage_row_votes_count_kernel, count, stream, args);
}

}  // namespace mage::cuda
