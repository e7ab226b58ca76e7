#pragma once

#include "core/row_votes_tiles.h"
#include "device/barrier.cuh"
#include "kernels/row_votes/search.cuh"

// Purpose   row_votes in one launch, where a cluster can hold the shares of a KV head; see mage/row_votes.h.
// Schedule  a cluster per KV head, a CTA of 512 threads per 16 (or 8) of its rows; a thread has every 32nd (64th) unit
// of
//           one row. All values of the CTA are read at once; as they arrive, each goes to shared memory as it is, its
//           exponential stays in a register, and so does the largest of each four. Per row then:
//           bound   the `budget`-th largest of the threads' maxima, which at least `budget` values reach; where the
//                   budget is above the number of threads, of the least of 4, or 16, maxima of each thread;
//           list    the values that reach the bound, about 22 for the 16th of 2049, by their fours' maxima;
//           cut     a warp per row finds the last unit taken: by rank in a list of at most 64, by a search in bins
//                   (search.cuh) in one of at most 384. Longer lists, of many equal shares or for large budgets, are
//                   given up, and all threads of the CTA search their values in the same way.
//           Votes of the CTA's rows are bytes, units with a vote are bits. Each CTA sends its bits to every CTA of the
//           cluster, and the bytes of each CTA's share of the units to it; then votes are stored and every CTA adds
//           what its rows have in the union. The first CTA gets the sums of the others.
// Memory    exponentials and maxima in registers; values in shared memory, four to a thread side by side.
// Sync      two messages through distributed shared memory, which arrive at an mbarrier of the receiver; it waits for
//           all that were sent to it, so a CTA may end before its own have arrived. Float sums are those of a thread's
//           values in order, then fixed trees over threads, warps, rows and CTAs.
// Ceiling   reads row_mass once: 7.3 MB at B = 1, Hkv = 4, n = 2049, R = 224. See NOTES.md.
namespace mage::cuda {

namespace {

constexpr int kClusterThreads = core::kVoteClusterThreads;
constexpr int kClusterWarps = kClusterThreads / kWarp;
constexpr int kMaxClusterCtas = core::kMaxVoteClusterCtas;
constexpr int kFours = core::kVoteClusterHeld / 4;
constexpr uint32_t kListed = 384;
constexpr float kLog2OfE = 1.44269504088896341f;
constexpr float kZeroShare = -1000.0f;  // its exponential is 0

template <int kRows>
struct ClusterShared {
    static constexpr int kSlots = kClusterThreads / kRows;
    static constexpr int kUnits = core::kVoteClusterHeld * kSlots;
    static constexpr int kWords = kUnits / kWarp;
    static constexpr int kHalves = kSlots / kWarp;  // words of the units of one value of each thread

