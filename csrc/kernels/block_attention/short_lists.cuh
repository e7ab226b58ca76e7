#pragma once

#include "kernels/block_attention/partial_row.cuh"
#include "kernels/block_attention/pieces.cuh"

// Purpose   attention over short lists, where all that a call takes is latency: mage/sparse_block_attention.h in one
//           launch.
// Schedule  a cluster is a segment: `ctas` CTAs with 64 rows each (they multicast K and V to one another), `splits`
//           times, each with its part of the positions, in boxes of 16. Grid: cluster, KV head x row tile, request.
//           Of a CTA's three warpgroups the first brings K and V (by TMA, a warp for each and each 64 columns; or all
//           four warps gather tokens). The two others have the same 64 rows and take boxes in turn: S = Q K^T, softmax,
//           O += P V, tile after tile, nearly always one or two; one would wait for itself most of the time. They add
//           up what they have, half of the rows each, write rows down, and bulk copies take these to the CTAs that own
//           them, about 64 / splits rows each, in fours; all warps of an owner add up what all splits have, in their
//           order. Where one split has all, each warp finishes the rows that it has written.
// Memory    Q (64 rows), two stages of K and V (160 rows each: five boxes of the one warpgroup, five of the other),
//           128-byte swizzle; incoming records of rows, [splits, rows of the owner]. In the ring, once it is read: what
//           warpgroups give one another, and outgoing records. A record is O in 24 bits and 16 bytes: what exponents
//           are of, and the sum.
// Sync      full_k/full_v[stage]: the producer's expectation and the copies' bytes, or one arrival of each warp that
//           gathers; the first full_k brings the piece too, each the flags of its tile, which the lane that arrives
//           writes. empty_k/empty_v[stage], if a tile is to come there: one arrival per consumer warp of every CTA of
//           the same split (of gathered tokens, of this CTA); the lane that has read the flags arrives at its own CTA.
//           merged: the bytes of the records. Cluster barrier, twice, if the cluster is more than a CTA: barriers are
//           initialised; all records have come. All threads of the CTA, once, if there are splits: the records are
//           written. Named barriers: the consumers.
// Ceiling   latencies: lists, page table, K, products, exchange; NOTES.md of sparse_block_attention has the times.
namespace mage::cuda {

template <typename T_, int kDim_>
struct ShortListConfig {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kRows = 64;
    static constexpr int kBox = 16;      // tokens
    static constexpr int kGroups = 2;    // of consumers
    static constexpr int kOwnBoxes = 5;  // of a group in a tile
    static constexpr int kColumns = kOwnBoxes * kBox;
    static constexpr int kBoxes = kGroups * kOwnBoxes;
    static constexpr int kKeys = kBoxes * kBox;
    static constexpr int kStages = 2;
    static constexpr int kConsumers = kGroups * kWarpgroup;
    static constexpr int kThreads = kConsumers + kWarpgroup;
    static constexpr int kSpans = kDim / kSpan;
    static constexpr int kTileBytes = kKeys * kDim * 2;
    static constexpr int kRecord = 3 * kDim + 16;
    static constexpr int kMostIncoming = 84;  // records: seven splits have up to twelve rows each
};

// token_begin == token_end: there is none.
struct ShortPiece : Piece {
    int32_t tile_tokens;  // a multiple of a box; tiles of a piece are about as long as each other
};

template <typename Config>
struct alignas(1024) ShortListShared {
    uint8_t q[Config::kRows * Config::kDim * 2];
    uint8_t k[Config::kStages][Config::kTileBytes];
    uint8_t v[Config::kStages][Config::kTileBytes];
    uint8_t incoming[Config::kMostIncoming * Config::kRecord];
    float2 joined[Config::kRows];  // what a warpgroup has of a row that the other one sends
    // What lies on pages outside the pool: x: a bit for each box of the tile, y: a part of the hole is there; or of
    // gathered tokens, a word for each warp that gathers, a bit for each of its rows.
    uint4 broken[Config::kStages][Config::kGroups];
    uint64_t full_k[Config::kStages], full_v[Config::kStages];
    uint64_t empty_k[Config::kStages], empty_v[Config::kStages];
    uint64_t merged;
    ShortPiece piece;
};

// Boxes of a tile are dealt out to the groups: the row of the tile where token `offset` of it lies.
template <typename Config>
__device__ __forceinline__ int32_t row_of_token(int32_t offset) {
    const int32_t box = offset / Config::kBox;
    return box % Config::kGroups * Config::kColumns + box / Config::kGroups * Config::kBox + offset % Config::kBox;
}

// Which part of which segment a CTA has.
struct ShortListPlace {
    int32_t request, kv_head, row_tile, split, rank;

