#pragma once

#include "kernels/select_kv/keys.cuh"

// The last unit that a list takes. A bound that enough units reach comes from a coarse histogram of what each thread's
// units have at most; the few units that reach it are listed and ranked. In general: histograms of ever smaller windows
// of keys, and then of places where keys are equal.
namespace mage::cuda {

namespace {

// The order of units whose keys are equal: by unit, then by head.
struct Places {
    int32_t head_bits;
    uint32_t last;

    __device__ __forceinline__ Places(const SelectArgs& args, const Range& range)
        : head_bits(args.head_bits), last((static_cast<uint32_t>(range.begin + range.width) << args.head_bits) - 1) {}

    __device__ __forceinline__ uint32_t of(int32_t unit, int32_t head) const {
        return static_cast<uint32_t>(unit) << head_bits | (static_cast<uint32_t>(head) & ((1u << head_bits) - 1));
    }
    __device__ __forceinline__ int32_t unit_of(uint32_t place) const {
        return static_cast<int32_t>(place >> head_bits);
    }
    __device__ __forceinline__ int32_t head_of(uint32_t place) const {
        return static_cast<int32_t>(place & ((1u << head_bits) - 1));
    }
};

// Values low to high, of which the `need` largest are taken; a value is a key or, among the units of one key, the place
// counted from the last one.
struct Window {
    uint32_t low, high, shift;  // bins of 2^shift values
    uint32_t need;
    uint32_t key;
    bool by_place;

    __device__ __forceinline__ bool contains(uint32_t value) const { return value - low <= high - low; }
};

template <uint32_t kPower>
constexpr uint32_t kLog2 = 1 + kLog2<kPower / 2>;
template <>
constexpr uint32_t kLog2<1> = 0;

// Bins of which kBins cover a window.
template <uint32_t kBins>
__device__ __forceinline__ uint32_t shift_of(uint32_t low, uint32_t high) {
    const int32_t bits = 32 - __clz(high - low);
    return static_cast<uint32_t>(max(bits - static_cast<int32_t>(kLog2<kBins>), 0));
}

constexpr uint32_t kMantissaBits = 23;

// Masses of a row sum to about 1, so half of their mean is a bound that few of many values reach: a power of two near
// it, as bits.
__device__ __forceinline__ uint32_t mean_bound(int32_t eligible) {
    constexpr uint32_t kBias = 127;
    return (kBias - 1 - (32 - __clz(eligible))) << kMantissaBits;
}

constexpr uint32_t kWindowOctaves = 16;
constexpr uint32_t kUsualVotes = 1024;
constexpr uint32_t kRanked = 64;  // entries that are ranked one against the other

template <uint32_t kBins>
__device__ __forceinline__ Window first_window(const SelectArgs& args, int32_t eligible, uint32_t need) {
    Window window = {};
    window.high = 0xffffffffu;
    window.need = need;
    if (args.rule == SelectRule::kLayer) {
        window.shift = shift_of<kBins>(0, static_cast<uint32_t>(args.units) + kUsualVotes);
    } else {
        window.low = mass_key(mean_bound(eligible));
        window.shift = kMantissaBits + kLog2<kWindowOctaves> - kLog2<kBins>;
    }
    return window;
}

// The bin, counted from the highest one.
template <uint32_t kBins>
__device__ __forceinline__ uint32_t position_of(const Window& window, uint32_t value) {
    return kBins - 1 - min((value - window.low) >> window.shift, kBins - 1);
}

// Cuts a window to the bin at a position.
template <uint32_t kBins>
__device__ __forceinline__ void cut(Window* window, uint32_t position) {
    const uint32_t bin = kBins - 1 - position;
    window->low += bin << window->shift;
    if (position > 0) window->high = min(window->high, window->low + ((1u << window->shift) - 1));
    window->shift = shift_of<kBins>(window->low, window->high);
}

// Of the lanes up to this one.
template <typename T>
__device__ __forceinline__ T running_sum(T value) {
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const T other = __shfl_up_sync(kAllLanes, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The first bin with which the sum from the highest one down reaches `need`; returns the sum of all. `vector` is the
// thread's vector of the bins: T is their type.
template <typename T, int kThreads>
__device__ __forceinline__ Sum find_bin(SelectShared<kThreads>& shared, uint4 vector, T need, Found* found) {
    constexpr int kItems = sizeof(uint4) / sizeof(T);
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T items[kItems];
    if constexpr (kItems == 4) {
        items[0] = vector.x, items[1] = vector.y, items[2] = vector.z, items[3] = vector.w;
    } else {
        items[0] = first_sum(vector), items[1] = second_sum(vector);
    }
    T sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += items[i];
    const T upto = running_sum(sum);
    if (lane == kWarp - 1) shared.bin_sums[warp] = upto;
    __syncthreads();
    const T part = lane < SelectShared<kThreads>::kWarps ? static_cast<T>(shared.bin_sums[lane]) : T{0};
    T above = warp_sum(lane < warp ? part : T{0}) + upto - sum;
    const T all = warp_sum(part);
    if (above < need && above + sum >= need) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (above < need && above + items[i] >= need)
                shared.found = {need - above, items[i], threadIdx.x * kItems + i};
            above += items[i];
        }
    }
    __syncthreads();
    *found = shared.found;
    return all;
}

// The last of the `need` largest of `count` entries, all different, 1 <= need <= count <= kRanked.
template <int kThreads>
__device__ __forceinline__ Pick last_of(SelectShared<kThreads>& shared, const Sum* entries, uint32_t count,
                                        uint32_t need) {
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Sum own[kRanked / kWarp];
#pragma unroll
    for (uint32_t i = 0; i < kRanked / kWarp; ++i) own[i] = lane + i * kWarp < count ? entries[lane + i * kWarp] : 0;
#pragma unroll 1
    for (uint32_t at = warp; at < count; at += SelectShared<kThreads>::kWarps) {
        const Sum entry = entries[at];
        uint32_t above = 0;
#pragma unroll
        for (uint32_t i = 0; i < kRanked / kWarp; ++i) {
            if (i * kWarp < count) above += __popc(__ballot_sync(kAllLanes, own[i] > entry));
        }
        if (above + 1 == need && lane == 0)
            shared.pick = {static_cast<uint32_t>(entry >> 32), ~static_cast<uint32_t>(entry)};
    }
    __syncthreads();
    return shared.pick;
}

__device__ __forceinline__ Sum entry_of(uint32_t key, uint32_t place) { return static_cast<Sum>(key) << 32 | ~place; }

// Coarse bins of values, the highest one first; what is above the last one is counted there.
struct CoarseBins {
    uint32_t low, shift;

