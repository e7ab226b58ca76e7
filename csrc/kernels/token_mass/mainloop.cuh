#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/attention_schedule.h"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/math.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "kernels/token_mass/arguments.h"

// Purpose   mass[t] = mean, maximum or list over rows r of exp(scale q[r] . k[t] - lse[r]); mage/token_mass.h.
// Schedule  persistent workers (core/token_mass_plan.h), one CTA each: two warpgroups that take every other tile of 64
//           tokens, and one whose warp 0 feeds a ring of K tiles by TMA, and whose others load the rows of the next
//           piece (q, lse, limits) while this one is worked on, and at last fill what lies past the last tokens.
//             per tile:  S = K Q^T     tensor cores; tokens are the 64 rows of S, the call's rows its columns
//                        2^(scale S - lse), added over a thread's own columns and then over four lanes
//           Beyond 128 columns S comes in two halves: the product of one runs while the exponentials of the other do.
//           No sum leaves a quad, so a token's mass does not depend on who has its tile. More than 256 rows go through
//           in chunks, each over a short run of tiles: the thread that stored a token's sum finds it again and adds.
// Memory    rows x D of Q twice, kStages x (64 tokens x D), in the 128-byte swizzle; S and each column's lse, or its
//           sum over the tokens, in registers.
// Sync      full_k[stage]: the producer's expectation and the copies' bytes. empty_k[stage]: the warps of the warpgroup
//           that has the tile; the producer waits for it, and the other warpgroup where it may have the stage next.
//           full_q[buffer]: the loaders. empty_q[buffer]: all consumers. Named barriers: the loaders (all rows are
//           there); the same and the consumers, which bring those of the first piece; the consumers (sums of all warps
//           are there, and read).
// Ceiling   max(bytes of K / HBM, 2 * rows padded to 64, 128, 192, 224 or 256 * D * tokens / tensor cores, rows *
//           tokens / 16 exponentials per clock and multiprocessor); NOTES.md has the numbers.
namespace mage::cuda {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kLoaders = 3 * kWarp;
constexpr int kTile = core::kMassTile;
constexpr int kSpan = 64;  // elements of a swizzled row of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kAtomBytes = 8 * kRowBytes;
constexpr int kLoaderBarrier = 1, kConsumerBarrier = 2, kFirstBarrier = 3;
constexpr int kRunTiles = 16;  // of a piece where it is walked once per chunk: K then comes from L2 the next time
constexpr int kFillFloats = 4096;
constexpr int kLine = 128;   // bytes, of L2
constexpr int kSharers = 4;  // CTAs that bring the Q of a stream into L2
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168, "a CTA shares what its 384 threads start with");
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <typename T_, int kDim_, int kRows_>
struct TokenMassConfig {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kRows = kRows_;  // columns of S
    static constexpr int kSpans = kDim / kSpan;
    static constexpr int kTileBytes = kTile * kDim * 2;
    static constexpr int kQBytes = kRows * kDim * 2;
    // What two Qs and the numbers of the rows leave of 227 KB, up to 128 KB.
    static constexpr int kFree = 232448 - 2048 - 2 * kQBytes - (2 * 2 + kConsumers / kWarp) * kRows * 4;
    static constexpr int kStages = kFree < 131072 ? kFree / kTileBytes : 131072 / kTileBytes;
};

// Where a warp is in its worker's tiles; `at` is the first that no piece has had.
struct Walk {
    int32_t at, end;
    int32_t request, request_begin;
    int32_t tiles;  // of each stream of the request
};

struct Range {
    int32_t request, kv_head;
    int32_t first, count;  // tiles of the stream
    bool begins;           // the worker's part of the stream
};

// What consumers know of a piece: a range of tiles and a chunk of rows.
struct Piece {
    int32_t tiles;
    bool last;  // of the worker
    int32_t first_tile, stream;
    int32_t first_row, rows;
    float factor;                     // of a finished sum
    int32_t least[kLoaders / kWarp];  // limits of all rows are at least the smallest one
    int32_t slot;                     // of the sums over tokens
    bool adds;                        // to what is in that slot
};

// A warp's walk and the range at hand; in shared memory, to spare registers.
struct Walker {
    Walk walk;
    Range range;
};

struct Start {
    Walker first;
    bool any;  // a tile; else there is no first range
    int32_t total, workers;
    int32_t own_workers;  // of each stream; 0: the tiles of all streams are cut evenly
};

template <typename Config>
struct alignas(1024) TokenMassShared {
    uint8_t q[2][Config::kQBytes];
    uint8_t k[Config::kStages][Config::kTileBytes];
    float negative_lse[2][Config::kRows];  // in log2; -inf: the row gives nothing
    int32_t limits[2][Config::kRows];      // tokens that the row may see
    float totals[kConsumers / kWarp][Config::kRows];
    uint2 valid[Config::kStages];  // bit i: token i of the tile counts
    uint64_t full_k[Config::kStages], empty_k[Config::kStages];
    uint64_t full_q[2], empty_q[2];
    Piece pieces[2];
    Start start;
    Walker walkers[1 + kLoaders / kWarp];
};

// Tokens of a request that count.
__device__ __forceinline__ int32_t end_of(const TokenMassArgs& args, int32_t request) {
    const int32_t seq_len = min(max(args.seq_lens[request], 0), args.max_seq_len);
    return args.prefix_lens == nullptr ? seq_len : min(max(args.prefix_lens[request], 0), seq_len);
}

__device__ __forceinline__ int32_t tiles_of(const TokenMassArgs& args, int32_t request) {
    return args.units != nullptr ? args.list_tiles : (end_of(args, request) + kTile - 1) / kTile;
}

