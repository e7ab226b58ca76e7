#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/math.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/block_attention/arguments.h"

// A worker of the attention kernel: its configuration, its shared memory, and how it finds its pieces.
//
// Positions. Of a dense call a position is a token of the request. Of a call with lists a stream, (request, KV head),
// has positions of its own: first the listed units, one behind the other, then the tail. The tail begins at the box of
// the copy engine that holds tail_start, so that every box is whole; positions of the tail below tail_start are masked
// (the hole), unless the unit that tail_start cuts is listed, whose tokens they then are. Boxes of the list that are to
// be skipped are masked too.
namespace mage::cuda {

constexpr int kWarp = 32;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kWarpgroup = 128;
constexpr int kSpan = 64;  // elements of a swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kAtomBytes = 8 * kRowBytes;
// Named barriers; of kGroupBarrier and kTurnBarrier one for each warpgroup.
constexpr int kTailBarrier = 1, kGroupBarrier = 2, kStartBarrier = 5, kTurnBarrier = 6, kPieceBarrier = 9;

template <typename T_, int kDim_, int kWarpgroups_, int kKeys_, int kStages_, int kCtas_, bool kLists_,
          bool kPacked_ = false>
struct AttentionConfig {
    using T = T_;
    static constexpr bool kLists = kLists_;
    static constexpr bool kPacked = kPacked_;  // unit sums in 16 bits
    static constexpr int kDim = kDim_;
    static constexpr int kWarpgroups = kWarpgroups_;  // of consumers
    static constexpr int kKeys = kKeys_;              // tokens of a tile
    static constexpr int kStages = kStages_;
    static constexpr int kCtas = kCtas_;  // of a worker
    static constexpr int kCtaRows = 64 * kWarpgroups;
    static constexpr int kConsumers = kWarpgroup * kWarpgroups;
    static constexpr int kThreads = kConsumers + kWarpgroup;
    static constexpr int kSpans = kDim / kSpan;
    static constexpr int kTileBytes = kKeys * kDim * 2;
    // Registers per thread: what remains of 65536 after the producer's share, in steps of 8.
    static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 152 : kWarpgroups == 1 ? 248 : kLists ? 216 : 224;
    static constexpr int kProducerRegisters = kWarpgroups == 3 ? 56 : kWarpgroups == 1 ? 120 : kLists ? 72 : 56;
};

struct Piece {
    bool first;  // of its worker
    int32_t request, kv_head, row_tile;
    int32_t token_begin, token_end;  // positions
    int32_t prefix;                  // tokens that count for mass
    int32_t slot;                    // -1: the piece is a whole segment
    int32_t pieces;                  // of its segment, or 0: to be counted
    // Of lists: positions of the list, positions up to which the hole is, the token of the tail's first position.
    int32_t list_end, hole_end, tail_begin;
};

// Where a warp is in its worker's units; `at` is the first unit that no piece has had, of whole segments the first of
// these.
struct Walk {
    int32_t at, request_begin, request;
};

// All units of the launch, the workers that they are for, and the end of this worker's. Workers that take segments
// whole have those between them for others in between: `step`, else 0.
struct Share {
    int32_t total, workers, worker, end, step;
};

template <typename Config>
struct alignas(1024) AttentionShared {
    uint8_t q[Config::kCtaRows * Config::kDim * 2];
    uint8_t k[Config::kStages][Config::kTileBytes];
    uint8_t v[Config::kStages][Config::kTileBytes];
    uint4 broken[Config::kStages];  // bit i: box i of the tile lies on a page outside the pool
    uint64_t full_k[Config::kStages], full_v[Config::kStages];
    uint64_t empty_k[Config::kStages], empty_v[Config::kStages];
    // The worker's part, whether it has a piece, and every warp's walk through its pieces.
    Share share;
    bool any;
    Piece piece[Config::kThreads / 32], next[Config::kThreads / 32];
    Walk walk[Config::kThreads / 32];
};

// Boxes of one token: threads copy them.
__device__ __forceinline__ bool gathers(const AttentionArgs& args) { return args.box_shift == 0; }

// Whether a worker has a segment of lists to itself, and no merge follows.
template <typename Config>
__device__ __forceinline__ bool is_whole(const AttentionArgs& args) {
    return Config::kLists && args.splits == 1;
}

// Rows of a worker's tile.
template <typename Config>
__device__ __forceinline__ constexpr int32_t tile_rows() {
    return Config::kCtaRows * Config::kCtas;
}

// This CTA among those of its worker.
template <typename Config>
__device__ __forceinline__ int32_t worker_rank() {
    return Config::kCtas == 1 ? 0 : static_cast<int32_t>(device::cluster_rank());
}

__device__ __forceinline__ int32_t clamped_length(const AttentionArgs& args, int32_t request) {
    return min(max(__ldcg(args.seq_lens + request), 0), args.max_seq_len);
}

// What the device knows of a stream of a call with lists, as it is there.
struct StreamFacts {
    int32_t count, tail_start, seq_len;