    __device__ __forceinline__ void count(uint32_t (&bins)[kCoarseBins], uint32_t value) const {
        if (value >= low) atomicAdd(&bins[kCoarseBins - 1 - min((value - low) >> shift, kCoarseBins - 1)], 1u);
    }
    __device__ __forceinline__ uint32_t low_of(uint32_t position) const {
        return low + ((kCoarseBins - 1 - position) << shift);
    }
};

constexpr uint32_t kBoundShift = kMantissaBits + kLog2<kWindowOctaves> - kLog2<kCoarseBins>;  // masses
constexpr uint32_t kListShift = kMantissaBits - kLog2<kCoarseBins>;  // an octave from the bound on, at first

// The bin with which those from the highest one down hold `need` values, what is left of them, and what it holds. The
// same in all CTAs of the group. inside = 0: they hold less.
struct CoarseBin {
    uint32_t position, need, inside;
};

template <int kThreads>
__device__ __forceinline__ CoarseBin find_coarse(Group<kThreads>& group, int32_t round, uint32_t need) {
    static_assert(kCoarseBins == 2 * kWarp);
    const uint2 bins = group.coarse_bins(round);
    const uint32_t own = bins.x + bins.y;
    const uint32_t upto = running_sum(own), above = upto - own;
    const uint32_t reached = __ballot_sync(kAllLanes, upto >= need);
    if (reached == 0) return {0, 0, 0};
    const bool in_first = above + bins.x >= need;
    const int32_t from = __ffs(reached) - 1;
    return {2 * static_cast<uint32_t>(from) + __shfl_sync(kAllLanes, in_first ? 0 : 1, from),
            need - __shfl_sync(kAllLanes, in_first ? above : above + bins.x, from),
            __shfl_sync(kAllLanes, in_first ? bins.x : bins.y, from)};
}

// visit(key, unit, head) for the entries of the list.
template <int kThreads, typename Visit>
__device__ __forceinline__ void each_listed(const SelectShared<kThreads>& shared, const Places& places, uint32_t count,
                                            Visit&& visit) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        const Sum entry = shared.list[i];
        const uint32_t place = ~static_cast<uint32_t>(entry);
        visit(static_cast<uint32_t>(entry >> 32), places.unit_of(place), places.head_of(place));
    }
}

