#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/barrier.cuh"

// The CTAs of a cluster that look for one threshold, and what they tell each other: histograms, the entries of one bin
// and sums. All of it is pushed through distributed shared memory and counted on an mbarrier of the receiver, so that
// nobody reads the memory of a CTA that may have ended. A group of one CTA sends nothing.
//
// Why no message overtakes the reader of the one before it in the same place: a CTA sends a histogram only after it has
// the whole one of the round before, to which every other CTA contributed after it had read what it was sent until
// then; the coarse bins come before all of them. Entries are followed by sums before the next histogram. Sums, which
// have no such answer, alternate between two places.
namespace mage::cuda {

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxGroup = 16;         // the largest cluster
constexpr uint32_t kCandidates = 64;  // entries of a bin that the CTAs of a group rank one against the other
constexpr uint32_t kCoarseBins = 64;  // of the bound
constexpr int32_t kCoarseRounds = 4;  // one for the bound, the others in what is above it
constexpr uint32_t kListed = 1024;    // entries of a CTA at or above the bound
constexpr uint32_t kPieceBits = 26;   // of 64-bit sums over a warp

using Sum = unsigned long long;

// The last unit that is taken in the order of ranking: keys above `key`, and of those that equal it the places up to
// `place`.
struct Pick {
    uint32_t key, place;

    __device__ __forceinline__ bool takes(uint32_t other_key, uint32_t other_place) const {
        return other_key > key || (other_key == key && other_place <= place);
    }
};

// Of units: all, whose keys are 1 and more (0 is what a walk says of places without a unit), or none.
constexpr Pick kPickAll = {1u, 0xffffffffu}, kPickNone = {0xffffffffu, 0u};

// Where a running sum of bins, from the highest one down, reaches what is needed.
struct Found {
    Sum need;    // what is left for this bin
    Sum inside;  // what it has
    uint32_t position;
};

template <int kThreads>
struct SelectShared {
    static constexpr int kWarps = kThreads / kWarp;

    uint4 bins[kThreads];  // of this CTA, the highest first; all 0 between two rounds
    union {
        uint4 group_bins[kThreads];                      // of the group
        uint4 coarse_in[2][kMaxGroup][kCoarseBins / 4];  // [round % 2][sender], before any histogram
    };
    union {
        uint4 bins[kThreads + kMaxGroup];           // [sender][share of this CTA]
        uint2 entries[kMaxGroup][kCandidates + 1];  // [sender]: their number, then key and place
    } incoming;
    // Place (its complement) and key as one number, which ranks them.
    Sum list[kListed];  // of this CTA's units at or above the bound
    Sum own_entries[kCandidates], entries[kCandidates];
    uint2 words[kThreads];                                    // a bit per unit taken; 0 at first
    alignas(16) uint32_t coarse[kCoarseRounds][kCoarseBins];  // of this CTA, a round each; 0 at first
    uint4 sums_in[2][kMaxGroup];                              // [sender]
    Sum warp_sums[2][kWarps], bin_sums[kWarps];
    uint32_t warp_taken[kWarps], warp_counts[kWarps];
    Found found;
    Pick pick;
    uint32_t listed, gathered;  // entries of list and of own_entries
    alignas(8) uint64_t values_arrived, bins_arrived, group_bins_arrived, entries_arrived, coarse_arrived[2],
        sums_arrived[2];
};

// Of 32 values below 2^63 whose sum is, too.
__device__ __forceinline__ Sum warp_sum(Sum value) {
    constexpr Sum kPiece = (Sum{1} << kPieceBits) - 1;
    const Sum low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value & kPiece));
    const Sum middle = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> kPieceBits & kPiece));
    const Sum high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 2 * kPieceBits));
    return low + (middle << kPieceBits) + (high << 2 * kPieceBits);
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(kAllLanes, value); }

__device__ __forceinline__ uint4 as_vector(Sum a, Sum b) {
    return make_uint4(static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
                      static_cast<uint32_t>(b >> 32));
}

__device__ __forceinline__ Sum first_sum(uint4 v) { return static_cast<Sum>(v.y) << 32 | v.x; }
__device__ __forceinline__ Sum second_sum(uint4 v) { return static_cast<Sum>(v.w) << 32 | v.z; }

