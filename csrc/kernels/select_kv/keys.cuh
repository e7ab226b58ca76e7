#pragma once

#include "device/tma.cuh"
#include "kernels/select_kv/group.cuh"
#include "mage/select_kv.h"

// The units of a CTA, and the keys that rank them, 0 for a unit that cannot be listed. Units of a CTA are consecutive;
// their values are held in shared memory, or read again from memory in each pass.
namespace mage::cuda {

namespace {

constexpr float kFixedPoint = 1099511627776.0f;  // 2^40
constexpr uint32_t kInfinity = 0x7f800000u;      // bits; those of NaN and of negative numbers are larger

struct SelectArgs {
    const float* mass;
    int64_t stride_layer, stride_request, stride_head;
    const int32_t* prefix_lens;
    const int32_t* votes;
    const int32_t* union_size;
    const float* coverage;
    int32_t* indices;
    int32_t* counts;
    float* kept_mass;
    int32_t* tail_start;
    bool* overflow;
    double p;
    SelectRule rule;
    int32_t layers, requests, heads, units, capacity;
    int32_t unit_shift;            // log2 g
    int32_t budget, least_budget;  // units of k and k_min
    int32_t sinks, recents;        // tokens
    int32_t parts, span;           // CTAs of a row and their units, a multiple of 32
    int32_t cluster;               // CTAs
    int32_t head_bits;             // of a place: the heads of rule "joint" that rank together
    bool all_heads;                // a CTA has its units of all heads
};

// Keys of masses: NaN 1, zero and negative 2, then ascending with the value.
__device__ __forceinline__ uint32_t mass_key(uint32_t bits) {
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t key = static_cast<int32_t>(bits) > 0 ? bits + 2 : 2u;
    return is_nan ? 1u : key;
}

__device__ __forceinline__ float mass_of_key(uint32_t key) { return key > 2 ? __uint_as_float(key - 2) : 0.0f; }

// Voted units above all others; those without votes by recency, which makes their keys unique.
__device__ __forceinline__ uint32_t vote_key(int32_t votes, int32_t unit, int32_t units) {
    return votes > 0 ? static_cast<uint32_t>(units) + static_cast<uint32_t>(votes) : static_cast<uint32_t>(unit) + 1;
}

__device__ __forceinline__ Sum fixed_point(float mass) {
    return mass > 0.0f ? static_cast<Sum>(__float2ll_rz(fminf(mass, 1.0f) * kFixedPoint)) : Sum{0};  // NaN: 0
}

// Units that are ranked.
struct Range {
    int32_t begin, width;

    __device__ __forceinline__ bool contains(int32_t unit) const {
        return static_cast<uint32_t>(unit - begin) < static_cast<uint32_t>(width);
    }
};

// Heads and chunks that a pass visits. Only values read again have more than one head.
struct Scope {
    int32_t first_head, heads;
    int32_t first_chunk = 0, chunks = 0x7fffffff;
};

template <int kThreads, bool kHeld>
class Keys {
public:
    // The CTA's units [first, first + units) of (layer, request, head). `slots`: where they are held, 16 bytes more
    // than they need, on 16 bytes.
    __device__ __forceinline__ Keys(const SelectArgs& args, int32_t layer, int32_t request, int32_t head, int32_t first,
                                    int32_t units, uint32_t* slots)
        : args_(&args),
          mass_(args.mass + layer * args.stride_layer + request * args.stride_request + head * args.stride_head),
          votes_(args.rule == SelectRule::kLayer
                     ? args.votes + ((int64_t{layer} * args.requests + request) * args.heads + head) * args.units
                     : nullptr),
          head_(head),
          first_(first),
          units_(units) {
        if constexpr (kHeld) {
            // Slots lie as the values do with regard to 16 bytes.
            shift_ = static_cast<int32_t>(reinterpret_cast<uintptr_t>(words_of(head)) / sizeof(float) % 4);
            values_ = slots + shift_;
        }
    }

    // Asks for the values: in one copy but for those at both ends that share 16 bytes with others. 0 stands in the rest
    // of the 16 bytes. A barrier must follow.
    __device__ __forceinline__ void request(uint64_t* arrived) {
        if constexpr (kHeld) {
            const uint32_t* words = words_of(head_);
            const auto thread = static_cast<int32_t>(threadIdx.x);
            const int32_t before = min((4 - shift_) % 4, units_);
            const int32_t whole = (units_ - before) / 4 * 4;
            if (thread == 0) {
                const uint32_t barrier = device::shared_address(arrived);
                const uint32_t bytes = static_cast<uint32_t>(whole) * sizeof(float);
                device::mbarrier_arrive_expect(barrier, bytes);
                if (bytes > 0)
                    device::copy_bulk(device::shared_address(values_ + before), words + before, bytes, barrier);
            } else if (thread >= kWarp && thread < kWarp + 8) {
                const int32_t lane = thread - kWarp;
                const bool is_first = lane < 4;
                const int32_t at = is_first ? lane - shift_ : before + whole + lane - 4;
                if (is_first ? shift_ > 0 : whole < units_ - before)
                    values_[at] = at >= 0 && at < units_ ? words[at] : 0u;
            }
        }
    }

    // Says which units can be listed, and waits for the values.
    __device__ __forceinline__ void settle(int32_t eligible, uint64_t* arrived) {
        below_ = min(max(eligible - first_, 0), units_);
        if constexpr (kHeld) device::mbarrier_wait(device::shared_address(arrived), 0);
    }