    __device__ __forceinline__ StreamFacts(const AttentionArgs& args, int32_t request, int32_t kv_head)
        : count(args.counts[request * args.num_kv_heads + kv_head]),
          tail_start(args.tail_start[request]),
          seq_len(args.seq_lens[request]) {}
};

// A stream of a call with lists.
struct ListStream {
    int32_t list_end, tail_begin, tail_start, length;  // length: positions

    __device__ __forceinline__ ListStream(const AttentionArgs& args, int32_t request, int32_t kv_head)
        : ListStream(args, StreamFacts(args, request, kv_head)) {}

    __device__ __forceinline__ ListStream(const AttentionArgs& args, const StreamFacts& facts) {
        const int32_t seq_len = min(max(facts.seq_len, 0), args.max_seq_len);
        list_end = min(max(facts.count, 0), args.capacity) << args.list_shift;
        tail_start = min(max(facts.tail_start, 0), seq_len);
        tail_begin = tail_start >> args.box_shift << args.box_shift;
        length = list_end + seq_len - tail_begin;
    }
};

// Positions of a stream; of a dense call all streams of a request have as many.
template <bool kLists>
__device__ __forceinline__ int32_t stream_length(const AttentionArgs& args, int32_t request, int32_t kv_head) {
    return kLists ? ListStream(args, request, kv_head).length : clamped_length(args, request);
}

__device__ __forceinline__ const int32_t* list_of(const AttentionArgs& args, int32_t request, int32_t kv_head) {
    return args.indices + (int64_t{request} * args.num_kv_heads + kv_head) * args.capacity;
}

// Whether a list has an entry of `unit` that is not to be skipped; one warp.
__device__ __forceinline__ bool is_listed(const int32_t* list, int32_t count, int32_t unit) {
    bool found = false;
    for (int32_t i = threadIdx.x % kWarp; i < count; i += kWarp)
        found = found || (list[i] == unit && (i == 0 || list[i - 1] < unit));
    return __any_sync(~0u, found);
}

// What the schedule calls a request is a stream where there are lists.
template <bool kLists>
__device__ __forceinline__ int32_t request_length(const AttentionArgs& args, int32_t index) {
    const int32_t request = kLists ? index / args.num_kv_heads : index;
    return stream_length<kLists>(args, request, kLists ? index - request * args.num_kv_heads : 0);
}

// Row / G by a multiplication: exact for rows below 2^32 / G.
__device__ __forceinline__ int32_t query_of(const AttentionArgs& args, int32_t row) {
    return args.group == 1 ? row : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(row), args.group_reciprocal));
}

// Whose segment it is.
template <bool kLists>
__device__ __forceinline__ void place_segment(const AttentionArgs& args, int32_t index, int32_t segment, Piece* piece) {
    if constexpr (kLists) {
        piece->request = index / args.num_kv_heads;
        piece->kv_head = index - piece->request * args.num_kv_heads;
        piece->row_tile = segment;
    } else {
        piece->request = index;
        piece->kv_head = args.row_tiles == 1 ? segment : segment / args.row_tiles;
        piece->row_tile = segment - piece->kv_head * args.row_tiles;
    }
}

// Where a stream's list and tail are; one warp.
__device__ __forceinline__ void set_list(const AttentionArgs& args, const ListStream& stream, Piece* piece) {
    piece->list_end = piece->hole_end = stream.list_end;
    piece->tail_begin = stream.tail_begin;
    if (stream.tail_start > stream.tail_begin) {
        const int32_t cut = stream.tail_start >> args.list_shift, count = stream.list_end >> args.list_shift;
        if (!is_listed(list_of(args, piece->request, piece->kv_head), count, cut))
            piece->hole_end += stream.tail_start - stream.tail_begin;
    }
}