// The token in place `at` of a stream, -1 where there is none.
__device__ __forceinline__ int32_t token_at(const TokenMassArgs& args, int32_t stream, int32_t at) {
    if (args.units == nullptr) return at;
    const int32_t candidate = at >> args.unit_shift;
    if (candidate >= args.num_candidates) return -1;
    const int32_t unit = args.units[int64_t{stream} * args.num_candidates + candidate];
    if (unit < 0 || unit > args.max_seq_len >> args.unit_shift) return -1;
    return (unit << args.unit_shift) + (at & ((1 << args.unit_shift) - 1));
}

// Row / G by a multiplication: exact for rows below 2^32 / G.
__device__ __forceinline__ int32_t query_of(const TokenMassArgs& args, int32_t row) {
    return args.group == 1 ? row : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(row), args.group_reciprocal));
}

__device__ __forceinline__ int32_t warp_sum(int32_t value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ __forceinline__ float quad_max(float x) {
    x = device::max_or_nan(x, __shfl_xor_sync(~0u, x, 1));
    return device::max_or_nan(x, __shfl_xor_sync(~0u, x, 2));
}

// The next range of a walk that is not at its end.
__device__ __forceinline__ Range take_range(const TokenMassArgs& args, Walk* walk) {
    while (walk->at >= walk->request_begin + walk->tiles * args.num_kv_heads) {
        walk->request_begin += walk->tiles * args.num_kv_heads;
        walk->tiles = tiles_of(args, ++walk->request);
    }
    const int32_t offset = walk->at - walk->request_begin;
    Range range;
    range.request = walk->request;
    range.kv_head = offset / walk->tiles;
    range.first = offset - range.kv_head * walk->tiles;
    range.count = min(walk->tiles - range.first, walk->end - walk->at);
    if (args.chunks > 1) range.count = min(range.count, kRunTiles);
    range.begins = true;
    walk->at += range.count;
    return range;
}

// Of a worker whose tiles are all of one stream, as are those of the others.
__device__ __forceinline__ void find_own(const TokenMassArgs& args, int32_t tiles, int32_t own_workers, Walk* walk,
                                         Range* range) {
    const int32_t worker = blockIdx.x, stream = worker / own_workers, part = worker - stream * own_workers;
    if (stream >= args.num_requests * args.num_kv_heads) return;
    const int32_t first = core::first_unit(tiles, own_workers, part);
    const int32_t last = core::first_unit(tiles, own_workers, part + 1);
    const int32_t request = args.num_requests == 1 ? 0 : stream / args.num_kv_heads;
    const int32_t count = args.chunks > 1 ? min(last - first, kRunTiles) : last - first;
    *walk = {stream * tiles + first + count, stream * tiles + last, request, request * args.num_kv_heads * tiles,
             tiles};
    *range = {request, stream - request * args.num_kv_heads, first, count, true};
}

// Finds the tiles of this CTA; one warp.
__device__ __forceinline__ void find_start(const TokenMassArgs& args, Start* start) {
    const int32_t lane = threadIdx.x % kWarp, worker = blockIdx.x;
    const int32_t streams = args.num_requests * args.num_kv_heads;
    Walk walk = {0, 0, 0, 0, 0};
    Range range = {0, 0, 0, 0, false};
    int32_t total = 0, own_workers = 0;
    if (args.alike) {
        walk.tiles = tiles_of(args, 0);
        total = walk.tiles * streams;
        own_workers = own_workers_of(walk.tiles, streams, args.stream_workers, gridDim.x);
    } else {
        for (int32_t b = lane; b < args.num_requests; b += kWarp) total += tiles_of(args, b);
        total = warp_sum(total) * args.num_kv_heads;
    }
    const int32_t workers = own_workers > 0 ? own_workers * streams : min(static_cast<int32_t>(gridDim.x), total);
    if (own_workers > 0) {
        find_own(args, walk.tiles, own_workers, &walk, &range);
    } else if (worker < workers) {
        walk.at = core::first_unit(total, workers, worker);
        walk.end = core::first_unit(total, workers, worker + 1);
        for (int32_t base = 0; !args.alike && base < args.num_requests; base += kWarp) {
            const int32_t b = base + lane;
            const int32_t own = b < args.num_requests ? tiles_of(args, b) * args.num_kv_heads : 0;
            int32_t sum = own;
#pragma unroll
            for (int step = 1; step < kWarp; step *= 2) {
                const int32_t other = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += other;
            }
            const uint32_t past = __ballot_sync(~0u, walk.request_begin + sum > walk.at);
            if (past != 0) {
                const int32_t found = __ffs(past) - 1;
                walk.request = base + found;
                walk.request_begin += __shfl_sync(~0u, sum - own, found);
                walk.tiles = tiles_of(args, walk.request);
                break;
            }
            walk.request_begin += __shfl_sync(~0u, sum, kWarp - 1);
        }
        if (args.alike) {
            walk.request = walk.at / (walk.tiles * args.num_kv_heads);
            walk.request_begin = walk.request * walk.tiles * args.num_kv_heads;
        }
        range = take_range(args, &walk);
    }
    if (lane == 0) *start = {{walk, range}, range.count > 0, total, workers, own_workers};
}

// Goes on to the next range of a walk, if the worker has one more; one warp. `start` is given before the first one.
__device__ __forceinline__ bool next_range(const TokenMassArgs& args, const Start* start, Walker* walker) {
    Walk walk;
    Range range;
    if (start != nullptr) {
        if (!start->any) return false;
        walk = start->first.walk;
        range = start->first.range;
    } else {
        walk = walker->walk;
        if (walk.at >= walk.end) return false;
        range = take_range(args, &walk);
        range.begins = range.request != walker->range.request || range.kv_head != walker->range.kv_head;
    }
    __syncwarp();  // all lanes have read
    if (threadIdx.x % kWarp == 0) *walker = {walk, range};
    __syncwarp();
    return true;
}

// What this CTA reads first if all requests are max_seq_len long is brought into L2, by all warps but the first.
// Nothing is read: launches before may still be writing it. CTAs of a stream share the lines of Q.
template <typename Config>
__device__ __forceinline__ void prefetch_first(const TokenMassArgs& args) {
    const int32_t thread = threadIdx.x - kWarp, worker = blockIdx.x, streams = args.num_requests * args.num_kv_heads;
    if (thread < 0) return;
    int32_t stream, first, end;
    if (args.guess_workers > 0) {
        stream = worker / args.guess_workers;
        const int32_t part = worker - stream * args.guess_workers;
        first = core::first_unit(args.guess_tiles, args.guess_workers, part);
        end = core::first_unit(args.guess_tiles, args.guess_workers, part + 1);
    } else {
        const int32_t at = core::first_unit(args.guess_tiles * streams, gridDim.x, worker);
        stream = at / args.guess_tiles;
        first = at - stream * args.guess_tiles;
        end = first + core::first_unit(args.guess_tiles * streams, gridDim.x, worker + 1) - at;
    }
    if (stream >= streams) return;
    end = min(end, args.guess_tiles);
    const int32_t request = stream / args.num_kv_heads, head = (stream - request * args.num_kv_heads) * args.group;
    constexpr int32_t kNumbers = kLine / 4;  // of 4 bytes in a line
    if (thread < kLoaders) {
        const int32_t* table = args.block_table + request * args.stride_table;
        if (args.units == nullptr) {
            const int32_t last = min(end * kTile, args.max_seq_len) - 1;
            const int32_t page = (first * kTile >> args.page_shift) + thread * kNumbers;
            if (page <= last >> args.page_shift) device::prefetch_l2(table + page);
        } else {  // its candidates, and all pages: those of the candidates are not known
            const int32_t last = min((end * kTile - 1) >> args.unit_shift, args.num_candidates - 1);
            const int32_t candidate = (first * kTile >> args.unit_shift) + thread * kNumbers;
            if (candidate <= last) device::prefetch_l2(args.units + int64_t{stream} * args.num_candidates + candidate);
            if (int64_t{thread} * kNumbers << args.page_shift < args.max_seq_len)
                device::prefetch_l2(table + thread * kNumbers);
        }
        const int64_t queries = int64_t{request} * args.num_queries;
        if (thread * kNumbers < args.rows) {
            device::prefetch_l2(args.lse + (int64_t{request} * args.num_heads + head) * args.num_queries +
                                thread * kNumbers);
        }
        if (args.kv_lens != nullptr && thread * kNumbers < args.num_queries)
            device::prefetch_l2(args.kv_lens + queries + thread * kNumbers);
        if (args.row_mask != nullptr && thread * kLine < args.num_queries)
            device::prefetch_l2(args.row_mask + queries + thread * kLine);
    } else {
        constexpr int32_t kLines = Config::kDim * 2 / kLine;  // of a row
        const int32_t rows = min(args.chunk_rows, args.rows);
        for (int32_t i = (thread - kLoaders) * kSharers + worker % kSharers; i < rows * kLines;
             i += kConsumers * kSharers) {
            const int32_t row = i / kLines, query = query_of(args, row);
            device::prefetch_l2(static_cast<const uint16_t*>(args.q) + request * args.stride_q_request +
                                query * args.stride_q_query + (head + row - query * args.group) * args.stride_q_head +
                                i % kLines * (kLine / 2));
        }
    }
}

// Bits [0, count), for any count.
__device__ __forceinline__ uint32_t low_bits(int32_t count) {
    return count <= 0 ? 0u : count >= kWarp ? ~0u : (1u << count) - 1;
}

// Position in the ring: a stage and the parity of its current round.
template <int kStages>
struct Ring {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// --- Producer: one warp ----------------------------------------------------------------------------------------------

// Tokens that lie one behind the other in a page; one whose page is outside the pool has count 0.
struct Box {
    int32_t token, page, count;
};

template <typename Config>
struct Producer {
    const TokenMassArgs& args;
    const CUtensorMap* map;
    TokenMassShared<Config>& shared;
    const int32_t lane = threadIdx.x % kWarp;
    Walker& walker;
    const Range& range;
    Ring<Config::kStages> ring;
    int32_t end = 0;

    __device__ __forceinline__ Producer(const TokenMassArgs& a, const CUtensorMap* m, TokenMassShared<Config>& s)
        : args(a), map(m), shared(s), walker(s.walkers[0]), range(walker.range) {}

    __device__ __forceinline__ int32_t stream() const { return range.request * args.num_kv_heads + range.kv_head; }

    // The page is not looked at yet, so that nothing waits for it.
    __device__ __forceinline__ Box find(int32_t at) const {
        Box box = {-1, -1, 0};
        if (at < (range.first + range.count) * kTile) box.token = token_at(args, stream(), at);
        if (box.token < 0 || box.token >= end) return box;
        box.count = min(end - box.token, 1 << args.box_shift);
        box.page = args.block_table[range.request * args.stride_table + (box.token >> args.page_shift)];
        return box;
    }

    // A box past the pool arrives as zeros.
    __device__ __forceinline__ void check(Box* box) const {
        if (box->page >= 0 && box->page < args.num_pages) return;
        box->page = static_cast<int32_t>(max(args.num_pages, int64_t{1}));
        box->count = 0;
    }

    __device__ __forceinline__ void copy(int32_t token, int32_t page, int32_t box, int32_t span) const {
        const device::BoxStart start = {span * kSpan, token & ((1 << args.page_shift) - 1), range.kv_head, page};
        const uint32_t to = device::shared_address(shared.k[ring.stage]) + span * (kTile * kRowBytes) +
                            box * (kRowBytes << args.box_shift);
        device::copy_box(map, to, device::shared_address(&shared.full_k[ring.stage]), start,
                         args.chunks == 1 ? device::kEvictFirst : device::kEvictNormal);
    }

    __device__ __forceinline__ void begin_tile(uint32_t valid_low, uint32_t valid_high) const {
        device::mbarrier_wait(device::shared_address(&shared.empty_k[ring.stage]), ring.parity ^ 1);
        if (lane == 0) {
            shared.valid[ring.stage] = make_uint2(valid_low, valid_high);
            device::mbarrier_arrive_expect(device::shared_address(&shared.full_k[ring.stage]), Config::kTileBytes);
        }
        __syncwarp();
    }

    // A tile of at most 4 boxes: the warp finds 32 boxes ahead, one per lane.
    __device__ __forceinline__ void fill_by_boxes() {
        const int32_t boxes = kTile >> args.box_shift, per_batch = kWarp / boxes;
        const int32_t own_box = lane % boxes, own_tile = lane / boxes;
        Box next = find(range.first * kTile + (lane << args.box_shift));
        for (int32_t base = 0; base < range.count; base += per_batch) {
            Box own = next;
            next = find((range.first + base + per_batch) * kTile + (lane << args.box_shift));
            check(&own);
            // Bits of the tile that are this box's, in the word that they belong to; a box of 64 has both words.
            const int32_t place = (own_box << args.box_shift) % kWarp;
            const uint32_t first = low_bits(own.count) << place, second = low_bits(own.count - kWarp);
            const bool is_low = own_box << args.box_shift < kWarp;
            const int32_t tiles = min(per_batch, range.count - base);
            for (int32_t tile = 0; tile < tiles; ++tile) {
                const bool in_tile = own_tile == tile;
                const uint32_t low = __reduce_or_sync(~0u, in_tile && is_low ? first : 0u);
                const uint32_t high = __reduce_or_sync(~0u, in_tile ? is_low ? second : first : 0u);
                const int32_t from = tile * boxes + own_box;
                const int32_t token = __shfl_sync(~0u, own.token, from), page = __shfl_sync(~0u, own.page, from);
                begin_tile(low, high);
                if (own_tile < Config::kSpans) copy(token, page, own_box, own_tile);
                ring.advance();
            }
        }
    }

    // A tile of 64 boxes of one token: two to a lane, found one tile ahead.
    __device__ __forceinline__ void fill_by_tokens() {
        Box next[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) next[i] = find(range.first * kTile + i * kWarp + lane);
        for (int32_t tile = 0; tile < range.count; ++tile) {
            Box own[2] = {next[0], next[1]};
#pragma unroll
            for (int i = 0; i < 2; ++i) next[i] = find((range.first + tile + 1) * kTile + i * kWarp + lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) check(&own[i]);
            begin_tile(__ballot_sync(~0u, own[0].count != 0), __ballot_sync(~0u, own[1].count != 0));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int span = 0; span < Config::kSpans; ++span)
                    copy(own[i].token, own[i].page, i * kWarp + lane, span);
            }
            ring.advance();
        }
    }

    __device__ __forceinline__ void run() {
        for (const Start* start = &shared.start; next_range(args, start, &walker); start = nullptr) {
            end = end_of(args, range.request);
            for (int32_t chunk = 0; chunk < args.chunks; ++chunk) {
                if (args.box_shift == 0) {
                    fill_by_tokens();
                } else {
                    fill_by_boxes();
                }
            }
        }
    }
};

