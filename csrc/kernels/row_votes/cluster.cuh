#pragma once

#include "core/row_votes_tiles.h"
#include "device/barrier.cuh"
#include "device/math.cuh"
#include "device/tma.cuh"
#include "kernels/row_votes/search.cuh"

// Purpose   row_votes in one launch, where a cluster can hold the shares of a KV head; see mage/row_votes.h.
// Schedule  a cluster per KV head, a CTA of 512 threads per 16 of its rows; a thread has four rows of every 128th unit.
//           All values of the CTA are asked for at once, in boxes of 128 units that the copy engine writes to shared
//           memory (where rows can't be boxes, threads read and write them); as they arrive, the exponential of each
//           stays in a register, and so do the maxima of each quarter of the thread's units. Per row then:
//           bound   a value that at least `budget` of the row reach: bisection for the budget-th largest of the 128
//                   threads' maxima; above 128, of the least of the maxima of their quarters, which four values reach;
//           list    the values that reach the bound, 18 for the 16th of 2049, where a quarter's maximum does;
//           cut     a warp per row finds the last unit taken: by rank in a list of at most 64, by bisection in one of
//                   at most 320, among nearly equal shares by a search in bins (search.cuh). Longer lists, of many
//                   equal shares or for large budgets, are given up, and all threads of the CTA search their values in
//                   the same way.
//           Votes of the CTA's rows are bytes, units with a vote are bits. Each CTA sends its bits to every CTA of the
//           cluster, and the bytes of each CTA's share of the units to it; then votes are stored and every CTA adds
//           what its rows have in the union. The first CTA gets the sums of the others.
// Memory    exponentials and maxima in registers; values in shared memory, [unit][16 rows].
// Sync      two messages through distributed shared memory, which arrive at an mbarrier of the receiver; it waits for
//           all that were sent to it, so a CTA may end before its own have arrived. Float sums are those of a thread's
//           units in order, then fixed trees over threads, warps, rows and CTAs.
// Ceiling   reads row_mass once: 7.3 MB at B = 1, Hkv = 4, n = 2049, R = 224; exponentials are as slow as the reads.
//           See NOTES.md.
namespace mage::cuda {

namespace {

constexpr int kClusterThreads = 512;
constexpr int kClusterWarps = kClusterThreads / kWarp;
constexpr int kClusterRows = core::kVoteClusterRows;
constexpr int kMaxClusterCtas = core::kMaxVoteClusterCtas;
constexpr int kQuads = kClusterRows / 4;
constexpr int kSpan = kClusterThreads / kQuads;  // units of one value of each thread
constexpr int kSpans = core::kMaxVoteClusterUnits / kSpan;
constexpr int kClusterWords = core::kMaxVoteClusterUnits / kWarp;
constexpr uint32_t kListed = 320;
constexpr int kBisections = 16;
constexpr float kLog2OfE = 1.44269504088896341f;
static_assert(kClusterWarps == kClusterRows && kSpan % kWarp == 0 && kSpans * kSpan == core::kMaxVoteClusterUnits);

struct ClusterShared {
    float4 values[kSpans * kClusterThreads];        // [unit][quad of rows]
    alignas(16) uint2 list[kClusterRows][kListed];  // key, unit; the first kCandidates are 0 at first
    struct {
        uint4 counts[(core::kMaxVoteClusterUnits + 16 * kMaxClusterCtas) / 16];  // votes of its rows, a byte per unit
        uint4 taken[kClusterWords / 4];  // units with a vote of its rows, a bit per unit
    } own;                               // of this CTA; 0 at first
    uint4 counts_in[(core::kMaxVoteClusterUnits + 16 * kMaxClusterCtas) / 16];  // [sender][share of this CTA]
    uint4 taken_in[kMaxClusterCtas * kClusterWords / 4];                        // [sender][words]
    float4 tops[kSpan][kQuads + 1];
    float4 bound_values[kQuads];
    uint2 candidates[kClusterRows][kCandidates];
    uint2 coverage_in[kMaxClusterCtas];  // sum over kept rows, kept rows
    uint32_t in_union[kClusterWords];
    uint32_t bins[kBins * kClusterRows];
    float totals[kClusterWarps][kClusterRows];
    float insides[kClusterWarps][kClusterRows];
    Search searches[kClusterRows];
    Pick picks[kClusterRows];
    uint32_t bounds[kClusterRows], kept[kClusterRows], listed[kClusterRows], highest[kClusterRows];
    uint32_t chosen_from[kClusterRows];
    alignas(8) uint64_t exchanged, summed, arrived[kSpans];