// And what does not depend on the piece.
template <bool kLists>
__device__ __forceinline__ void set_segment(const AttentionArgs& args, int32_t index, int32_t segment, Piece* piece) {
    place_segment<kLists>(args, index, segment, piece);
    if constexpr (kLists) set_list(args, ListStream(args, piece->request, piece->kv_head), piece);
    piece->prefix = args.prefix_lens != nullptr ? max(0, args.prefix_lens[piece->request]) : INT32_MAX;
}

// The next segment that a worker has to itself, if there is one more.
__device__ __forceinline__ bool next_whole(const AttentionArgs& args, const Share& share, Walk* walk, Piece* piece) {
    int32_t request, segment, seq_len;
    do {
        if (walk->at >= share.end) return false;
        request = walk->at / args.schedule.segments_per_request;
        segment = walk->at - request * args.schedule.segments_per_request;
        seq_len = clamped_length(args, request);
        walk->at += share.step;
    } while (seq_len == 0);
    piece->first = false;
    piece->pieces = 1;
    piece->slot = -1;
    set_segment<false>(args, request, segment, piece);
    piece->token_begin = 0;
    piece->token_end = seq_len;
    return true;
}

// The next piece of a walk, if the worker has one more.
template <bool kLists>
__device__ __forceinline__ bool next_piece(const AttentionArgs& args, const Share& share, Walk* walk, Piece* piece) {
    if (walk->at >= share.end) return false;
    if constexpr (!kLists) {
        // Behind the code of calls that have few pieces, which comes cold.
        if (__builtin_expect(share.step > 0, 0)) return next_whole(args, share, walk, piece);
    }
    const core::Schedule& s = args.schedule;
    int32_t seq_len = request_length<kLists>(args, walk->request);
    int32_t units = core::units_of(s, seq_len);
    while (walk->at >= walk->request_begin + units * s.segments_per_request) {
        walk->request_begin += units * s.segments_per_request;
        seq_len = request_length<kLists>(args, ++walk->request);
        units = core::units_of(s, seq_len);
    }
    const int32_t offset = walk->at - walk->request_begin;
    const int32_t segment = offset / units;
    const int32_t first = offset - segment * units;
    const int32_t last = s.fixed ? first + 1 : min(units, first + (share.end - walk->at));
    piece->first = false;
    piece->pieces = 0;
    set_segment<kLists>(args, walk->request, segment, piece);
    piece->token_begin = first * s.unit_tokens;
    piece->token_end = min(seq_len, last * s.unit_tokens);
    piece->slot = first == 0 && last == units ? -1 : core::slot_of(s, walk->at, share.worker, first == 0);
    walk->at += last - first;
    return true;
}

// The same for the calling warp, whose walk and piece lie in shared memory to spare registers.
template <typename Config, typename Shared>
__device__ __forceinline__ bool next_piece_of_warp(const AttentionArgs& args, Shared& shared, Piece* next) {
    const int32_t warp = threadIdx.x / kWarp;
    Walk walk = shared.walk[warp];
    Piece piece;
    if (!next_piece<Config::kLists>(args, shared.share, &walk, &piece)) return false;
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
        shared.walk[warp] = walk;
        *next = piece;
    }
    __syncwarp();
    return true;
}

// The piece of a worker whose segments have workers of their own, `most` units to each at most; `length` is that of the
// lane's request. One warp.
template <bool kLists>
__device__ __forceinline__ bool aligned_piece(const AttentionArgs& args, int32_t worker, int32_t most, int32_t length,
                                              Piece* piece) {
    const core::Schedule& s = args.schedule;
    const int32_t lane = threadIdx.x % kWarp;
    const int32_t each = core::ceil_div(core::units_of(s, length), most);  // workers of a segment
    const int32_t own = each * s.segments_per_request;
    int32_t until = own;
    for (int step = 1; step < s.num_requests; step *= 2) {
        const int32_t other = __shfl_up_sync(~0u, until, step);
        if (lane >= step) until += other;
    }
    const uint32_t past = __ballot_sync(~0u, until > worker);
    if (past == 0) return false;
    const int32_t request = __ffs(past) - 1;
    const int32_t workers = __shfl_sync(~0u, each, request);
    const int32_t offset = worker - __shfl_sync(~0u, until - own, request);
    const int32_t seq_len = __shfl_sync(~0u, length, request);
    const int32_t segment = offset / workers, index = offset - segment * workers;
    const int32_t units = core::units_of(s, seq_len);
    set_segment<kLists>(args, request, segment, piece);
    piece->token_begin = core::first_unit(units, workers, index) * s.unit_tokens;
    piece->token_end = min(seq_len, core::first_unit(units, workers, index + 1) * s.unit_tokens);
    piece->slot = workers == 1 ? -1 : core::slot_of(s, 0, worker, index == 0);
    piece->pieces = workers;
    return true;
}