// --- Loaders: three warps that bring the rows of each piece ----------------------------------------------------------

// Asks for rows of a stream, by kAskers threads; those past the last are zeros.
template <typename Config, int kAskers>
__device__ __forceinline__ void ask_for_q(const TokenMassArgs& args, const uint8_t* q, const Range& range,
                                          int32_t chunk, int32_t thread) {
    using T = typename Config::T;
    constexpr int kRows = Config::kRows, kChunks = Config::kDim / 8;  // of 16 bytes in a row
    const int32_t first_row = chunk * args.chunk_rows, rows = min(args.chunk_rows, args.rows - first_row);
    const int32_t part = thread % kChunks;
    const T* base = static_cast<const T*>(args.q) + range.request * args.stride_q_request +
                    int64_t{range.kv_head} * args.group * args.stride_q_head + part * 8;
    const uint32_t to = device::shared_address(q) + part / 8 * (kRows * kRowBytes);
#pragma unroll 4
    for (int32_t i = thread / kChunks; i < kRows; i += kAskers / kChunks) {
        const int32_t row = i < rows ? first_row + i : first_row, query = query_of(args, row);
        const T* from = base + query * args.stride_q_query + (row - query * args.group) * args.stride_q_head;
        device::copy_16_bytes(to + i * kRowBytes + ((part % 8) ^ (i % 8)) * 16, from, i < rows ? 16 : 0);
    }
}

