#pragma once

#include "device/cp_async.cuh"
#include "kernels/select_kv/group.cuh"
#include "mage/select_kv.h"

// The units of a CTA, and the keys that rank them, 0 for a unit that cannot be listed. Units of a CTA are consecutive,
// in chunks of one unit per thread; values are held in registers, in shared memory, or read again in each pass.
namespace mage::cuda {

namespace {

constexpr float kFixedPoint = 1099511627776.0f;  // 2^40
constexpr int kInShared = 0;                     // kHeld of Keys, else keys per thread in registers
constexpr int kInMemory = -1;
constexpr uint32_t kInfinity = 0x7f800000u;  // bits; those of NaN and of negative numbers are larger

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

template <int kThreads, int kHeld>
class Keys {
public:
    // The CTA's units [first, first + units) of (layer, request, head); `slots` is a value of each thread and chunk in
    // shared memory.
    __device__ __forceinline__ Keys(const SelectArgs& args, int32_t layer, int32_t request, int32_t head, int32_t first,
                                    int32_t units, uint32_t* slots)
        : args_(args),
          mass_(args.mass + layer * args.stride_layer + request * args.stride_request + head * args.stride_head),
          votes_(args.rule == SelectRule::kLayer
                     ? args.votes + ((int64_t{layer} * args.requests + request) * args.heads + head) * args.units
                     : nullptr),
          slots_(slots),
          head_(head),
          first_(first),
          units_(units) {}

    // Asks for the values.
    __device__ __forceinline__ void request() {
        const uint32_t* words = words_of(head_);
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const int32_t at = i * kThreads + static_cast<int32_t>(threadIdx.x);
                held_[i] = at < units_ ? words[at] : 0u;
            }
        } else if constexpr (kHeld == kInShared) {
            for (int32_t at = threadIdx.x; at < units_; at += kThreads)
                device::copy_4_bytes(device::shared_address(slots_ + at), words + at);
        }
    }

    // Says which units can be listed, and waits for the values.
    __device__ __forceinline__ void settle(int32_t eligible) {
        below_ = min(max(eligible - first_, 0), units_);
        chunks_ = (below_ + kThreads - 1) / kThreads;
        if constexpr (kHeld == kInShared) device::copies_wait();
    }

    __device__ __forceinline__ int32_t first() const { return first_; }
    __device__ __forceinline__ int32_t units() const { return units_; }
    __device__ __forceinline__ int32_t chunks() const { return chunks_; }

    // visit(key, unit, head, chunk) by all threads of a warp together; keys of units at and past E are 0.
    template <typename Visit>
    __device__ __forceinline__ void each(const Scope& scope, Visit&& visit) const {
        const int32_t end = min(chunks_, scope.first_chunk + min(scope.chunks, chunks_));
        each_word(scope, scope.first_chunk, end, [&](uint32_t word, int32_t at, int32_t head, int32_t chunk) {
            visit(at < below_ ? key_of(word, first_ + at) : 0u, first_ + at, head, chunk);
        });
    }

    // Mass of a unit whose key is given.
    __device__ __forceinline__ Sum mass_of(uint32_t key, int32_t unit, int32_t head) const {
        return fixed_point(votes_ != nullptr ? mass_row(head)[unit] : mass_of_key(key));
    }

    // What this thread's units at and past E have.
    __device__ __forceinline__ Sum tail(int32_t head) const {
        Sum sum = 0;
        const float* mass = mass_row(head) + first_;
        const int32_t end = (units_ + kThreads - 1) / kThreads;
        each_word({head, 1}, below_ / kThreads, end, [&](uint32_t word, int32_t at, int32_t, int32_t) {
            if (at >= below_ && at < units_) sum += fixed_point(votes_ != nullptr ? mass[at] : __uint_as_float(word));
        });
        return sum;
    }

    // The bits of the largest positive mass of the thread's units in the range; adds those outside to `outside`.
    __device__ __forceinline__ uint32_t survey(const Range& range, Sum* outside) const {
        uint32_t top = 0;
        const int32_t end = (units_ + kThreads - 1) / kThreads;
        each_word({head_, 1}, 0, end, [&](uint32_t word, int32_t at, int32_t, int32_t) {
            const uint32_t share = word <= kInfinity ? word : 0u;
            const bool is_inside = range.contains(first_ + at);
            top = max(top, is_inside ? share : 0u);
            if (!is_inside && share != 0 && at < units_) *outside += fixed_point(__uint_as_float(share));
        });
        return top;
    }

    // visit(key, unit) for the thread's units of the range whose mass has at least the bits `bound`.
    template <typename Visit>
    __device__ __forceinline__ void each_above(const Range& range, uint32_t bound, Visit&& visit) const {
        each_word({head_, 1}, 0, chunks_, [&](uint32_t word, int32_t at, int32_t, int32_t) {
            if (word - bound <= kInfinity - bound && range.contains(first_ + at)) visit(mass_key(word), first_ + at);
        });
    }

private:
    // visit(word, at, head, chunk): the value of unit first + at; of units past the CTA's own anything.
    template <typename Visit>
    __device__ __forceinline__ void each_word(const Scope& scope, int32_t begin, int32_t end, Visit&& visit) const {
        const int32_t thread = threadIdx.x;
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                if (i >= begin && i < end) visit(held_[i], i * kThreads + thread, head_, i);
            }
        } else {
            const int32_t heads = kHeld == kInMemory ? scope.heads : 1;
            for (int32_t i = 0; i < heads; ++i) {
                const int32_t head = kHeld == kInMemory ? scope.first_head + i : head_;
                const uint32_t* words = kHeld == kInMemory ? words_of(head) : slots_;
#pragma unroll 4
                for (int32_t chunk = begin; chunk < end; ++chunk) {
                    const int32_t at = chunk * kThreads + thread;
                    visit(at < units_ ? words[at] : 0u, at, head, chunk);
                }
            }
        }
    }

    __device__ __forceinline__ uint32_t key_of(uint32_t word, int32_t unit) const {
        return votes_ != nullptr ? vote_key(static_cast<int32_t>(word), unit, args_.units) : mass_key(word);
    }
    __device__ __forceinline__ const float* mass_row(int32_t head) const {
        return mass_ + (head - head_) * args_.stride_head;
    }
    // What is ranked: masses or, where a CTA has one head, votes.
    __device__ __forceinline__ const uint32_t* words_of(int32_t head) const {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(mass_row(head));
        return (votes_ != nullptr ? reinterpret_cast<const uint32_t*>(votes_) : words) + first_;
    }

    const SelectArgs& args_;
    const float* mass_;
    const int32_t* votes_;
    uint32_t* slots_;
    int32_t head_, first_, units_;
    int32_t below_ = 0;   // of the CTA's units, those below E
    int32_t chunks_ = 0;  // that hold them
    uint32_t held_[kHeld > 0 ? kHeld : 1];
};

}  // namespace

}  // namespace mage::cuda