// The first piece of a worker that takes units in a row, and the walk to the next; one warp.
template <bool kLists>
__device__ __forceinline__ bool balanced_piece(const AttentionArgs& args, const Share& share, Walk* walk,
                                               Piece* piece) {
    const core::Schedule& s = args.schedule;
    const int32_t lane = threadIdx.x % kWarp;
    const int32_t begin = walk->at;
    int32_t reached = 0, request = 0;
    for (int32_t base = 0; base < s.num_requests && begin < share.end; base += kWarp) {
        const int32_t b = base + lane;
        const int32_t own =
            b < s.num_requests ? core::units_of(s, request_length<kLists>(args, b)) * s.segments_per_request : 0;
        int32_t sum = own;
        for (int step = 1; step < kWarp; step *= 2) {
            const int32_t other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        const uint32_t past = __ballot_sync(~0u, reached + sum > begin);
        if (past != 0) {
            const int32_t found = __ffs(past) - 1;
            request = base + found;
            reached += __shfl_sync(~0u, sum - own, found);
            break;
        }
        reached += __shfl_sync(~0u, sum, kWarp - 1);
    }
    walk->request_begin = reached;
    walk->request = request;
    return next_piece<kLists>(args, share, walk, piece);
}

// The piece of a worker that has all of a segment of lists.
__device__ __forceinline__ bool whole_piece(const AttentionArgs& args, int32_t worker, Piece* piece) {
    const int32_t index = worker / args.schedule.segments_per_request;
    set_segment<true>(args, index, worker - index * args.schedule.segments_per_request, piece);
    piece->pieces = 1;
    piece->slot = -1;
    piece->token_begin = 0;
    piece->token_end = stream_length<true>(args, piece->request, piece->kv_head);
    return piece->token_end > 0;
}

// Finds the units of a worker and its first piece; one warp.
template <int kWarps, bool kLists, typename Shared>
__device__ __forceinline__ void find_start(const AttentionArgs& args, int32_t worker, Shared& shared) {
    const core::Schedule& s = args.schedule;
    const int32_t lane = threadIdx.x % kWarp;
    if (kLists && args.splits == 1) {
        Piece piece;
        const bool any = whole_piece(args, worker, &piece);
        piece.first = true;
        if (lane < kWarps) {
            shared.piece[lane] = piece;
            shared.walk[lane] = {0, 0, 0};
        }
        if (lane == 0) {
            shared.any = any;
            shared.share = {0, 0, worker, 0, 0};  // nothing behind the piece
        }
        return;
    }
    const int32_t length = lane < s.num_requests ? request_length<kLists>(args, lane) : 0;
    int32_t total = core::units_of(s, length), longest = total;
    for (int32_t b = lane + kWarp; b < s.num_requests; b += kWarp) {
        const int32_t own = core::units_of(s, request_length<kLists>(args, b));
        total += own;
        longest = max(longest, own);
    }
    total = __reduce_add_sync(~0u, total) * s.segments_per_request;
    const int32_t most = core::aligned_units(s, total, [&](int32_t t) {
        return __reduce_add_sync(~0u, core::ceil_div(core::units_of(s, length), t)) * s.segments_per_request;
    });
    Share share = {total, 0, worker, 0, 0};
    Walk walk = {0, 0, 0};
    Piece piece;
    bool any;
    if (most > 0) {
        any = aligned_piece<kLists>(args, worker, most, length, &piece);
    } else if (!kLists && core::may_take_whole(s) && core::takes_whole(s, total, __reduce_max_sync(~0u, longest))) {
        share.step = s.max_workers;
        share.end = s.num_requests * s.segments_per_request;
        walk.at = worker < s.max_workers ? worker : share.end;  // blocks that finish masses may be more
        any = next_piece<kLists>(args, share, &walk, &piece);
    } else {
        share.workers = total > 0 ? core::workers_of(s, total) : 0;
        if (worker < share.workers) {
            walk.at = core::first_unit(total, share.workers, worker);
            share.end = core::first_unit(total, share.workers, worker + 1);
        }
        any = balanced_piece<kLists>(args, share, &walk, &piece);
    }
    piece.first = true;
    if (lane < kWarps) {
        shared.walk[lane] = walk;
        if (any) shared.piece[lane] = piece;
    }
    if (lane == 0) {
        shared.any = any;
        shared.share = share;
    }
}

// A box of a listed unit: the unit and the one before it in the list.
struct Entry {
    int32_t unit = -1, previous = -1;
};

// Where a box is: its first token and the page of that; kBroken: it is not to be read.
struct Place {
    int32_t token = 0, page = 0;
};
constexpr int32_t kBroken = -1;

// Where the positions of a piece are in the cache.
template <bool kLists>
struct Places {
    const AttentionArgs& args;
    const Piece& piece;
    const int32_t token_end;
    const int32_t *table, *list;

    __device__ __forceinline__ Places(const AttentionArgs& a, const Piece& p)
        : args(a),
          piece(p),
          token_end(p.token_end),
          table(a.block_table + p.request * a.stride_table),
          list(kLists ? list_of(a, p.request, p.kv_head) : nullptr) {}

    __device__ __forceinline__ Entry entry_at(int32_t position) const {
        Entry entry;
        if constexpr (kLists) {
            const int32_t at = position >> args.list_shift;
            if (position < piece.list_end) entry = {list[at], at > 0 ? list[at - 1] : -1};
        }
        return entry;
    }

    // Past the piece it is nowhere, which is not broken.
    __device__ __forceinline__ Place place_of(int32_t position, const Entry& entry) const {
        Place place = place_at(position, entry);
        if (position < token_end && place.page != kBroken) place.page = __ldg(table + (place.token >> args.page_shift));
        return place;
    }

    // The same but for the page, if there is one to look up.
    __device__ __forceinline__ Place place_at(int32_t position, const Entry& entry) const {
        Place place = {position, nowhere()};
        bool is_listed = true;
        if constexpr (kLists) {
            if (position >= piece.list_end) {
                place.token = piece.tail_begin + position - piece.list_end;
            } else {
                is_listed =
                    entry.unit > entry.previous && entry.unit >= 0 && entry.unit <= piece.tail_begin >> args.list_shift;
                place.token = is_listed ? (entry.unit << args.list_shift) + (position & (1 << args.list_shift) - 1) : 0;
                is_listed = is_listed && place.token < piece.tail_begin;
            }
        }
        if (position < token_end && !is_listed) place.page = kBroken;
        return place;
    }

    // The page past the pool.
    __device__ __forceinline__ int32_t nowhere() const { return static_cast<int32_t>(max(args.num_pages, int64_t{1})); }

    // Whether a place is to be masked; it then reads as zeros.
    __device__ __forceinline__ bool mark(int32_t position, Place* place) const {
        const bool is_broken = position < token_end && (place->page < 0 || place->page >= args.num_pages);
        if (is_broken) place->page = nowhere();
        return is_broken;
    }
};

// Copies tokens of a pool to rows `first` to first + kRows of a tile, to each the one whose place a lane has, zeros
// where that is past the pool. A row takes as many lanes as it has chunks of 16 bytes. kBatch copies of a lane are
// asked for at once: one alone would wait for its address, and the next for its registers.
template <typename Config, int kRows, int kBatch>
__device__ __forceinline__ void copy_rows(const AttentionArgs& args, const PoolBytes& pool, int32_t kv_head,
                                          const Place& place, uint32_t tile, int32_t first) {
    constexpr int kChunks = Config::kDim / 8, kAtOnce = kWarp / kChunks;  // rows at once
    static_assert(kRows % (kBatch * kAtOnce) == 0 && kRows <= kWarp);
    const int32_t lane = threadIdx.x % kWarp, chunk = lane % kChunks, own = lane / kChunks;
    const bool reads = place.page < args.num_pages;
    const uint32_t all_reads = __ballot_sync(~0u, reads);
    const int32_t in_page = place.token & (1 << args.page_shift) - 1;
    const int64_t offset = reads ? place.page * pool.stride_page + in_page * pool.stride_token : 0;
    const auto low = static_cast<uint32_t>(offset), high = static_cast<uint32_t>(offset >> 32);
    const uint8_t* head = pool.data + kv_head * pool.stride_head + chunk * 16;
    const uint32_t to = tile + chunk / 8 * (Config::kKeys * kRowBytes) + (first + own) * kRowBytes;
    // `first` is a multiple of 4 and what is added to it one of kAtOnce, so that the bits of the swizzle add up.
    const uint32_t column = chunk % 8 ^ (first + own) % 8;
#pragma unroll 1
    for (int32_t base = 0; base < kRows; base += kBatch * kAtOnce) {
        uint32_t lows[kBatch], highs[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            lows[i] = __shfl_sync(~0u, low, base + i * kAtOnce + own);
            highs[i] = __shfl_sync(~0u, high, base + i * kAtOnce + own);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int32_t row = base + i * kAtOnce;
            const uint8_t* from = head + static_cast<int64_t>(uint64_t{highs[i]} << 32 | lows[i]);
            device::copy_16_bytes(to + row * kRowBytes + (column ^ row % 8) * 16, from,
                                  all_reads >> (row + own) & 1 ? 16 : 0);
        }
    }
}

// Arrives when all groups of copies of the warp but kPending are there, and visible to wgmma.
template <int kPending>
__device__ __forceinline__ void arrive(uint32_t barrier) {
    device::copies_wait_but<kPending>();
    device::fence_async_shared();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) device::mbarrier_arrive(barrier);
}