// Tokens past those that count have mass 0, or -inf as a logarithm. Their last tile is the consumers'.
__device__ __forceinline__ void fill_rest(const TokenMassArgs& args) {
    if (args.mode == MassMode::kTotals || args.units != nullptr) return;
    const int32_t lane = threadIdx.x % kWarp;
    const int64_t width = args.mode == MassMode::kRows ? args.rows : 1;
    const float value = args.mode == MassMode::kRows ? -INFINITY : 0.0f;
    const int64_t stream_floats = args.length * width;
    const int64_t per_stream = (stream_floats + kFillFloats - 1) / kFillFloats;
    const int64_t total = per_stream * args.num_requests * args.num_kv_heads;
    const int32_t warps = kLoaders / kWarp;
    for (int64_t i = blockIdx.x * warps + threadIdx.x / kWarp - 1; i < total; i += gridDim.x * warps) {
        const int64_t stream = i / per_stream, at = (i - stream * per_stream) * kFillFloats;
        const auto request = static_cast<int32_t>(stream / args.num_kv_heads);
        const int64_t walked = int64_t{tiles_of(args, request)} * kTile * width;
        const int64_t count = min(at + kFillFloats, stream_floats) - max(at, walked);
        if (count <= 0) continue;
        float* to = args.mass + stream * stream_floats + max(at, walked);
        const auto head = min(count, static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(to) % 16) % 16 / 4));
        if (lane < head) to[lane] = value;
        const auto vectors = static_cast<int32_t>((count - head) / 4);
        float4* aligned = reinterpret_cast<float4*>(to + head);
        for (int32_t j = lane; j < vectors; j += kWarp) aligned[j] = make_float4(value, value, value, value);
        const auto tail = static_cast<int32_t>(count - head - 4 * vectors);
        if (lane < tail) to[count - tail + lane] = value;
    }
}

