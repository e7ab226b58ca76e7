#pragma once

#include "kernels/select_kv/search.cuh"

// Rule "fixed", many long rows: a row is one CTA's, and its values pass through registers once. A sample that is spread
// over the row gives a mass that more units reach than are taken, but for chance; the pass lists what reaches it, and
// the last unit is looked for in the list. Where the list is too short or too long for that (many equal masses, less
// than 2^-64, bad luck): the general search, which reads the row again in each pass, and a pass that lists what it
// takes.
namespace mage::cuda {

namespace {

constexpr uint32_t kStreamList = 7168;        // entries of the list
constexpr uint32_t kListChunk = kWarp;        // of them, taken by a warp at a time
constexpr int32_t kStreamNeed = 2048;         // most units ranked; a list of these must fit in any case
constexpr int64_t kStreamUnits = 1 << 19;     // of a row: of more the sample says too little
constexpr int32_t kStreamDepth = 6;           // loads of 16 bytes in flight, of a thread
constexpr int32_t kSampledVectors = 8;        // of a thread
constexpr int32_t kSampledGroup = 4;          // vectors that lie together
constexpr int32_t kLineVectors = 8;           // of 128 bytes
constexpr uint32_t kSampleSlack = 64;         // units of the sample beyond 3/2 of what is expected
constexpr uint32_t kLeastBound = 0x1f800000;  // 2^-64, as bits
constexpr uint32_t kSampleOctaves = 64;       // of its histogram, from there on
constexpr uint32_t kPickOctaves = 4;          // of the first histogram of the list
constexpr int32_t kWordsOfThread = 8;

template <int kThreads>
struct StreamShared {
    SelectShared<kThreads> select;
    Sum list[kStreamList];  // in no order; an entry of 0 stands for no unit
    uint4 words[kThreads * kWordsOfThread / 4];
    uint32_t chunks_end;  // of the list; 0 at first
};

// visit(key, unit) for the thread's of the first `end` entries of the list; unit -1 is none.
template <int kThreads, typename Visit>
__device__ __forceinline__ void each_listed(const StreamShared<kThreads>& shared, uint32_t end, Visit&& visit) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < end; i += kThreads) {
        const Sum entry = shared.list[i];
        visit(static_cast<uint32_t>(entry >> 32), static_cast<int32_t>(~static_cast<uint32_t>(entry)));
    }
}

// A row, read by all threads in vectors of 16 bytes, which lie on 16 bytes: the first and the last may hold less than
// four units.
template <int kThreads>
class RowStream {
public:
    __device__ __forceinline__ RowStream(const float* mass, int32_t units) : units_(units) {
        shift_ = static_cast<int32_t>(reinterpret_cast<uintptr_t>(mass) / sizeof(float) % 4);
        vectors_ = reinterpret_cast<const uint4*>(mass - shift_);
    }