// Counts of four bins, or sums of two.
template <bool kWeighted>
__device__ __forceinline__ uint4 add_bins(uint4 a, uint4 b) {
    if constexpr (kWeighted) return as_vector(first_sum(a) + first_sum(b), second_sum(a) + second_sum(b));
    return make_uint4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <int kThreads>
class Group {
public:
    using Shared = SelectShared<kThreads>;

    // CTAs first to first + size - 1 of the cluster, of which this is number `rank`.
    __device__ __forceinline__ Group(Shared& shared, uint32_t size, uint32_t rank)
        : shared_(&shared), first_(0), size_(size), rank_(rank) {}

    __device__ __forceinline__ uint32_t size() const { return size_; }
    __device__ __forceinline__ uint32_t rank() const { return rank_; }

    // Goes on with a part of the CTAs.
    __device__ __forceinline__ void narrow(uint32_t first, uint32_t size) {
        rank_ -= first;
        first_ = first;
        size_ = size;
    }

    // By one thread, before a barrier of the cluster.
    static __device__ __forceinline__ void init_barriers(Shared& shared) {
        for (uint64_t* barrier :
             {&shared.values_arrived, &shared.bins_arrived, &shared.group_bins_arrived, &shared.entries_arrived,
              &shared.coarse_arrived[0], &shared.coarse_arrived[1], &shared.sums_arrived[0], &shared.sums_arrived[1]})
            device::mbarrier_init(device::shared_address(barrier), 1);
        device::mbarrier_init_fence();
    }

    // Each thread's vector of the sum of all histograms; `own` is its vector of this CTA's. Every CTA adds up a share
    // of the bins and sends the sums to all.
    template <bool kWeighted>
    __device__ __forceinline__ uint4 add_up(uint4 own) {
        if (size_ == 1) return own;
        const uint32_t thread = threadIdx.x;
        const uint32_t share = (kThreads + size_ - 1) / size_;
        const uint32_t to = thread / share, at = thread % share;
        const uint32_t begin = rank_ * share;
        const uint32_t vectors = begin < kThreads ? min(share, kThreads - begin) : 0u;
        const uint32_t shares = device::shared_address(&shared_->bins_arrived);
        const uint32_t totals = device::shared_address(&shared_->group_bins_arrived);
        if (thread == 0) {
            device::mbarrier_arrive_expect(shares, size_ * vectors * sizeof(uint4));
            device::mbarrier_arrive_expect(totals, kThreads * sizeof(uint4));
        }
        device::store_cluster_async(at_cta(&shared_->incoming.bins[rank_ * share + at], to), own, at_cta(shares, to));
        if (thread < vectors) {
            device::mbarrier_wait(shares, bins_parity_);
            uint4 sum = shared_->incoming.bins[thread];
            for (uint32_t i = 1; i < size_; ++i)
                sum = add_bins<kWeighted>(sum, shared_->incoming.bins[i * share + thread]);
            for (uint32_t i = 0; i < size_; ++i) {
                device::store_cluster_async(at_cta(&shared_->group_bins[begin + thread], i), sum, at_cta(totals, i));
            }
        }
        device::mbarrier_wait(totals, bins_parity_);
        bins_parity_ ^= 1;
        return shared_->group_bins[thread];
    }

    // The `all` entries of a bin, at most kCandidates, in every CTA; shared.own_entries has this CTA's,
    // shared.gathered their number. A barrier of the CTA stands before and must follow.
    __device__ __forceinline__ const Sum* collect(uint32_t all) {
        if (size_ == 1) return shared_->own_entries;
        const uint32_t thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
        const uint32_t arrived = device::shared_address(&shared_->entries_arrived);
        if (thread == 0) device::mbarrier_arrive_expect(arrived, (all + size_) * sizeof(uint2));
        const uint32_t listed = shared_->gathered;
        for (uint32_t i = thread; i < (listed + 1) * size_; i += kThreads) {
            const uint32_t to = i % size_, at = i / size_;
            uint2 entry = make_uint2(listed, 0u);
            if (at > 0) {
                const Sum own = shared_->own_entries[at - 1];
                entry = make_uint2(static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32));
            }
            device::store_cluster_async(at_cta(&shared_->incoming.entries[rank_][at], to), entry, at_cta(arrived, to));
        }
        device::mbarrier_wait(arrived, entries_parity_);
        entries_parity_ ^= 1;
        const uint32_t count = lane < size_ ? shared_->incoming.entries[lane][0].x : 0u;
        for (uint32_t sender = warp; sender < size_; sender += Shared::kWarps) {
            const uint32_t before = warp_sum(lane < sender ? count : 0u);
            const uint32_t sent = __shfl_sync(kAllLanes, count, sender);
            for (uint32_t i = lane; i < sent; i += kWarp) {
                const uint2 entry = shared_->incoming.entries[sender][1 + i];
                shared_->entries[before + i] = static_cast<Sum>(entry.y) << 32 | entry.x;
            }
        }
        return shared_->entries;
    }

    // What two of the coarse bins hold, lane by lane of each warp. One time for each round; a barrier of the CTA stands
    // before.
    __device__ __forceinline__ uint2 coarse_bins(int32_t round) {
        constexpr uint32_t kVectors = kCoarseBins / 4;
        const uint32_t thread = threadIdx.x, lane = thread % kWarp;
        if (size_ == 1) return reinterpret_cast<const uint2*>(shared_->coarse[round])[lane];
        const uint32_t arrived = device::shared_address(&shared_->coarse_arrived[round % 2]);
        if (thread == 0) device::mbarrier_arrive_expect(arrived, size_ * kVectors * sizeof(uint4));
        for (uint32_t i = thread; i < size_ * kVectors; i += kThreads) {
            const uint32_t to = i / kVectors, at = i % kVectors;
            device::store_cluster_async(at_cta(&shared_->coarse_in[round % 2][rank_][at], to),
                                        reinterpret_cast<const uint4*>(shared_->coarse[round])[at],
                                        at_cta(arrived, to));
        }
        device::mbarrier_wait(arrived, round / 2 % 2);
        uint2 sum = {};
#pragma unroll 4
        for (uint32_t i = 0; i < size_; ++i) {
            const uint2 part = reinterpret_cast<const uint2*>(shared_->coarse_in[round % 2][i])[lane];
            sum.x += part.x;
            sum.y += part.y;
        }
        return sum;
    }

    // Every CTA's pair of sums, by rank; of more than one CTA. The first warp gives the pair.
    __device__ __forceinline__ const uint4* gather(uint4 own) {
        const uint32_t thread = threadIdx.x, place = sums_ % 2;
        const uint32_t arrived = device::shared_address(&shared_->sums_arrived[place]);
        if (thread == 0) device::mbarrier_arrive_expect(arrived, size_ * sizeof(uint4));
        if (thread < size_) {
            device::store_cluster_async(at_cta(&shared_->sums_in[place][rank_], thread), own, at_cta(arrived, thread));
        }
        device::mbarrier_wait(arrived, sums_ / 2 % 2);
        ++sums_;
        return shared_->sums_in[place];
    }

    // The sums of two values over all threads of the CTA.
    __device__ __forceinline__ uint4 cta_sums(Sum a, Sum b) {
        const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        a = warp_sum(a);
        b = warp_sum(b);
        if (lane == 0) {
            shared_->warp_sums[0][warp] = a;
            shared_->warp_sums[1][warp] = b;
        }
        __syncthreads();
        a = warp_sum(lane < Shared::kWarps ? shared_->warp_sums[0][lane] : Sum{0});
        b = warp_sum(lane < Shared::kWarps ? shared_->warp_sums[1][lane] : Sum{0});
        return as_vector(a, b);
    }

    // The same over all threads of the group.
    __device__ __forceinline__ uint4 sums(Sum a, Sum b) {
        const uint4 own = cta_sums(a, b);
        uint4 all = own;
        if (size_ > 1) {
            const uint32_t lane = threadIdx.x % kWarp;
            const uint4* parts = gather(own);
            const uint4 part = lane < size_ ? parts[lane] : uint4{};
            all = as_vector(warp_sum(first_sum(part)), warp_sum(second_sum(part)));
        }
        __syncthreads();  // the places of the warps' sums may be used again
        return all;
    }

private:
    __device__ __forceinline__ uint32_t at_cta(uint32_t address, uint32_t number) const {
        return device::cluster_address(address, first_ + number);
    }
    __device__ __forceinline__ uint32_t at_cta(const void* pointer, uint32_t number) const {
        return at_cta(device::shared_address(pointer), number);
    }

    Shared* shared_;
    uint32_t first_, size_, rank_;
    uint32_t bins_parity_ = 0, entries_parity_ = 0, sums_ = 0;
};

}  // namespace

}  // namespace mage::cuda