    __device__ __forceinline__ float value(uint32_t unit, uint32_t row) const {
        return reinterpret_cast<const float*>(values)[unit * kClusterRows + row];
    }
};

constexpr int kMostSharedMemory = 227 * 1024;  // of a block on Hopper
static_assert(sizeof(ClusterShared) <= kMostSharedMemory);

// A share: 1 for a log-share above 0, 0 for NaN and where the share is below the smallest normal number. Its relative
// error is below 2^-18, and below 2^-21 for shares above e^-8.
__device__ __forceinline__ float share_of(float log_share) {
    return __saturatef(device::exp2_fast(log_share * kLog2OfE));
}

// share_key of a finite log-share or infinity.
__device__ __forceinline__ uint32_t finite_key(float log_share) {
    const int32_t bits = __float_as_int(log_share + 0.0f);  // -0 becomes 0
    return static_cast<uint32_t>(bits ^ (bits >> 31 | static_cast<int32_t>(0x80000000u)));
}

__device__ __forceinline__ void add_vote(ClusterShared& shared, uint32_t unit, uint32_t votes) {
    atomicAdd(reinterpret_cast<uint32_t*>(shared.own.counts) + unit / 4, votes << (unit % 4 * 8));
    atomicOr(reinterpret_cast<uint32_t*>(shared.own.taken) + unit / kWarp, 1u << (unit % kWarp));
}

// A bound that `needed` of the keys of a warp reach, and hardly more; at least `needed` reach `low`. Sets `exact` where
// no more reach it.
template <int kKeys>
__device__ __forceinline__ uint32_t bisect(const uint32_t (&keys)[kKeys], uint32_t needed, uint32_t low, bool* exact) {
    uint32_t high = keys[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) high = max(high, keys[i]);
    high = __reduce_max_sync(kAllLanes, high);
    *exact = false;
#pragma unroll 1
    for (int step = 0; step < kBisections && low < high; ++step) {
        const uint32_t middle = high - (high - low) / 2;
        uint32_t reached = 0;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) reached += keys[i] >= middle ? 1u : 0u;
        reached = __reduce_add_sync(kAllLanes, reached);
        if (reached == needed) {
            *exact = true;
            return middle;
        }
        if (reached > needed) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// The last unit that a row takes of its list, by a warp. More than kCandidates and at most kListed entries.
__device__ __noinline__ uint2 search_list(ClusterShared& shared, int32_t row, uint32_t count, uint32_t need,
                                          int32_t eligible) {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint2* list = shared.list[row];
    {
        uint32_t keys[kListed / kWarp];
#pragma unroll
        for (uint32_t i = 0; i < kListed / kWarp; ++i)
            keys[i] = lane + i * kWarp < count ? list[lane + i * kWarp].x : 0u;
        bool exact;
        const uint32_t key = bisect(keys, need, shared.bounds[row], &exact);
        if (exact) return make_uint2(key, static_cast<uint32_t>(kEveryUnit));
    }
    // Keys that are equal, or nearly so, at the end of what is taken.
    for (uint32_t i = lane; i < kBins; i += kWarp) shared.bins[i * kClusterRows + row] = 0;
    if (lane == 0) shared.chosen_from[row] = 0;
    uint32_t highest = 0;
    for (uint32_t i = lane; i < count; i += kWarp) highest = max(highest, list[i].x);
    __syncwarp();
    Search search = first_search(need, __reduce_max_sync(kAllLanes, highest), shared.bounds[row]);
    const auto visit = [&](auto f) {
        const bool by_unit = search.stage == Stage::kUnits || search.stage == Stage::kListUnits;
#pragma unroll 1
        for (uint32_t i = lane; i < count; i += kWarp) {
            const uint2 entry = list[i];
            const uint32_t value = by_unit ? static_cast<uint32_t>(eligible - 1) - entry.y : entry.x;
            const uint32_t offset = value - search.low;
            if (offset <= search.last && (!by_unit || entry.x == search.key)) f(entry, offset);
        }
    };
#pragma unroll 1
    while (is_searching(search.stage)) {
        visit([&](uint2, uint32_t offset) {
            atomicAdd(&shared.bins[(offset >> search.shift) * kClusterRows + row], 1u);
        });
        __syncwarp();
        narrow<kClusterRows>(shared.bins + row, eligible, &search, &shared.picks[row]);
        __syncwarp();
    }
    if (search.stage == Stage::kDone) {
        const Pick pick = shared.picks[row];
        return make_uint2(share_key(pick.share), static_cast<uint32_t>(pick.unit));
    }
    uint2* candidates = shared.candidates[row];
    visit([&](uint2 entry, uint32_t) { candidates[atomicAdd(&shared.chosen_from[row], 1u)] = entry; });
    __syncwarp();
    return last_taken(candidates, shared.chosen_from[row], search.need);
}

// The votes of the rows whose lists are too long, by all threads.
__device__ __noinline__ void vote_without_lists(ClusterShared& shared, int32_t eligible, uint32_t budget) {
    const uint32_t row = threadIdx.x % kClusterRows;
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool overflows = shared.listed[row] > kListed;
    // f(value, unit) for every 32nd unit, with whole warps; -inf past the last.
    const auto visit = [&](auto f) {
        constexpr int kStep = kClusterThreads / kClusterRows, kWarpUnits = kWarp / kClusterRows;
#pragma unroll 4
        for (int32_t first = warp * kWarpUnits; first < eligible; first += kStep) {
            const int32_t unit = first + static_cast<int32_t>(lane) / kClusterRows;
            f(unit < eligible ? shared.value(unit, row) : -INFINITY, static_cast<uint32_t>(unit));
        }
    };
    for (uint32_t i = threadIdx.x; i < kBins * kClusterRows; i += kClusterThreads) shared.bins[i] = 0;
    if (threadIdx.x < kClusterRows) {
        shared.highest[row] = 0;
        shared.chosen_from[row] = 0;
    }
    uint32_t highest = 0;
    visit([&](float value, uint32_t) { highest = max(highest, share_key(value)); });
    __syncthreads();
    atomicMax(&shared.highest[row], highest);
    __syncthreads();

    Search own = first_search(overflows ? budget : 0, shared.highest[row], shared.bounds[row]);
    if (threadIdx.x < kClusterRows) {
        shared.searches[row] = own;
        shared.picks[row] = {INFINITY, -1};  // nothing
    }
    const auto visit_window = [&](auto f) {
        const bool by_unit = own.stage == Stage::kUnits || own.stage == Stage::kListUnits;
        visit([&](float share, uint32_t unit) {
            const uint32_t key = share_key(share);
            const uint32_t offset = (by_unit ? static_cast<uint32_t>(eligible - 1) - unit : key) - own.low;
            if (offset <= own.last && (!by_unit || key == own.key)) f(key, unit, offset);
        });
    };
    while (true) {
        if (is_searching(own.stage)) {
            visit_window([&](uint32_t, uint32_t, uint32_t offset) {
                atomicAdd(&shared.bins[(offset >> own.shift) * kClusterRows + row], 1u);
            });
        }
        __syncthreads();
        Search led = shared.searches[warp];
        bool goes_on = false;
        if (is_searching(led.stage)) {
            narrow<kClusterRows>(shared.bins + warp, eligible, &led, &shared.picks[warp]);
            __syncwarp();  // all lanes have read what is written now
            if (lane == 0) shared.searches[warp] = led;
            goes_on = is_searching(led.stage);
        }
        goes_on = __syncthreads_or(goes_on);
        if (is_searching(own.stage)) own = shared.searches[row];
        if (!goes_on) break;
    }
    if (own.stage != Stage::kDone) {
        visit_window([&](uint32_t key, uint32_t unit, uint32_t) {
            shared.candidates[row][atomicAdd(&shared.chosen_from[row], 1u)] = make_uint2(key, unit);
        });
    }
    __syncthreads();
    if (shared.searches[warp].stage != Stage::kDone) {
        const uint2 last = last_taken(shared.candidates[warp], shared.chosen_from[warp], shared.searches[warp].need);
        if (lane == 0) shared.picks[warp] = {share_of_key(last.x), static_cast<int32_t>(last.y)};
    }
    __syncthreads();
    const Pick pick = shared.picks[row];
    visit([&](float share, uint32_t unit) {
        const bool chosen = share > pick.share || (share == pick.share && static_cast<int32_t>(unit) <= pick.unit);
        const uint32_t rows = __ballot_sync(kAllLanes, chosen) >> (lane - row) & ((1u << kClusterRows) - 1);
        if (row == 0 && rows != 0) add_vote(shared, unit, __popc(rows));
    });
}

// The sums of a quad's rows over a warp's units. Each lane gets that of one row: 2 for bit 2 of the lane, plus 1 for
// bit 3.
__device__ __forceinline__ float sum_rows(float4 own) {
    const uint32_t lane = threadIdx.x % kWarp;
    const bool odd = (lane & 4) != 0, high = (lane & 8) != 0;
    float first = odd ? own.z : own.x, second = odd ? own.w : own.y;
    first += __shfl_xor_sync(kAllLanes, odd ? own.x : own.z, 4);
    second += __shfl_xor_sync(kAllLanes, odd ? own.y : own.w, 4);
    float sum = high ? second : first;
    sum += __shfl_xor_sync(kAllLanes, high ? first : second, 8);
    return sum + __shfl_xor_sync(kAllLanes, sum, 16);
}

__global__ void __launch_bounds__(kClusterThreads, 1)
    mage_row_votes_cluster_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ RowVotesArgs args) {
    extern __shared__ __align__(128) unsigned char memory[];
    ClusterShared& shared = *reinterpret_cast<ClusterShared*>(memory);

    const int32_t request = blockIdx.y;
    const int32_t head = request * args.num_kv_heads + static_cast<int32_t>(device::cluster_index());
    const int32_t cta = static_cast<int32_t>(device::cluster_rank());
    const int32_t first_row = cta * kClusterRows;
    const int32_t quad = threadIdx.x % kQuads, slot = threadIdx.x / kQuads;
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int32_t units = args.units;
    const int32_t word_vectors = (units + 127) / 128;  // of bits of all units
    const int32_t count_vectors = args.share / 16;     // of bytes of the units of a CTA

    // Before the inputs are there: what is counted into is 0, and the cluster knows each other's barriers.
    static_assert(sizeof(shared.own) / 16 <= kClusterThreads);
    if (threadIdx.x < sizeof(shared.own) / 16)
        reinterpret_cast<uint4*>(&shared.own)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    static_assert(kClusterRows * kCandidates / 2 == kClusterThreads && sizeof(shared.list[0]) % 16 == 0);
    reinterpret_cast<uint4*>(shared.list[warp])[lane] = make_uint4(0, 0, 0, 0);
    const uint32_t exchanged = device::shared_address(&shared.exchanged);
    const uint32_t summed = device::shared_address(&shared.summed);
    const bool* mask = nullptr;
    if (threadIdx.x < kClusterRows) {
        const int32_t row = first_row + threadIdx.x;
        shared.listed[threadIdx.x] = 0;
        if (args.row_mask != nullptr && row < args.rows)
            mask = args.row_mask + int64_t{request} * args.positions + row / args.group;
    }
    if (threadIdx.x == kWarp) {
        device::prefetch_tensor_map(&map);
#pragma unroll 1
        for (int i = 0; i < kSpans; ++i) device::mbarrier_init(device::shared_address(&shared.arrived[i]), 1);
        device::mbarrier_init_fence();
    }
    if (threadIdx.x == 0) {
        device::mbarrier_init(exchanged, 1);
        device::mbarrier_init(summed, 1);
        device::mbarrier_init_fence();
        device::mbarrier_arrive_expect(exchanged, args.row_blocks * (word_vectors + count_vectors) * 16);
        device::mbarrier_arrive_expect(summed, cta == 0 ? args.row_blocks * 8 : 0);
    }
    __syncthreads();
    device::cluster_arrive_relaxed();
    device::dependency_wait();
    device::dependency_release();

    // Load. Values past the last unit or row are zeros or copies of others, and are counted nowhere. The length is read
    // last, so that no read waits for it.
    float4 shares[kSpans];  // log-shares at first
    const float* from = args.row_mass + int64_t{head} * units * args.rows;
    if (args.vectors) {
        if (threadIdx.x == kWarp) {
#pragma unroll 1
            for (int i = 0; i * kSpan < units; ++i) {
                const uint32_t barrier = device::shared_address(&shared.arrived[i]);
                device::mbarrier_arrive_expect(barrier, kClusterThreads * sizeof(float4));
                device::copy_box(&map, device::shared_address(&shared.values[i * kClusterThreads]), barrier,
                                 {first_row, i * kSpan, head - request * args.num_kv_heads, request},
                                 device::kEvictNormal);
            }
        }
        __syncwarp();
    } else {
        const int32_t last = args.rows - 1, row = first_row + quad * 4;
#pragma unroll
        for (int i = 0; i < kSpans; ++i) {
            if (i * kSpan >= units) break;
            const uint32_t unit = min(i * kSpan + slot, units - 1);
            const float* at = from + unit * static_cast<uint64_t>(args.rows);
            shares[i] = make_float4(__ldcg(at + min(row, last)), __ldcg(at + min(row + 1, last)),
                                    __ldcg(at + min(row + 2, last)), __ldcg(at + min(row + 3, last)));
        }
    }
    const bool kept = first_row + static_cast<int32_t>(threadIdx.x) < args.rows && (mask == nullptr || *mask);
    const int32_t eligible = eligible_units(args, request);
    float4 tops[4];  // of every fourth span; without NaN
#pragma unroll
    for (int i = 0; i < 4; ++i) tops[i] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
        if (i * kSpan >= units) break;
        float4& own = shares[i];
        float4& value = shared.values[i * kClusterThreads + threadIdx.x];
        if (args.vectors) {
            device::mbarrier_wait(device::shared_address(&shared.arrived[i]), 0);
            own = value;
        } else {
            value = own;
        }
        if (i * kSpan + slot < eligible) {
            float4& top = tops[i % 4];
            top.x = fmaxf(top.x, own.x);
            top.y = fmaxf(top.y, own.y);
            top.z = fmaxf(top.z, own.z);
            top.w = fmaxf(top.w, own.w);
        }
        own = make_float4(share_of(own.x), share_of(own.y), share_of(own.z), share_of(own.w));
        if (i * kSpan + slot < units) {
            total.x += own.x;
            total.y += own.y;
            total.z += own.z;
            total.w += own.w;
        }
    }

