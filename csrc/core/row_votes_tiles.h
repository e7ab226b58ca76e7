#pragma once

#include <algorithm>
#include <cstdint>

// How row_votes cuts the units of a KV head among the blocks of a GPU. A function of shapes alone, and so is the order
// of its sums.
namespace mage::core {

constexpr int64_t kVoteGroup = 32;  // units that a thread holds at once, one bit each in a mask
constexpr int64_t kMaxVoteTiles = 64;

struct VoteTiles {
    int64_t row_threads = 0;  // R up to whole warps
    int64_t slices = 0;       // of a block: each has a thread for every row, and groups of its own
    int64_t rounds = 0;       // groups that a slice takes, one after the other
    int64_t tiles = 0;        // blocks of a KV head
};

// Most blocks that a KV head can have; the workspace is made for it.
inline int64_t max_vote_tiles(int64_t num_units) {
    return std::min(kMaxVoteTiles, (num_units + kVoteGroup - 1) / kVoteGroup);
}

inline VoteTiles vote_tiles(int64_t heads, int64_t num_units, int64_t num_rows) {
    constexpr int64_t kWantedBlocks = 128;  // about one per multiprocessor
    constexpr int64_t kWantedThreads = 512;
    const int64_t groups = (num_units + kVoteGroup - 1) / kVoteGroup;
    VoteTiles plan;
    plan.row_threads = (num_rows + 31) / 32 * 32;
    const int64_t most_slices = std::max<int64_t>(1, kWantedThreads / plan.row_threads);
    plan.slices = std::clamp<int64_t>(heads * groups / kWantedBlocks, 1, most_slices);
    const int64_t slice_groups = (groups + plan.slices - 1) / plan.slices;
    plan.rounds = (slice_groups + kMaxVoteTiles - 1) / kMaxVoteTiles;
    plan.tiles = (slice_groups + plan.rounds - 1) / plan.rounds;
    return plan;
}

// Where a cluster of CTAs holds the shares of a KV head, each CTA has some of its rows.
constexpr int64_t kVoteClusterRows = 16;
constexpr int64_t kMaxVoteClusterCtas = 16;
constexpr int64_t kMaxVoteClusterUnits = 2176;  // what shared memory holds: 17 values of each thread's rows

struct VoteClusters {
    int64_t ctas = 0;   // of a KV head; 0 where no cluster holds it
    int64_t share = 0;  // units whose votes a CTA adds, a multiple of 16
};

inline VoteClusters vote_clusters(int64_t num_requests, int64_t num_units, int64_t num_rows) {
    constexpr int64_t kMaxGridY = 65535;
    VoteClusters plan;
    if (num_requests > kMaxGridY || num_units > kMaxVoteClusterUnits ||
        num_rows > kMaxVoteClusterCtas * kVoteClusterRows)
        return plan;
    // One CTA would be no cluster, which the messages of the kernel need.
    plan.ctas = std::max<int64_t>(2, (num_rows + kVoteClusterRows - 1) / kVoteClusterRows);
    plan.share = ((num_units + plan.ctas - 1) / plan.ctas + 15) / 16 * 16;
    return plan;
}

}  // namespace mage::core
