// Purpose   budgets and lists of all layers, requests and heads of a step, in one launch; see mage/select_kv.h.
// Schedule  a row of masses is one CTA's, or the parts of a cluster where it is long; rule "joint" has the heads of a
//           layer and request in one cluster. Every value is read once and becomes a key (keys.cuh). The last unit
//           taken is found by a histogram of the keys that lie above half of the mean mass, of which few of a long row
//           do; what is in the bin where the count is reached, usually a few units, is ranked one against the other
//           (search.cuh). Parts add up their histograms (group.cuh), so all of them find the same unit. Then a pass in
//           the order of units has a bit for each one taken; sums over the bits are the places in the list.
//           Rule "mass" first finds how many units reach p by histograms of masses; rule "joint" searches once for all
//           heads, and again for a head whose list is longer than the capacity; rule "layer" adds up the scores of a
//           request's layers in every CTA, which are L * Hkv numbers.
// Memory    keys in registers up to 20 per thread, in shared memory up to 48K per CTA, beyond that made from memory in
//           each pass. Histograms of 2048 bins. The workspace is not used.
// Sync      messages between the CTAs of a cluster through distributed shared memory, counted by the receiver; no
//           global atomics, nothing is read that another CTA wrote. Sums are integers, so their order is free.
// Ceiling   reads mass once: 4 * L * B * Hkv * n bytes / 3.05 TB/s; short rows take the latency of one read, a
//           histogram, a ranking and a prefix sum. See NOTES.md.
#include <algorithm>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "kernels/kernel_list.h"
#include "kernels/select_kv/search.cuh"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "select_kv";
constexpr int kThreads = 512;
constexpr int kFewThreads = 128;
constexpr int kFewHeld = 8;
constexpr int kMostHeld = 20;
constexpr double kLeastCoverage = 1.0 / (1 << 24);
constexpr double kLogGrid = 1 << 20;

// Units a request can list, and those that come first.
struct Prefix {
    int32_t eligible;  // E
    int32_t sinks;     // [0, sinks) intersect the sink tokens
    int32_t recents;   // [E - recents, E) intersect the recent tokens; disjoint from the sinks
    int32_t partial;   // 1 if the prefix ends inside a unit
};

__device__ __forceinline__ Prefix prefix_of(const SelectArgs& args, int32_t length) {
    const int32_t tokens = min(max(length, 0), args.units << args.unit_shift);
    const int32_t last_token = (1 << args.unit_shift) - 1;
    Prefix prefix;
    prefix.eligible = tokens >> args.unit_shift;
    prefix.partial = (tokens & last_token) != 0;
    prefix.sinks = min((args.sinks + last_token) >> args.unit_shift, prefix.eligible);
    prefix.recents = 0;
    if (args.recents > 0) {
        const int32_t first = max(tokens - args.recents, 0) >> args.unit_shift;
        prefix.recents = min(prefix.eligible - min(first, prefix.eligible), prefix.eligible - prefix.sinks);
    }
    return prefix;
}

// Forced units of one list of `count` units: sinks first, then the latest recents; and the units between them, of
// which `ranked` more are listed.
struct Budget {
    int32_t count, ranked;
    Range between;

    __device__ __forceinline__ Budget(const Prefix& prefix, int32_t units) : count(units) {
        const int32_t sinks = min(prefix.sinks, units);
        const int32_t recents = min(prefix.recents, units - sinks);
        ranked = units - sinks - recents;
        between = {sinks, prefix.eligible - sinks - recents};
    }
};

__device__ __forceinline__ int32_t budget_units(const SelectArgs& args, const Prefix& prefix, int32_t units) {
    return min(max(units - prefix.partial, 0), args.units);
}