    if (threadIdx.x < kClusterRows) shared.kept[threadIdx.x] = kept;

    // Bound.
    const uint32_t budget = min(args.budget, eligible);
    const bool by_quarters = budget > kSpan;
    {
        const auto join = [&](float a, float b, float c, float d) {
            return by_quarters ? fminf(fminf(a, b), fminf(c, d)) : fmaxf(fmaxf(a, b), fmaxf(c, d));
        };
        shared.tops[slot][quad] = make_float4(
            join(tops[0].x, tops[1].x, tops[2].x, tops[3].x), join(tops[0].y, tops[1].y, tops[2].y, tops[3].y),
            join(tops[0].z, tops[1].z, tops[2].z, tops[3].z), join(tops[0].w, tops[1].w, tops[2].w, tops[3].w));
    }
    __syncthreads();
    {
        uint32_t keys[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            keys[i] = share_key(reinterpret_cast<const float*>(shared.tops[lane + i * kWarp])[warp]);
        const uint32_t needed = by_quarters ? (budget + 3) / 4 : budget;
        uint32_t bound = kAllLanes;  // above all keys, as a value NaN: the row takes nothing
        if (shared.kept[warp] != 0 && needed > 0) {
            bound = 0;
            if (needed <= kSpan) {
                bool exact;
                const uint32_t least = min(min(keys[0], keys[1]), min(keys[2], keys[3]));
                bound = bisect(keys, needed, __reduce_min_sync(kAllLanes, least), &exact);
            }
            bound = max(bound, kLeastKey);
        }
        if (lane == 0) {
            shared.bounds[warp] = bound;
            reinterpret_cast<float*>(shared.bound_values)[warp] = share_of_key(bound);
        }
    }
    __syncthreads();

    // List.
    {
        const float4 bound = shared.bound_values[quad];
        uint32_t wanted = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (tops[i].x >= bound.x) wanted |= 1u << i;
            if (tops[i].y >= bound.y) wanted |= 16u << i;
            if (tops[i].z >= bound.z) wanted |= 256u << i;
            if (tops[i].w >= bound.w) wanted |= 4096u << i;
        }
        // A warp's hits, dealt evenly to its lanes: rows that are alike hit in the same threads.
        uint32_t end = __popc(wanted);
        const uint32_t own_hits = end;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const uint32_t before = __shfl_up_sync(kAllLanes, end, step);
            if (lane >= step) end += before;
        }
        const uint32_t hits = __shfl_sync(kAllLanes, end, kWarp - 1);
        static_assert(sizeof(shared.bins) == sizeof(uint16_t) * 16 * kClusterThreads);  // not in use yet
        uint16_t* queue = reinterpret_cast<uint16_t*>(shared.bins) + warp * (16 * kWarp);
#pragma unroll 1
        for (uint32_t next = end - own_hits; wanted != 0; wanted &= wanted - 1, ++next)
            queue[next] = static_cast<uint16_t>(lane * 16 + __ffs(wanted) - 1);
        __syncwarp();
#pragma unroll 1
        for (uint32_t hit = lane; hit < hits; hit += kWarp) {
            const int32_t at = queue[hit] % 16, from_lane = queue[hit] / 16;
            const int32_t row = from_lane % kQuads * 4 + at / 4;
            const int32_t first_unit = at % 4 * kSpan + (warp * kWarp + from_lane) / kQuads;
            const float row_bound = reinterpret_cast<const float*>(shared.bound_values)[row];
            constexpr int kMost = (kSpans + 3) / 4;
            float values[kMost];
#pragma unroll
            for (int i = 0; i < kMost; ++i) {
                const int32_t unit = first_unit + i * 4 * kSpan;
                values[i] = unit < eligible ? shared.value(unit, row) : -INFINITY;
            }
            uint32_t found = 0;
#pragma unroll
            for (int i = 0; i < kMost; ++i) found += values[i] >= row_bound;
            uint32_t next = atomicAdd(&shared.listed[row], found);
#pragma unroll
            for (int i = 0; i < kMost; ++i) {
                const uint32_t unit = first_unit + i * 4 * kSpan;
                if (values[i] >= row_bound && next < kListed)
                    shared.list[row][next] = make_uint2(finite_key(values[i]), unit);
                next += values[i] >= row_bound;
            }
        }
    }
    __syncthreads();