    // visit(words, unit) for the vectors that hold units of the range, by all threads of a warp together. 0 stands for
    // what lies outside of the row, and may be visited where another thread has the values.
    template <int kDepth, typename Visit>
    __device__ __forceinline__ void each(const Range& range, Visit&& visit) const {
        static_assert(4 * kDepth <= kWarp);
        const auto thread = static_cast<int32_t>(threadIdx.x), lane = thread % kWarp;
        const int32_t first = first_of(range), end = end_of(range);
        const int32_t whole = min(end, (units_ + shift_) / 4);
        int32_t vector = first + (first == 0 && shift_ > 0 ? 1 : 0) + thread;
        uint4 words[kDepth];
        const auto load_whole = [&](int32_t at) { return at < whole ? vectors_[at] : uint4{}; };
#pragma unroll
        for (int32_t i = 0; i < kDepth; ++i) words[i] = load_whole(vector + i * kThreads);
#pragma unroll 1
        while (vector - lane < whole) {
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                visit(words[i], 4 * vector - shift_);
                words[i] = load_whole(vector + kDepth * kThreads);
                vector += kThreads;
            }
            // What the next turn will load; a lane asks for 128 bytes.
            const int32_t ahead = vector - lane + (kDepth + lane / 4) * kThreads + lane % 4 * kLineVectors;
            if (lane < 4 * kDepth && ahead < whole) device::prefetch_l2(vectors_ + ahead);
        }
        // The vectors at the ends that lie partly outside of the row: the first one by a lane, the last one by another.
        const bool has_first = first == 0 && shift_ > 0, has_last = whole < end && (whole > 0 || !has_first);
        if (thread < kWarp && (has_first || has_last)) {
            const bool is_own = (lane == 0 && has_first) || (lane == 1 && has_last);
            const int32_t at = lane == 1 ? whole : 0;
            visit(load(at, is_own ? end : 0), 4 * at - shift_);
        }
    }

    // What this thread's units outside of the range have.
    __device__ __forceinline__ Sum outside(const Range& range) const {
        constexpr int32_t kDepth = 4;
        const int32_t below = (range.begin + shift_ + 3) / 4;
        const int32_t all = (units_ + shift_ + 3) / 4;
        const int32_t skipped = max((range.begin + range.width + shift_) / 4 - below, 0);
        Sum sum = 0;
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < all - skipped; i += kDepth * kThreads) {
            uint4 words[kDepth];
            int32_t vectors[kDepth];
#pragma unroll
            for (int32_t j = 0; j < kDepth; ++j) {
                const int32_t at = i + j * kThreads;
                vectors[j] = at < below ? at : at + skipped;
                words[j] = load(vectors[j], all);
            }
#pragma unroll
            for (int32_t j = 0; j < kDepth; ++j) {
                const uint32_t values[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
                for (int32_t k = 0; k < 4; ++k) {
                    if (!range.contains(4 * vectors[j] - shift_ + k)) sum += fixed_point(__uint_as_float(values[k]));
                }
            }
        }
        return sum;
    }

    // Bits of a mass that more than `need` units of the range reach, to judge by groups of 64 bytes: the range in as
    // many equal parts as are read, and one out of each, each at another place.
    __device__ __forceinline__ uint32_t guess_bound(SelectShared<kThreads>& shared, const Range& range,
                                                    uint32_t need) const {
        constexpr uint32_t kBins = 4 * kThreads;
        constexpr uint32_t kShift = kMantissaBits + kLog2<kSampleOctaves> - kLog2<kBins>;
        constexpr int32_t kGroups = kSampledVectors * kThreads / kSampledGroup;
        const auto thread = static_cast<int32_t>(threadIdx.x);
        // Groups that lie on 64 bytes, whole and in the range.
        const auto skew = static_cast<int32_t>(reinterpret_cast<uintptr_t>(vectors_) / sizeof(uint4) % kSampledGroup);
        const int32_t first = (range.begin + shift_ + 3) / 4, last = (range.begin + range.width + shift_) / 4;
        const int32_t begin = (first + skew + kSampledGroup - 1) / kSampledGroup * kSampledGroup - skew;
        const int32_t groups = max(last - begin, 0) / kSampledGroup;
        const auto spread = static_cast<uint32_t>(max(groups, kGroups));

        uint4 words[kSampledVectors];
#pragma unroll
        for (int32_t i = 0; i < kSampledVectors; ++i) {
            const uint32_t number = (i * kThreads + threadIdx.x) / kSampledGroup;
            const uint32_t part = number * spread / kGroups, part_end = (number + 1) * spread / kGroups;
            const uint32_t group = part + ((number * 0x9e37 & 0xffff) * (part_end - part) >> 16);
            words[i] = number < static_cast<uint32_t>(groups)
                           ? vectors_[begin + group * kSampledGroup + thread % kSampledGroup]
                           : uint4{};
        }
        // Meanwhile the first of the pass that follows, and of what is behind the range.
        const int32_t ahead = first + kLineVectors * thread, behind = max(first, last) + kLineVectors * thread;
        if (ahead < last) device::prefetch_l2(vectors_ + ahead);
        if (behind < (units_ + shift_) / 4) device::prefetch_l2(vectors_ + behind);
        __syncwarp();  // not after what waits for the sample

        uint32_t* bins = reinterpret_cast<uint32_t*>(shared.bins);
#pragma unroll
        for (int32_t i = 0; i < kSampledVectors; ++i) {
            const uint32_t values[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int32_t k = 0; k < 4; ++k) {
                const uint32_t above = values[k] - kLeastBound;
                if (above <= kInfinity - kLeastBound) atomicAdd(bins + kBins - 1 - min(above >> kShift, kBins - 1), 1u);
            }
        }
        __syncthreads();
        const uint4 own = shared.bins[thread];
        shared.bins[thread] = uint4{};
        const auto sampled = static_cast<uint32_t>(4 * kSampledGroup * min(groups, kGroups));
        const auto all = static_cast<uint32_t>(max(range.width, 1));
        const uint32_t expected = need * sampled / all;
        // The less is left out, the less can be missing.
        const float twice_left = 2.0f * static_cast<float>(all - sampled) / static_cast<float>(all);
        const float slack = static_cast<float>(expected / 2 + kSampleSlack) * fminf(twice_left, 1.0f);
        const uint32_t wanted = expected + 1 + static_cast<uint32_t>(slack);
        Found found;
        if (find_bin<uint32_t>(shared, own, wanted, &found) < wanted) return kLeastBound;
        return kLeastBound + ((kBins - 1 - found.position) << kShift);
    }

    // Lists the units of the range whose mass has at least the bits `bound` > 0. A warp takes room for them in chunks,
    // and leaves what it does not need of its last one empty; returns how much that is. shared.chunks_end counts what
    // is taken: where it ends up beyond the list, not all are listed.
    __device__ __forceinline__ uint32_t list_above(StreamShared<kThreads>& shared, const Range& range,
                                                   uint32_t bound) const {
        constexpr uint32_t kToKey = 2;  // from the bits of a mass above 0
        const uint32_t lane = threadIdx.x % kWarp, lanes_below = (1u << lane) - 1;
        uint32_t least = bound;  // beyond all masses where there is no room
        Sum* chunk = shared.list;
        uint32_t used = 0, room = 0;  // of the chunk
        each<kStreamDepth>(range, [&](const uint4& words, int32_t unit) {
            if (!__any_sync(kAllLanes, max(max(words.x, words.y), max(words.z, words.w)) >= least)) return;
            uint32_t next = used;
            const auto list = [&](uint32_t value, int32_t i, Sum* to, bool is_late) {
                const bool is_above = value - bound <= kInfinity - bound && range.contains(unit + i);
                const uint32_t above = __ballot_sync(kAllLanes, is_above);
                if (above == 0) return;
                const uint32_t at = next + __popc(above & lanes_below);
                if (is_above && (at >= room) == is_late)
                    to[at] = entry_of(value + kToKey, static_cast<uint32_t>(unit + i));
                next += __popc(above);
            };
            list(words.x, 0, chunk, false);
            list(words.y, 1, chunk, false);
            list(words.z, 2, chunk, false);
            list(words.w, 3, chunk, false);
            if (__builtin_expect(next > room, false)) {
                const uint32_t more = (next - room + kListChunk - 1) / kListChunk * kListChunk;
                uint32_t first = 0;
                if (lane == 0) first = atomicAdd(&shared.chunks_end, more);
                first = __shfl_sync(kAllLanes, first, 0);
                if (first + more > kStreamList) {
                    least = 0xffffffffu;
                    used = room;  // as is the chunk: who found room has written there
                    return;
                }
                // Those that found no room.
                next = used;
#pragma unroll 1
                for (int32_t i = 0; i < 4; ++i)
                    list(i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w), i,
                         shared.list + first - room, true);
                chunk = shared.list + first;
                next -= room;
                room = more;
            }
            used = next;
        });
        if (lane < room - used) chunk[used + lane] = 0;
        return room - used;
    }

    // visit(key, unit) for the units of the range.
    template <typename Visit>
    __device__ __forceinline__ void each_key(const Range& range, Visit&& visit) const {
        constexpr int32_t kDepth = 6;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(vectors_) + shift_;
        const int32_t end = range.begin + range.width;
#pragma unroll 1
        for (int32_t unit = range.begin + static_cast<int32_t>(threadIdx.x); unit < end; unit += kDepth * kThreads) {
            uint32_t values[kDepth];
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i)
                values[i] = unit + i * kThreads < end ? words[unit + i * kThreads] : 0u;
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                if (unit + i * kThreads < end) visit(mass_key(values[i]), unit + i * kThreads);
            }
        }
    }