    float4 values[kFours][kClusterThreads];                 // -inf past the eligible units
    uint2 list[kRows][kListed];                             // key, unit
    uint4 counts[(kUnits + 16 * kMaxClusterCtas) / 16];     // votes of this CTA's rows, a byte per unit
    uint4 counts_in[(kUnits + 16 * kMaxClusterCtas) / 16];  // [sender][share of this CTA]
    uint4 taken[kWords / 4];                                // units with a vote of this CTA's rows, a bit per unit
    uint4 taken_in[kMaxClusterCtas * kWords / 4];           // [sender][words]
    uint4 in_union[kHalves][kFours];
    uint32_t tops[kRows][kSlots + 4];
    uint2 candidates[kRows][kCandidates];
    uint32_t bins[kBins * kRows];
    float2 sums[kClusterWarps][kRows];  // all shares, those in the union
    Search searches[kRows];
    Pick picks[kRows];
    uint32_t bounds[kRows], listed[kRows], highest[kRows], chosen_from[kRows];
    uint2 coverage_in[kMaxClusterCtas];  // sum over kept rows, kept rows
    alignas(8) uint64_t exchanged, summed;
};

// A share, 0 for one below the smallest normal number and for NaN. Its relative error is below 2^-18, and below 2^-22
// for shares above e^-5.
__device__ __forceinline__ float share_of(float log_share) {
    float share;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(fminf(fmaxf(log_share, kZeroShare), 0.0f) * kLog2OfE));
    return share;
}

template <int kRows>
__device__ __forceinline__ void add_vote(ClusterShared<kRows>& shared, uint32_t unit, uint32_t votes) {
    atomicAdd(reinterpret_cast<uint32_t*>(shared.counts) + unit / 4, votes << (unit % 4 * 8));
    atomicOr(reinterpret_cast<uint32_t*>(shared.taken) + unit / kWarp, 1u << (unit % kWarp));
}

// The last unit that a row takes of its list, by a warp. More than kCandidates and at most kListed entries.
template <int kRows>
__device__ __noinline__ uint2 search_list(ClusterShared<kRows>& shared, int32_t row, uint32_t count, uint32_t need,
                                          int32_t eligible) {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint2* list = shared.list[row];
    uint32_t highest = 0;
    for (uint32_t i = lane; i < count; i += kWarp) highest = max(highest, list[i].x);
    Search search = first_search(need, __reduce_max_sync(kAllLanes, highest), shared.bounds[row]);
    const auto visit = [&](auto f) {
        const bool by_unit = search.stage == Stage::kUnits || search.stage == Stage::kListUnits;
        for (uint32_t i = lane; i < count; i += kWarp) {
            const uint2 entry = list[i];
            const uint32_t value = by_unit ? static_cast<uint32_t>(eligible - 1) - entry.y : entry.x;
            const uint32_t offset = value - search.low;
            if (offset <= search.last && (!by_unit || entry.x == search.key)) f(entry, offset);
        }
    };
    while (is_searching(search.stage)) {
        visit([&](uint2, uint32_t offset) { atomicAdd(&shared.bins[(offset >> search.shift) * kRows + row], 1u); });
        __syncwarp();
        narrow<kRows>(shared.bins + row, eligible, &search, &shared.picks[row]);
        __syncwarp();
    }
    if (search.stage == Stage::kDone) {
        const Pick pick = shared.picks[row];
        return make_uint2(share_key(pick.share), static_cast<uint32_t>(pick.unit));
    }
    uint2* candidates = shared.candidates[row];
    if (lane == 0) shared.chosen_from[row] = 0;
    __syncwarp();
    visit([&](uint2 entry, uint32_t) { candidates[atomicAdd(&shared.chosen_from[row], 1u)] = entry; });
    __syncwarp();
    return last_taken(candidates, shared.chosen_from[row], search.need);
}

// The votes of the rows whose lists are too long, by all threads.
template <int kRows>
__device__ __noinline__ void vote_without_lists(ClusterShared<kRows>& shared, int32_t fours, int32_t eligible,
                                                uint32_t budget) {
    constexpr int kSlots = ClusterShared<kRows>::kSlots;
    const uint32_t row = threadIdx.x % kRows, slot = threadIdx.x / kRows;
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool overflows = shared.listed[row] > kListed;
    // f(value, unit) for the thread's values, with whole warps.
    const auto visit = [&](auto f) {
#pragma unroll 1
        for (int32_t four = 0; four < fours; ++four) {
            const float4 values = shared.values[four][threadIdx.x];
            const uint32_t unit = four * 4 * kSlots + slot;
            f(values.x, unit);
            f(values.y, unit + kSlots);
            f(values.z, unit + 2 * kSlots);
            f(values.w, unit + 3 * kSlots);
        }
    };
    if (threadIdx.x < kRows) {
        shared.highest[row] = 0;
        shared.chosen_from[row] = 0;
    }
    uint32_t highest = 0;
    visit([&](float value, uint32_t) { highest = max(highest, share_key(value)); });
    __syncthreads();
    atomicMax(&shared.highest[row], highest);
    __syncthreads();

    Search own = first_search(overflows ? budget : 0, shared.highest[row], shared.bounds[row]);
    if (threadIdx.x < kRows) {
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
                atomicAdd(&shared.bins[(offset >> own.shift) * kRows + row], 1u);
            });
        }
        __syncthreads();
        bool goes_on = false;
        if (warp < kRows) {
            Search led = shared.searches[warp];
            if (is_searching(led.stage)) {
                narrow<kRows>(shared.bins + warp, eligible, &led, &shared.picks[warp]);
                __syncwarp();  // all lanes have read what is written now
                if (lane == 0) shared.searches[warp] = led;
                goes_on = is_searching(led.stage);
            }
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
    if (warp < kRows && shared.searches[warp].stage != Stage::kDone) {
        const uint2 last = last_taken(shared.candidates[warp], shared.chosen_from[warp], shared.searches[warp].need);
        if (lane == 0) shared.picks[warp] = {share_of_key(last.x), static_cast<int32_t>(last.y)};
    }
    __syncthreads();
    const Pick pick = shared.picks[row];
    visit([&](float share, uint32_t unit) {
        const bool chosen = share > pick.share || (share == pick.share && static_cast<int32_t>(unit) <= pick.unit);
        const uint32_t rows =
            __ballot_sync(kAllLanes, chosen) >> (lane - row) & static_cast<uint32_t>((1u << kRows) - 1);
        if (row == 0 && rows != 0) add_vote(shared, unit, __popc(rows));
    });
}

