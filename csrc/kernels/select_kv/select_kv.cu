// Purpose   budgets and lists of all layers, requests and heads of a step, in one launch; see mage/select_kv.h.
// Schedule  a row of masses is one CTA's, or the parts of a cluster where it is long; rule "joint" has the heads of a
//           layer and request in one cluster. The values come into shared memory in one copy. Rules "fixed" and
//           "joint", if not all units are taken:
//           bound   a coarse histogram of what each thread's units have at most; the lower end of the bin with which
//                   `need` threads are counted is a mass that at least `need` units reach, and not many more;
//           list    the units that reach it;
//           pick    the last unit taken: in a list of at most 32 by ranking each entry against all; else by up to three
//                   coarse histograms of the list, the first of an octave from the bound on, and by ranking what is in
//                   the bin where `need` is reached. Where this does not end it (many equal masses), and for the other
//                   rules: histograms of ever smaller windows of all keys, then of places (search.cuh).
//           Then a bit for each unit taken; sums over the bits are the places in the list, so it comes out in order.
//           Rule "fixed" with long rows, more than can run at once in clusters: one CTA a row, which reads it once
//           without holding it, after a sample of it gave the bound (stream.cuh).
//           Parts tell each other their histograms, entries and sums (group.cuh), so all of them find the same unit.
//           Rule "mass" first finds how many units reach p by histograms of masses; rule "joint" searches once for all
//           heads, and again for a head whose list is longer than the capacity; rule "layer" adds up the scores of a
//           request's layers in every CTA, which are L * Hkv numbers.
// Memory    values in shared memory, up to 48K per CTA; of longer rows they are read again in each pass. 40 KB for
//           histograms of 2048 bins, messages and the list; 72 KB more for the list and bits of a streamed row. The
//           workspace is not used.
// Sync      messages between the CTAs of a cluster through distributed shared memory, counted by the receiver; no
//           global atomics, nothing is read that another CTA wrote. Sums are integers, so their order is free.
// Ceiling   reads mass once: 4 * L * B * Hkv * n bytes / 3.05 TB/s; short rows take the latency of one read, two
//           histograms, a ranking and a prefix sum. See NOTES.md.
#include <algorithm>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "kernels/kernel_list.h"
#include "kernels/select_kv/stream.cuh"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "select_kv";
constexpr int kThreads = 512;
constexpr int kFewThreads = 128;
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
__device__ __noinline__ int32_t layer_budget(const SelectArgs& args, Group<kThreadsOf> group, int32_t layer,
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

// The general search, where a bound did not help.
template <int kThreadsOf, bool kHeld>
__device__ __forceinline__ Pick search_keys(SelectShared<kThreadsOf>& shared, const Keys<kThreadsOf, kHeld>& keys,
                                            const Scope& scope, Group<kThreadsOf>& group, const Range& range,
                                            const Places& places, const Window& window) {
    return search(shared, group, range, places, window, [&](auto&& visit) {
        keys.each(scope, [&](uint32_t key, int32_t unit, int32_t head, int32_t) { visit(key, unit, head); });
    });
}

// The same as a function that is called, so that a kernel that hardly ever needs it does not pay for its registers.
template <int kThreadsOf, bool kHeld>
__device__ __noinline__ Pick search_all(SelectShared<kThreadsOf>& shared, Keys<kThreadsOf, kHeld> keys, Scope scope,
                                        Group<kThreadsOf> group, Range range, Places places, Window window) {
    return search_keys(shared, keys, scope, group, range, places, window);
}

// rule kMass: units wanted of a row, and the window in which the last one lies, if it is known.
template <int kThreadsOf>
struct MassBudget {
    int32_t wanted;
    bool has_window;
    Window window = {};
    Group<kThreadsOf> group;
};

template <int kThreadsOf, bool kHeld>
__device__ __noinline__ MassBudget<kThreadsOf> mass_budget(const SelectArgs& args, SelectShared<kThreadsOf>& shared,
                                                           Keys<kThreadsOf, kHeld> keys, Scope scope,
                                                           Group<kThreadsOf> group, Prefix prefix) {
    const Budget forced(prefix, prefix.eligible);
    Sum between = 0, all = keys.tail(scope.first_head);
    keys.each(scope, [&](uint32_t key, int32_t unit, int32_t head, int32_t) {
        const Sum mass = keys.mass_of(key, unit, head);
        all += mass;
        if (forced.between.contains(unit)) between += mass;
    });
    const uint4 sums = group.sums(between, all);
    between = first_sum(sums);
    const Sum total = second_sum(sums);
    const double share = ceil(args.p * static_cast<double>(total));
    // A total above 2^53 may be rounded up on its way to double.
    const Sum target = share >= static_cast<double>(total) ? total : static_cast<Sum>(share);
    int32_t wanted = prefix.sinks + prefix.recents;
    bool has_window = false;
    Window window = {};
    if (target > total - between) {
        const uint2 last = reach(shared, keys, scope, group, forced.between, target - (total - between));
        Sum above = 0;
        keys.each(scope, [&](uint32_t key, int32_t unit, int32_t, int32_t) {
            if (forced.between.contains(unit) && key > last.x) ++above;
        });
        wanted += static_cast<int32_t>(first_sum(group.sums(above, 0)) + last.y);
        // Unless the list gets another length, all that is left are the places of the last key.
        window = {0u, Places(args, forced.between).last, 0u, last.y, last.x, true};
        window.shift = shift_of<4 * kThreadsOf>(window.low, window.high);
        has_window = wanted <= args.capacity;
    }
    const int32_t least = budget_units(args, prefix, args.least_budget);
    has_window = has_window && wanted >= least;
    return {max(wanted, least), has_window, window, group};
}

// What a thread's units have and how many of them, between the forced ones, are taken up to `pick`. Sets their bits,
// for the units of a block from a chunk on.
struct Taken {
    Sum mass;
    uint32_t count;
};

template <int kThreadsOf, bool kHeld>
__device__ __noinline__ Taken take_of_all(SelectShared<kThreadsOf>& shared, Keys<kThreadsOf, kHeld> keys, int32_t head,
                                          Range between, Places places, Pick pick, int32_t first_chunk) {
    constexpr int kWarps = kThreadsOf / kWarp;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp, warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    uint32_t* words = &shared.words[0].x;
    Taken taken = {keys.tail(head), 0};
    keys.each({head, 1}, [&](uint32_t key, int32_t unit, int32_t of, int32_t chunk) {
        const bool is_between = between.contains(unit);
        const bool takes = key != 0 && is_between && pick.takes(key, places.of(unit, of));
        if (takes || (key != 0 && !is_between)) taken.mass += keys.mass_of(key, unit, of);
        if (takes) ++taken.count;
        const uint32_t word = __ballot_sync(kAllLanes, takes);
        if (lane == 0 && chunk >= first_chunk && chunk < first_chunk + 2 * kWarp)
            words[(chunk - first_chunk) * kWarps + warp] = word;
    });
    return taken;
}

// The same for the units of the list; its count alone.
template <int kThreadsOf>
__device__ __forceinline__ Taken take_of_list(SelectShared<kThreadsOf>& shared, const Places& places, uint32_t listed,
                                              const Pick& pick, int32_t first) {
    uint32_t* words = &shared.words[0].x;
    Taken taken = {0, 0};
    each_listed(shared, places, listed, [&](uint32_t key, int32_t unit, int32_t head) {
        if (pick.takes(key, places.of(unit, head))) {
            const int32_t at = unit - first;
            if (at >= 0 && at < 2 * kThreadsOf * kWarp) atomicOr(words + at / kWarp, 1u << at % kWarp);
            taken.mass += fixed_point(mass_of_key(key));
            ++taken.count;
        }
    });
    return taken;
}

// The entries of a list past its count.
template <int kThreadsOf>
__device__ __forceinline__ void clear_rest(const SelectArgs& args, const Group<kThreadsOf>& group, int64_t row,
                                           int32_t count) {
    int32_t* indices = args.indices + row * args.capacity;
#pragma unroll 1
    for (int32_t i = count + static_cast<int32_t>(group.rank() * kThreadsOf + threadIdx.x); i < args.capacity;
         i += static_cast<int32_t>(group.size()) * kThreadsOf)
        indices[i] = -1;
}

// The lowest `count` bits; none if it is negative, all from 32 on.
__device__ __forceinline__ uint32_t low_bits(int32_t count) {
    return count <= 0 ? 0u : count >= kWarp ? kAllLanes : (1u << count) - 1;
}

// The bits of 32 units from `begin` on that are forced; units from `end` on are not the CTA's or cannot be listed.
__device__ __forceinline__ uint32_t forced_bits(const Range& between, int32_t begin, int32_t end) {
    const int32_t recents = between.begin + between.width;
    const uint32_t listable = low_bits(end - begin);
    return listable & (low_bits(between.begin - begin) | ~low_bits(recents - begin));
}

// A list of units: the entries of shared.list, if there is one, hold all of a CTA's that may be taken.
struct Choice {
    Budget budget;
    Pick pick;
    bool overflow;
    bool has_list;
    uint32_t listed;
    Sum outside;  // with a list: the mass of what is not between the forced units; of this thread
};

// Lists the forced units and those up to the pick between them, of one head. shared.words is 0 before.
template <int kThreadsOf, bool kHeld>
__device__ __forceinline__ void write_list(const SelectArgs& args, SelectShared<kThreadsOf>& shared,
                                           const Keys<kThreadsOf, kHeld>& keys, Group<kThreadsOf>& group, int64_t row,
                                           int32_t head, const Prefix& prefix, const Choice& choice) {
    constexpr int kWarps = kThreadsOf / kWarp;
    constexpr int kBlock = 2 * kThreadsOf * kWarp;  // units whose bits the threads have, two words each
    const int32_t thread = threadIdx.x;
    const int32_t lane = thread % kWarp, warp = thread / kWarp;
    const Range between = choice.budget.between;
    const Places places(args, between);
    const int32_t first = keys.first(), end = min(first + keys.units(), prefix.eligible);
    const int32_t recents = between.begin + between.width;  // the first of them

    Taken taken;
    if (choice.has_list) {
        taken = take_of_list(shared, places, choice.listed, choice.pick, first);
        taken.mass += choice.outside;
    } else {
        taken = take_of_all(shared, keys, head, between, places, choice.pick, 0);
    }
    if (__any_sync(kAllLanes, taken.mass != 0)) taken.mass = warp_sum(taken.mass);
    if (group.size() > 1) taken.count = warp_sum(taken.count);
    if (lane == 0) {
        shared.warp_sums[0][warp] = taken.mass;
        shared.warp_taken[warp] = taken.count;
    }
    __syncthreads();

    // Sums of the CTA and of the group, by the first warp.
    const auto kept_by_cta = [&] { return warp_sum(lane < kWarps ? shared.warp_sums[0][lane] : Sum{0}); };
    uint32_t base = 0;
    const uint4* parts = nullptr;
    if (group.size() > 1) {
        uint4 sums = {};
        if (warp == 0) {
            uint32_t count = warp_sum(lane < kWarps ? shared.warp_taken[lane] : 0u);
            count += max(min(between.begin, end) - first, 0) + max(end - max(first, recents), 0);
            sums = as_vector(kept_by_cta(), count);
        }
        parts = group.gather(sums);
        base = warp_sum(lane < static_cast<int32_t>(group.rank()) ? parts[lane].z : 0u);
    }

    int32_t* indices = args.indices + row * args.capacity;
#pragma unroll 1
    for (int32_t block = first; block < end; block += kBlock) {
        if (block > first) {
            __syncthreads();
            shared.words[thread] = uint2{};
            __syncthreads();
            if (choice.has_list) {
                take_of_list(shared, places, choice.listed, choice.pick, block);
            } else {
                take_of_all(shared, keys, head, between, places, choice.pick, (block - first) / kThreadsOf);
            }
            __syncthreads();
        }
        const int32_t begin = block + thread * 2 * kWarp;
        uint2 words = {};
        if (begin < end) {
            words = shared.words[thread];
            words.x |= forced_bits(between, begin, end);
            words.y |= forced_bits(between, begin + kWarp, end);
        }
        const uint32_t own = __popc(words.x) + __popc(words.y);
        uint32_t upto = 0;
        if (__any_sync(kAllLanes, own != 0)) upto = running_sum(own);
        if (lane == kWarp - 1) shared.warp_counts[warp] = upto;
        __syncthreads();
        const uint32_t listed = lane < kWarps ? shared.warp_counts[lane] : 0u;
        int32_t* to = indices + base + warp_sum(lane < warp ? listed : 0u) + upto - own;
        int32_t unit = begin - 1;
#pragma unroll 1
        while ((words.x | words.y) != 0) {
            if (words.x == 0) {
                words = make_uint2(words.y, 0u);
                unit = begin + kWarp - 1;
            }
            *to++ = unit + __ffs(words.x);
            words.x &= words.x - 1;
        }
        base += warp_sum(listed);
    }
    if (warp == 0 && group.rank() == 0) {
        Sum kept = 0;
        if (group.size() > 1) {
            kept = warp_sum(lane < static_cast<int32_t>(group.size()) ? first_sum(parts[lane]) : Sum{0});
        } else {
            kept = kept_by_cta();
        }
        if (lane == 0) {
            args.counts[row] = choice.budget.count;
            args.kept_mass[row] = static_cast<float>(static_cast<double>(kept) * (1.0 / kFixedPoint));
            args.overflow[row] = choice.overflow;
        }
    }
}

// Lists of all heads of rule kJoint in one CTA or group, one after the other, after the joint search.
template <int kThreadsOf>
__device__ __forceinline__ void write_lists(const SelectArgs& args, SelectShared<kThreadsOf>& shared,
                                            const Keys<kThreadsOf, false>& keys, Group<kThreadsOf>& group, int64_t row,
                                            const Prefix& prefix, const Budget& budget, const Pick& pick) {
    for (int32_t head = 0; head < args.heads; ++head) {
        const Scope scope = {head, 1};
        const Places places(args, budget.between);
        Sum taken = 0;
        keys.each(scope, [&](uint32_t key, int32_t unit, int32_t of, int32_t) {
            if (budget.between.contains(unit) && pick.takes(key, places.of(unit, of))) ++taken;
        });
        const int32_t wanted = budget.count - budget.ranked + static_cast<int32_t>(first_sum(group.sums(taken, 0)));
        Choice choice = {budget, pick, wanted > args.capacity, false, 0, 0};
        choice.budget.count = wanted;
        if (choice.overflow) {
            choice.budget = Budget(prefix, args.capacity);
            const Range between = choice.budget.between;
            const auto need = static_cast<uint32_t>(choice.budget.ranked);
            choice.pick = kPickNone;
            if (choice.budget.ranked >= between.width) {
                choice.pick = kPickAll;
            } else if (need > 0) {
                const Window window = first_window<4 * kThreadsOf>(args, prefix.eligible, need);
                choice.pick = search_keys(shared, keys, scope, group, between, Places(args, between), window);
            }
        }
        clear_rest(args, group, row + head, choice.budget.count);
        write_list(args, shared, keys, group, row + head, head, prefix, choice);
        __syncthreads();
        shared.words[threadIdx.x] = uint2{};
        __syncthreads();
    }
}

// kFixed: rule kFixed alone. kAlone: no clusters. What they exclude would cost registers and instructions.
// Two blocks of 512 threads, with 64 registers a thread, but for the general rules in clusters, which would spill.
template <int kThreadsOf, bool kHeld, bool kFixed, bool kAlone>
__global__ void __launch_bounds__(kThreadsOf, kFixed || kAlone ? 1024 / kThreadsOf : 1)
    mage_select_kv_kernel(const __grid_constant__ SelectArgs args) {
    extern __shared__ uint4 shared_memory[];
    using Shared = SelectShared<kThreadsOf>;
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    const int32_t thread = threadIdx.x;
    const uint32_t parts = kAlone ? 1 : args.parts;
    const uint32_t row = blockIdx.x / parts, part = blockIdx.x % parts;
    const bool has_all_heads = !kHeld && args.all_heads;
    const uint32_t heads = has_all_heads ? 1 : args.heads;  // that have CTAs of their own
    const auto head = static_cast<int32_t>(row % heads);
    const auto request = static_cast<int32_t>(row / heads % args.requests);
    const auto layer = static_cast<int32_t>(row / heads / args.requests);
    const int64_t list_row = (int64_t{layer} * args.requests + request) * args.heads + head;

    if (thread == 0) {
        shared.listed = 0;
        shared.gathered = 0;
        Group<kThreadsOf>::init_barriers(shared);
    }
    shared.bins[thread] = uint4{};
    shared.words[thread] = uint2{};
    for (int32_t i = thread; i < kCoarseRounds * static_cast<int32_t>(kCoarseBins); i += kThreadsOf)
        (&shared.coarse[0][0])[i] = 0;
    __syncthreads();
    const uint32_t cluster = kAlone ? 1 : args.cluster;
    if (cluster > 1) device::cluster_sync_relaxed();
    Group<kThreadsOf> group(shared, cluster, cluster > 1 ? device::cluster_rank() : 0);
    device::dependency_wait();

    const int32_t first = static_cast<int32_t>(part) * args.span;
    Keys<kThreadsOf, kHeld> keys(args, layer, request, head, first, min(max(args.units - first, 0), args.span),
                                 reinterpret_cast<uint32_t*>(&shared + 1));
    keys.request(&shared.values_arrived);
    device::dependency_release();
    const Prefix prefix = prefix_of(args, args.prefix_lens[request]);
    if (layer == 0 && head == 0 && part == 0 && thread == 0)
        args.tail_start[request] = prefix.eligible << args.unit_shift;

    bool ranks_heads = !kFixed && args.rule == SelectRule::kJoint;
    const bool is_bounded = kHeld && (kFixed || args.rule == SelectRule::kFixed || ranks_heads);
    const Scope scope = {head, has_all_heads ? args.heads : 1};
    Window window = {};
    bool has_window = false;
    int32_t wanted = budget_units(args, prefix, args.budget);
    if constexpr (!kFixed) {
        __syncthreads();
        keys.settle(prefix.eligible, &shared.values_arrived);
        if (args.rule == SelectRule::kLayer) {
            wanted = budget_units(args, prefix, layer_budget(args, group, layer, request));
        } else if (args.rule == SelectRule::kMass) {
            const auto found = mass_budget(args, shared, keys, scope, group, prefix);
            wanted = found.wanted;
            has_window = found.has_window;
            window = found.window;
            if constexpr (!kAlone) group = found.group;
        }
    }
    wanted = min(wanted, prefix.eligible);

    Choice choice = {Budget(prefix, ranks_heads ? wanted : min(wanted, args.capacity)),
                     {0xffffffffu, 0u},
                     !ranks_heads && wanted > args.capacity,
                     false,
                     0,
                     0};
    uint32_t need = static_cast<uint32_t>(choice.budget.ranked) * (ranks_heads ? args.heads : 1);
    if (has_window) need = window.need;
    bool takes_all = !has_window && choice.budget.ranked >= choice.budget.between.width;
    if constexpr (kFixed) {  // all of this while the values are on their way
        clear_rest(args, group, list_row, choice.budget.count);
        __syncthreads();
        keys.settle(prefix.eligible, &shared.values_arrived);
    }
    bool is_picked = takes_all || need == 0;
    if (takes_all) choice.pick = kPickAll;
    if (is_bounded && !is_picked) {
        const Range between = choice.budget.between;
        const Places places(args, between);
        const CoarseBins coarse = {mean_bound(prefix.eligible), kBoundShift};
        // What each thread has at most, or what every four units have, is enough to find a bound for `need`.
        const bool counts_fours = need * 2 > group.size() * kThreadsOf;
        const uint32_t top = keys.survey(between, &choice.outside, [&](uint32_t most) {
            if (counts_fours) coarse.count(shared.coarse[0], most);
        });
        if (!counts_fours) coarse.count(shared.coarse[0], top);
        __syncthreads();
        const CoarseBin found = find_coarse(group, 0, need);
        if (found.inside > 0) {
            const uint32_t bound = coarse.low_of(found.position);
            if (top >= bound) {
                keys.each_above(
                    between, bound, [&](uint32_t number) { return atomicAdd(&shared.listed, number); },
                    [&](uint32_t key, int32_t unit, uint32_t at) {
                        if (at < kListed) shared.list[at] = entry_of(key, places.of(unit, head));
                    });
            }
            __syncthreads();
            choice.listed = shared.listed;
            choice.has_list = choice.listed <= kListed;
            // visit(key, unit) for what is above the bound.
            const auto each_above = [&](auto&& visit) {
                if (choice.has_list) {
                    each_listed(shared, places, choice.listed,
                                [&](uint32_t key, int32_t unit, int32_t) { visit(key, unit); });
                } else {
                    keys.each_above(
                        between, bound, [](uint32_t) { return 0u; },
                        [&](uint32_t key, int32_t unit, uint32_t) { visit(key, unit); });
                }
            };
            if (group.size() == 1 && choice.listed <= kWarp) {
                choice.pick = last_of(shared, shared.list, choice.listed, need);
                is_picked = true;
            } else {
                window = {mass_key(bound), mass_key(kInfinity), kListShift, need, 0, false};
                has_window = true;
#pragma unroll 1
                for (int32_t round = 1; round < kCoarseRounds && !is_picked && window.low < window.high; ++round) {
                    const CoarseBins bins = {window.low, window.shift};
                    each_above([&](uint32_t key, int32_t) {
                        if (window.contains(key)) bins.count(shared.coarse[round], key);
                    });
                    __syncthreads();
                    const CoarseBin last = find_coarse(group, round, window.need);
                    window.low = bins.low_of(last.position);
                    if (last.position > 0) window.high = min(window.high, window.low + ((1u << window.shift) - 1));
                    window.shift = shift_of<kCoarseBins>(window.low, window.high);
                    window.need = last.need;
                    if (last.need == last.inside) {
                        choice.pick = {window.low, 0xffffffffu};
                        is_picked = true;
                    } else if (last.inside <= kCandidates) {
                        each_above([&](uint32_t key, int32_t unit) {
                            if (window.contains(key)) {
                                shared.own_entries[atomicAdd(&shared.gathered, 1u)] =
                                    entry_of(key, places.of(unit, head));
                            }
                        });
                        __syncthreads();
                        const Sum* entries = group.collect(last.inside);
                        __syncthreads();
                        choice.pick = last_of(shared, entries, last.inside, last.need);
                        if (thread == 0) shared.gathered = 0;
                        is_picked = true;
                    }
                }
                window.shift = shift_of<4 * kThreadsOf>(window.low, window.high);
            }
        }
    }
#pragma unroll 1
    while (true) {
        const Places places(args, choice.budget.between);
        if (!is_picked) {
            if (!has_window) window = first_window<4 * kThreadsOf>(args, prefix.eligible, need);
            if constexpr (kFixed && kAlone) {
                choice.pick = search_all(shared, keys, scope, group, choice.budget.between, places, window);
            } else {
                choice.pick = search_keys(shared, keys, scope, group, choice.budget.between, places, window);
            }
        }
        if (!ranks_heads || has_all_heads) break;
        // What this head has of the joint ranking is the top of its own; where that is too long, another search.
        ranks_heads = false;
        Sum taken = 0;
        const auto count = [&](uint32_t key, int32_t unit, int32_t of) {
            if (choice.budget.between.contains(unit) && choice.pick.takes(key, places.of(unit, of))) ++taken;
        };
        if (choice.has_list) {
            each_listed(shared, places, choice.listed, count);
        } else {
            keys.each(scope, [&](uint32_t key, int32_t unit, int32_t of, int32_t) { count(key, unit, of); });
        }
        uint4 sums = group.cta_sums(taken, 0);
        if (group.size() > 1) {
            const int32_t lane = thread % kWarp;
            const uint4* parts = group.gather(sums);
            const bool is_own = lane < args.cluster && lane / args.parts == head;
            sums = as_vector(warp_sum(is_own ? first_sum(parts[lane]) : 0), 0);
        }
        __syncthreads();
        group.narrow(static_cast<uint32_t>(head) * parts, parts);
        wanted = choice.budget.count - choice.budget.ranked + static_cast<int32_t>(first_sum(sums));
        choice.overflow = wanted > args.capacity;
        choice.budget.count = wanted;
        if (!choice.overflow) break;
        choice.budget = Budget(prefix, args.capacity);
        choice.has_list = false;
        need = static_cast<uint32_t>(choice.budget.ranked);
        takes_all = choice.budget.ranked >= choice.budget.between.width;
        choice.pick = takes_all ? kPickAll : kPickNone;
        is_picked = takes_all || need == 0;
        has_window = false;
    }
    if constexpr (!kHeld) {
        if (args.all_heads) return write_lists(args, shared, keys, group, list_row, prefix, choice.budget, choice.pick);
    }
    if constexpr (!kFixed) clear_rest(args, group, list_row, choice.budget.count);
    write_list(args, shared, keys, group, list_row, head, prefix, choice);
}

// Rule kFixed, many long rows: one CTA each (stream.cuh).
template <int kThreadsOf>
__global__ void __launch_bounds__(kThreadsOf, 1024 / kThreadsOf)
    mage_select_kv_stream_kernel(const __grid_constant__ SelectArgs args) {
    extern __shared__ uint4 shared_memory[];
    constexpr int kWarps = kThreadsOf / kWarp;
    auto& shared = *reinterpret_cast<StreamShared<kThreadsOf>*>(shared_memory);
    const int32_t thread = threadIdx.x;
    const int32_t lane = thread % kWarp, warp = thread / kWarp;
    const uint32_t row = blockIdx.x, heads = args.heads;
    const auto head = static_cast<int32_t>(row % heads);
    const auto request = static_cast<int32_t>(row / heads % args.requests);
    const auto layer = static_cast<int32_t>(row / heads / args.requests);
    if (thread == 0) {
        shared.select.listed = 0;
        shared.select.gathered = 0;
        shared.chunks_end = 0;
    }
    shared.select.bins[thread] = uint4{};
    shared.words[2 * thread] = shared.words[2 * thread + 1] = uint4{};
    __syncthreads();
    device::dependency_wait();

    const Prefix prefix = prefix_of(args, args.prefix_lens[request]);
    const int32_t wanted = min(budget_units(args, prefix, args.budget), prefix.eligible);
    const Budget budget(prefix, min(wanted, args.capacity));
    const Range between = budget.between;
    const auto need = static_cast<uint32_t>(budget.ranked);
    const bool takes_all = budget.ranked >= between.width;
    const Places places(args, between);
    const RowStream<kThreadsOf> stream(
        args.mass + layer * args.stride_layer + request * args.stride_request + head * args.stride_head, args.units);
    uint32_t bound = 0;
    if (need > 0 && !takes_all) bound = stream.guess_bound(shared.select, between, need);
    device::dependency_release();

    uint32_t empty = 0;
    if (bound > 0) empty = stream.list_above(shared, between, bound);
    // The forced units on both sides of the others.
    int32_t* indices = args.indices + int64_t{row} * args.capacity;
    const int32_t recents = budget.count - between.begin - budget.ranked;
#pragma unroll 1
    for (int32_t i = thread; i < between.begin; i += kThreadsOf) indices[i] = i;
#pragma unroll 1
    for (int32_t i = thread; i < recents; i += kThreadsOf)
        indices[budget.count - recents + i] = between.begin + between.width + i;
#pragma unroll 1
    for (int32_t i = budget.count + thread; i < args.capacity; i += kThreadsOf) indices[i] = -1;
    if (thread == 0) {
        args.counts[row] = budget.count;
        args.overflow[row] = wanted > args.capacity;
        if (layer == 0 && head == 0) args.tail_start[request] = prefix.eligible << args.unit_shift;
    }
    const Sum outside = warp_sum(stream.outside(between));
    if (lane == 0) shared.select.warp_sums[1][warp] = outside;
    Pick pick = {0xffffffffu, 0u};
    uint32_t listed = 0;
    bool is_listed = need == 0;
    if (bound > 0) {
        if (lane == 0) shared.select.warp_taken[warp] = empty;
        __syncthreads();
        listed = shared.chunks_end;
        is_listed =
            listed <= kStreamList && listed - warp_sum(lane < kWarps ? shared.select.warp_taken[lane] : 0u) >= need;
        if (is_listed) {
            constexpr uint32_t kBins = 4 * kThreadsOf;
            Group<kThreadsOf> group(shared.select, 1, 0);
            const Window window = {mass_key(bound),
                                   mass_key(kInfinity),
                                   kMantissaBits + kLog2<kPickOctaves> - kLog2<kBins>,
                                   need,
                                   0u,
                                   false};
            pick = search(shared.select, group, between, places, window, [&](auto&& visit) {
                each_listed(shared, listed, [&](uint32_t key, int32_t unit) { visit(key, unit, 0); });
            });
        }
    }
    if (!is_listed) {
        const Window window = first_window<4 * kThreadsOf>(args, prefix.eligible, need);
        pick = list_taken(shared, stream, between, places, window, takes_all);
        listed = shared.select.listed;
    }

    Sum kept = 0;
    if (need > 0) kept = warp_sum(write_taken(shared, between, listed, pick, indices + between.begin));
    if (lane == 0) shared.select.warp_sums[0][warp] = kept;
    __syncthreads();
    if (warp != 0) return;
    kept = warp_sum(lane < kWarps ? shared.select.warp_sums[0][lane] + shared.select.warp_sums[1][lane] : Sum{0});
    if (lane == 0) args.kept_mass[row] = static_cast<float>(static_cast<double>(kept) * (1.0 / kFixedPoint));
}

// How rows are laid on CTAs.
struct RowPlan {
    int32_t parts = 1;  // CTAs of a row
    int32_t span = 0;   // their units
    int32_t threads = kThreads;
    bool is_held = false;
    bool is_streamed = false;
};

constexpr int kMostSharedMemory = 227 * 1024;  // of a block on Hopper
constexpr int64_t kMostSlots =
    (kMostSharedMemory - static_cast<int64_t>(sizeof(SelectShared<kThreads>))) / static_cast<int64_t>(sizeof(float)) -
    8;
// Two blocks that stream fit a multiprocessor: 228 KB, of which each block costs 1 KB more than it asks for.
static_assert(2 * (sizeof(StreamShared<kThreads>) + 1024) <= 228 * 1024);
constexpr int64_t kFewUnits = 8192;    // of a CTA, where all CTAs run at once
constexpr int64_t kManyUnits = 16416;  // else
constexpr int64_t kHopperMultiprocessors = 132;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

RowPlan split(int64_t units, int64_t parts, bool is_held, int threads) {
    RowPlan plan;
    plan.parts = static_cast<int32_t>(parts);
    plan.span = static_cast<int32_t>(ceil_div(ceil_div(units, parts), kWarp) * kWarp);
    plan.threads = threads;
    plan.is_held = is_held;
    return plan;
}

// Rows of n units, by the CTAs that a row may have and the number of rows; they may be streamed if a list has few
// enough units.
RowPlan row_plan(int64_t rows, int64_t units, int64_t most_parts, bool can_stream) {
    if (units <= kFewThreads * 8) return split(units, 1, true, kFewThreads);
    const int64_t many = std::min(most_parts, ceil_div(units, kFewUnits));
    const bool at_once = rows * many <= kHopperMultiprocessors;
    if (can_stream && !at_once && units > kManyUnits && units <= kStreamUnits) {
        RowPlan plan = split(units, 1, false, kThreads);
        plan.is_streamed = true;
        return plan;
    }
    const int64_t parts = at_once ? many : std::min(most_parts, ceil_div(units, kManyUnits));
    return split(units, parts, ceil_div(units, parts) + kWarp <= kMostSlots, kThreads);
}

template <int kThreadsOf, bool kHeld, bool kFixed, bool kAlone>
void start(const SelectArgs& args, LaunchPlan plan, CudaStream stream) {
    const auto kernel = &mage_select_kv_kernel<kThreadsOf, kHeld, kFixed, kAlone>;
    const void* function = reinterpret_cast<const void*>(kernel);
    plan.block[0] = kThreadsOf;
    // Slots, and 16 bytes for how the values lie.
    const size_t slots = kHeld ? args.span * sizeof(float) + 2 * sizeof(uint4) : 0;
    plan.shared_bytes = static_cast<uint32_t>(sizeof(SelectShared<kThreadsOf>) + slots);
    core::allow_shared_memory(kOp, function, kMostSharedMemory);
    if (plan.cluster > 8) core::allow_large_clusters(kOp, function);
    core::launch(kOp, kernel, plan, stream, args);
}

void start_stream(const SelectArgs& args, LaunchPlan plan, CudaStream stream) {
    const auto kernel = &mage_select_kv_stream_kernel<kThreads>;
    plan.block[0] = kThreads;
    plan.shared_bytes = static_cast<uint32_t>(sizeof(StreamShared<kThreads>));
    core::allow_shared_memory(kOp, reinterpret_cast<const void*>(kernel), kMostSharedMemory);
    core::launch(kOp, kernel, plan, stream, args);
}

template <int kThreadsOf, bool kHeld, bool kFixed, bool kAlone>
KernelEntry entry(const char* name, int64_t units) {
    return {name, reinterpret_cast<const void*>(&mage_select_kv_kernel<kThreadsOf, kHeld, kFixed, kAlone>), kThreadsOf,
            static_cast<int>(sizeof(SelectShared<kThreadsOf>) + units * sizeof(float))};
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
    const bool is_fixed = p.rule == SelectRule::kFixed, is_alone = args.cluster == 1;
    if (rows_plan.is_streamed) return start_stream(args, plan, stream);
    if (!rows_plan.is_held) return start<kThreads, false, false, false>(args, plan, stream);
    if (!is_fixed && is_alone) return start<kThreads, true, false, true>(args, plan, stream);
    if (!is_fixed) return start<kThreads, true, false, false>(args, plan, stream);
    if (!is_alone) return start<kThreads, true, true, false>(args, plan, stream);
    if (rows_plan.threads == kThreads) return start<kThreads, true, true, true>(args, plan, stream);
    start<kFewThreads, true, true, true>(args, plan, stream);
}

}  // namespace