template <typename Config>
struct Loader {
    static constexpr int kRows = Config::kRows;
    static constexpr int kChunks = Config::kDim / 8;  // of 16 bytes in a row

    const TokenMassArgs& args;
    TokenMassShared<Config>& shared;
    const int32_t thread = threadIdx.x - kWarp, lane = threadIdx.x % kWarp;
    uint32_t count = 0;  // of pieces

    __device__ __forceinline__ Loader(const TokenMassArgs& a, TokenMassShared<Config>& s) : args(a), shared(s) {}

    __device__ __forceinline__ void wait_for_room() const {
        device::mbarrier_wait(device::shared_address(&shared.empty_q[count % 2]), (count / 2 % 2) ^ 1);
    }
    __device__ __forceinline__ void publish() {
        device::mbarrier_arrive(device::shared_address(&shared.full_q[count % 2]));
        ++count;
    }

    // A row's sum over all tokens that count, of the slots in their order.
    __device__ __forceinline__ float total_of(int32_t stream, const StreamParts& parts, int32_t row) const {
        constexpr int kAhead = 4;
        const float* from = args.totals + int64_t{stream + parts.worker} * args.stride_totals + row;
        float total = 0.0f;
#pragma unroll 1
        for (int32_t base = 0; base < parts.count; base += kAhead) {
            float values[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                values[i] = base + i < parts.count ? __ldcg(from + (base + i) * args.stride_totals) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) total += values[i];
        }
        return total;
    }

    // lse and limits of the rows, and the smallest limit that this warp has seen.
    __device__ __forceinline__ int32_t load_numbers(const Range& range, int32_t first_row, int32_t rows,
                                                    const StreamParts& parts) const {
        float* numbers = shared.negative_lse[count % 2];
        int32_t least = INT32_MAX;
#pragma unroll
        for (int32_t i = thread; i < kRows; i += kLoaders) {
            float negative = -INFINITY;
            int32_t limit = INT32_MAX;
            if (i < rows) {
                const int32_t row = first_row + i, query = query_of(args, row);
                const int32_t head = range.kv_head * args.group + row - query * args.group;
                const int64_t position = int64_t{range.request} * args.num_queries + query;
                const float lse = args.lse[(int64_t{range.request} * args.num_heads + head) * args.num_queries + query];
                const bool counts = args.row_mask == nullptr || args.row_mask[position];
                if (counts && lse != -INFINITY) negative = -lse * kLog2E;
                if (args.kv_lens != nullptr) limit = args.kv_lens[position];
            }
            numbers[i] = negative;
            shared.limits[count % 2][i] = limit;
            least = min(least, limit);
        }
        if (args.divides) {
            const int32_t stream = range.request * args.num_kv_heads + range.kv_head;
#pragma unroll 1
            for (int32_t i = thread; i < rows; i += kLoaders) {
                const float total = total_of(stream, parts, first_row + i);
                numbers[i] = total == 0.0f ? -INFINITY : numbers[i] - log2f(total);
            }
        }
        return __reduce_min_sync(~0u, least);
    }

    // Rows that give nothing may hold anything, NaN included, and become zeros. A warp clears those whose numbers it
    // has loaded.
    __device__ __forceinline__ void clear_rows(int32_t rows) const {
#pragma unroll 1
        for (int32_t base = thread - lane; base < rows; base += kLoaders) {
            const bool clears = base + lane < rows && shared.negative_lse[count % 2][base + lane] == -INFINITY;
            for (uint32_t left = __ballot_sync(~0u, clears); left != 0; left &= left - 1) {
                const int32_t row = base + __ffs(left) - 1;
                if (lane >= kChunks) continue;
                device::store_shared(device::shared_address(shared.q[count % 2]) + lane / 8 * (kRows * kRowBytes) +
                                         row * kRowBytes + lane % 8 * 16,
                                     make_uint4(0, 0, 0, 0));
            }
        }
    }

    // Rows that the mean is taken over.
    __device__ __forceinline__ int32_t kept_rows(int32_t request) const {
        if (args.row_mask == nullptr) return args.rows;
        int32_t kept = 0;
        for (int32_t i = lane; i < args.num_queries; i += kWarp) {
            kept += args.row_mask[int64_t{request} * args.num_queries + i] ? 1 : 0;
        }
        return warp_sum(kept) * args.group;
    }