template <int kRows>
__global__ void __launch_bounds__(kClusterThreads, 1)
    mage_row_votes_cluster_kernel(const __grid_constant__ RowVotesArgs args) {
    using Shared = ClusterShared<kRows>;
    constexpr int kSlots = Shared::kSlots, kHalves = Shared::kHalves;
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);

    const int32_t head = static_cast<int32_t>(device::cluster_index());
    const int32_t cta = static_cast<int32_t>(device::cluster_rank());
    const int32_t request = head / args.num_kv_heads;
    const int32_t first_row = cta * kRows;
    const int32_t row = threadIdx.x % kRows, slot = threadIdx.x / kRows;
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int32_t units = args.units;
    const int32_t fours = (units + 4 * kSlots - 1) / (4 * kSlots);  // of a thread
    const int32_t word_vectors = (units + 127) / 128;               // of bits of all units
    const int32_t count_vectors = args.share / 16;                  // of bytes of the units of a CTA

    const bool* mask = args.row_mask == nullptr ? nullptr
                                                : args.row_mask + int64_t{request} * args.positions +
                                                      min(first_row + row, args.rows - 1) / args.group;

    // Before the inputs are there: what is counted into is 0, and the cluster knows each other's barriers.
    const auto clear = [&](auto& array) {
        uint4* vectors = reinterpret_cast<uint4*>(&array);
        for (uint32_t i = threadIdx.x; i < sizeof(array) / 16; i += kClusterThreads)
            vectors[i] = make_uint4(0, 0, 0, 0);
    };
    clear(shared.counts);
    clear(shared.taken);
    clear(shared.bins);
    if (threadIdx.x < kRows) shared.listed[threadIdx.x] = 0;
    const uint32_t exchanged = device::shared_address(&shared.exchanged);
    const uint32_t summed = device::shared_address(&shared.summed);
    if (threadIdx.x == 0) {
        device::mbarrier_init(exchanged, 1);
        device::mbarrier_init(summed, 1);
        device::mbarrier_init_fence();
        device::mbarrier_arrive_expect(exchanged, args.row_blocks * (word_vectors + count_vectors) * 16);
        device::mbarrier_arrive_expect(summed, cta == 0 ? args.row_blocks * 8 : 0);
    }
    __syncwarp();
    device::cluster_arrive_relaxed();
    device::dependency_wait();
    device::dependency_release();

    // Load.
    const int32_t eligible = eligible_units(args, request);
    const bool kept = first_row + row < args.rows && (mask == nullptr || *mask);
    float shares[4 * kFours] = {};  // log-shares at first
    {
        const int32_t own_row = min(first_row + row, args.rows - 1);  // rows past the last are not kept
        const float* from = args.row_mass + (int64_t{head} * units + slot) * args.rows + own_row;
        const int64_t step = int64_t{kSlots} * args.rows;
#pragma unroll
        for (int four = 0; four < kFours; ++four) {
            if ((four + 1) * 4 * kSlots <= units) {
#pragma unroll
                for (int i = 0; i < 4; ++i) shares[four * 4 + i] = __ldcg(from + (four * 4 + i) * step);
            } else if (four * 4 * kSlots < units) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = four * 4 + i;
                    shares[at] = at * kSlots + slot < units ? __ldcg(from + at * step) : -INFINITY;
                }
            }
        }
    }
    float tops[kFours];
    float total = 0.0f;
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
        float* own = shares + four * 4;
        tops[four] = -INFINITY;
        if (four * 4 * kSlots < units) {
            float4 values = make_float4(own[0], own[1], own[2], own[3]);
            if ((four + 1) * 4 * kSlots > eligible) {
                const int32_t unit = four * 4 * kSlots + slot;
                if (unit >= eligible) values.x = -INFINITY;
                if (unit + kSlots >= eligible) values.y = -INFINITY;
                if (unit + 2 * kSlots >= eligible) values.z = -INFINITY;
                if (unit + 3 * kSlots >= eligible) values.w = -INFINITY;
            }
            shared.values[four][threadIdx.x] = values;
            tops[four] = fmaxf(fmaxf(values.x, values.y), fmaxf(values.z, values.w));  // without NaN
#pragma unroll
            for (int i = 0; i < 4; ++i) own[i] = share_of(own[i]);
            total += (own[0] + own[1]) + (own[2] + own[3]);
        }
    }

    // Bound.
    const uint32_t budget = min(args.budget, eligible);
    {
        const auto largest = [&](int first, int step) {
            float top = -INFINITY;
#pragma unroll
            for (int i = first; i < kFours; i += step) top = fmaxf(top, tops[i]);
            return top;
        };
        float top;
        uint32_t per_thread = 1;
        if (budget <= kSlots) {
            top = largest(0, 1);
        } else if (budget <= 4 * kSlots) {
            per_thread = 4;
            top = fminf(fminf(largest(0, 4), largest(1, 4)), fminf(largest(2, 4), largest(3, 4)));
        } else {
            per_thread = 16;
            top = largest(0, 16);
#pragma unroll
            for (int i = 1; i < 16; ++i) top = fminf(top, largest(i, 16));
        }
        shared.tops[row][slot] = share_key(top);
        const uint32_t rows_kept = __ballot_sync(kAllLanes, kept);
        if (threadIdx.x < kRows) shared.chosen_from[row] = rows_kept >> row & 1u;
        __syncthreads();
        if (warp < kRows) {
            const uint32_t needed = shared.chosen_from[warp] != 0 ? (budget + per_thread - 1) / per_thread : 0;
            uint32_t own[kHalves], above[kHalves] = {};
#pragma unroll
            for (int i = 0; i < kHalves; ++i) own[i] = shared.tops[warp][lane + i * kWarp];
#pragma unroll
            for (int j = 0; j < kSlots; j += 4) {
                const uint4 others = *reinterpret_cast<const uint4*>(&shared.tops[warp][j]);
#pragma unroll
                for (int i = 0; i < kHalves; ++i) {
                    above[i] += others.x > own[i];
                    above[i] += others.y > own[i];
                    above[i] += others.z > own[i];
                    above[i] += others.w > own[i];
                }
            }
            uint32_t bound = kAllLanes;  // above all keys: such a row takes nothing
#pragma unroll
            for (int i = 0; i < kHalves; ++i) bound = above[i] < needed ? min(bound, own[i]) : bound;
            bound = __reduce_min_sync(kAllLanes, bound);
            if (needed > kSlots) bound = 0;
            if (lane == 0) shared.bounds[warp] = max(bound, kLeastKey);
        }
        __syncthreads();
    }

    // List.
    {
        const float bound = share_of_key(shared.bounds[row]);  // NaN where nothing is taken
        uint32_t wanted = 0;
#pragma unroll
        for (int four = 0; four < kFours; ++four) {
            if (tops[four] >= bound) wanted |= 1u << four;
        }
        for (; wanted != 0; wanted &= wanted - 1) {
            const int32_t four = __ffs(wanted) - 1;
            const float4 four_values = shared.values[four][threadIdx.x];
            const float values[4] = {four_values.x, four_values.y, four_values.z, four_values.w};
            uint32_t count = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) count += values[i] >= bound;
            uint32_t at = atomicAdd(&shared.listed[row], count);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (values[i] >= bound) {
                    if (at < kListed)
                        shared.list[row][at] = make_uint2(share_key(values[i]), (four * 4 + i) * kSlots + slot);
                    ++at;
                }
            }
        }
        __syncthreads();
    }

    // Cut and vote.
    bool overflows = false;
    if (warp < kRows) {
        const uint32_t count = shared.listed[warp];
        overflows = count > kListed;
        if (!overflows && count > 0) {
            uint2 last = make_uint2(0u, 0u);  // below all
            if (count > kCandidates && count > budget) {
                last = search_list(shared, warp, count, budget, eligible);
            } else if (count > budget) {
                last = last_taken(shared.list[warp], count, budget);
            }
            for (uint32_t i = lane; i < count; i += kWarp) {
                const uint2 entry = shared.list[warp][i];
                if (entry.x > last.x ||
                    (entry.x == last.x && static_cast<int32_t>(entry.y) <= static_cast<int32_t>(last.y)))
                    add_vote(shared, entry.y, 1);
            }
        }
    }
    if (__syncthreads_or(overflows)) {
        vote_without_lists(shared, fours, eligible, budget);
        __syncthreads();
    }

    // Exchange: warp i sends to CTA i.
    device::cluster_wait();
    if (warp < args.row_blocks) {
        const uint32_t barrier = device::address_in_cluster(exchanged, warp);
        const uint32_t bits =
            device::address_in_cluster(device::shared_address(&shared.taken_in[cta * word_vectors]), warp);
        for (int32_t i = lane; i < word_vectors; i += kWarp) device::send(bits + i * 16, shared.taken[i], barrier);
        const uint32_t bytes =
            device::address_in_cluster(device::shared_address(&shared.counts_in[cta * count_vectors]), warp);
        for (int32_t i = lane; i < count_vectors; i += kWarp)
            device::send(bytes + i * 16, shared.counts[warp * count_vectors + i], barrier);
    }
    device::mbarrier_wait(exchanged, 0);
    const int32_t words = word_vectors * 4;
    uint32_t* in_union = reinterpret_cast<uint32_t*>(shared.in_union);  // [half][value of a thread]
    for (int32_t i = threadIdx.x; i < fours * 4 * kHalves; i += kClusterThreads) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(shared.taken_in) + i;
        uint32_t bits = 0;
        for (int32_t sender = 0; sender < args.row_blocks; ++sender, from += words) bits |= i < words ? *from : 0u;
        in_union[i % kHalves * (kFours * 4) + i / kHalves] = bits;
    }
    __syncthreads();

    // Sums of the rows.
    float inside = 0.0f;
    {
        const uint32_t own_bit = 1u << (slot % kWarp);
        const uint4* vectors = shared.in_union[slot / kWarp];
        float parts[4] = {};
#pragma unroll
        for (int four = 0; four < kFours; ++four) {
            if (four * 4 * kSlots >= units) break;
            const uint4 bits = vectors[four];
            if ((bits.x & own_bit) != 0) parts[0] += shares[four * 4];
            if ((bits.y & own_bit) != 0) parts[1] += shares[four * 4 + 1];
            if ((bits.z & own_bit) != 0) parts[2] += shares[four * 4 + 2];
            if ((bits.w & own_bit) != 0) parts[3] += shares[four * 4 + 3];
        }
        inside = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
#pragma unroll
    for (int step = kRows; step < kWarp; step *= 2) {
        total += __shfl_xor_sync(kAllLanes, total, step);
        inside += __shfl_xor_sync(kAllLanes, inside, step);
    }
    if (lane < kRows) shared.sums[warp][lane] = make_float2(total, inside);
    __syncthreads();

    if (warp == 0) {
        constexpr int kParts = kWarp / kRows;
        total = 0.0f;
        inside = 0.0f;
#pragma unroll
        for (int i = 0; i < kClusterWarps; i += kParts) {
            const float2 sums = shared.sums[i + lane / kRows][row];
            total += sums.x;
            inside += sums.y;
        }
#pragma unroll
        for (int step = kRows; step < kWarp; step *= 2) {
            total += __shfl_xor_sync(kAllLanes, total, step);
            inside += __shfl_xor_sync(kAllLanes, inside, step);
        }
        float coverage = kept && total > 0.0f ? inside / total : 0.0f;
#pragma unroll
        for (int step = 1; step < kRows; step *= 2) coverage += __shfl_xor_sync(kAllLanes, coverage, step);
        const uint32_t kept_rows = __popc(__ballot_sync(kAllLanes, kept && lane < kRows));
        if (lane == 0) {
            const uint32_t to = device::shared_address(&shared.coverage_in[cta]);
            device::send(device::address_in_cluster(to, 0), make_uint2(__float_as_uint(coverage), kept_rows),
                         device::address_in_cluster(summed, 0));
        }
        if (cta > 0) return;
        device::mbarrier_wait(summed, 0);
        const uint2 sent = lane < args.row_blocks ? shared.coverage_in[lane] : make_uint2(0u, 0u);
        coverage = __uint_as_float(sent.x);
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) coverage += __shfl_xor_sync(kAllLanes, coverage, step);
        const uint32_t all_kept = __reduce_add_sync(kAllLanes, sent.y);
        if (lane == 0) args.coverage[head] = all_kept > 0 ? coverage / static_cast<float>(all_kept) : 0.0f;
        return;
    }
    if (cta == 0 && warp == 1) {
        uint32_t size = 0;
        for (int32_t i = lane; i < fours * 4 * kHalves; i += kWarp)
            size += __popc(in_union[i % kHalves * (kFours * 4) + i / kHalves]);
        size = __reduce_add_sync(kAllLanes, size);
        if (lane == 0) args.union_size[head] = static_cast<int32_t>(size);
    }
    const int32_t first_unit = cta * args.share;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(shared.counts_in);
    int32_t* votes = args.votes + int64_t{head} * units;
    for (int32_t i = threadIdx.x - kWarp; i < min(args.share, units - first_unit); i += kClusterThreads - kWarp) {
        int32_t sum = 0;
        for (int32_t sender = 0; sender < args.row_blocks; ++sender) sum += bytes[sender * args.share + i];
        votes[first_unit + i] = sum;
    }
}

}  // namespace

}  // namespace mage::cuda