    __device__ __forceinline__ explicit ShortListPlace(const AttentionArgs& args) {
        const auto x = static_cast<int32_t>(blockIdx.x), y = static_cast<int32_t>(blockIdx.y);
        request = blockIdx.z;
        row_tile = args.row_tiles == 1 ? 0 : y / args.num_kv_heads;
        kv_head = y - row_tile * args.num_kv_heads;
        split = x >> args.ctas / 2;  // 1, 2 or 4
        rank = x - split * args.ctas;
    }
    __device__ __forceinline__ int32_t first_row(const AttentionArgs& args) const {
        return (row_tile * args.ctas + rank) * 64;
    }
};

// Whether a cluster is more than a CTA.
__device__ __forceinline__ bool in_cluster(const AttentionArgs& args) { return (args.ctas | args.splits) != 1; }

// Whether CTAs of a split bring K and V for one another: of gathered tokens every CTA brings all by itself.
__device__ __forceinline__ bool shares(const AttentionArgs& args) { return args.ctas > 1 && !gathers(args); }

// By the number of splits; exact for small values.
__device__ __forceinline__ int32_t over_splits(const AttentionArgs& args, int32_t value) {
    return args.splits == 1 ? value : static_cast<int32_t>(__umulhi(value, args.splits_reciprocal));
}

// Records of this CTA's rows, where V was.
template <typename Config>
__device__ __forceinline__ const uint8_t* outgoing_of(const ShortListShared<Config>& shared) {
    return shared.v[0];
}
template <typename Config>
__device__ __forceinline__ uint8_t* outgoing_of(ShortListShared<Config>& shared) {
    return shared.v[0];
}

// Rows go to their owners in fours: of 16 fours of a CTA, four i is split owner_of(i)'s, whose first is first_four.
constexpr int kFour = 4, kFours = 16;
__device__ __forceinline__ int32_t owner_of(const AttentionArgs& args, int32_t four) {
    return four * args.splits / kFours;
}
__device__ __forceinline__ int32_t first_four(const AttentionArgs& args, int32_t split) {
    return over_splits(args, kFours * split + args.splits - 1);
}

// Positions of a split, and how many splits have some; `length` positions are cut into boxes.
template <typename Config>
__device__ __forceinline__ void cut(const AttentionArgs& args, int32_t length, int32_t split, ShortPiece* piece) {
    const int32_t boxes = (length + Config::kBox - 1) / Config::kBox;
    const bool few = boxes < args.splits;
    const int32_t each = few ? 1 : over_splits(args, boxes), more = few ? 0 : boxes - each * args.splits;
    piece->pieces = few ? boxes : args.splits;
    const bool any = split < piece->pieces;
    const int32_t begin = split * each + min(split, more), own = each + (split < more ? 1 : 0);
    piece->token_begin = any ? begin * Config::kBox : 0;
    piece->token_end = any ? min(length, (begin + own) * Config::kBox) : 0;
    const int32_t tile = own <= Config::kBoxes       ? own
                         : own <= 2 * Config::kBoxes ? (own + 1) / 2
                         : own <= 3 * Config::kBoxes ? (own + 2) / 3
                                                     : Config::kBoxes;
    piece->tile_tokens = tile * Config::kBox;
}

// Where a lane's box of the first tiles is, by the guess that the list is full: then its entry and its page are read
// while the list's length is still on its way.
struct Guess {
    int32_t position, list_end;
    Entry entry;
    int32_t token, page;
};

// `position`: by the guess.
__device__ __forceinline__ Guess guess_place(const AttentionArgs& args, const ShortListPlace& at,
                                             const StreamFacts& facts, int32_t position) {
    Guess guess;
    guess.list_end = args.capacity << args.list_shift;
    guess.position = position;
    const bool is_listed = guess.position < guess.list_end;
    if (args.capacity > 0) {
        const int32_t* list = list_of(args, at.request, at.kv_head);
        const int32_t entry = min(guess.position >> args.list_shift, args.capacity - 1);
        guess.entry = {list[entry], entry > 0 ? list[entry - 1] : -1};
    }
    const int32_t inside = guess.position & (1 << args.list_shift) - 1;
    const int32_t tail_begin = facts.tail_start >> args.box_shift << args.box_shift;
    // A count, a start and an entry may be anything: unsigned, so that sums may run over.
    const uint32_t token = is_listed ? (static_cast<uint32_t>(guess.entry.unit) << args.list_shift) + inside
                                     : static_cast<uint32_t>(tail_begin) + guess.position - guess.list_end;
    guess.token = static_cast<int32_t>(token);
    const bool reads = token < static_cast<uint32_t>(args.max_seq_len);
    guess.page =
        reads ? __ldg(args.block_table + at.request * args.stride_table + (guess.token >> args.page_shift)) : kBroken;
    return guess;
}

// The piece by that guess, which no length is needed for.
template <typename Config>
__device__ __forceinline__ ShortPiece guess_piece(const AttentionArgs& args, const ShortListPlace& at) {
    ShortPiece piece;
    cut<Config>(args, (args.capacity << args.list_shift) + args.num_queries, at.split, &piece);
    return piece;
}

// The piece of a CTA; one warp.
template <typename Config>
__device__ __forceinline__ ShortPiece find_short_piece(const AttentionArgs& args, const ShortListPlace& at,
                                                       const StreamFacts& facts) {
    ShortPiece piece;
    const ListStream stream(args, facts);
    piece.first = true;
    piece.request = at.request;
    piece.kv_head = at.kv_head;
    piece.row_tile = at.row_tile;
    piece.prefix = 0;
    piece.slot = -1;
    cut<Config>(args, stream.length, at.split, &piece);
    set_list(args, stream, &piece);
    return piece;
}

// The place of a position, by the guess if that was right.
__device__ __forceinline__ Place place_by(const Guess& guess, const Places<true>& places, int32_t position) {
    const bool same = guess.position == position && guess.list_end == places.piece.list_end;
    if (__all_sync(~0u, same)) {
        Place place = places.place_at(position, guess.entry);
        if (position < places.token_end && place.page != kBroken && place.token == guess.token) {
            place.page = guess.page;
            return place;
        }
        if (position >= places.token_end || place.page == kBroken) return place;
    }
    return places.place_of(position, places.entry_at(position));
}

// --- Producers -------------------------------------------------------------------------------------------------------

// A warp asks the copy engine for boxes of 16 tokens of K or V, of 64 columns; a lane for each of two tiles.
template <typename Config>
__device__ __forceinline__ void produce_short(const AttentionArgs& args, const ShortListPlace& at,
                                              const ShortPiece& guessed, const CUtensorMap* k_map,
                                              const CUtensorMap* v_map, ShortListShared<Config>& shared) {
    constexpr int kLanes = kWarp / Config::kStages;  // of a tile
    static_assert(Config::kStages == 2 && Config::kBoxes <= kLanes, "a lane to a box, a stage to a tile");
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t box = lane % kLanes, tile = lane / kLanes, span = warp / 2;
    const bool is_v = warp % 2 != 0, writes = warp == 0;
    const bool owns = (box & args.ctas - 1) == at.rank;
    const auto receivers = static_cast<uint16_t>(((1 << args.ctas) - 1) << at.split * args.ctas);
    const CUtensorMap* map = is_v ? v_map : k_map;
    const uint32_t to = device::shared_address(is_v ? shared.v[0] : shared.k[0]) + tile * Config::kTileBytes +
                        (span * Config::kKeys + row_of_token<Config>(box * Config::kBox)) * kRowBytes;
    const uint32_t full = device::shared_address(is_v ? shared.full_v : shared.full_k);
    const uint32_t empty = device::shared_address(is_v ? shared.empty_v : shared.empty_k);
    const StreamFacts facts(args, at.request, at.kv_head);
    const Guess guess =
        guess_place(args, at, facts, guessed.token_begin + tile * guessed.tile_tokens + box * Config::kBox);
    const ShortPiece piece = find_short_piece<Config>(args, at, facts);
    const int32_t offset = tile * piece.tile_tokens + box * Config::kBox;
    const bool is_used = box * Config::kBox < piece.tile_tokens;
    // Of V what is not used becomes zeros.
    const bool copies = owns && box < Config::kBoxes;
    if (writes && lane == 0) shared.piece = piece;
    const Places<true> places(args, piece);
    __syncwarp();
    if (shares(args)) device::cluster_wait();  // their barriers are initialised
    if (piece.token_begin == piece.token_end && writes && lane == 0) device::mbarrier_arrive(full);
    uint32_t parity = 1;
    Place place = place_by(guess, places, piece.token_begin + offset);
    for (int32_t token = piece.token_begin; token < piece.token_end; token += Config::kStages * piece.tile_tokens) {
        const int32_t position = token + offset;
        const bool is_broken = places.mark(position, &place) && is_used;
        if (!is_used) place.page = places.nowhere();  // zeros
        const uint32_t flagged = __ballot_sync(~0u, is_broken);
        const device::BoxStart start = {span * kSpan, place.token & (1 << args.page_shift) - 1, piece.kv_head,
                                        place.page};
#pragma unroll 1
        for (int32_t stage = 0; stage < Config::kStages; ++stage) {
            const int32_t first = token + stage * piece.tile_tokens;
            if (first >= piece.token_end) break;
            const int32_t boxes = (min(piece.token_end - first, piece.tile_tokens) + Config::kBox - 1) / Config::kBox;
            device::mbarrier_wait(empty + 8 * stage, parity);
            if (writes && lane == 0) {
                const bool is_holed = first < piece.hole_end && first + piece.tile_tokens > piece.list_end &&
                                      piece.hole_end > piece.list_end;
                const uint4 flags = make_uint4(flagged >> stage * kLanes & (1u << kLanes) - 1, is_holed ? 1 : 0, 0, 0);
#pragma unroll
                for (int group = 0; group < Config::kGroups; ++group) shared.broken[stage][group] = flags;
            }
            if (span == 0 && lane == 0)
                device::mbarrier_arrive_expect(full + 8 * stage,
                                               (is_v ? Config::kBoxes : boxes) * (Config::kBox * Config::kDim * 2));
            if (copies && tile == stage && (is_v || box < boxes)) {
                if (args.ctas == 1) {
                    device::copy_box(map, to, full + 8 * stage, start, device::kEvictNormal);
                } else {
                    device::copy_box_multicast(map, to, full + 8 * stage, start, receivers, device::kEvictNormal);
                }
            }
            __syncwarp();
        }
        const int32_t next = position + Config::kStages * piece.tile_tokens;
        place = places.place_of(next, places.entry_at(next));
        parity ^= 1;
    }
    __syncwarp();
    if (!shares(args) && in_cluster(args)) device::cluster_wait();
}

// Of a consumer group's rows.
template <typename Config>
__device__ __forceinline__ constexpr int rows_of_gatherer() {
    return Config::kColumns / (kWarpgroup / kWarp);
}

// Single tokens are gathered by four warps, 16 bytes at a time: of the rows of each consumer group a warp
// finds a quarter of the places, a lane to a token, and copies them. Every CTA gathers all of its tile by itself.
template <typename Config>
__device__ __forceinline__ void gather_short(const AttentionArgs& args, const ShortListPlace& at,
                                             ShortListShared<Config>& shared) {
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    constexpr int kEach = rows_of_gatherer<Config>();
    const ShortPiece piece = find_short_piece<Config>(args, at, StreamFacts(args, at.request, at.kv_head));
    if (warp == 0 && lane == 0) shared.piece = piece;
    const Places<true> places(args, piece);
    if (piece.token_begin == piece.token_end && lane == 0)
        device::mbarrier_arrive(device::shared_address(&shared.full_k[0]));
    // The barrier of the half tile before: it is told when the next has been asked for, and all of its copies are
    // there.
    uint32_t behind = 0, stage = 0, parity = 1;
    for (int32_t token = piece.token_begin; token < piece.token_end; token += piece.tile_tokens) {
        Place own_places[Config::kGroups];
        device::mbarrier_wait(device::shared_address(&shared.empty_k[stage]), parity);
#pragma unroll
        for (int group = 0; group < Config::kGroups; ++group) {
            const int32_t own = warp * kEach + min(lane, kEach - 1);
            const int32_t offset = (own / Config::kBox * Config::kGroups + group) * Config::kBox + own % Config::kBox;
            const int32_t position = token + offset;
            Place place = places.place_of(position, places.entry_at(position));
            const bool is_used = offset < piece.tile_tokens;
            const bool is_broken = places.mark(position, &place) && is_used;
            if (!is_used) place.page = places.nowhere();  // zeros
            const uint32_t flags = __ballot_sync(~0u, is_broken);
            if (lane == 0) reinterpret_cast<uint32_t*>(&shared.broken[stage][group])[warp] = flags;
            own_places[group] = place;
        }
        const auto fill = [&](const PoolBytes& pool, const uint8_t* tile, uint64_t* full) {
#pragma unroll
            for (int group = 0; group < Config::kGroups; ++group)
                copy_rows<Config, kEach, 5>(args, pool, piece.kv_head, own_places[group], device::shared_address(tile),
                                            group * Config::kColumns + warp * kEach);
            device::copies_commit();
            if (behind != 0) arrive<1>(behind);
            behind = device::shared_address(full);
        };
        fill(args.k_pool, shared.k[stage], &shared.full_k[stage]);
        device::mbarrier_wait(device::shared_address(&shared.empty_v[stage]), parity);
        fill(args.v_pool, shared.v[stage], &shared.full_v[stage]);
        stage ^= 1;
        if (stage == 0) parity ^= 1;
    }
    if (behind != 0) arrive<0>(behind);
    __syncwarp();
    if (in_cluster(args)) device::cluster_wait();
}

// --- The consumers: two warpgroups -----------------------------------------------------------------------------------

template <typename Config>
struct ShortListConsumer {
    using T = typename Config::T;
    static constexpr int kDim = Config::kDim;
    static constexpr int kRecord = Config::kRecord;