// rule kLayer: units of K_l of a layer and request, before the partial unit is charged. Threads of a layer are
// neighbours.
template <int kThreadsOf>
__device__ __forceinline__ int32_t layer_budget(const SelectArgs& args, Group<kThreadsOf>& group, int32_t layer,
                                                int32_t request) {
    int32_t lanes = 1;
    while (lanes < args.heads && lanes < kWarp) lanes *= 2;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % lanes;
    Sum sum = 0, own = 0;
    for (int32_t begin = 0; begin < args.layers; begin += kThreadsOf / lanes) {
        const int32_t at = begin + static_cast<int32_t>(threadIdx.x) / lanes;
        Sum score = 0;
        if (at < args.layers) {
            const int64_t row = (int64_t{at} * args.requests + request) * args.heads;
            for (int32_t head = lane; head < args.heads; head += lanes) {
                const double coverage = args.coverage[row + head];
                const double share =
                    coverage > kLeastCoverage ? fmin(coverage, 1.0) : kLeastCoverage;  // NaN: the least
                const auto weight = static_cast<Sum>(__double2ll_rn((1.0 - log(share)) * kLogGrid));
                const auto size = static_cast<Sum>(min(max(args.union_size[row + head], 0), args.units));
                score = max(score, size * weight);
            }
        }
        for (int32_t step = lanes / 2; step > 0; step /= 2) score = max(score, __shfl_xor_sync(kAllLanes, score, step));
        if (lane == 0) sum += score;
        if (lane == 0 && at == layer) own = score;
    }
    const uint4 sums = group.cta_sums(sum, own);
    __syncthreads();
    double share = args.budget;
    if (first_sum(sums) > 0) {
        const auto pool = static_cast<double>(int64_t{args.budget} * args.layers);
        share = floor(static_cast<double>(second_sum(sums)) * pool / static_cast<double>(first_sum(sums)));
    }
    share = fmin(share, static_cast<double>(args.units) + 1);  // one more for the partial unit
    return max(args.least_budget, static_cast<int32_t>(share));
}

// The CTA's units between the forced ones that are taken up to `pick`; this thread's.
template <int kThreadsOf, int kHeld>
__device__ __forceinline__ Sum count_taken(const SelectShared<kThreadsOf>& shared, const Keys<kThreadsOf, kHeld>& keys,
                                           const Scope& scope, const Budget& budget, const Places& places,
                                           const Pick& pick, const List& list) {
    Sum taken = 0;
    each_of(shared, keys, scope, places, list, [&](uint32_t key, int32_t unit, int32_t head) {
        if (budget.between.contains(unit) && pick.takes(key, places.of(unit, head))) ++taken;
    });
    return taken;
}

// The lowest `count` bits; none if it is negative, all from 32 on.
__device__ __forceinline__ uint32_t low_bits(int32_t count) {
    return count <= 0 ? 0u : count >= kWarp ? kAllLanes : (1u << count) - 1;
}

// How many of the units [begin, end) are below `limit`.
__device__ __forceinline__ int32_t units_below(int32_t begin, int32_t end, int32_t limit) {
    return max(min(end, limit) - begin, 0);
}

// The entries of a list past its count.
template <int kThreadsOf>
__device__ __forceinline__ void clear_rest(const SelectArgs& args, const Group<kThreadsOf>& group, int64_t row,
                                           int32_t count) {
    int32_t* indices = args.indices + row * args.capacity;
    for (int32_t i = count + static_cast<int32_t>(group.rank() * kThreadsOf + threadIdx.x); i < args.capacity;
         i += static_cast<int32_t>(group.size()) * kThreadsOf)
        indices[i] = -1;
}