    // Writes down where the sums of a stream are, if this worker has its first tile.
    __device__ __forceinline__ void write_parts(const Range& range, int32_t walked, int32_t tiles) const {
        if (args.mode != MassMode::kTotals || range.first != 0 || thread != 0) return;
        const Start& start = shared.start;
        const auto worker = static_cast<int32_t>(blockIdx.x);
        const int32_t last = walked - range.count + tiles - 1;
        const int32_t count =
            start.own_workers > 0 ? start.own_workers : core::worker_of(start.total, start.workers, last) - worker + 1;
        args.parts[range.request * args.num_kv_heads + range.kv_head] = {worker, count};
    }

    // The first piece's rows are asked for by the consumers, which have nothing else to do yet, and meanwhile these
    // warps ask for those of the second.
    __device__ __forceinline__ void run() {
        Walker& walker = shared.walkers[1 + thread / kWarp];
        const Range& range = walker.range;
        int32_t chunk = 0, kept = 1;
        StreamParts parts = {0, 0};
        for (bool more = next_range(args, &shared.start, &walker); more;) {
            const int32_t stream = range.request * args.num_kv_heads + range.kv_head;
            if (chunk == 0) {
                write_parts(range, walker.walk.at, walker.walk.tiles);
                if (args.mode == MassMode::kMean) kept = kept_rows(range.request);
                parts = args.divides && end_of(args, range.request) > 0 ? args.parts[stream] : StreamParts{0, 0};
            }
            const int32_t first_row = chunk * args.chunk_rows;
            const int32_t rows = min(args.chunk_rows, args.rows - first_row);
            const int32_t least = load_numbers(range, first_row, rows, parts);
            Piece& piece = shared.pieces[count % 2];
            if (lane == 0) {
                piece.least[thread / kWarp] = args.units != nullptr && args.kv_lens != nullptr ? 0 : least;
            }
            const bool finished = chunk + 1 == args.chunks;
            if (thread == 0) {
                piece.tiles = range.count;
                piece.last = finished && walker.walk.at == walker.walk.end;
                piece.first_tile = range.first;
                piece.stream = stream;
                piece.first_row = first_row;
                piece.rows = rows;
                piece.factor = finished && kept > 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
                piece.slot = stream + static_cast<int32_t>(blockIdx.x);
                piece.adds = !range.begins;
            }
            chunk = finished ? 0 : chunk + 1;
            if (finished) more = next_range(args, nullptr, &walker);
            if (count == 0) {
                if (more) ask_for_q<Config, kLoaders>(args, shared.q[1], range, chunk, thread);
                device::named_barrier(kFirstBarrier, kLoaders + kConsumers);
            } else {
                device::copies_wait();
                device::named_barrier(kLoaderBarrier, kLoaders);
            }
            clear_rows(rows);
            device::fence_async_shared();
            publish();
            if (more && count > 1) {
                wait_for_room();
                ask_for_q<Config, kLoaders>(args, shared.q[count % 2], range, chunk, thread);
            }
        }
        fill_rest(args);
    }
};

// --- Consumers: two warpgroups with a tile each ----------------------------------------------------------------------

template <typename Config>
struct Consumer {
    using T = typename Config::T;
    static constexpr int kRows = Config::kRows;
    static constexpr int kDim = Config::kDim;

    const TokenMassArgs& args;
    TokenMassShared<Config>& shared;
    const int32_t thread = threadIdx.x - kWarpgroup, lane = threadIdx.x % kWarp;
    const int32_t own_column = lane % 4 * 2;                                // and the next one, of every 8
    const int32_t own_token = thread % kWarpgroup / kWarp * 16 + lane / 4;  // of a tile, and the one 8 further on
    uint32_t buffer = 0;                                                    // of Q

    static constexpr int kParts = kRows > 128 ? 2 : 1;
    static constexpr int kPart = kRows / kParts;  // columns that are multiplied at once

    float s[kParts][kPart / 2];
    float columns[kRows / 4];  // this thread's: negative lse, or sums over the tokens
    float results[4];          // sums or maxima of the thread's columns: two of each of its tokens

    __device__ __forceinline__ Consumer(const TokenMassArgs& a, TokenMassShared<Config>& sh) : args(a), shared(sh) {}

    __device__ __forceinline__ float2 negative_lse(int i) const {
        return *reinterpret_cast<const float2*>(&shared.negative_lse[buffer][8 * i + own_column]);
    }