    const AttentionArgs& args;
    ShortListShared<Config>& shared;
    const ShortListPlace& at;
    const int32_t thread, group, lane, warp;  // in the group; the group
    const int32_t first_row;                  // of this CTA, in the stream
    const int32_t valid;                      // rows of this CTA that are rows of the stream
    ShortPiece piece;
    int32_t limit[2], listed_limit[2];  // positions, and tokens of a list, that each row may see
    bool passes_lists;                  // whether lists reach past the limit of a row of this warp
    float reference[2], sum[2];

    float s[Config::kColumns / 2];
    uint32_t p[Config::kOwnBoxes][4];
    float o[kDim / 2];

    // The shared memory as descriptors see it, in 16 bytes.
    const uint32_t shared_tile;
    static constexpr uint32_t kKTile = Config::kRows * kDim * 2 / 16;
    static constexpr uint32_t kVTile = kKTile + Config::kStages * Config::kTileBytes / 16;

    __device__ __forceinline__ ShortListConsumer(const AttentionArgs& a, const ShortListPlace& place,
                                                 ShortListShared<Config>& sh)
        : args(a),
          shared(sh),
          at(place),
          thread(threadIdx.x % kWarpgroup),
          group(__shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) / kWarpgroup - 1, 0)),
          lane(threadIdx.x % kWarp),
          warp(thread / kWarp),
          first_row(place.first_row(a)),
          valid(min(max(a.rows - first_row, 0), Config::kRows)),
          shared_tile(device::tile_address(device::shared_address(&sh))) {}

    __device__ __forceinline__ int32_t row_in_cta() const { return warp * 16 + lane / 4; }  // the other is 8 below

    // Q, swizzled, asynchronous; rows past R are zeros. A thread keeps its chunk of 16 bytes and goes on by a multiple
    // of 8 rows, so that the swizzle stays the same.
    static constexpr int kChunks = kDim / 8;
    static constexpr int kRowStep = Config::kConsumers / kChunks;
    static constexpr int kRounds = Config::kRows / kRowStep;

    __device__ __forceinline__ int32_t loader() const { return threadIdx.x - kWarpgroup; }

    __device__ __forceinline__ uint32_t own_chunk() const {
        const int32_t chunk = loader() % kChunks, row = loader() / kChunks;
        return chunk / 8 * (Config::kRows * kRowBytes) + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
    }

    __device__ __forceinline__ void start_q() const {
        const T* base = static_cast<const T*>(args.q) + at.request * args.stride_q_request +
                        int64_t{at.kv_head} * args.group * args.stride_q_head + loader() % kChunks * 8;
        const uint32_t to = device::shared_address(shared.q) + own_chunk();
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const int32_t r = first_row + loader() / kChunks + i * kRowStep;
            const int32_t row = min(r, args.rows - 1), query = query_of(args, row);
            const T* from = base + query * args.stride_q_query + (row - query * args.group) * args.stride_q_head;
            device::copy_16_bytes(to + i * kRowStep * kRowBytes, from, r < args.rows ? 16 : 0);
        }
    }

    __device__ __forceinline__ void finish_q() const {
        device::copies_wait();
        if (args.flip != 0 || args.keep != ~0u) {
#pragma unroll 1
            for (int i = 0; i < kRounds; ++i) {
                uint4* chunk = reinterpret_cast<uint4*>(shared.q + own_chunk() + i * kRowStep * kRowBytes);
                const uint4 x = *chunk;
                *chunk = make_uint4((x.x & args.keep) ^ args.flip, (x.y & args.keep) ^ args.flip,
                                    (x.z & args.keep) ^ args.flip, (x.w & args.keep) ^ args.flip);
            }
        }
        device::fence_async_shared();
        device::named_barrier(kTailBarrier, Config::kConsumers);
    }

    __device__ __forceinline__ void start_piece() {
        piece = shared.piece;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            limit[i] = piece.token_end;
            listed_limit[i] = INT32_MAX;
            const int32_t row = first_row + row_in_cta() + 8 * i;
            if (args.kv_lens != nullptr && row < args.rows) {
                // Listed tokens come at any distance: each is held against its row's limit.
                const int32_t visible = args.kv_lens[at.request * args.num_queries + query_of(args, row)];
                listed_limit[i] = min(max(visible, 0), args.max_seq_len);
                limit[i] = min(limit[i], piece.list_end + max(listed_limit[i] - piece.tail_begin, 0));
            }
        }
        passes_lists = __any_sync(~0u, min(listed_limit[0], listed_limit[1]) <= piece.tail_begin);
    }

    // Whether boxes of a tile are broken or it has a part of the hole. One lane reads, the one that releases K at this
    // CTA: what the others read its arrival would not order.
    __device__ __forceinline__ bool any_flag(uint32_t stage) const {
        uint32_t any = 0;
        if (lane == at.rank) {
            const uint4 flags = shared.broken[stage][group];
            any = flags.x | flags.y | flags.z | flags.w;
        }
        return __any_sync(~0u, any != 0);
    }

    // S = Q K^T of this group's columns of a stage. `beside` runs while the tensor cores do.
    template <typename BesideT>
    __device__ __forceinline__ void multiply_keys(uint32_t stage, const BesideT& beside) {
        const uint64_t q = device::swizzled_tile(shared_tile, kAtomBytes, 16);
        const uint64_t k = device::swizzled_tile(
            shared_tile + kKTile + stage * (Config::kTileBytes / 16) + group * (Config::kColumns * kRowBytes / 16),
            kAtomBytes, 16);
        device::pin_registers(s);
        device::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            const int column = i % 4 * 32;
            device::WgmmaScores<T, Config::kColumns>::scores(s, q + (i / 4 * (Config::kRows * kRowBytes) + column) / 16,
                                                             k + (i / 4 * (Config::kKeys * kRowBytes) + column) / 16,
                                                             i != 0);
        }
        device::wgmma_commit();
        beside();
        device::wgmma_wait<0>();
        device::pin_registers(s);
    }

    // O += P V of this group's rows of a stage.
    __device__ __forceinline__ void multiply_values(uint32_t stage) {
        const uint64_t v = device::swizzled_tile(
            shared_tile + kVTile + stage * (Config::kTileBytes / 16) + group * (Config::kColumns * kRowBytes / 16),
            kAtomBytes, Config::kKeys * kRowBytes);
        device::pin_registers(o);
        device::wgmma_fence();
#pragma unroll
        for (int i = 0; i < Config::kOwnBoxes; ++i)
            device::Wgmma<T, kDim>::values(o, p[i], v + i * Config::kBox * kRowBytes / 16, true);
        device::wgmma_commit();
        device::wgmma_wait<0>();
        device::pin_registers(o);
    }

    // Where column i of this thread's (of two rows alike) lies behind the tile's first position, less what depends on
    // the thread.
    static __device__ __forceinline__ constexpr int token_of(int i) {
        return i / 4 * (Config::kGroups * Config::kBox) + i / 2 % 2 * 8 + i % 2;
    }
    __device__ __forceinline__ int32_t own_token() const { return group * Config::kBox + lane % 4 * 2; }

    // Scores of tokens that a row must not see become -inf; the tile has `tokens` from position `token` on.
    __device__ __forceinline__ void mask(int32_t token, int32_t tokens, uint32_t stage, bool any_flag) {
        if (token + tokens > min(limit[0], limit[1]) ||
            tokens < (Config::kBoxes - Config::kGroups + 1 + group) * Config::kBox) {
            const int32_t left[2] = {min(limit[0] - token, tokens) - own_token(),
                                     min(limit[1] - token, tokens) - own_token()};
#pragma unroll
            for (int i = 0; i < Config::kColumns / 2; ++i) {
                if (token_of(i / 4 * 2 + i % 2) >= left[i / 2 % 2]) s[i] = -INFINITY;
            }
        }
        if (any_flag || passes_lists) hide(token, stage);
    }

    // The rare part: broken pages, the hole, and listed tokens past a row's limit. All lanes of the warp.
    __device__ __forceinline__ void hide(int32_t token, uint32_t stage) {
        constexpr int kOwn = Config::kColumns / 4;  // columns of this thread
        constexpr int kEach = rows_of_gatherer<Config>();
        uint4 flags = make_uint4(0, 0, 0, 0);
        if (lane == at.rank) flags = shared.broken[stage][group];  // alone, as in any_flag
        flags.x = __shfl_sync(~0u, flags.x, at.rank);
        if (gathers(args)) {
            flags.y = __shfl_sync(~0u, flags.y, at.rank);
            flags.z = __shfl_sync(~0u, flags.z, at.rank);
            flags.w = __shfl_sync(~0u, flags.w, at.rank);
        }
        const int32_t* list = list_of(args, at.request, at.kv_head);
        const int32_t inside = (1 << args.list_shift) - 1;
        uint32_t hidden[2] = {0, 0};  // by row, a bit for each column
#pragma unroll 1
        for (int i = 0; i < kOwn; ++i) {
            const int32_t offset = own_token() + token_of(i), position = token + offset;
            bool hides = position >= piece.list_end && position < piece.hole_end;
            if (gathers(args)) {
                const int32_t row = row_of_token<Config>(offset) - group * Config::kColumns, from = row / kEach;
                const uint32_t word = from == 0 ? flags.x : from == 1 ? flags.y : from == 2 ? flags.z : flags.w;
                hides = hides || (word >> (row - from * kEach) & 1u) != 0;
            } else {
                hides = hides || (flags.x >> offset / Config::kBox & 1u) != 0;
            }
            const int32_t unit =
                passes_lists && position < piece.list_end ? list[position >> args.list_shift] : INT32_MIN;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const bool is_past = unit > (listed_limit[r] - 1 - (position & inside)) >> args.list_shift;
                hidden[r] |= (hides || is_past ? 1u : 0u) << i;
            }
        }