// Lists the forced units and those up to `pick` between them, of one head. With a list, `outside` is the mass of what
// is not between the forced units. shared.words is 0 before.
template <int kThreadsOf, int kHeld>
__device__ __forceinline__ void write_list(const SelectArgs& args, SelectShared<kThreadsOf>& shared,
                                           const Keys<kThreadsOf, kHeld>& keys, Group<kThreadsOf>& group, int64_t row,
                                           int32_t head, const Prefix& prefix, const Budget& budget, const Pick& pick,
                                           const List& list, Sum outside, bool overflow) {
    constexpr int kWarps = kThreadsOf / kWarp;
    constexpr int kBlock = kThreadsOf * kWarp;  // units whose bits the threads have, a word each
    const int32_t thread = threadIdx.x;
    const int32_t lane = thread % kWarp, warp = thread / kWarp;
    const Places places(args, budget.between);
    const int32_t first = keys.first(), end = min(first + keys.units(), prefix.eligible);
    const int32_t recents = budget.between.begin + budget.between.width;  // the first of them
    const auto is_taken = [&](uint32_t key, int32_t unit, int32_t of) {
        return key != 0 && budget.between.contains(unit) && pick.takes(key, places.of(unit, of));
    };

    Sum kept = list.is_complete ? outside : keys.tail(head);
    uint32_t taken = 0;
    if (list.is_complete) {
        for (uint32_t i = thread; i < list.count; i += kThreadsOf) {
            const Sum entry = shared.list[i];
            const auto key = static_cast<uint32_t>(entry >> 32);
            const uint32_t place = ~static_cast<uint32_t>(entry);
            if (pick.takes(key, place)) {
                const int32_t at = places.unit_of(place) - first;
                if (at < kBlock) atomicOr(&shared.words[at / kWarp], 1u << at % kWarp);
                kept += fixed_point(mass_of_key(key));
                ++taken;
            }
        }
    } else {
        keys.each({head, 1}, [&](uint32_t key, int32_t unit, int32_t of, int32_t chunk) {
            const bool takes = is_taken(key, unit, of);
            if (takes || (key != 0 && !budget.between.contains(unit))) kept += keys.mass_of(key, unit, of);
            taken += takes ? 1 : 0;
            const uint32_t word = __ballot_sync(kAllLanes, takes);
            if (lane == 0 && chunk < kWarp) shared.words[chunk * kWarps + warp] = word;
        });
    }
    if (__any_sync(kAllLanes, kept != 0)) kept = warp_sum(kept);
    if (group.size() > 1) taken = warp_sum(taken);
    if (lane == 0) {
        shared.warp_sums[0][warp] = kept;
        shared.warp_counts[warp] = taken;
    }
    __syncthreads();
    uint4 sums = {};
    if (warp == 0) {
        kept = warp_sum(lane < kWarps ? shared.warp_sums[0][lane] : Sum{0});
        if (group.size() > 1) {
            taken = warp_sum(lane < kWarps ? shared.warp_counts[lane] : 0u);
            taken += units_below(first, end, budget.between.begin) + units_below(max(first, recents), end, end);
        }
        sums = as_vector(kept, taken);
    }
    uint32_t base = 0;
    if (group.size() > 1) {
        const uint4* parts = group.gather(sums);
        base = warp_sum(lane < static_cast<int32_t>(group.rank()) ? parts[lane].z : 0u);
        if (warp == 0) {
            const bool is_part = lane < static_cast<int32_t>(group.size());
            kept = warp_sum(is_part ? first_sum(parts[lane]) : Sum{0});
        }
    }
    if (group.rank() == 0 && thread == 0) {
        args.counts[row] = budget.count;
        args.kept_mass[row] = static_cast<float>(static_cast<double>(kept) * (1.0 / kFixedPoint));
        args.overflow[row] = overflow;
    }

    int32_t* indices = args.indices + row * args.capacity;
    for (int32_t block = first; block < end; block += kBlock) {
        if (block > first) {
            __syncthreads();
            shared.words[thread] = 0;
            __syncthreads();
            if (list.is_complete) {
                for (uint32_t i = thread; i < list.count; i += kThreadsOf) {
                    const Sum entry = shared.list[i];
                    const uint32_t place = ~static_cast<uint32_t>(entry);
                    const int32_t at = places.unit_of(place) - block;
                    if (pick.takes(static_cast<uint32_t>(entry >> 32), place) && at >= 0 && at < kBlock)
                        atomicOr(&shared.words[at / kWarp], 1u << at % kWarp);
                }
            } else {
                const int32_t chunk_of_block = (block - first) / kThreadsOf;
                keys.each({head, 1, chunk_of_block, kWarp}, [&](uint32_t key, int32_t unit, int32_t of, int32_t chunk) {
                    const uint32_t word = __ballot_sync(kAllLanes, is_taken(key, unit, of));
                    if (lane == 0) shared.words[(chunk - chunk_of_block) * kWarps + warp] = word;
                });
            }
            __syncthreads();
        }
        // A thread has 32 units.
        const int32_t begin = block + thread * kWarp;
        uint32_t word = shared.words[thread];
        word |= low_bits(budget.between.begin - begin) | (low_bits(end - begin) & ~low_bits(recents - begin));
        if (begin >= end) word = 0;
        const uint32_t own = __popc(word);
        uint32_t upto = own;
        if (__any_sync(kAllLanes, word != 0)) {
#pragma unroll
            for (int step = 1; step < kWarp; step *= 2) {
                const uint32_t other = __shfl_up_sync(kAllLanes, upto, step);
                if (lane >= step) upto += other;
            }
        }
        if (lane == kWarp - 1) shared.warp_counts[warp] = upto;
        __syncthreads();
        const uint32_t listed = lane < kWarps ? shared.warp_counts[lane] : 0u;
        int32_t* to = indices + base + warp_sum(lane < warp ? listed : 0u) + upto - own;
        for (; word != 0; word &= word - 1) *to++ = begin + __ffs(word) - 1;
        base += warp_sum(listed);
    }
}

