#pragma once

#include <cstdint>

// What the kernels of row_votes share: their arguments, keys that order log-shares, and the search of a row's last
// unit.
namespace mage::cuda {

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kBins = 256;
constexpr int kChunks = kBins / kWarp;
constexpr int kCandidates = 2 * kWarp;
constexpr uint32_t kLeastKey = 0x00800000u;  // of the smallest finite share
constexpr int32_t kEveryUnit = 0x7fffffff;

// A row takes the units with a log-share above `share`, and those with an equal one up to `unit`.
struct Pick {
    float share;
    int32_t unit;
};

struct RowVotesArgs {
    const float* row_mass;
    const int32_t* prefix_lens;
    const bool* row_mask;
    int32_t* votes;
    int32_t* union_size;
    float* coverage;
    unsigned long long* tickets;  // [heads]
    Pick* picks;                  // [heads, rows]
    float2* partials;             // [heads, tiles, rows]: sums of all shares and of those in the union
    int32_t num_kv_heads;
    int32_t units;
    int32_t rows;
    int32_t positions;   // Q, with row_mask
    int32_t group;       // G, with row_mask
    int32_t unit_shift;  // log2 g
    int32_t budget;      // units per row
    int32_t row_blocks;  // blocks of select per head, CTAs of a cluster
    int32_t share;       // units of a CTA of a cluster
    bool vectors;        // a cluster reads its rows in boxes, not one by one
    int32_t tiles;       // blocks of count per head
    int32_t rounds;
};

__device__ __forceinline__ int32_t eligible_units(const RowVotesArgs& args, int32_t request) {
    const int32_t length = args.prefix_lens[request];
    return min(max(length, 0), args.units << args.unit_shift) >> args.unit_shift;
}

__device__ __forceinline__ bool is_kept(const RowVotesArgs& args, int32_t head, int32_t row) {
    return row < args.rows && (args.row_mask == nullptr ||
                               args.row_mask[int64_t{head / args.num_kv_heads} * args.positions + row / args.group]);
}

// Ascending with the log-share; 0 for one that cannot be chosen (-inf, NaN). -0 and 0 are equal.
__device__ __forceinline__ uint32_t share_key(float log_share) {
    const uint32_t bits = __float_as_uint(log_share);
    const uint32_t key = bits > 0x80000000u ? ~bits : bits | 0x80000000u;
    return log_share > -INFINITY ? key : 0u;
}

__device__ __forceinline__ float share_of_key(uint32_t key) {
    return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// What is left of the search for the last unit taken: values v with v - low <= last, in bins of 2^shift. A value is a
// key, or, among the units of one key, the unit counted from the end, so that the larger value goes first in both.
enum class Stage : uint32_t { kKeys, kUnits, kListKeys, kListUnits, kDone };

struct Search {
    Stage stage;
    uint32_t low, last, shift;
    uint32_t key;   // kUnits, kListUnits
    uint32_t need;  // values of the window that the row takes
};

__device__ __forceinline__ uint32_t bin_shift(uint32_t last) { return max(0, 24 - __clz(last)); }

__device__ __forceinline__ bool is_searching(Stage stage) { return stage <= Stage::kUnits; }

__device__ __forceinline__ Search first_search(uint32_t budget, uint32_t highest, uint32_t bound) {
    Search search;
    search.stage = budget > 0 && highest > 0 ? Stage::kKeys : Stage::kDone;
    search.low = max(bound, kLeastKey);
    search.last = highest - search.low;
    search.shift = bin_shift(search.last);
    search.key = 0;
    search.need = budget;
    return search;
}

// Cuts the search of a row to the bin of the `need`-th largest value, or ends it; a warp's work. The bins of kRows rows
// lie side by side. Leaves them empty.
template <int kRows>
__device__ __forceinline__ void narrow(uint32_t* bins, int32_t eligible, Search* search, Pick* pick) {
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t above = 0, chunk = kChunks, own = 0;
#pragma unroll
    for (int i = kChunks - 1; i >= 0; --i) {
        uint32_t* bin = bins + (i * kWarp + lane) * kRows;
        const uint32_t count = *bin;
        *bin = 0;
        const uint32_t sum = __reduce_add_sync(kAllLanes, count);
        if (chunk == kChunks) {
            if (above + sum >= search->need) {
                chunk = i;
                own = count;
            } else {
                above += sum;
            }
        }
    }
    if (chunk == kChunks) {  // fewer keys than the row may take; only at first
        if (lane == 0) *pick = {share_of_key(search->low), kEveryUnit};
        search->stage = Stage::kDone;
        return;
    }
    uint32_t suffix = own;  // of this lane's bin and those above it in the chunk
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t higher = __shfl_down_sync(kAllLanes, suffix, step);
        if (lane + step < kWarp) suffix += higher;
    }
    const uint32_t at = 31 - __clz(__ballot_sync(kAllLanes, above + suffix >= search->need));
    const uint32_t inside = __shfl_sync(kAllLanes, own, at);
    search->need -= above + __shfl_sync(kAllLanes, suffix, at) - inside;
    const uint32_t begin = (chunk * kWarp + at) << search->shift;
    search->low += begin;
    search->last = min((1u << search->shift) - 1, search->last - begin);
    search->shift = bin_shift(search->last);
    const bool by_unit = search->stage == Stage::kUnits;
    if (search->need == inside) {
        const Pick last = by_unit ? Pick{share_of_key(search->key), eligible - 1 - static_cast<int32_t>(search->low)}
                                  : Pick{share_of_key(search->low), kEveryUnit};
        if (lane == 0) *pick = last;
        search->stage = Stage::kDone;
    } else if (inside <= kCandidates) {
        search->stage = by_unit ? Stage::kListUnits : Stage::kListKeys;
    } else if (search->last == 0) {  // one key; a unit is alone in its bin and never comes here
        search->stage = Stage::kUnits;
        search->key = search->low;
        search->low = 0;
        search->last = static_cast<uint32_t>(eligible - 1);
        search->shift = bin_shift(search->last);
    }
}

// The key and the unit of the last of the `need` entries (key, unit) that a row takes; all lanes of a warp get it.
// 1 <= need < count <= kCandidates, all entries differ.
__device__ __forceinline__ uint2 last_taken(const uint2* entries, uint32_t count, uint32_t need) {
    const uint32_t lane = threadIdx.x % kWarp;
    uint2 own[2];
    uint32_t above[2] = {};
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) own[i] = lane + i * kWarp < count ? entries[lane + i * kWarp] : make_uint2(0u, 0u);
    if (count <= kWarp) {
#pragma unroll 4
        for (uint32_t j = 0; j < count; ++j) above[0] += entries[j].x > own[0].x;
        above[1] = count;
    } else {
#pragma unroll 4
        for (uint32_t j = 0; j < count; ++j) {
            const uint32_t key = entries[j].x;
            above[0] += key > own[0].x;
            above[1] += key > own[1].x;
        }
    }
    uint32_t key = kAllLanes;
#pragma unroll
    for (int i = 0; i < 2; ++i) key = above[i] < need ? min(key, own[i].x) : key;
    key = __reduce_min_sync(kAllLanes, key);
    // Entries at and above it; where they are too many, the lowest units of those that equal it go first.
    uint32_t equal[2], higher = 0, at_least = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        equal[i] = __ballot_sync(kAllLanes, own[i].x == key);
        higher += __popc(__ballot_sync(kAllLanes, own[i].x > key));
        at_least += __popc(equal[i]);
    }
    at_least += higher;
    if (at_least == need) return make_uint2(key, kEveryUnit);
    uint32_t unit = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t before = 0;
#pragma unroll 1
        for (uint32_t j = 0; j < count; ++j) before += entries[j].x == key && entries[j].y < own[i].y;
        if (own[i].x == key && higher + before + 1 == need) unit = own[i].y;
    }
    return make_uint2(key, __reduce_max_sync(kAllLanes, unit));
}

}  // namespace

}  // namespace mage::cuda