#pragma unroll
        for (int i = 0; i < Config::kColumns / 2; ++i) {
            if ((hidden[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1u) != 0) s[i] = -INFINITY;
        }
    }

    // P of this group's boxes, of which `boxes` are used. A base is rounded. From kRounded on an exponent that is not
    // could be far from 0 where it should be 0, so scores are rounded alike before they are held against it.
    __device__ __forceinline__ void exponentials(const float (&base)[2], int32_t boxes) {
        constexpr float kRounded = 16384.0f;
        float scale = args.scale_log2;
        if (__any_sync(~0u, fmaxf(fabsf(base[0]), fabsf(base[1])) >= kRounded)) {
#pragma unroll
            for (int i = 0; i < Config::kColumns / 2; ++i) s[i] *= scale;
            scale = 1.0f;
        }
#pragma unroll
        for (int i = 0; i < Config::kOwnBoxes; ++i) {
            if (i > 0 && i >= boxes) {
                p[i][0] = p[i][1] = p[i][2] = p[i][3] = 0;
                continue;
            }
#pragma unroll
            for (int j = 8 * i; j < 8 * i + 8; ++j) s[j] = device::exp2_fast(fmaf(s[j], scale, -base[j / 2 % 2]));
            sum[0] += (s[8 * i] + s[8 * i + 1]) + (s[8 * i + 4] + s[8 * i + 5]);
            sum[1] += (s[8 * i + 2] + s[8 * i + 3]) + (s[8 * i + 6] + s[8 * i + 7]);
#pragma unroll
            for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1], T());
        }
    }

    // Rows of V that no position reads hold anything, NaN included, and P = 0 does not silence NaN: those past the end
    // of the stream, and those of the hole.
    __device__ __forceinline__ void clear_values(uint32_t stage, int32_t token) {
        const int32_t box = 1 << args.box_shift;
        const int32_t hole = max(piece.list_end - token, 0), hole_end = min(piece.hole_end - token, piece.tile_tokens);
        if (hole < hole_end) clear_tokens(stage, hole, hole_end - hole);
        const int32_t end = piece.token_end - token;
        if (end < piece.tile_tokens && (end & box - 1) != 0) clear_tokens(stage, end, box - (end & box - 1));
    }

    // `tokens` tokens of a tile from token `first` of it on.
    __device__ __forceinline__ void clear_tokens(uint32_t stage, int32_t first, int32_t tokens) const {
#pragma unroll 1
        for (int32_t i = loader(); i < tokens * Config::kSpans * 8; i += Config::kConsumers) {
            const int32_t span = i / (tokens * 8), chunk = i - span * tokens * 8;
            const int32_t row = row_of_token<Config>(first + chunk / 8);
            device::store_shared(
                device::shared_address(shared.v[stage]) + (span * Config::kKeys + row) * kRowBytes + chunk % 8 * 16,
                make_uint4(0, 0, 0, 0));
        }
        device::fence_async_shared();
        device::named_barrier(kTailBarrier, Config::kConsumers);
    }

    __device__ __forceinline__ void release(uint64_t* empty) const {
        __syncwarp();
        const uint32_t barrier = device::shared_address(empty);
        if (lane == at.rank) {  // see any_flag
            device::mbarrier_arrive(barrier);
        } else if (shares(args) && lane < args.ctas) {
            device::mbarrier_arrive_cluster(barrier, at.split * args.ctas + lane);
        }
    }

    __device__ __forceinline__ void attend() {
        uint32_t stage = 0, parity = 0;
#pragma unroll 1
        for (int32_t token = piece.token_begin; token < piece.token_end; token += piece.tile_tokens) {
            const int32_t tokens = min(piece.token_end - token, piece.tile_tokens);
            device::mbarrier_wait(device::shared_address(&shared.full_k[stage]), parity);
            bool flag;
            multiply_keys(stage, [&] { flag = any_flag(stage); });
            mask(token, tokens, stage, flag);
            // Else nobody waits for it, and it could come to another CTA after that one's end.
            const bool releases = token + Config::kStages * piece.tile_tokens < piece.token_end;
            if (releases) release(&shared.empty_k[stage]);
            float highest[4];  // two of each row
#pragma unroll
            for (int i = 0; i < 4; ++i) highest[i] = fmaxf(s[2 * i], s[2 * i + 1]);
#pragma unroll
            for (int i = 8; i < Config::kColumns / 2; i += 2)
                highest[i / 2 % 4] = fmaxf(highest[i / 2 % 4], fmaxf(s[i], s[i + 1]));
            float base[2], shrink[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float most = fmaxf(highest[r], highest[r + 2]);
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                const float next = fmaxf(reference[r], most * args.scale_log2);
                base[r] = next == -INFINITY ? 0.0f : next;
                shrink[r] = device::exp2_fast(reference[r] - base[r]);
                reference[r] = next;
                sum[r] *= shrink[r];
            }
            exponentials(base, (tokens + Config::kBox - 1) / Config::kBox + 1 - group >> 1);
            if (token != piece.token_begin) {
#pragma unroll
                for (int i = 0; i < kDim / 2; ++i) o[i] *= shrink[i / 2 % 2];
            }
            device::mbarrier_wait(device::shared_address(&shared.full_v[stage]), parity);
            clear_values(stage, token);
            multiply_values(stage);
            if (releases) release(&shared.empty_v[stage]);
            stage ^= 1;
            if (stage == 0) parity ^= 1;
        }
    }

    // Adds up what the two groups have, and writes it down: the first group's threads have the upper of their rows, the
    // second's the lower. Nothing reads the ring any more.
    __device__ __forceinline__ void join() {
        constexpr int kValues = kDim / 16;  // float4 of a thread's row
        static_assert(2 * kValues * kWarpgroup * sizeof(float4) <= sizeof(shared.k), "rows lie in K's place");
        static_assert(Config::kRows * kRecord <= sizeof(shared.v), "records lie in V's place");
        device::named_barrier(kTailBarrier, Config::kConsumers);
        auto* values = reinterpret_cast<float4*>(shared.k[0]) + thread;
        const float all[2] = {device::quad_sum(sum[0]), device::quad_sum(sum[1])};
        const auto give = [&](int r) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                const float* from = o + 8 * i + 2 * r;
                values[(r * kValues + i) * kWarpgroup] = make_float4(from[0], from[1], from[4], from[5]);
            }
            if (lane % 4 == 0) shared.joined[row_in_cta() + 8 * r] = make_float2(reference[r], all[r]);
        };
        const auto take = [&](int r) {
            const float2 other = shared.joined[row_in_cta() + 8 * r];
            const float highest = fmaxf(reference[r], other.x);
            const float base = highest == -INFINITY ? 0.0f : highest;
            const float own = device::exp2_fast(reference[r] - base), share = device::exp2_fast(other.x - base);
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                float* to = o + 8 * i + 2 * r;
                const float4 x = values[(r * kValues + i) * kWarpgroup];
                to[0] = to[0] * own + x.x * share;
                to[1] = to[1] * own + x.y * share;
                to[4] = to[4] * own + x.z * share;
                to[5] = to[5] * own + x.w * share;
            }
            uint8_t* record = outgoing_of(shared) + (row_in_cta() + 8 * r) * kRecord;
            pack_row<kDim>(o, r, record);
            if (lane % 4 == 0)
                *reinterpret_cast<float4*>(record + 3 * kDim) =
                    make_float4(highest, all[r] * own + other.y * share, 0.0f, 0.0f);
        };
        if (group == 0) {
            give(1);
        } else {
            give(0);
        }
        device::named_barrier(kTailBarrier, Config::kConsumers);
        if (group == 0) {
            take(0);
        } else {
            take(1);
        }
        device::fence_async_shared();
    }

    // A warp's rows to their owners.
    __device__ __forceinline__ void send() const {
        const int32_t four = warp * 4 + group * 2 + lane, owner = owner_of(args, four);
        if (lane >= 2 || four * kFour >= valid || owner == at.split) return;
        const int32_t first = first_four(args, owner), fours = first_four(args, owner + 1) - first;
        const int32_t cta = owner * args.ctas + at.rank;
        const int32_t place = (at.split * fours + four - first) * kFour;
        device::copy_cluster_async(
            device::cluster_address(device::shared_address(shared.incoming + place * kRecord), cta),
            device::shared_address(outgoing_of(shared) + four * kFour * kRecord), kFour * kRecord,
            device::cluster_address(device::shared_address(&shared.merged), cta));
    }

    // One thread: what comes from other splits.
    __device__ __forceinline__ void expect() const {
        const int32_t others = piece.pieces - (at.split < piece.pieces ? 1 : 0);
        const int32_t used = (valid + kFour - 1) / kFour;
        const int32_t fours = min(first_four(args, at.split + 1), used) - min(first_four(args, at.split), used);
        device::mbarrier_arrive_expect(device::shared_address(&shared.merged), others * fours * (kFour * kRecord));
    }

    __device__ __forceinline__ void run() {
        start_q();
#pragma unroll
        for (float& x : o) x = 0.0f;
        reference[0] = reference[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
        finish_q();
        // Where the producers wait for the other CTAs before they ask for K, so do these before they wait for it: no
        // warp at that barrier then depends on one that is not there yet, whatever a tool makes of the barrier.
        if (shares(args)) device::cluster_wait();
        device::mbarrier_wait(device::shared_address(&shared.full_k[0]), 0);
        start_piece();
        if (thread == 0 && group == 0) expect();
        const bool any = piece.token_begin < piece.token_end;
        if (any) {
            attend();
            join();
        }
        __syncwarp();
        if (!shares(args) && in_cluster(args)) device::cluster_wait();
        if (any) send();
        __syncwarp();
    }
};