std::vector<KernelEntry> select_kv_kernels() {
    return {
        entry<kFewThreads, true, true, true>("mage_select_kv_fixed_short_kernel", kFewThreads * 8),
        entry<kThreads, true, true, true>("mage_select_kv_fixed_kernel", kFewUnits),
        entry<kThreads, true, true, false>("mage_select_kv_fixed_cluster_kernel", kFewUnits),
        entry<kThreads, true, false, true>("mage_select_kv_kernel", kFewUnits),
        entry<kThreads, true, false, false>("mage_select_kv_cluster_kernel", kFewUnits),
        entry<kThreads, false, false, false>("mage_select_kv_long_kernel", 0),
        {"mage_select_kv_fixed_stream_kernel", reinterpret_cast<const void*>(&mage_select_kv_stream_kernel<kThreads>),
         kThreads, static_cast<int>(sizeof(StreamShared<kThreads>))},
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
        const int64_t parts = std::min<int64_t>(kMaxGroup, ceil_div(p.num_units, kThreads));
        return run(p, split(p.num_units, parts, false, kThreads), true, stream);
    }
    const int64_t rows = p.num_layers * p.num_requests * p.num_kv_heads;
    const bool can_stream = p.rule == SelectRule::kFixed && std::min(p.k / p.granularity, p.capacity) <= kStreamNeed;
    run(p, row_plan(rows, p.num_units, is_joint ? kMaxGroup / p.num_kv_heads : kMaxGroup, can_stream), false, stream);
}

}  // namespace mage::cuda