// CTAs of a multiprocessor that registers are left for.
template <int kThreadsOf, int kHeld>
constexpr int kLeastBlocks = kThreadsOf == kFewThreads ? 4
                             : kHeld == kInShared      ? 2
                                                       : 1;

template <int kThreadsOf, int kHeld>
__global__ void __launch_bounds__(kThreadsOf, (kLeastBlocks<kThreadsOf, kHeld>))
    mage_select_kv_kernel(const __grid_constant__ SelectArgs args) {
    extern __shared__ uint4 shared_memory[];
    using Shared = SelectShared<kThreadsOf>;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    const int32_t thread = threadIdx.x;
    const int32_t part = static_cast<int32_t>(blockIdx.x) % args.parts;
    const int32_t row = static_cast<int32_t>(blockIdx.x) / args.parts;
    const int32_t heads = args.all_heads ? 1 : args.heads;  // that have CTAs of their own
    const int32_t head = row % heads, request = row / heads % args.requests, layer = row / heads / args.requests;
    const int64_t list_row = (int64_t{layer} * args.requests + request) * args.heads + head;

    shared.bins[thread] = uint4{};
    shared.words[thread] = 0;
    if (thread < static_cast<int32_t>(kCoarseBins)) shared.coarse[thread] = 0;
    if (thread == 0) {
        shared.listed = 0;
        shared.gathered = 0;
        if (args.cluster > 1) Group<kThreadsOf>::init_barriers(shared);
    }
    __syncthreads();
    if (args.cluster > 1) device::cluster_sync_relaxed();
    Group<kThreadsOf> group(shared, args.cluster, args.cluster > 1 ? device::cluster_rank() : 0);
    device::dependency_wait();
    device::dependency_release();

    const int32_t first = part * args.span;
    Keys<kThreadsOf, kHeld> keys(args, layer, request, head, first, min(max(args.units - first, 0), args.span),
                                 reinterpret_cast<uint32_t*>(&shared + 1));
    keys.request();
    const Prefix prefix = prefix_of(args, args.prefix_lens[request]);
    if (layer == 0 && head == 0 && part == 0 && thread == 0)
        args.tail_start[request] = prefix.eligible << args.unit_shift;
    keys.settle(prefix.eligible);

    const Scope scope = {head, args.all_heads ? args.heads : 1};
    constexpr uint32_t kBins = 4 * kThreadsOf;
    int32_t wanted;
    Window window;
    bool has_window = false;
    if (args.rule == SelectRule::kMass) {
        const Budget forced(prefix, prefix.eligible);
        Sum between = 0, all = keys.tail(head);
        keys.each(scope, [&](uint32_t key, int32_t unit, int32_t of, int32_t) {
            const Sum mass = keys.mass_of(key, unit, of);
            all += mass;
            if (forced.between.contains(unit)) between += mass;
        });
        const uint4 sums = group.sums(between, all);
        between = first_sum(sums);
        const Sum total = second_sum(sums);
        const double share = ceil(args.p * static_cast<double>(total));
        // A total above 2^53 may be rounded up on its way to double.
        const Sum target = share >= static_cast<double>(total) ? total : static_cast<Sum>(share);
        wanted = prefix.sinks + prefix.recents;
        if (target > total - between) {
            const uint2 last = reach(shared, keys, scope, group, forced.between, target - (total - between));
            Sum above = 0;
            keys.each(scope, [&](uint32_t key, int32_t unit, int32_t, int32_t) {
                if (forced.between.contains(unit) && key > last.x) ++above;
            });
            wanted += static_cast<int32_t>(first_sum(group.sums(above, 0)) + last.y);
            // Unless the list gets another length, all that is left are the places of the last key.
            window = {0u, Places(args, forced.between).last, 0u, last.y, last.x, true};
            window.shift = shift_of<kBins>(window.low, window.high);
            has_window = wanted <= args.capacity;
        }
        const int32_t least = budget_units(args, prefix, args.least_budget);
        has_window = has_window && wanted >= least;
        wanted = max(wanted, least);
    } else {
        int32_t units = args.budget;
        if (args.rule == SelectRule::kLayer) units = layer_budget(args, group, layer, request);
        wanted = budget_units(args, prefix, units);
    }
    wanted = min(wanted, prefix.eligible);

    bool ranks_heads = args.rule == SelectRule::kJoint;
    bool overflow = !ranks_heads && wanted > args.capacity;
    Budget budget(prefix, ranks_heads ? wanted : min(wanted, args.capacity));
    const auto lists = static_cast<uint32_t>(ranks_heads ? args.heads : 1);
    uint32_t need = has_window ? window.need : lists * static_cast<uint32_t>(budget.ranked);
    bool takes_all = !has_window && need >= lists * static_cast<uint32_t>(budget.between.width);
    List list = {false, 0};
    Sum outside = 0;
    if (!args.all_heads && (args.rule == SelectRule::kFixed || ranks_heads) && !takes_all && need > 0) {
        const uint32_t top = keys.survey(budget.between, &outside);
        const uint32_t bound = find_bound(shared, group, top, prefix.eligible, need);
        if (bound != 0) {
            const Places places(args, budget.between);
            if (top >= bound) {
                keys.each_above(budget.between, bound, [&](uint32_t key, int32_t unit) {
                    const uint32_t at = atomicAdd(&shared.listed, 1u);
                    if (at < kListed) shared.list[at] = entry_of(key, places.of(unit, head));
                });
            }
            __syncthreads();
            list = {shared.listed <= kListed, shared.listed};
            window = window_above<kBins>(bound, need);
            has_window = true;
        }
    }
    Pick pick;
    while (true) {
        const Places places(args, budget.between);
        if (takes_all) {
            pick = {0u, 0xffffffffu};
        } else if (need == 0) {
            pick = {0xffffffffu, 0u};
        } else if (list.is_complete && list.count <= kRanked && group.size() == 1) {
            pick = last_of(shared, shared.list, list.count, need);
        } else {
            if (!has_window) window = first_window<kBins>(args, prefix.eligible, need);
            pick = search(shared, keys, scope, group, budget.between, places, window, list);
        }
        if (!ranks_heads || args.all_heads) break;
        // What this head has of the joint ranking is the top of its own; where that is too long, another search.
        ranks_heads = false;
        const Sum taken = count_taken(shared, keys, scope, budget, places, pick, list);
        uint4 sums = group.cta_sums(taken, 0);
        if (group.size() > 1) {
            const int32_t lane = thread % kWarp;
            const uint4* parts = group.gather(sums);
            const bool is_own = lane < args.cluster && lane / args.parts == head;
            sums = as_vector(warp_sum(is_own ? first_sum(parts[lane]) : 0), 0);
        }
        __syncthreads();
        group.narrow(static_cast<uint32_t>(head * args.parts), static_cast<uint32_t>(args.parts));
        wanted = budget.count - budget.ranked + static_cast<int32_t>(first_sum(sums));
        overflow = wanted > args.capacity;
        if (!overflow) {
            budget.count = wanted;
            break;
        }
        budget = Budget(prefix, args.capacity);
        need = static_cast<uint32_t>(budget.ranked);
        takes_all = budget.ranked >= budget.between.width;
        has_window = false;
        list.is_complete = false;
    }
    if constexpr (kHeld == kInMemory) {
        if (args.all_heads) {
            for (int32_t of = 0; of < args.heads; ++of) {
                const Scope one = {of, 1};
                const Sum taken = count_taken(shared, keys, one, budget, Places(args, budget.between), pick, list);
                wanted = budget.count - budget.ranked + static_cast<int32_t>(first_sum(group.sums(taken, 0)));
                overflow = wanted > args.capacity;
                Budget cut = budget;
                cut.count = wanted;
                Pick last = pick;
                if (overflow) {
                    cut = Budget(prefix, args.capacity);
                    need = static_cast<uint32_t>(cut.ranked);
                    if (cut.ranked >= cut.between.width) {
                        last = {0u, 0xffffffffu};
                    } else if (need == 0) {
                        last = {0xffffffffu, 0u};
                    } else {
                        window = first_window<kBins>(args, prefix.eligible, need);
                        last = search(shared, keys, one, group, cut.between, Places(args, cut.between), window, list);
                    }
                }
                clear_rest(args, group, list_row + of, cut.count);
                write_list(args, shared, keys, group, list_row + of, of, prefix, cut, last, list, 0, overflow);
                __syncthreads();
                shared.words[thread] = 0;
                __syncthreads();
            }
            return;
        }
    }
    clear_rest(args, group, list_row, budget.count);
    write_list(args, shared, keys, group, list_row, head, prefix, budget, pick, list, outside, overflow);
}