    // A part of S = K Q^T of a stage, asynchronous.
    __device__ __forceinline__ void start(uint32_t stage, int part) {
        const uint64_t k =
            device::swizzled_tile(device::tile_address(device::shared_address(shared.k[stage])), kAtomBytes, 16);
        const uint64_t q =
            device::swizzled_tile(device::tile_address(device::shared_address(shared.q[buffer])), kAtomBytes, 16) +
            part * kPart * kRowBytes / 16;
        device::pin_registers(s[part]);
        device::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            const int step = i % 4 * 32;
            device::WgmmaScores<T, kPart>::scores(s[part], k + (i / 4 * (kTile * kRowBytes) + step) / 16,
                                                  q + (i / 4 * (kRows * kRowBytes) + step) / 16, i != 0);
        }
        device::wgmma_commit();
    }

    // Scores of tokens that don't count, or that a row must not see, become such that their share is 0.
    __device__ __forceinline__ void hide(const Piece& piece, int32_t tile, uint32_t valid, int part) {
        int32_t tokens[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            tokens[r] = counts(valid, r) ? token_at(args, piece.stream, tile * kTile + own_token + 8 * r) : INT32_MAX;
        }
#pragma unroll
        for (int i = 0; i < kPart / 8; ++i) {
            const int2 limit =
                *reinterpret_cast<const int2*>(&shared.limits[buffer][part * kPart + 8 * i + own_column]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (tokens[r] >= limit.x) s[part][4 * i + 2 * r] = args.hidden;
                if (tokens[r] >= limit.y) s[part][4 * i + 2 * r + 1] = args.hidden;
            }
        }
    }

    __device__ __forceinline__ float share(float score, float negative) const {
        return device::exp2_fast(score * args.scale_log2 + negative);
    }

    // Of a warp's 16 tokens, the thread's first or second one.
    __device__ __forceinline__ bool counts(uint32_t valid, int r) const {
        return (valid >> (lane / 4 + 8 * r) & 1u) != 0;
    }

    // The quad's two tokens, stored by its first two lanes; later chunks go on from what earlier ones left. A token
    // that does not count has 0, also where an lse is NaN.
    __device__ __forceinline__ void store(const Piece& piece, int32_t tile, uint32_t valid, float first, float second,
                                          bool largest) {
        const bool other = lane % 4 == 1;
        const int32_t at = tile * kTile + own_token + (other ? 8 : 0);
        if (lane % 4 > 1 || at >= args.length) return;
        float* to = args.mass + int64_t{piece.stream} * args.length + at;
        float value = counts(valid, other ? 1 : 0) ? other ? second : first : 0.0f;
        if (piece.first_row > 0) value = largest ? device::max_or_nan(*to, value) : *to + value;
        *to = value * piece.factor;
    }

    __device__ __forceinline__ void add_rows(int part) {
#pragma unroll
        for (int i = 0; i < kPart / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                results[j] += share(s[part][4 * i + j], columns[part * kPart / 4 + 2 * i + j % 2]);
        }
    }

    __device__ __forceinline__ void find_largest(int part) {
#pragma unroll
        for (int i = 0; i < kPart / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                results[j] = device::max_or_nan(results[j],
                                                share(s[part][4 * i + j], columns[part * kPart / 4 + 2 * i + j % 2]));
            }
        }
    }

    __device__ __forceinline__ void store_results(const Piece& piece, int32_t tile, uint32_t valid) {
        if (args.mode == MassMode::kMean) {
            store(piece, tile, valid, device::quad_sum(results[0] + results[1]),
                  device::quad_sum(results[2] + results[3]), false);
        } else {
            store(piece, tile, valid, quad_max(device::max_or_nan(results[0], results[1])),
                  quad_max(device::max_or_nan(results[2], results[3])), true);
        }
    }

    __device__ __forceinline__ void store_rows(const Piece& piece, int32_t tile, uint32_t valid, int part) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t at = tile * kTile + own_token + 8 * r;
            if (at >= args.length) continue;
            const int32_t first = part * kPart + own_column;
            float* to = args.mass + (int64_t{piece.stream} * args.length + at) * args.rows + piece.first_row + first;