    __device__ __forceinline__ int32_t first() const { return first_; }
    __device__ __forceinline__ int32_t units() const { return units_; }

    // visit(key, unit, head, chunk) by all threads of a warp together, in chunks of a unit per thread; keys of units at
    // and past E are 0.
    template <typename Visit>
    __device__ __forceinline__ void each(const Scope& scope, Visit&& visit) const {
        const int32_t chunks = (below_ + kThreads - 1) / kThreads;
        const int32_t end = min(chunks, scope.first_chunk + min(scope.chunks, chunks));
        for (int32_t i = 0; i < (kHeld ? 1 : scope.heads); ++i) {
            const int32_t head = kHeld ? head_ : scope.first_head + i;
            const uint32_t* words = kHeld ? values_ : words_of(head);
#pragma unroll 2
            for (int32_t chunk = scope.first_chunk; chunk < end; ++chunk) {
                const int32_t at = chunk * kThreads + static_cast<int32_t>(threadIdx.x);
                uint32_t key = 0;
                if (at < below_) {
                    const uint32_t word = words[at];
                    key = votes_ != nullptr ? vote_key(static_cast<int32_t>(word), first_ + at, args_->units)
                                            : mass_key(word);
                }
                visit(key, first_ + at, head, chunk);
            }
        }
    }

    // Mass of a unit whose key is given.
    __device__ __forceinline__ Sum mass_of(uint32_t key, int32_t unit, int32_t head) const {
        return fixed_point(votes_ != nullptr ? mass_row(head)[unit] : mass_of_key(key));
    }

    // What this thread's units at and past E have.
    __device__ __forceinline__ Sum tail(int32_t head) const {
        Sum sum = 0;
        const float* mass = mass_row(head) + first_;
        if (kHeld && votes_ == nullptr) mass = reinterpret_cast<const float*>(values_);
#pragma unroll 2
        for (int32_t at = below_ + static_cast<int32_t>(threadIdx.x); at < units_; at += kThreads)
            sum += fixed_point(mass[at]);
        return sum;
    }

    // What the thread's held units of the range have at most, as bits; `visit` gets that of every four units. Adds what
    // is outside to `outside`.
    template <typename Visit>
    __device__ __forceinline__ uint32_t survey(const Range& range, Sum* outside, Visit&& visit) const {
        uint32_t top = 0;
        const auto width = static_cast<uint32_t>(max(range.width - 3, 0));
#pragma unroll 1
        for (int32_t vector = threadIdx.x; vector < vectors(); vector += kThreads) {
            const uint4 words = reinterpret_cast<const uint4*>(values_ - shift_)[vector];
            const int32_t unit = first_ + 4 * vector - shift_;
            uint32_t most = max(max(words.x, words.y), max(words.z, words.w));
            if (most != 0 && (most > kInfinity || static_cast<uint32_t>(unit - range.begin) >= width)) {
                const uint32_t values[4] = {words.x, words.y, words.z, words.w};
                most = 0;
#pragma unroll
                for (int32_t i = 0; i < 4; ++i) {
                    const uint32_t share = values[i] <= kInfinity ? values[i] : 0u;
                    const bool is_inside = range.contains(unit + i);
                    most = max(most, is_inside ? share : 0u);
                    *outside += fixed_point(is_inside ? 0.0f : __uint_as_float(share));
                }
            }
            visit(most);
            top = max(top, most);
        }
        return top;
    }

    // visit(key, unit, at) for the thread's held units of the range whose mass has at least the bits `bound` > 0; `at`
    // counts from what reserve(number) gives for up to four of them.
    template <typename Reserve, typename Visit>
    __device__ __forceinline__ void each_above(const Range& range, uint32_t bound, Reserve&& reserve,
                                               Visit&& visit) const {
#pragma unroll 1
        for (int32_t vector = threadIdx.x; vector < vectors(); vector += kThreads) {
            const uint4 words = reinterpret_cast<const uint4*>(values_ - shift_)[vector];
            if (max(max(words.x, words.y), max(words.z, words.w)) < bound) continue;
            const uint32_t values[4] = {words.x, words.y, words.z, words.w};
            const int32_t unit = first_ + 4 * vector - shift_;
            bool is_above[4];
            uint32_t number = 0;
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
                is_above[i] = values[i] - bound <= kInfinity - bound && range.contains(unit + i);
                number += is_above[i] ? 1 : 0;
            }
            if (number == 0) continue;
            uint32_t at = reserve(number);
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
                if (is_above[i]) visit(mass_key(values[i]), unit + i, at++);
            }
        }
    }

private:
    __device__ __forceinline__ int32_t vectors() const { return (units_ + shift_ + 3) / 4; }
    __device__ __forceinline__ const float* mass_row(int32_t head) const {
        return mass_ + (head - head_) * args_->stride_head;
    }
    // What is ranked: masses or, where a CTA has one head, votes.
    __device__ __forceinline__ const uint32_t* words_of(int32_t head) const {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(mass_row(head));
        return (votes_ != nullptr ? reinterpret_cast<const uint32_t*>(votes_) : words) + first_;
    }

    const SelectArgs* args_;
    const float* mass_;
    const int32_t* votes_;
    uint32_t* values_ = nullptr;
    int32_t head_, first_, units_;
    int32_t shift_ = 0;
    int32_t below_ = 0;  // of the CTA's units, those below E
};

}  // namespace

}  // namespace mage::cuda