// The rows that a warp of consumers writes down in `join`.
constexpr int kJoinedRows = 8;
__device__ __forceinline__ int32_t first_joined(int32_t warp, int32_t group) {
    return (warp * 2 + group) * kJoinedRows;
}

// --- The sum of pieces: all warps ------------------------------------------------------------------------------------

template <typename Config>
struct ShortListMerge {
    using T = typename Config::T;
    static constexpr int kDim = Config::kDim;
    static constexpr int kRecord = Config::kRecord;
    static constexpr int kOwn = 4;     // elements of a lane
    static constexpr int kAtOnce = 4;  // pieces
    static constexpr int kHalf = kWarp / 2;

    const AttentionArgs& args;
    const ShortListShared<Config>& shared;
    const ShortListPlace& at;
    const int32_t lane;
    const int32_t first, slice;  // rows of this CTA that its split owns
    const int32_t first_row;     // of the slice, in the stream
    const int32_t rows;          // of the slice that are rows of the stream

    __device__ __forceinline__ ShortListMerge(const AttentionArgs& a, const ShortListPlace& place,
                                              const ShortListShared<Config>& sh)
        : args(a),
          shared(sh),
          at(place),
          lane(threadIdx.x % kWarp),
          first(first_four(a, place.split) * kFour),
          slice(first_four(a, place.split + 1) * kFour - first),
          first_row(place.first_row(a) + first),
          rows(min(max(a.rows - first_row, 0), slice)) {}