// How rows are laid on CTAs.
struct RowPlan {
    int32_t parts = 1;  // CTAs of a row
    int32_t span = 0;   // their units
    int32_t held = kInMemory;
    int32_t threads = kThreads;
};

constexpr int kMostSharedMemory = 227 * 1024;  // of a block on Hopper
constexpr int64_t kMostSlots = (kMostSharedMemory - static_cast<int64_t>(sizeof(SelectShared<kThreads>))) /
                               (kThreads * static_cast<int64_t>(sizeof(uint32_t))) * kThreads;
constexpr int64_t kUsualSlots = 33 * kThreads;  // two CTAs in a multiprocessor
constexpr int64_t kHopperMultiprocessors = 132;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of n units, by the CTAs that a row may have and the number of rows.
RowPlan row_plan(int64_t rows, int64_t units, int64_t most_parts) {
    RowPlan plan;
    const auto split = [&](int64_t parts, int32_t held) {
        plan.parts = static_cast<int32_t>(parts);
        plan.span = static_cast<int32_t>(ceil_div(ceil_div(units, parts), kWarp) * kWarp);
        plan.held = held;
        return plan;
    };
    if (units <= kFewThreads * kFewHeld) {
        plan.threads = kFewThreads;
        return split(1, kFewHeld);
    }
    if (units <= kThreads * kFewHeld) return split(1, kFewHeld);
    const int64_t parts = ceil_div(units, kThreads * kMostHeld - kWarp);
    if (parts == 1 || (parts <= most_parts && rows * parts <= kHopperMultiprocessors)) return split(parts, kMostHeld);
    const int64_t slots = std::min(most_parts, ceil_div(units, kUsualSlots - kWarp));
    if (ceil_div(units, slots) <= kMostSlots - kWarp) return split(slots, kInShared);
    return split(most_parts, kInMemory);
}