private:
    __device__ __forceinline__ int32_t first_of(const Range& range) const { return (range.begin + shift_) / 4; }
    __device__ __forceinline__ int32_t end_of(const Range& range) const {
        return (range.begin + range.width + shift_ + 3) / 4;
    }

    __device__ __forceinline__ uint4 load(int32_t vector, int32_t end) const {
        uint4 words = {};
        if (vector >= end) return words;
        const int32_t unit = 4 * vector - shift_;
        if (unit >= 0 && unit + 3 < units_) return vectors_[vector];
        const auto* values = reinterpret_cast<const uint32_t*>(vectors_ + vector);
        if (unit >= 0 && unit < units_) words.x = values[0];
        if (unit + 1 >= 0 && unit + 1 < units_) words.y = values[1];
        if (unit + 2 >= 0 && unit + 2 < units_) words.z = values[2];
        if (unit + 3 >= 0 && unit + 3 < units_) words.w = values[3];
        return words;
    }

    const uint4* vectors_;
    int32_t units_, shift_;
};

// The last unit of the `window.need` that are taken of the range, 1 or more, by reading the row again and again;
// shared.list then has the units taken, one after the other. With `takes_all`, all are.
template <int kThreads>
__device__ __forceinline__ Pick list_taken(StreamShared<kThreads>& shared, RowStream<kThreads> row, Range range,
                                           Places places, Window window, bool takes_all) {
    Pick pick = {0u, 0xffffffffu};
    if (!takes_all) {
        Group<kThreads> group(shared.select, 1, 0);
        pick = search(shared.select, group, range, places, window, [&](auto&& visit) {
            row.each_key(range, [&](uint32_t key, int32_t unit) { visit(key, unit, 0); });
        });
    }
    row.each_key(range, [&](uint32_t key, int32_t unit) {
        if (!range.contains(unit) || !pick.takes(key, places.of(unit, 0))) return;
        shared.list[atomicAdd(&shared.select.listed, 1u)] = entry_of(key, places.of(unit, 0));
    });
    __syncthreads();
    return pick;
}