    // Cut and vote.
    const uint32_t count = shared.listed[warp];
    const bool overflows = count > kListed;
    if (count <= kCandidates) {
        // Ranks; what lies past the end of the list has the key 0.
        uint2 own[2];
        uint32_t above[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) own[i] = shared.list[warp][lane + i * kWarp];
        const uint4* pairs = reinterpret_cast<const uint4*>(shared.list[warp]);
        const auto rank = [&](int own_entries) {
#pragma unroll 1
            for (uint32_t j = 0; j < count; j += 8) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint4 pair = pairs[j / 2 + i];
#pragma unroll
                    for (int k = 0; k < own_entries; ++k)
                        above[k] += (pair.x > own[k].x ? 1u : 0u) + (pair.z > own[k].x ? 1u : 0u);
                }
            }
        };
        if (count <= kWarp) {
            rank(1);
        } else {
            rank(2);
        }
        bool chosen[2];
        uint32_t number = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            chosen[i] = own[i].x != 0 && above[i] < budget;
            number += __popc(__ballot_sync(kAllLanes, chosen[i]));
        }
        if (number > budget) {  // equal shares at the end: the lowest units go first
            const uint2 last = last_taken(shared.list[warp], count, budget);
#pragma unroll
            for (int i = 0; i < 2; ++i) chosen[i] = chosen[i] && (own[i].x > last.x || own[i].y <= last.y);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (chosen[i]) add_vote(shared, own[i].y, 1);
        }
    } else if (!overflows) {
        uint2 last = make_uint2(0u, 0u);  // below all
        if (count > budget) last = search_list(shared, warp, count, budget, eligible);
#pragma unroll 1
        for (uint32_t i = lane; i < count; i += kWarp) {
            const uint2 entry = shared.list[warp][i];
            if (entry.x > last.x || (entry.x == last.x && entry.y <= last.y)) add_vote(shared, entry.y, 1);
        }
    }
    if (__syncthreads_or(overflows)) {
        vote_without_lists(shared, eligible, budget);
        __syncthreads();
    }

    // Exchange: warp i sends to CTA i.
    device::cluster_wait();
    if (warp < args.row_blocks) {
        const uint32_t barrier = device::cluster_address(exchanged, warp);
        const uint32_t bits =
            device::cluster_address(device::shared_address(&shared.taken_in[cta * word_vectors]), warp);
        const uint32_t bytes =
            device::cluster_address(device::shared_address(&shared.counts_in[cta * count_vectors]), warp);
        if (lane < word_vectors) device::store_cluster_async(bits + lane * 16, shared.own.taken[lane], barrier);
#pragma unroll 1
        for (int32_t i = lane; i < count_vectors; i += kWarp)
            device::store_cluster_async(bytes + i * 16, shared.own.counts[warp * count_vectors + i], barrier);
    }
    const int32_t own_row = quad * 4 + (lane & 4) / 2 + (lane & 8) / 8;  // of the sum that this lane gets
    const float row_total = sum_rows(total);
    if (lane < 16) shared.totals[warp][own_row] = row_total;
    device::mbarrier_wait(exchanged, 0);
    if (threadIdx.x < word_vectors * 4) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(shared.taken_in) + threadIdx.x;
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kMaxClusterCtas; ++i) bits |= i < args.row_blocks ? words[i * word_vectors * 4] : 0u;
        shared.in_union[threadIdx.x] = bits;
    }
    __syncthreads();

    // Sums of the rows.
    float4 inside = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const uint32_t* words = shared.in_union + slot / kWarp;
    const uint32_t own_bit = 1u << (slot % kWarp);
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
        if (i * kSpan >= units) break;
        if ((words[i * (kSpan / kWarp)] & own_bit) != 0) {
            inside.x += shares[i].x;
            inside.y += shares[i].y;
            inside.z += shares[i].z;
            inside.w += shares[i].w;
        }
    }
    const float row_inside = sum_rows(inside);
    if (lane < 16) shared.insides[warp][own_row] = row_inside;
    __syncthreads();

    if (warp == 0) {
        const int32_t row = lane % kClusterRows, half = lane / kClusterRows;
        float parts[8], insides[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            parts[i] = shared.totals[i * 2 + half][row];
            insides[i] = shared.insides[i * 2 + half][row];
        }
        const auto add = [](const float (&a)[8]) {
            return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
        };
        float sum = add(parts), in_it = add(insides);
        sum += __shfl_xor_sync(kAllLanes, sum, 16);
        in_it += __shfl_xor_sync(kAllLanes, in_it, 16);
        const bool row_kept = shared.kept[row] != 0;
        float coverage = row_kept && sum > 0.0f ? __fdividef(in_it, sum) : 0.0f;
#pragma unroll
        for (int step = 1; step < kClusterRows; step *= 2) coverage += __shfl_xor_sync(kAllLanes, coverage, step);
        const uint32_t kept_rows = __popc(__ballot_sync(kAllLanes, row_kept && lane < kClusterRows));
        if (lane == 0) {
            const uint32_t to = device::shared_address(&shared.coverage_in[cta]);
            device::store_cluster_async(device::cluster_address(to, 0),
                                        make_uint2(__float_as_uint(coverage), kept_rows),
                                        device::cluster_address(summed, 0));
        }
        if (cta > 0) return;
        device::mbarrier_wait(summed, 0);
        const uint2 sent = lane < args.row_blocks ? shared.coverage_in[lane] : make_uint2(0u, 0u);
        coverage = __uint_as_float(sent.x);
#pragma unroll
        for (int step = 1; step < kMaxClusterCtas; step *= 2) coverage += __shfl_xor_sync(kAllLanes, coverage, step);
        const uint32_t all_kept = __reduce_add_sync(kAllLanes, sent.y);
        if (lane == 0) args.coverage[head] = all_kept > 0 ? __fdividef(coverage, static_cast<float>(all_kept)) : 0.0f;
        return;
    }
    if (cta == 0 && warp == 1) {
        uint32_t size = 0;
        for (int32_t i = lane; i < word_vectors * 4; i += kWarp) size += __popc(shared.in_union[i]);
        size = __reduce_add_sync(kAllLanes, size);
        if (lane == 0) args.union_size[head] = static_cast<int32_t>(size);
    }
    const int32_t first_unit = cta * args.share;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(shared.counts_in);
    int32_t* votes = args.votes + int64_t{head} * units;
#pragma unroll 1
    for (int32_t i = threadIdx.x - kWarp; i < min(args.share, units - first_unit); i += kClusterThreads - kWarp) {
        int32_t sum = 0;
#pragma unroll
        for (int j = 0; j < kMaxClusterCtas; ++j) sum += j < args.row_blocks ? bytes[j * args.share + i] : 0;
        votes[first_unit + i] = sum;
    }
}

}  // namespace

}  // namespace mage::cuda