// Before the launches ahead are known to be complete: brings what the worker's piece will need into L2, by the guess
// that all requests are as long as they may be (or all lists), so that lengths, lists, pages and Q are not waited for
// one after the other.
template <typename Config>
__device__ __forceinline__ void prefetch_first(const AttentionArgs& args, int32_t worker) {
    const core::Schedule& s = args.schedule;
    const int32_t thread = threadIdx.x - kWarp;  // of those behind the first warp
    if (thread < 0 || args.guess_workers == 0) return;
    const int32_t position = worker / args.guess_workers;  // of the segment in the launch
    const int32_t index = position / s.segments_per_request, segment = position - index * s.segments_per_request;
    if (index >= s.num_requests) return;
    const int32_t request = Config::kLists ? index / args.num_kv_heads : index;
    const int32_t row_tile = Config::kLists || args.row_tiles > 1 ? segment % args.row_tiles : 0;
    const int32_t kv_head = Config::kLists        ? index - request * args.num_kv_heads
                            : args.row_tiles == 1 ? segment
                                                  : segment / args.row_tiles;
    if (thread < kWarpgroup - kWarp) {
        constexpr int32_t kEntries = 32;  // of a line
        const int32_t guess = Config::kLists ? args.capacity << args.list_shift : args.max_seq_len;
        const int32_t units = core::units_of(s, guess), part = worker - position * args.guess_workers;
        const int32_t first = core::first_unit(units, args.guess_workers, part) * s.unit_tokens;
        const int32_t last = min(guess, core::first_unit(units, args.guess_workers, part + 1) * s.unit_tokens) - 1;
        const int32_t* table = args.block_table + request * args.stride_table;
        if constexpr (Config::kLists) {  // its entries, and all pages: those of the entries are not known
            const int32_t entry = (first >> args.list_shift) + thread * kEntries;
            if (entry <= last >> args.list_shift) device::prefetch_l2(list_of(args, request, kv_head) + entry);
            if (thread * kEntries << args.page_shift < args.max_seq_len) device::prefetch_l2(table + thread * kEntries);
        } else {
            const int32_t page = (first >> args.page_shift) + thread * kEntries;
            if (page <= last >> args.page_shift) device::prefetch_l2(table + page);
        }
    } else {
        constexpr int32_t kLines = (Config::kDim * 2 + 127) / 128;  // of a row
        const int32_t first_row = row_tile * tile_rows<Config>() + worker_rank<Config>() * Config::kCtaRows;
        for (int32_t i = thread - (kWarpgroup - kWarp); i < Config::kCtaRows * kLines; i += Config::kConsumers) {
            const int32_t row = first_row + i / kLines;
            if (row >= args.rows) break;
            const int32_t query = query_of(args, row);
            device::prefetch_l2(
                static_cast<const uint16_t*>(args.q) + request * args.stride_q_request + query * args.stride_q_query +
                (int64_t{kv_head} * args.group + row - query * args.group) * args.stride_q_head + i % kLines * 64);
        }
    }
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace mage::cuda