// The units of the first `listed` entries of the list that are taken, in order, to `indices`; returns what this
// thread's have. shared.words is 0 before.
template <int kThreads>
__device__ __forceinline__ Sum write_taken(StreamShared<kThreads>& shared, const Range& range, uint32_t listed,
                                           const Pick& pick, int32_t* indices) {
    constexpr int32_t kBlock = kThreads * kWordsOfThread * kWarp;
    static_assert(sizeof(shared.select.group_bins) == sizeof(uint16_t) * kThreads * kWordsOfThread);
    const auto thread = static_cast<int32_t>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    uint32_t* words = &shared.words[0].x;
    // Of a word: units taken in those before it.
    auto* before = reinterpret_cast<uint16_t*>(shared.select.group_bins);
    Sum mass = 0;
#pragma unroll 1
    for (int32_t block = range.begin; block < range.begin + range.width; block += kBlock) {
        if (block > range.begin) {
            __syncthreads();
            shared.words[2 * thread] = shared.words[2 * thread + 1] = uint4{};
            __syncthreads();
        }
        const auto each_taken = [&](auto&& visit) {
            each_listed(shared, listed, [&](uint32_t key, int32_t unit) {
                const auto at = static_cast<uint32_t>(unit - block);
                if (at < kBlock && pick.takes(key, static_cast<uint32_t>(unit))) visit(key, unit, at);
            });
        };
        each_taken([&](uint32_t key, int32_t, uint32_t at) {
            atomicOr(words + at / kWarp, 1u << at % kWarp);
            mass += fixed_point(mass_of_key(key));
        });
        __syncthreads();
        const uint4 low = shared.words[2 * thread], high = shared.words[2 * thread + 1];
        const uint32_t own[kWordsOfThread] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        uint32_t upto[kWordsOfThread + 1] = {};
#pragma unroll
        for (int32_t i = 0; i < kWordsOfThread; ++i) upto[i + 1] = upto[i] + __popc(own[i]);
        const uint32_t sum = upto[kWordsOfThread];
        const uint32_t running = running_sum(sum);
        if (lane == kWarp - 1) shared.select.warp_counts[warp] = running;
        __syncthreads();
        const uint32_t counts = lane < SelectShared<kThreads>::kWarps ? shared.select.warp_counts[lane] : 0u;
        const uint32_t first = warp_sum(lane < warp ? counts : 0u) + running - sum;
        const auto pair = [&](int32_t i) { return (first + upto[i]) | (first + upto[i + 1]) << 16; };
        shared.select.group_bins[thread] = make_uint4(pair(0), pair(2), pair(4), pair(6));
        __syncthreads();
        each_taken([&](uint32_t, int32_t unit, uint32_t at) {
            const uint32_t bits = words[at / kWarp] & ((1u << at % kWarp) - 1);
            indices[before[at / kWarp] + __popc(bits)] = unit;
        });
        indices += warp_sum(counts);
    }
    return mass;
}

}  // namespace

}  // namespace mage::cuda