    // Two rows of a warp at once: half of its lanes find what the pieces of a row count, all of them add up.
    struct Pair {
        int32_t rows[2];  // of the slice; the second may be the first again
        bool has_second;
        uint32_t* out[2];
        float* lse;  // of this lane's half
    };

    __device__ __forceinline__ Pair pair_at(int32_t row) const {
        Pair pair;
        pair.rows[0] = row;
        pair.has_second = row + 1 < rows;
        pair.rows[1] = pair.has_second ? row + 1 : row;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t r = first_row + pair.rows[i], query = query_of(args, r);
            const int64_t head = at.kv_head * args.group + r - query * args.group;
            pair.out[i] = static_cast<uint32_t*>(args.out) +
                          (((int64_t{at.request} * args.num_queries + query) * args.num_heads + head) * kDim +
                           packed_column(lane)) /
                              2;
            if (lane / kHalf == i)
                pair.lse = args.lse + (int64_t{at.request} * args.num_heads + head) * args.num_queries + query;
        }
        return pair;
    }

    // out and lse of this CTA's slice. `wait` returns when all records that this warp reads are there.
    template <typename WaitT>
    __device__ __forceinline__ void finish(const WaitT& wait) const {
        constexpr int32_t kWarps = kWarpgroup / kWarp;  // of a warpgroup
        const int32_t warp = threadIdx.x / kWarp;
        int32_t row = warp * 2, end = rows, step = Config::kThreads / kWarp * 2;
        if (args.splits == 1) {
            row = warp < kWarps ? rows : first_joined(warp % kWarps, warp / kWarps - 1);
            end = min(row + kJoinedRows, rows);
            step = 2;
        }
        Pair pair = pair_at(row);
        wait();
        const int32_t pieces = shared.piece.pieces;
        while (row < end) {
            add_up(pair, pieces);
            row += step;
            if (row < end) pair = pair_at(row);
        }
    }

    __device__ __forceinline__ void add_up(const Pair& pair, int32_t pieces) const {
        const int32_t half = lane / kHalf, own = lane % kHalf;
        const auto record_of = [&](int32_t split, int32_t row) {
            return device::shared_address(split == at.split ? outgoing_of(shared) : shared.incoming) +
                   ((split == at.split ? first : split * slice) + row) * kRecord;
        };
        float2 stats = make_float2(-INFINITY, 0.0f);
        if (own < pieces)
            stats = device::load_shared_2(record_of(own, half == 0 ? pair.rows[0] : pair.rows[1]) + 3 * kDim);
        float highest = stats.x;
#pragma unroll
        for (int step = kHalf / 2; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
        const float base = highest == -INFINITY ? 0.0f : highest;
        float weight = device::exp2_fast(stats.x - base);
        float all = weight * stats.y;
#pragma unroll
        for (int step = kHalf / 2; step > 0; step /= 2) all += __shfl_xor_sync(~0u, all, step);
        weight *= all == 0.0f ? 0.0f : __fdividef(1.0f, all);  // NaN stays
        if (own == 0 && (half == 0 || pair.has_second))
            *pair.lse = (all == 0.0f ? -INFINITY : base + device::log2_fast(all)) * kLn2;
        float result[2][kOwn] = {};
        for (int32_t i = 0; i < pieces; i += kAtOnce) {
            PackedElements elements[kAtOnce][2];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int32_t split = min(i + j, pieces - 1);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    elements[j][r].load_shared(record_of(split, pair.rows[r]), kDim, lane % (kDim / kOwn));
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const float shares[2] = {__shfl_sync(~0u, weight, i + j & kHalf - 1),
                                         __shfl_sync(~0u, weight, kHalf + (i + j & kHalf - 1))};
                if (i + j >= pieces) continue;
                elements[j][0].add_to(result[0], shares[0]);
                elements[j][1].add_to(result[1], shares[1]);
            }
        }
        if (lane * kOwn >= kDim) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (r == 1 && !pair.has_second) continue;
            pair.out[r][0] = pack(result[r][0], result[r][1], T());
            pair.out[r][4] = pack(result[r][2], result[r][3], T());
        }
    }
};