#pragma unroll
            for (int i = 0; i < kPart / 8; ++i) {
                const int column = part * kPart / 4 + 2 * i;
                float x = (s[part][4 * i + 2 * r] * args.scale_log2 + columns[column]) * kLn2;
                float y = (s[part][4 * i + 2 * r + 1] * args.scale_log2 + columns[column + 1]) * kLn2;
                if (!counts(valid, r)) x = y = -INFINITY;
                const int32_t left = piece.rows - 8 * i - first;
                if (args.pairs && left > 1) {
                    *reinterpret_cast<float2*>(to + 8 * i) = make_float2(x, y);
                } else {
                    if (left > 0) to[8 * i] = x;
                    if (left > 1) to[8 * i + 1] = y;
                }
            }
        }
    }

    __device__ __forceinline__ void add_tokens(int part) {
#pragma unroll
        for (int i = 0; i < kPart / 8; ++i) {
            const float2 negative = negative_lse(part * kPart / 8 + i);
            const float* of = &s[part][4 * i];
            columns[part * kPart / 4 + 2 * i] += share(of[0], negative.x) + share(of[2], negative.x);
            columns[part * kPart / 4 + 2 * i + 1] += share(of[1], negative.y) + share(of[3], negative.y);
        }
    }

    // Of a part whose product is there.
    __device__ __forceinline__ void take(const Piece& piece, int32_t tile, uint32_t valid, bool hides, int part) {
        if (hides) hide(piece, tile, valid, part);
        switch (args.mode) {
            case MassMode::kMean:
                add_rows(part);
                break;
            case MassMode::kMax:
                find_largest(part);
                break;
            case MassMode::kRows:
                store_rows(piece, tile, valid, part);
                break;
            case MassMode::kTotals:
                add_tokens(part);
        }
    }

    // Sums over tokens of all threads, into the worker's slot of the stream.
    __device__ __forceinline__ void store_totals(const Piece& piece) {
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
#pragma unroll
            for (int step = 4; step < kWarp; step *= 2) columns[i] += __shfl_xor_sync(~0u, columns[i], step);
        }
        if (lane < 4) {
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
                *reinterpret_cast<float2*>(&shared.totals[thread / kWarp][8 * i + own_column]) =
                    make_float2(columns[2 * i], columns[2 * i + 1]);
            }
        }
        device::named_barrier(kConsumerBarrier, kConsumers);
        if (thread < piece.rows) {
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < kConsumers / kWarp; ++i) total += shared.totals[i][thread];
            float* to = args.totals + int64_t{piece.slot} * args.stride_totals + piece.first_row + thread;
            *to = piece.adds ? *to + total : total;
        }
        device::named_barrier(kConsumerBarrier, kConsumers);
    }

    __device__ __forceinline__ void release(uint64_t* empty) const {
        __syncwarp();
        if (lane == 0) device::mbarrier_arrive(device::shared_address(empty));
    }

    // Rows of the first piece, see the loaders.
    __device__ __forceinline__ void ask_for_first() const {
        if (shared.start.any) ask_for_q<Config, kConsumers>(args, shared.q[0], shared.start.first.range, 0, thread);
    }

    __device__ __forceinline__ void run() {
        const int32_t warpgroup = __shfl_sync(~0u, thread / kWarpgroup, 0);  // known to be the same in a warp
        uint32_t tiles_before = 0;
        if (!shared.start.any) return;
        device::copies_wait();
        device::fence_async_shared();
        device::named_barrier_arrive(kFirstBarrier, kLoaders + kConsumers);
        for (uint32_t count = 0;; ++count) {
            buffer = count % 2;
            device::mbarrier_wait(device::shared_address(&shared.full_q[buffer]), count / 2 % 2);
            const Piece& piece = shared.pieces[buffer];
            const int32_t tiles = piece.tiles, first_tile = piece.first_tile;
            const int32_t least = min(min(piece.least[0], piece.least[1]), piece.least[2]);
            const bool last = piece.last;
#pragma unroll
            for (int i = 0; i < kRows / 8; ++i) {
                const float2 negative = args.mode == MassMode::kTotals ? make_float2(0.0f, 0.0f) : negative_lse(i);
                columns[2 * i] = negative.x;
                columns[2 * i + 1] = negative.y;
            }
            // Chunks of rows must find a token's tile with the same warpgroup; without them the two go on alternating.
            const int32_t offset = args.chunks == 1 ? static_cast<int32_t>(tiles_before % 2) : 0;
            for (int32_t i = (warpgroup + offset) % 2; i < tiles; i += 2) {
                const uint32_t place = tiles_before + i, stage = place % Config::kStages;
                const int32_t tile = first_tile + i;
                // A parity tells a round only from its neighbours: where the other warpgroup may have had this stage
                // last, its tile must be done with before this one's is waited for.
                if (Config::kStages % 2 != 0 || args.chunks > 1) {
                    device::mbarrier_wait(device::shared_address(&shared.empty_k[stage]),
                                          (place / Config::kStages + 1) % 2);
                }
                device::mbarrier_wait(device::shared_address(&shared.full_k[stage]), place / Config::kStages % 2);
#pragma unroll
                for (int part = 0; part < kParts; ++part) start(stage, part);
                const uint2 words = shared.valid[stage];
                const uint32_t word = thread % kWarpgroup < kWarpgroup / 2 ? words.x : words.y;
                const uint32_t valid = word >> (thread / kWarp % 2 * 16) & 0xffffu;  // of the warp's 16 tokens
                const bool hides = valid != 0xffffu || (tile + 1) * kTile > least;
#pragma unroll
                for (int j = 0; j < 4; ++j) results[j] = 0.0f;
                if constexpr (kParts == 2) {
                    device::wgmma_wait<1>();
                    device::pin_registers(s[0]);
                    take(piece, tile, valid, hides, 0);
                }
                device::wgmma_wait<0>();
                device::pin_registers(s[kParts - 1]);
                release(&shared.empty_k[stage]);
                take(piece, tile, valid, hides, kParts - 1);
                if (args.mode < MassMode::kRows) store_results(piece, tile, valid);
            }
            if (args.mode == MassMode::kTotals) store_totals(piece);
            if (last) break;
            tiles_before += tiles;
            // Every thread, for each has read numbers: once per piece it costs nothing, and racecheck follows it.
            device::mbarrier_arrive(device::shared_address(&shared.empty_q[buffer]));
        }
    }
};

template <typename Config>
__global__ void __launch_bounds__(kThreads, 1)
    mage_token_mass_kernel(const __grid_constant__ TokenMassArgs args, const __grid_constant__ CUtensorMap k_map) {
    extern __shared__ uint8_t raw_shared[];
    auto& shared =
        *reinterpret_cast<TokenMassShared<Config>*>(raw_shared + (-device::shared_address(raw_shared) & 1023));
    const int32_t warp = threadIdx.x / kWarp;
    if (warp == 0) {
        for (int32_t b = threadIdx.x * (kLine / 4); b < args.num_requests; b += kWarp * (kLine / 4)) {
            device::prefetch_l2(args.seq_lens + b);
            if (args.prefix_lens != nullptr) device::prefetch_l2(args.prefix_lens + b);
        }
    }
    if (threadIdx.x == kWarp) {
        device::prefetch_tensor_map(&k_map);
#pragma unroll
        for (int i = 0; i < Config::kStages; ++i) {
            device::mbarrier_init(device::shared_address(&shared.full_k[i]), 1);
            device::mbarrier_init(device::shared_address(&shared.empty_k[i]), kWarpgroup / kWarp);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            device::mbarrier_init(device::shared_address(&shared.full_q[i]), kLoaders);
            device::mbarrier_init(device::shared_address(&shared.empty_q[i]), kConsumers);
        }
        device::mbarrier_init_fence();
    }
    prefetch_first<Config>(args);
    device::dependency_wait();
    device::dependency_release();
    if (warp == 0) find_start(args, &shared.start);
    __syncthreads();

    if (warp < kWarpgroup / kWarp) {
        device::registers_shrink<kProducerRegisters>();
        if (warp == 0) {
            Producer<Config>(args, &k_map, shared).run();
        } else {
            Loader<Config>(args, shared).run();
        }
    } else {
        Consumer<Config> consumer(args, shared);
        consumer.ask_for_first();
        device::registers_grow<kConsumerRegisters>();
        consumer.run();
    }
}

}  // namespace mage::cuda