template <int kThreadsOf, int kHeld>
void start(const SelectArgs& args, LaunchPlan plan, int64_t slots, CudaStream stream) {
    const auto kernel = &mage_select_kv_kernel<kThreadsOf, kHeld>;
    const void* function = reinterpret_cast<const void*>(kernel);
    plan.block[0] = kThreadsOf;
    plan.shared_bytes = static_cast<uint32_t>(sizeof(SelectShared<kThreadsOf>) + slots * sizeof(uint32_t));
    if (slots > 0) core::allow_shared_memory(kOp, function, kMostSharedMemory);
    if (plan.cluster > 8) core::allow_large_clusters(kOp, function);
    core::launch(kOp, kernel, plan, stream, args);
}

template <int kThreadsOf, int kHeld>
KernelEntry entry(const char* name, int slots) {
    return {name, reinterpret_cast<const void*>(&mage_select_kv_kernel<kThreadsOf, kHeld>), kThreadsOf,
            static_cast<int>(sizeof(SelectShared<kThreadsOf>)) + slots * static_cast<int>(sizeof(uint32_t))};
}

// Launches a call whose arguments hold. A head has CTAs of its own unless `all_heads`.
void run(const SelectKvParams& p, const RowPlan& rows_plan, bool all_heads, CudaStream stream) {
    const bool is_joint = p.rule == SelectRule::kJoint;
    const int64_t rows = p.num_layers * p.num_requests * (all_heads ? 1 : p.num_kv_heads);
    MAGE_CHECK(rows * rows_plan.parts < int64_t{1} << 31, kOp, ": mass must need fewer than 2^31 blocks, got ",
               rows * rows_plan.parts);
    SelectArgs args = {};
    while (is_joint && (int64_t{1} << args.head_bits) < p.num_kv_heads) ++args.head_bits;
    args.all_heads = all_heads;
    args.mass = p.mass;
    args.stride_layer = p.stride_mass_layer;
    args.stride_request = p.stride_mass_request;
    args.stride_head = p.stride_mass_head;
    args.prefix_lens = p.prefix_lens;
    args.votes = p.votes;
    args.union_size = p.union_size;
    args.coverage = p.coverage;
    args.indices = p.indices;
    args.counts = p.counts;
    args.kept_mass = p.kept_mass;
    args.tail_start = p.tail_start;
    args.overflow = p.overflow;
    args.p = p.p;
    args.rule = p.rule;
    args.layers = static_cast<int32_t>(p.num_layers);
    args.requests = static_cast<int32_t>(p.num_requests);
    args.heads = static_cast<int32_t>(p.num_kv_heads);
    args.units = static_cast<int32_t>(p.num_units);
    args.capacity = static_cast<int32_t>(p.capacity);
    while ((int64_t{1} << args.unit_shift) < p.granularity) ++args.unit_shift;
    args.budget = static_cast<int32_t>(p.k / p.granularity);
    args.least_budget = static_cast<int32_t>(p.k_min / p.granularity);
    args.sinks = static_cast<int32_t>(p.sinks);
    args.recents = static_cast<int32_t>(p.recents);
    args.parts = rows_plan.parts;
    args.span = rows_plan.span;
    args.cluster = rows_plan.parts * (is_joint && !all_heads ? args.heads : 1);

    LaunchPlan plan;
    plan.grid[0] = static_cast<uint32_t>(rows * rows_plan.parts);
    plan.cluster = static_cast<uint32_t>(args.cluster);
    plan.overlap = true;
    if (rows_plan.threads == kFewThreads) return start<kFewThreads, kFewHeld>(args, plan, 0, stream);
    if (rows_plan.held == kFewHeld) return start<kThreads, kFewHeld>(args, plan, 0, stream);
    if (rows_plan.held == kMostHeld) return start<kThreads, kMostHeld>(args, plan, 0, stream);
    if (rows_plan.held == kInShared) {
        return start<kThreads, kInShared>(args, plan, ceil_div(args.span, kThreads) * kThreads, stream);
    }
    return start<kThreads, kInMemory>(args, plan, 0, stream);
}

}  // namespace