// Before the launches ahead are known to be complete: brings what the CTA will need into L2, by the guess that its list
// is full, so that lengths, lists, pages and Q are not waited for one after the other.
template <typename Config>
__device__ __forceinline__ void prefetch_short(const AttentionArgs& args, const ShortListPlace& at,
                                               const ShortPiece& guess) {
    constexpr int32_t kEntries = 32;                            // of a line
    constexpr int32_t kLines = (Config::kDim * 2 + 127) / 128;  // of a row of Q
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (threadIdx.x >= kWarpgroup) {
        const int32_t line = threadIdx.x - kWarpgroup, row = at.first_row(args) + line / kLines;
        if (row >= args.rows || line >= Config::kRows * kLines) return;
        const int32_t query = query_of(args, row);
        device::prefetch_l2(
            static_cast<const uint16_t*>(args.q) + at.request * args.stride_q_request + query * args.stride_q_query +
            (int64_t{at.kv_head} * args.group + row - query * args.group) * args.stride_q_head + line % kLines * 64);
    } else if (warp >= 2) {  // all pages: those of the entries are not known
        const int32_t entry = (threadIdx.x - 2 * kWarp) * kEntries;
        if (entry << args.page_shift < args.max_seq_len)
            device::prefetch_l2(args.block_table + at.request * args.stride_table + entry);
    } else if (warp == 1) {
        const int32_t entry = (guess.token_begin >> args.list_shift) + lane * kEntries;
        if (entry < args.capacity && entry << args.list_shift < guess.token_end)
            device::prefetch_l2(list_of(args, at.request, at.kv_head) + entry);
    } else if (lane == 1) {
        device::prefetch_l2(args.counts + at.request * args.num_kv_heads + at.kv_head);
        device::prefetch_l2(args.tail_start + at.request);
        device::prefetch_l2(args.seq_lens + at.request);
    }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    mage_block_attention_short_list_kernel(const __grid_constant__ AttentionArgs args,
                                           const __grid_constant__ CUtensorMap k_map,
                                           const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ uint8_t raw_shared[];
    auto& shared =
        *reinterpret_cast<ShortListShared<Config>*>(raw_shared + (-device::shared_address(raw_shared) & 1023));
    const int32_t warp = threadIdx.x / kWarp;
    const ShortListPlace at(args);
    if (threadIdx.x == 0) {
        const uint32_t releases = Config::kConsumers / kWarp * (shares(args) ? args.ctas : 1);
        const uint32_t fills = gathers(args) ? kWarpgroup / kWarp : 1;
#pragma unroll
        for (int i = 0; i < Config::kStages; ++i) {
            device::mbarrier_init(device::shared_address(&shared.full_k[i]), fills);
            device::mbarrier_init(device::shared_address(&shared.full_v[i]), fills);
            device::mbarrier_init(device::shared_address(&shared.empty_k[i]), releases);
            device::mbarrier_init(device::shared_address(&shared.empty_v[i]), releases);
        }
        device::mbarrier_init(device::shared_address(&shared.merged), 1);
        device::mbarrier_init_fence();
    }
    if (threadIdx.x == kWarp) {
        device::prefetch_tensor_map(&k_map);
        device::prefetch_tensor_map(&v_map);
    }
    const ShortPiece guess = guess_piece<Config>(args, at);
    prefetch_short<Config>(args, at, guess);
    __syncthreads();
    // In a launch without clusters the wait would be a barrier of all warps of the CTA, which must be one instruction.
    if (in_cluster(args)) device::cluster_arrive_relaxed();
    device::dependency_wait();
    device::dependency_release();
    if (warp >= kWarpgroup / kWarp) {
        ShortListConsumer<Config>(args, at, shared).run();
    } else if (gathers(args)) {
        gather_short<Config>(args, at, shared);
    } else if (warp / 2 < Config::kSpans) {
        produce_short<Config>(args, at, guess, &k_map, &v_map, shared);
    } else if (in_cluster(args)) {
        device::cluster_wait();
    }
    __syncwarp();
    ShortListMerge<Config>(args, at, shared).finish([&] {
        if (args.splits != 1) {
            __syncthreads();  // the records of this CTA are written
            device::mbarrier_wait(device::shared_address(&shared.merged), 0);
        }
        // What others have of this CTA's rows has come: its own are where they belong once all can say so.
        __syncwarp();
        if (in_cluster(args)) device::cluster_arrive_relaxed();
    });
    __syncwarp();
    if (in_cluster(args)) device::cluster_wait();
}

}  // namespace mage::cuda