// The last unit of the `window.need` that are taken of the range, 1 or more and not all of them, of all CTAs of the
// group. each(visit) calls visit(key, unit, head) for the units of this CTA that may be in the window.
template <int kThreads, typename Each>
__device__ __forceinline__ Pick search(SelectShared<kThreads>& shared, Group<kThreads>& group, const Range& range,
                                       const Places& places, Window window, Each&& each) {
    constexpr uint32_t kBins = 4 * kThreads;
    uint32_t* bins = reinterpret_cast<uint32_t*>(shared.bins);
    const auto in_window = [&](uint32_t key, int32_t unit, int32_t head, uint32_t* value) {
        *value = window.by_place ? places.last - places.of(unit, head) : key;
        return range.contains(unit) && (!window.by_place || key == window.key) && window.contains(*value);
    };
    while (true) {
        each([&](uint32_t key, int32_t unit, int32_t head) {
            uint32_t value;
            if (in_window(key, unit, head, &value)) atomicAdd(bins + position_of<kBins>(window, value), 1u);
        });
        __syncthreads();
        const uint4 own = shared.bins[threadIdx.x];
        shared.bins[threadIdx.x] = uint4{};
        Found found;
        const auto all =
            static_cast<uint32_t>(find_bin<uint32_t>(shared, group.template add_up<false>(own), window.need, &found));
        if (all < window.need) {  // only in the first window, which does not reach down to the least key
            window.need -= all;
            window.high = window.low - 1;
            window.low = 0;
            window.shift = shift_of<kBins>(window.low, window.high);
            continue;
        }
        cut<kBins>(&window, found.position);
        window.need = static_cast<uint32_t>(found.need);
        const auto inside = static_cast<uint32_t>(found.inside);
        if (window.need == inside)
            return window.by_place ? Pick{window.key, places.last - window.low} : Pick{window.low, 0xffffffffu};
        if (inside <= kCandidates) {
            each([&](uint32_t key, int32_t unit, int32_t head) {
                uint32_t value;
                if (in_window(key, unit, head, &value))
                    shared.own_entries[atomicAdd(&shared.gathered, 1u)] = entry_of(key, places.of(unit, head));
            });
            __syncthreads();
            const Sum* entries = group.collect(inside);
            __syncthreads();
            const Pick pick = last_of(shared, entries, inside, window.need);
            if (threadIdx.x == 0) shared.gathered = 0;
            return pick;
        }
        if (!window.by_place && window.low == window.high) {
            window.by_place = true;
            window.key = window.low;
            window.low = 0;
            window.high = places.last;
            window.shift = shift_of<kBins>(window.low, window.high);
        }
    }
}

// The key with which the masses of the range, from the largest one down, sum to at least `need`, and how many units of
// that key are taken; all are equal. At least 1, and at most what they sum to.
template <int kThreads, bool kHeld>
__device__ __forceinline__ uint2 reach(SelectShared<kThreads>& shared, const Keys<kThreads, kHeld>& keys,
                                       const Scope& scope, Group<kThreads>& group, const Range& range, Sum need) {
    constexpr uint32_t kBins = 2 * kThreads;
    uint32_t* words = reinterpret_cast<uint32_t*>(shared.bins);
    Window window = {};
    window.low = mass_key(__float_as_uint(1.0f / kFixedPoint));  // less counts as 0
    window.high = 0xffffffffu;
    window.shift = shift_of<kBins>(window.low, mass_key(__float_as_uint(1.0f)));
    while (true) {
        keys.each(scope, [&](uint32_t key, int32_t unit, int32_t, int32_t) {
            if (!range.contains(unit) || !window.contains(key)) return;
            const Sum mass = fixed_point(mass_of_key(key));
            uint32_t* bin = words + 2 * position_of<kBins>(window, key);
            const auto low = static_cast<uint32_t>(mass);
            auto high = static_cast<uint32_t>(mass >> 32);
            const uint32_t before = atomicAdd(bin, low);
            if (before + low < before) ++high;
            if (high != 0) atomicAdd(bin + 1, high);
        });
        __syncthreads();
        const uint4 own = shared.bins[threadIdx.x];
        shared.bins[threadIdx.x] = uint4{};
        Found found;
        find_bin<Sum>(shared, group.template add_up<true>(own), need, &found);
        cut<kBins>(&window, found.position);
        need = found.need;
        if (window.low == window.high) {
            const Sum each = fixed_point(mass_of_key(window.low));
            return make_uint2(window.low, static_cast<uint32_t>((need + each - 1) / each));
        }
    }
}

}  // namespace

}  // namespace mage::cuda