std::vector<KernelEntry> select_kv_kernels() {
    return {
        entry<kFewThreads, kFewHeld>("mage_select_kv_128x8_kernel", 0),
        entry<kThreads, kFewHeld>("mage_select_kv_512x8_kernel", 0),
        entry<kThreads, kMostHeld>("mage_select_kv_512x20_kernel", 0),
        entry<kThreads, kInShared>("mage_select_kv_shared_kernel", static_cast<int>(kUsualSlots)),
        entry<kThreads, kInMemory>("mage_select_kv_memory_kernel", 0),
    };
}

void select_kv(const SelectKvParams& p, CudaStream stream) {
    core::require_hopper(kOp);
    check_select_kv(p);
    if (p.num_requests == 0) return;
    const bool is_joint = p.rule == SelectRule::kJoint;
    MAGE_CHECK(p.rule != SelectRule::kLayer || (p.votes && p.union_size && p.coverage), kOp,
               ": votes, union_size and coverage must be given with rule \"layer\", got a null pointer");
    MAGE_CHECK(p.mass && p.prefix_lens && p.indices && p.counts && p.kept_mass && p.tail_start && p.overflow, kOp,
               ": mass, prefix_lens and the outputs must be given, got a null pointer");
    int32_t head_bits = 0;
    while (is_joint && (int64_t{1} << head_bits) < p.num_kv_heads) ++head_bits;
    MAGE_CHECK(p.num_units <= (int64_t{1} << 32) >> head_bits, kOp, ": mass must have at most ",
               (int64_t{1} << 32) >> head_bits, " units with rule \"joint\" and ", p.num_kv_heads,
               " heads on CUDA, got ", p.num_units);
    if (is_joint && p.num_kv_heads > kMaxGroup) {
        RowPlan plan;
        plan.parts = static_cast<int32_t>(std::min<int64_t>(kMaxGroup, ceil_div(p.num_units, kThreads)));
        plan.span = static_cast<int32_t>(ceil_div(ceil_div(p.num_units, plan.parts), kWarp) * kWarp);
        return run(p, plan, true, stream);
    }
    const int64_t rows = p.num_layers * p.num_requests * p.num_kv_heads;
    run(p, row_plan(rows, p.num_units, is_joint ? kMaxGroup / p.num_kv_heads : kMaxGroup), false, stream);
}

}  // namespace mage::cuda
