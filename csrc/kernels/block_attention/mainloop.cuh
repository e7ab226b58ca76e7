#pragma once

#include "kernels/block_attention/partial_row.cuh"
#include "kernels/block_attention/pieces.cuh"

// Purpose   out[r] = sum_t softmax(scale q[r] . k[t]) v[t] over the tokens of a paged KV stream, all of them or those
//           of a list and a tail, and on request every row's sum over every unit of g tokens, its logarithm or, in
//           kernels of their own, 16 bits (core/unit_sums.h); mage/block_attention.h, block_attention_mass.h,
//           sparse_block_attention.h.
// Schedule  persistent workers (core/attention_schedule.h): a CTA, or a pair of CTAs that share the rows of a tile and
//           multicast K and V to one another. Of the first warpgroup, warp 0 feeds a ring of K and V tiles by TMA, and
//           warp 1 writes the pieces of segments down for the merge; single tokens are gathered by all four warps.
//           Each other warpgroup owns 64 rows. A segment of lists may be a worker's own (is_whole); short lists have a
//           kernel of their own (short_lists.cuh).
//             per tile j:  mask, exponentials, sums, P = S in 16 bits
//                          O += P V(j)              tensor cores; P is in registers, so that issuing lasts as long
//                          S = Q K(j + 1)^T         tensor cores, asynchronous
//                          store the unit sums of tile j             while S is on its way
//           Warpgroups take turns at the products: while one multiplies, the others are at their exponentials.
// Memory    Q tile (64 rows x D per warpgroup), kStages x (K tile, V tile) of kKeys rows, all in the 128-byte swizzle;
//           S, P and O in registers, float32 sums.
// Sync      full_k/full_v[stage]: the producer's expectation and the copies' bytes, or one arrival of each warp that
//           gathers. empty_k/empty_v[stage]: one arrival per consumer warp of the tile in every CTA of the worker.
//           Named barriers: all consumers (V's tail is clear); one per warpgroup (its Q is stored);
//           consumers and producer, once (Q is asked for); one per warpgroup (its turn, two warpgroups at a time); all
//           threads of lists, once (the piece is known).
// Ceiling   max(bytes of K and V / HBM, 4 * rows padded to 64 * D * tokens / tensor cores); NOTES.md has the numbers.
namespace mage::cuda {

// Position in the ring: a stage and the parity of its current round.
template <int kStages>
struct Ring {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage >= kStages) {
            stage -= kStages;
            parity ^= 1;
        }
    }
};

// --- Producer --------------------------------------------------------------------------------------------------------

// Of a pair, until the consumers of both CTAs have released all that this one's ring has had: none does so after its
// end. `ring` is where the next tile would go.
template <typename Config>
__device__ __forceinline__ void wait_for_releases(AttentionShared<Config>& shared, Ring<Config::kStages> ring) {
    if constexpr (Config::kCtas > 1) {
#pragma unroll 1
        for (int i = 0; i < Config::kStages; ++i) {
            device::mbarrier_wait(device::shared_address(&shared.empty_k[ring.stage]), ring.parity ^ 1);
            device::mbarrier_wait(device::shared_address(&shared.empty_v[ring.stage]), ring.parity ^ 1);
            ring.advance();
        }
    }
}

// One warp asks the copy engine for boxes of 16 tokens and more, a lane for each.
template <typename Config>
__device__ __forceinline__ void produce(const AttentionArgs& args, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        AttentionShared<Config>& shared) {
    constexpr int kKeys = Config::kKeys;
    const int32_t lane = threadIdx.x % kWarp;
    constexpr int ctas = Config::kCtas;
    const int32_t rank = worker_rank<Config>();
    const int32_t boxes = kKeys >> args.box_shift;
    const uint64_t policy = args.row_tiles == 1 ? device::kEvictFirst : device::kEvictNormal;
    constexpr auto receivers = static_cast<uint16_t>((1 << ctas) - 1);
    const int32_t own_box = lane % boxes, own_span = lane / boxes;
    const bool own = own_span < Config::kSpans && (Config::kCtas == 1 || lane % ctas == rank);

    Ring<Config::kStages> ring;
    if (!shared.any) return;
    do {
        const Piece& piece = shared.piece[0];
        const Places<Config::kLists> places(args, piece);
        const int32_t begin = piece.token_begin + (own_box << args.box_shift);
        // One tile ahead, and of lists two.
        Place next = places.place_of(begin, places.entry_at(begin));
        Entry ahead = places.entry_at(begin + kKeys);
        for (int32_t token = piece.token_begin; token < places.token_end; token += kKeys) {
            const int32_t position = token + (own_box << args.box_shift);
            Place place = next;
            if (!Config::kLists) place.token = position;  // spares a register
            next = places.place_of(position + kKeys, ahead);
            ahead = places.entry_at(position + 2 * kKeys);
            // A broken box is marked; a tile with a part of the hole is masked like one with broken boxes.
            const uint32_t broken = __ballot_sync(~0u, places.mark(position, &place) && lane < boxes);
            const bool holed = Config::kLists && token < piece.hole_end && token + kKeys > piece.list_end &&
                               piece.hole_end > piece.list_end;
            const auto fill = [&](const CUtensorMap* map, const uint8_t* tile, uint64_t* full) {
                if (lane == 0) device::mbarrier_arrive_expect(device::shared_address(full), Config::kTileBytes);
                __syncwarp();
                if (!own) return;
                const device::BoxStart start = {own_span * kSpan, place.token & (1 << args.page_shift) - 1,
                                                piece.kv_head, place.page};
                const uint32_t to = device::shared_address(tile) + own_span * (kKeys * kRowBytes) +
                                    own_box * (uint32_t{kRowBytes} << args.box_shift);
                if constexpr (ctas == 1) {
                    device::copy_box(map, to, device::shared_address(full), start, policy);
                } else {
                    device::copy_box_multicast(map, to, device::shared_address(full), start, receivers, policy);
                }
            };
            const uint32_t stage = ring.stage;
            // Flags of a tile without any are written only over others: nearly none ever has some.
            uint4& flags = shared.broken[stage];
            const bool writes_flags = lane == 0 && (broken != 0 || holed || (flags.x | flags.y) != 0);
            device::mbarrier_wait(device::shared_address(&shared.empty_k[stage]), ring.parity ^ 1);
            if (writes_flags) flags = make_uint4(broken, holed ? 1 : 0, 0, 0);
            fill(k_map, shared.k[stage], &shared.full_k[stage]);
            // Q is asked for before the ring is filled: behind all of K and V it would arrive when these have.
            if (piece.first && token == piece.token_begin)
                device::named_barrier(kStartBarrier, Config::kConsumers + kWarp);
            device::mbarrier_wait(device::shared_address(&shared.empty_v[stage]), ring.parity ^ 1);
            fill(v_map, shared.v[stage], &shared.full_v[stage]);
            ring.advance();
        }
    } while (next_piece_of_warp<Config>(args, shared, &shared.piece[threadIdx.x / kWarp]));
    wait_for_releases<Config>(shared, ring);
}

// Of the calling warp's piece: where a segment begins, its pieces are written down for the merge.
template <typename Config>
__device__ __forceinline__ void write_piece(const AttentionArgs& args, AttentionShared<Config>& shared) {
    const core::Schedule& s = args.schedule;
    const int32_t warp = threadIdx.x / kWarp;
    const Piece& piece = shared.piece[warp];
    if (piece.token_begin != 0 || threadIdx.x % kWarp != 0) return;
    const Share& share = shared.share;
    core::Pieces pieces = {piece.pieces, share.worker};
    if (piece.pieces == 0) {
        const int32_t taken = s.fixed ? 1 : core::units_of(s, piece.token_end);
        pieces = core::pieces_of(s, share.total, share.workers, share.worker, shared.walk[warp].at - taken,
                                 core::units_of(s, stream_length<Config::kLists>(args, piece.request, piece.kv_head)));
    }
    if (piece.slot < 0) pieces.count = 1;
    const int64_t stream = int64_t{piece.request} * args.num_kv_heads + piece.kv_head;
    args.pieces[stream * args.row_tiles + piece.row_tile] = pieces;
}

// One warp, of all pieces.
template <typename Config>
__device__ __forceinline__ void write_pieces(const AttentionArgs& args, AttentionShared<Config>& shared) {
    if (!shared.any) return;
    do {
        write_piece<Config>(args, shared);
    } while (next_piece_of_warp<Config>(args, shared, &shared.piece[threadIdx.x / kWarp]));
}

// Single tokens are gathered by four warps, 16 bytes at a time: each warp finds the places of a quarter of a tile, a
// lane to a token, and copies them. Every CTA gathers all of its tile by itself. Warp 1 writes pieces down too.
template <typename Config>
__device__ __forceinline__ void gather(const AttentionArgs& args, AttentionShared<Config>& shared) {
    constexpr int kKeys = Config::kKeys, kOwn = kKeys / (kWarpgroup / kWarp);
    constexpr int kBatch = Config::kLists && (kKeys == 128 || Config::kDim == 128) ? 4 : 2;  // more would be spilled
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const bool writes = warp == 1 && !is_whole<Config>(args) && worker_rank<Config>() == 0;
    // The barrier of the half tile before: it is told when the next has been asked for, and all of its copies are
    // there.
    uint32_t behind = 0;
    bool flagged = false;  // whether this warp has ever had a broken token: until then all flags are 0
    Ring<Config::kStages> ring;
    if (!shared.any) return;
    do {
        if (writes) write_piece<Config>(args, shared);
        const Piece& piece = shared.piece[warp];
        const Places<Config::kLists> places(args, piece);
        const int32_t begin = piece.token_begin + warp * kOwn + lane;
        Place next = places.place_of(begin, places.entry_at(begin));
        for (int32_t token = piece.token_begin; token < places.token_end; token += kKeys) {
            const int32_t position = token + warp * kOwn + lane;
            Place place = next;
            const uint32_t broken = __ballot_sync(~0u, places.mark(position, &place) && lane < kOwn);
            const auto fill = [&](const PoolBytes& pool, const uint8_t* tile, uint64_t* full) {
                copy_rows<Config, kOwn, kBatch>(args, pool, piece.kv_head, place, device::shared_address(tile),
                                                warp * kOwn);
                device::copies_commit();
                if (behind != 0) arrive<1>(behind);
                behind = device::shared_address(full);
            };
            const uint32_t stage = ring.stage;
            device::mbarrier_wait(device::shared_address(&shared.empty_k[stage]), ring.parity ^ 1);
            flagged |= broken != 0;
            if (flagged && lane == 0) {
                if constexpr (kOwn == kWarp) {
                    reinterpret_cast<uint32_t*>(&shared.broken[stage])[warp] = broken;
                } else {
                    reinterpret_cast<uint16_t*>(&shared.broken[stage])[warp] = static_cast<uint16_t>(broken);
                }
            }
            const Entry ahead = places.entry_at(position + kKeys);
            fill(args.k_pool, shared.k[stage], &shared.full_k[stage]);
            if (warp == 0 && piece.first && token == piece.token_begin)
                device::named_barrier(kStartBarrier, Config::kConsumers + kWarp);
            next = places.place_of(position + kKeys, ahead);
            device::mbarrier_wait(device::shared_address(&shared.empty_v[stage]), ring.parity ^ 1);
            fill(args.v_pool, shared.v[stage], &shared.full_v[stage]);
            ring.advance();
        }
    } while (next_piece_of_warp<Config>(args, shared, &shared.piece[warp]));
    arrive<0>(behind);
    wait_for_releases<Config>(shared, ring);
}

// --- Consumers: kWarpgroups warpgroups of 64 rows each ---------------------------------------------------------------

template <typename Config>
struct Consumer {
    using T = typename Config::T;
    static constexpr int kDim = Config::kDim;
    static constexpr int kKeys = Config::kKeys;
    static constexpr int kBlocks = kKeys / 16;  // of 16 keys: a step of P V, and the finest unit
    static constexpr int kUnits = kKeys / 64;   // of 64 keys
    static constexpr bool kPacked = Config::kPacked;
    using Unit = std::conditional_t<kPacked, uint16_t, float>;  // a row's sum over a unit

    const AttentionArgs& args;
    AttentionShared<Config>& shared;
    const int32_t thread, warpgroup, lane, rank;
    const Piece& piece;  // the one at hand
    int32_t token_end, prefix;
    int32_t first_row;                          // of the stream; this thread's other row is 8 below
    int32_t limit[2];                           // positions that each may see
    int32_t listed_limit[2];                    // and tokens of a list
    float reference[2], sum[2], prefix_sum[2];  // of the softmax, in log2
    float blocks[2][kBlocks];                   // sums of P per row and 16 keys of the last tile
    float units[2][kUnits];                     // and per row and unit of 64 keys
    bool emits;                                 // this thread's row of the quad's four values is one of R, see emit
    bool emits_units;                           // and units have 64 keys, see emit_step
    Unit* unit_at;                              // where the one of this tile's first units goes
    int32_t unit_step;                          // from tile to tile, where units have 64 keys; else 0
    float unit_level;  // of the emitted row, packed sums alone: its level times 2^kOne, in log2

    // The shared memory as descriptors see it, in 16 bytes; the tiles lie one behind the other.
    const uint32_t shared_tile;
    static constexpr uint32_t kKTile = Config::kCtaRows * kDim * 2 / 16;
    static constexpr uint32_t kVTile = kKTile + Config::kStages * Config::kTileBytes / 16;

    float s[kKeys / 2];
    float o[kDim / 2];
    uint32_t p[kBlocks][4];

    __device__ __forceinline__ Consumer(const AttentionArgs& a, AttentionShared<Config>& sh)
        : args(a),
          shared(sh),
          thread(threadIdx.x - kWarpgroup),
          warpgroup(__shfl_sync(~0u, thread / kWarpgroup, 0)),  // known to be the same in a warp
          lane(threadIdx.x % kWarp),
          rank(worker_rank<Config>()),
          piece(sh.piece[threadIdx.x / kWarp]),
          shared_tile(device::tile_address(device::shared_address(&sh))) {}

    // This thread among the consumers. Where sums are packed it is found anew: what follows from it would be spilled.
    __device__ __forceinline__ int32_t own_thread() const {
        return kPacked ? device::thread_index() - kWarpgroup : thread % Config::kConsumers;
    }
    __device__ __forceinline__ int32_t row_in_cta() const {
        return own_thread() / kWarp * 16 + own_thread() % kWarp / 4;
    }
    __device__ __forceinline__ int32_t row_of(int i) const { return (kPacked ? find_row() : first_row) + 8 * i; }
    __device__ __forceinline__ int32_t find_row() const {
        return piece.row_tile * tile_rows<Config>() + rank * Config::kCtaRows + row_in_cta();
    }

    // Q rows of this warpgroup, swizzled, asynchronous; rows past R are zeros. A thread keeps its chunk of 16 bytes and
    // goes on by a multiple of 8 rows, so that the swizzle stays the same.
    static constexpr int kChunks = kDim / 8;
    static constexpr int kRowStep = kWarpgroup / kChunks;
    static constexpr int kRounds = 64 / kRowStep;

    __device__ __forceinline__ uint32_t own_chunk(int32_t thread) const {
        const int32_t chunk = thread % kChunks, group_row = thread % kWarpgroup / kChunks;
        return device::shared_address(shared.q) + chunk / 8 * (Config::kCtaRows * kRowBytes) +
               (thread / kWarpgroup * 64 + group_row) * kRowBytes + ((chunk % 8) ^ (group_row % 8)) * 16;
    }

    __device__ __forceinline__ void start_q(const Piece& of) const {
        // Found anew for every piece: kept from one to the next, what follows from it would be spilled.
        const int32_t thread = device::thread_index() - kWarpgroup;
        const T* base = static_cast<const T*>(args.q) + of.request * args.stride_q_request +
                        int64_t{of.kv_head} * args.group * args.stride_q_head + thread % kChunks * 8;
        int32_t r = of.row_tile * tile_rows<Config>() + rank * Config::kCtaRows + thread / kWarpgroup * 64 +
                    thread % kWarpgroup / kChunks;
        uint32_t to = own_chunk(thread);
#pragma unroll 1
        for (int i = 0; i < kRounds; ++i, r += kRowStep, to += kRowStep * kRowBytes) {
            const int32_t row = min(r, args.rows - 1), query = query_of(args, row);
            const T* from = base + query * args.stride_q_query + (row - query * args.group) * args.stride_q_head;
            device::copy_16_bytes(to, from, r < args.rows ? 16 : 0);
        }
    }

    __device__ __forceinline__ void finish_q() const {
        device::copies_wait();
        const int32_t thread = device::thread_index() - kWarpgroup;  // as in start_q
        if (args.flip != 0 || args.keep != ~0u) {
            const uint32_t own = own_chunk(thread) - device::shared_address(shared.q);
            for (int i = 0; i < kRounds; ++i) {
                uint4* chunk = reinterpret_cast<uint4*>(shared.q + own + i * kRowStep * kRowBytes);
                const uint4 x = *chunk;
                *chunk = make_uint4((x.x & args.keep) ^ args.flip, (x.y & args.keep) ^ args.flip,
                                    (x.z & args.keep) ^ args.flip, (x.w & args.keep) ^ args.flip);
            }
        }
        device::fence_async_shared();
        device::named_barrier(kGroupBarrier + thread / kWarpgroup, kWarpgroup);
    }

    __device__ __forceinline__ void start_piece() {
        token_end = piece.token_end;
        prefix = piece.prefix;
        first_row = find_row();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            limit[i] = piece.token_end;
            if constexpr (Config::kLists) listed_limit[i] = INT32_MAX;
            if (args.kv_lens != nullptr && row_of(i) < args.rows) {
                const int32_t visible = args.kv_lens[piece.request * args.num_queries + query_of(args, row_of(i))];
                if constexpr (Config::kLists) {
                    // Listed tokens come at any distance: each is held against its row's limit.
                    listed_limit[i] = min(max(visible, 0), args.max_seq_len);
                    limit[i] = min(limit[i], piece.list_end + max(listed_limit[i] - piece.tail_begin, 0));
                } else {
                    limit[i] = min(limit[i], visible);
                }
            }
            reference[i] = -INFINITY;
            sum[i] = prefix_sum[i] = 0.0f;
        }
        const int64_t stream = int64_t{piece.request} * args.num_kv_heads + piece.kv_head;
        const int32_t emitted = row_of(lane & 1);
        emits = emitted < unit_rows();
        const int32_t unit = (piece.token_begin >> args.unit_shift) + (lane >> 1 & 1);
        unit_at = static_cast<Unit*>(args.units) + (stream * args.num_units + unit) * unit_rows() + emitted;
        emits_units = find_emits_units();
        unit_step = find_unit_step();
        if constexpr (kPacked) {
            unit_level = -INFINITY;
            if (emits && (lane & 2) == 0) *unit_levels() = core::no_levels();
        }
    }

    __device__ __forceinline__ bool of_64() const {
        return !Config::kLists && args.units != nullptr && args.unit_shift == 6;
    }
    __device__ __forceinline__ bool find_emits_units() const {
        return emits && of_64() && (kUnits == 2 || (lane & 2) == 0);
    }
    __device__ __forceinline__ int32_t find_unit_step() const { return of_64() ? kUnits * unit_rows() : 0; }
    __device__ __forceinline__ int32_t unit_rows() const { return kPacked ? args.unit_rows : args.rows; }

    // Of the emitted row.
    __device__ __forceinline__ core::UnitLevels* unit_levels() const {
        const int32_t stream = piece.request * args.num_kv_heads + piece.kv_head;
        const int32_t at = piece.slot < 0 ? args.slots + stream : piece.slot;
        return args.unit_levels + int64_t{at} * tile_rows<Config>() + row_of(lane & 1);
    }

    // S = Q K^T of a stage, asynchronous.
    __device__ __forceinline__ void start_scores(uint32_t stage) {
        const uint64_t q = device::swizzled_tile(shared_tile + warpgroup * (64 * kRowBytes / 16), kAtomBytes, 16);
        const uint64_t k =
            device::swizzled_tile(shared_tile + kKTile + stage * (Config::kTileBytes / 16), kAtomBytes, 16);
        device::pin_registers(s);
        device::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            const int column = i % 4 * 32;
            device::Wgmma<T, kKeys>::scores(s, device::tile_further(q, i / 4 * (Config::kCtaRows * kRowBytes) + column),
                                            device::tile_further(k, i / 4 * (kKeys * kRowBytes) + column), i != 0);
        }
        device::wgmma_commit();
    }

    // O += P V of a stage, asynchronous.
    __device__ __forceinline__ void start_values(uint32_t stage) {
        const uint64_t v = device::swizzled_tile(shared_tile + kVTile + stage * (Config::kTileBytes / 16), kAtomBytes,
                                                 kKeys * kRowBytes);
        device::pin_registers(o);
        device::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
            device::Wgmma<T, kDim>::values(o, p[i], device::tile_further(v, i * 16 * kRowBytes), true);
        device::wgmma_commit();
    }

    __device__ __forceinline__ void release(uint64_t* empty) {
        __syncwarp();
        const uint32_t barrier = device::shared_address(empty);
        if constexpr (Config::kCtas == 1) {
            if (lane == 0) device::mbarrier_arrive(barrier);
        } else if (lane < Config::kCtas) {
            device::mbarrier_arrive_cluster(barrier, lane);
        }
    }

    // Rows of V that no position reads hold anything, NaN included, and P = 0 does not silence NaN: those past the end
    // of the stream, and those of the hole.
    __device__ __forceinline__ void clear_tail(uint32_t stage, int32_t token) {
        const int32_t box = 1 << args.box_shift;
        const int32_t first = token_end - token;
        if (first < kKeys && (first & (box - 1)) != 0) clear_rows(stage, first, box - (first & (box - 1)));
    }

    __device__ __forceinline__ void clear_hole(uint32_t stage, int32_t token) {
        if constexpr (Config::kLists) {
            const int32_t first = max(piece.list_end - token, 0), last = min(piece.hole_end - token, kKeys);
            if (first < last) clear_rows(stage, first, last - first);
        }
    }

    __device__ __forceinline__ void clear_rows(uint32_t stage, int32_t first, int32_t rows) {
        for (int32_t i = own_thread(); i < rows * Config::kSpans * 8; i += Config::kConsumers) {
            const int32_t span = i / (rows * 8);
            const int32_t at = i - span * rows * 8;
            device::store_shared(
                device::shared_address(shared.v[stage]) + span * (kKeys * kRowBytes) + first * kRowBytes + at * 16,
                make_uint4(0, 0, 0, 0));
        }
        device::fence_async_shared();
        device::named_barrier(kTailBarrier, Config::kConsumers);
    }

    // Scores of listed tokens past a row's limit, where that is below the tail.
    __device__ __forceinline__ void mask_listed(int32_t token) {
        const int32_t* list = list_of(args, piece.request, piece.kv_head);
        const int32_t inside = (1 << args.list_shift) - 1;
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            const int32_t position = token + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (position >= piece.list_end) continue;
            const int32_t unit = list[position >> args.list_shift];
            if (unit > (listed_limit[i / 2 % 2] - 1 - (position & inside)) >> args.list_shift) s[i] = -INFINITY;
        }
    }

    // Scores of tokens that a row must not see become -inf.
    __device__ __forceinline__ void mask(int32_t token, uint32_t stage, bool any_broken) {
        if (Config::kLists && min(listed_limit[0], listed_limit[1]) <= piece.tail_begin) mask_listed(token);
        if (token + kKeys <= min(limit[0], limit[1]) && !any_broken) return;
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            const int32_t column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (token + column >= limit[i / 2 % 2]) s[i] = -INFINITY;
        }
        if (!any_broken) return;
        const uint4 broken = shared.broken[stage];
        const uint32_t words[4] = {broken.x, broken.y, broken.z, broken.w};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            const int32_t column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            // Boxes of 16 tokens and more are all in the first word; boxes of one are in the column's own.
            const int32_t box = column >> args.box_shift;
            const uint32_t word = args.box_shift == 0 ? words[i / 16] : words[0];
            if ((word >> (box & 31) & 1u) != 0) s[i] = -INFINITY;
            if (Config::kLists && token + column >= piece.list_end && token + column < piece.hole_end) s[i] = -INFINITY;
        }
    }

    __device__ __forceinline__ bool is_broken(uint32_t stage) const {
        const uint4 broken = shared.broken[stage];
        return (broken.x | broken.y | broken.z | broken.w) != 0;
    }

    // The block sums again, of the first `end` columns alone.
    __device__ __forceinline__ void block_sums(int32_t end) {
        const int32_t left = end - lane % 4 * 2;
        const auto kept = [&](int i, int32_t column) { return column < left ? s[i] : 0.0f; };
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            const int32_t c = 16 * i;
            blocks[0][i] =
                (kept(8 * i, c) + kept(8 * i + 1, c + 1)) + (kept(8 * i + 4, c + 8) + kept(8 * i + 5, c + 9));
            blocks[1][i] =
                (kept(8 * i + 2, c) + kept(8 * i + 3, c + 1)) + (kept(8 * i + 6, c + 8) + kept(8 * i + 7, c + 9));
            add_block(i);
        }
    }

    // The sum of a unit of the emitted row, if there is one. It is to stay in L2, which K and V pass through.
    __device__ __forceinline__ void store_sum(bool stores, Unit* to, float sum) const {
        const float own = (lane & 1) != 0 ? reference[1] : reference[0];
        if constexpr (kPacked) {
            const uint32_t packed = core::PackedSum::pack(sum * device::exp2_fast(own - unit_level));
            device::store_16_bits_if(stores, to, packed, device::kEvictLast);
        } else {
            device::store_if(stores, to, device::log2_fast(sum) + own, device::kEvictLast);
        }
    }

    // Adds four values over the quad (two rows x two units) so that each lane ends with one, and stores it: lane bit 0
    // is the row, bit 1 the unit. `offset` and `left` count units from the tile's first.
    __device__ __forceinline__ void emit(int32_t offset, int32_t left, float row0, float row1, float next0,
                                         float next1) const {
        const bool second = (lane & 2) != 0, lower = (lane & 1) != 0;
        float keep0 = second ? next0 : row0, keep1 = second ? next1 : row1;
        keep0 += __shfl_xor_sync(~0u, second ? row0 : next0, 2);
        keep1 += __shfl_xor_sync(~0u, second ? row1 : next1, 2);
        store_unit(offset, left, lower ? keep1 : keep0, lower ? keep0 : keep1);
    }

    __device__ __forceinline__ void store_unit(int32_t offset, int32_t left, float total, float other) const {
        const bool second = (lane & 2) != 0;
        total += __shfl_xor_sync(~0u, other, 1);
        store_sum(emits && offset + (second ? 1 : 0) < left, unit_at + int64_t{offset} * unit_rows(), total);
    }

    // What emit does for units of 64 keys of a tile that ends inside of the piece. Nothing branches, with masses or
    // without. Of one unit, both lanes of a pair have the result of their row.
    __device__ __forceinline__ void emit_whole() {
        if (Config::kLists) return;
        const bool second = (lane & 2) != 0, lower = (lane & 1) != 0;
        float total;
        if constexpr (kUnits == 2) {
            float keep[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                keep[r] = second ? units[r][1] : units[r][0];
                keep[r] += __shfl_xor_sync(~0u, second ? units[r][0] : units[r][1], 2);
            }
            total = lower ? keep[1] : keep[0];
            total += __shfl_xor_sync(~0u, lower ? keep[0] : keep[1], 1);
        } else {
            total = lower ? units[1][0] : units[0][0];
            total += __shfl_xor_sync(~0u, lower ? units[0][0] : units[1][0], 1);
            total += __shfl_xor_sync(~0u, total, 2);
        }
        store_sum(kPacked ? find_emits_units() : emits_units, unit_at, total);
        unit_at += kPacked ? find_unit_step() : unit_step;
    }

    // Of the tile whose sums are at hand. kWhole: emit_whole has emitted units of 64 keys.
    template <bool kWhole>
    __device__ __forceinline__ void emit_units(int32_t token) {
        if (Config::kLists || args.units == nullptr || (kWhole && args.unit_shift == 6)) return;
        const int32_t left = (token_end - token - 1 >> args.unit_shift) + 1;
        if (args.unit_shift == 6) {
            if constexpr (kKeys == 64) {  // one unit: the upper pair of the quad adds to the lower
                const bool lower = (lane & 1) != 0;
                units[0][0] += __shfl_xor_sync(~0u, units[0][0], 2);
                units[1][0] += __shfl_xor_sync(~0u, units[1][0], 2);
                store_unit(0, 1, lower ? units[1][0] : units[0][0], lower ? units[0][0] : units[1][0]);
            } else {
                emit(0, left, units[0][0], units[1][0], units[0][1], units[1][1]);
            }
        } else if (args.unit_shift == 5) {
#pragma unroll
            for (int i = 0; i < kBlocks; i += 4) {
                emit(i / 2, left, blocks[0][i] + blocks[0][i + 1], blocks[1][i] + blocks[1][i + 1],
                     blocks[0][i + 2] + blocks[0][i + 3], blocks[1][i + 2] + blocks[1][i + 3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kBlocks; i += 2)
                emit(i, left, blocks[0][i], blocks[1][i], blocks[0][i + 1], blocks[1][i + 1]);
        }
        unit_at += int64_t{kKeys >> args.unit_shift} * unit_rows();
    }

    // Looks whether what a row's tile adds up to, of which these are the thread's parts, is its next level.
    __device__ __forceinline__ void fit_level(int32_t token, const float (&added)[2]) {
        const float upper_row = device::quad_sum(added[0]), lower_row = device::quad_sum(added[1]);
        const bool lower = (lane & 1) != 0;
        const float level = (lower ? reference[1] : reference[0]) + device::log2_fast(lower ? lower_row : upper_row) +
                            core::PackedSum::kOne;
        if (!emits || !core::is_next_level(level, unit_level)) return;
        unit_level = level;
        if ((lane & 2) == 0) *unit_levels() = core::with_level(*unit_levels(), level, token);
    }

    // Turns S into P, in 16 bits, and adds up its sums; keeps the block sums for emit_units. Exponents are taken
    // against a reference that follows a row's maximum only when that has grown by more than 2^kSlack: terms stay below
    // 2^kSlack, which 16-bit P and float32 sums hold as well as 1. So most tiles need no maximum, only the knowledge
    // that nothing exceeds the slack, which one integer maximum over both rows gives: what is above a positive number
    // is above it as an integer too, and what is negative is below it.
    __device__ __forceinline__ void softmax(int32_t token) {
        constexpr float kSlack = 8.0f;
        const bool unseen[2] = {reference[0] == -INFINITY, reference[1] == -INFINITY};
        const float base[2] = {unseen[0] ? 0.0f : reference[0], unseen[1] ? 0.0f : reference[1]};
        int32_t highest_bits[4] = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
#pragma unroll
        for (int i = 0; i < kKeys / 2; i += 2) {
            s[i] = fmaf(s[i], args.scale_log2, -base[i / 2 % 2]);
            s[i + 1] = fmaf(s[i + 1], args.scale_log2, -base[i / 2 % 2]);
            highest_bits[i / 2 % 4] =
                __vimax3_s32(highest_bits[i / 2 % 4], __float_as_int(s[i]), __float_as_int(s[i + 1]));
        }
        const int32_t highest = max(__vimax3_s32(highest_bits[0], highest_bits[1], highest_bits[2]), highest_bits[3]);
        const bool moves = __any_sync(~0u, highest > __float_as_int(kSlack) || unseen[0] || unseen[1]);
        if (moves) rebase(kSlack);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
            for (int j = 8 * i; j < 8 * i + 8; ++j) s[j] = device::exp2_fast(s[j]);
            blocks[0][i] = (s[8 * i] + s[8 * i + 1]) + (s[8 * i + 4] + s[8 * i + 5]);
            blocks[1][i] = (s[8 * i + 2] + s[8 * i + 3]) + (s[8 * i + 6] + s[8 * i + 7]);
            add_block(i);
#pragma unroll
            for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1], T());
        }
        float added[2] = {tile_sum(0), tile_sum(1)};
        sum[0] += added[0];
        sum[1] += added[1];
        if (Config::kLists || args.units == nullptr) return;
        if (token + kKeys > prefix) {
            block_sums(prefix - token);
            added[0] = tile_sum(0);
            added[1] = tile_sum(1);
        }
        if (kPacked && (moves || token + kKeys > prefix)) fit_level(token, added);
        prefix_sum[0] += added[0];
        prefix_sum[1] += added[1];
    }

    __device__ __forceinline__ void add_block(int i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) units[r][i / 4] = i % 4 == 0 ? blocks[r][i] : units[r][i / 4] + blocks[r][i];
    }

    __device__ __forceinline__ float tile_sum(int r) const {
        return kUnits == 2 ? units[r][0] + units[r][kUnits - 1] : units[r][0];
    }

    // Moves the references of rows that have grown too far, or have seen nothing so far, to their maximum, and
    // everything that was counted from the old ones along.
    __device__ __forceinline__ void rebase(float slack) {
        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = s[2 * r];
#pragma unroll
            for (int i = 0; i < kKeys / 8; ++i) highest = fmaxf(highest, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const bool unseen = reference[r] == -INFINITY;
            const bool moves = unseen ? highest != -INFINITY : highest > slack;
            const float by = moves ? highest : 0.0f;
            scale[r] = device::exp2_fast(-by);
            reference[r] = unseen ? (moves ? highest : -INFINITY) : reference[r] + by;
            if (unseen) scale[r] = 1.0f;  // of nothing
#pragma unroll
            for (int i = 0; i < kKeys / 8; ++i) {
                s[4 * i + 2 * r] -= by;
                s[4 * i + 2 * r + 1] -= by;
            }
            sum[r] *= scale[r];
            prefix_sum[r] *= scale[r];
        }
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= scale[i / 2 % 2];
    }

    // The piece's result: a whole segment's goes to out and lse, any other into its slot.
    __device__ __forceinline__ void store() {
        const int64_t stream = int64_t{piece.request} * args.num_kv_heads + piece.kv_head;
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float all = device::quad_sum(sum[r]);
            const float below = device::quad_sum(prefix_sum[r]);
            const float log2_all = all == 0.0f ? -INFINITY : reference[r] + device::log2_fast(all);
            const float log2_below = below == 0.0f ? -INFINITY : reference[r] + device::log2_fast(below);
            inverse[r] = all == 0.0f ? 0.0f : __fdividef(1.0f, all);  // NaN stays
            if (piece.slot >= 0) {
                store_partial(r, inverse[r], log2_all, log2_below);
                continue;
            }
            if (row_of(r) >= args.rows || lane % 4 != 0) continue;
            const int32_t query = query_of(args, row_of(r));
            const int32_t head = piece.kv_head * args.group + row_of(r) - query * args.group;
            args.lse[(int64_t{piece.request} * args.num_heads + head) * args.num_queries + query] = log2_all * kLn2;
            if (args.units == nullptr) continue;
            reinterpret_cast<float2*>(args.row_stats)[stream * args.rows + row_of(r)] =
                make_float2(log2_all, log2_below);
        }
        if (piece.slot < 0) store_out(inverse);
    }

    // Rows of out, by way of those of Q in shared memory, which nobody reads any more, in the same swizzle: a lane
    // writes 16 bytes at once. Matrices of 8 x 8: two blocks of eight columns, each of the rows and those 8 below.
    __device__ __forceinline__ void store_out(const float (&inverse)[2]) {
        const uint32_t group = kGroupBarrier + warpgroup;
        const uint32_t rows_of_warp = device::shared_address(shared.q) + own_thread() / kWarp * (16 * kRowBytes);
        const auto at = [&](int32_t row, int32_t chunk) {
            return rows_of_warp + chunk / 8 * (Config::kCtaRows * kRowBytes) + row * kRowBytes +
                   ((chunk % 8) ^ (row % 8)) * 16;
        };
        device::named_barrier(group, kWarpgroup);
#pragma unroll
        for (int i = 0; i < kDim / 8; i += 2) {
            const float* x = o + 4 * i;
            device::store_matrices(at(lane % 16, i + lane / 16),
                                   make_uint4(pack(x[0] * inverse[0], x[1] * inverse[0], T()),
                                              pack(x[2] * inverse[1], x[3] * inverse[1], T()),
                                              pack(x[4] * inverse[0], x[5] * inverse[0], T()),
                                              pack(x[6] * inverse[1], x[7] * inverse[1], T())));
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (row_of(r) >= args.rows) continue;
            const int32_t query = query_of(args, row_of(r));
            const int32_t head = piece.kv_head * args.group + row_of(r) - query * args.group;
            uint4* out = static_cast<uint4*>(args.out) +
                         ((int64_t{piece.request} * args.num_queries + query) * args.num_heads + head) * (kDim / 8);
#pragma unroll
            for (int i = 0; i < kDim / 8; i += 4)
                out[i + lane % 4] = device::load_shared(at(lane / 4 + 8 * r, i + lane % 4));
        }
        device::named_barrier(group, kWarpgroup);  // the next Q may come
    }

    __device__ __forceinline__ void store_partial(int r, float inverse, float log2_all, float log2_below) const {
        if (row_of(r) >= args.rows) return;
        const int32_t tile_row = row_of(r) - piece.row_tile * tile_rows<Config>();
        pack_row<kDim>(o, r, args.partial + (int64_t{piece.slot} * tile_rows<Config>() + tile_row) * (3 * kDim));
        if (lane % 4 == 0) {
            float* stats = args.partial_rows + int64_t{piece.slot} * 3 * tile_rows<Config>() + tile_row;
            stats[0] = log2_all;
            stats[tile_rows<Config>()] = log2_below;
            stats[2 * tile_rows<Config>()] = inverse;
        }
    }

    // A segment without a position, where no merge follows.
    __device__ __forceinline__ void store_nothing() const {
        for (int32_t i = thread / kWarp; i < Config::kCtaRows; i += Config::kConsumers / kWarp) {
            const int32_t row = piece.row_tile * tile_rows<Config>() + rank * Config::kCtaRows + i;
            if (row >= args.rows) return;
            const int32_t query = query_of(args, row);
            const int32_t head = piece.kv_head * args.group + row - query * args.group;
            uint32_t* out = static_cast<uint32_t*>(args.out) +
                            ((int64_t{piece.request} * args.num_queries + query) * args.num_heads + head) * (kDim / 2);
            for (int32_t j = lane; j < kDim / 2; j += kWarp) out[j] = 0;
            if (lane == 0)
                args.lse[(int64_t{piece.request} * args.num_heads + head) * args.num_queries + query] = -INFINITY;
        }
    }

    // Q has been asked for where that did not have to wait for the piece.
    __device__ __forceinline__ void run() {
        if (is_whole<Config>(args) && !shared.any) {
            device::copies_wait();  // of Q, which is not needed
            store_nothing();
        }
        Ring<Config::kStages> k_ring, v_ring;
        if (!shared.any) return;
        // Warpgroups take turns at the tensor cores: one multiplies while the others are at their softmax.
        constexpr bool kTurns = Config::kWarpgroups > 1;
        constexpr int kTurnThreads = 2 * kWarpgroup;
        const int32_t next_turn = warpgroup == Config::kWarpgroups - 1 ? 0 : warpgroup + 1;
        if (kTurns && next_turn == 0) device::named_barrier_arrive(kTurnBarrier, kTurnThreads);
        if (!is_whole<Config>(args)) start_q(piece);
        device::named_barrier_arrive(kStartBarrier, Config::kConsumers + kWarp);
        finish_q();
        while (true) {
            start_piece();
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
            int32_t token = piece.token_begin;
            device::mbarrier_wait(device::shared_address(&shared.full_k[k_ring.stage]), k_ring.parity);
            device::pin_registers(o);
            start_scores(k_ring.stage);
            bool any_broken = is_broken(k_ring.stage);
            device::wgmma_wait<0>();
            for (;; token += kKeys) {
                device::pin_registers(s);
                device::pin_registers(o);
                mask(token, k_ring.stage, any_broken);
                release(&shared.empty_k[k_ring.stage]);
                k_ring.advance();
                softmax(token);
                device::mbarrier_wait(device::shared_address(&shared.full_v[v_ring.stage]), v_ring.parity);
                clear_hole(v_ring.stage, token);
                if (token + kKeys >= token_end) break;
                device::mbarrier_wait(device::shared_address(&shared.full_k[k_ring.stage]), k_ring.parity);
                // P V of this tile, then S of the next. The tensor cores take P from registers, so that issuing P V
                // lasts about as long as it does: S comes last, that other work of this warpgroup may run beside
                // it.
                if (kTurns) device::named_barrier(kTurnBarrier + warpgroup, kTurnThreads);
                start_values(v_ring.stage);
                start_scores(k_ring.stage);
                if (kTurns) device::named_barrier_arrive(kTurnBarrier + next_turn, kTurnThreads);
                any_broken = is_broken(k_ring.stage);
                if (kPacked ? of_64() : unit_step != 0) {
                    emit_whole();
                } else {
                    emit_units<true>(token);
                }
                device::wgmma_wait<0>();
                release(&shared.empty_v[v_ring.stage]);
                v_ring.advance();
            }
            clear_tail(v_ring.stage, token);
            start_values(v_ring.stage);
            emit_units<false>(token);
            device::wgmma_wait<0>();
            device::pin_registers(o);
            release(&shared.empty_v[v_ring.stage]);
            v_ring.advance();
            store();
            Piece& next = shared.next[threadIdx.x / kWarp];
            if (!next_piece_of_warp<Config>(args, shared, &next)) break;
            // The next Q may come when all warps are done with this one; store_out has waited for that.
            device::named_barrier(kGroupBarrier + warpgroup, kWarpgroup);
            start_q(next);
            finish_q();
            if (lane == 0) shared.piece[threadIdx.x / kWarp] = next;
            __syncwarp();
        }
    }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    mage_block_attention_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map) {
    extern __shared__ uint8_t raw_shared[];
    auto& shared =
        *reinterpret_cast<AttentionShared<Config>*>(raw_shared + (-device::shared_address(raw_shared) & 1023));
    const int32_t warp = threadIdx.x / kWarp;
    if (threadIdx.x == 0) {
        device::prefetch_l2(args.seq_lens);
        if (args.prefix_lens != nullptr) device::prefetch_l2(args.prefix_lens);
    }
    if (threadIdx.x == kWarp) {
        device::prefetch_tensor_map(&k_map);
        device::prefetch_tensor_map(&v_map);
        const uint32_t releases = Config::kConsumers / kWarp * Config::kCtas;
        const uint32_t fills = gathers(args) ? kWarpgroup / kWarp : 1;
#pragma unroll
        for (int i = 0; i < Config::kStages; ++i) {
            device::mbarrier_init(device::shared_address(&shared.full_k[i]), fills);
            shared.broken[i] = make_uint4(0, 0, 0, 0);
            device::mbarrier_init(device::shared_address(&shared.full_v[i]), fills);
            device::mbarrier_init(device::shared_address(&shared.empty_k[i]), releases);
            device::mbarrier_init(device::shared_address(&shared.empty_v[i]), releases);
        }
        device::mbarrier_init_fence();
    }
    const int32_t worker = static_cast<int32_t>(blockIdx.x) / Config::kCtas;
    constexpr bool in_cluster = Config::kCtas != 1;
    prefetch_first<Config>(args, worker);
    __syncthreads();
    if (in_cluster) device::cluster_sync_relaxed();  // its barriers are initialised
    device::dependency_wait();
    device::dependency_release();

    if constexpr (Config::kLists) {
        // The producer waits for nobody: lists are short, so that Q, which is asked for now if its rows do not depend
        // on lengths, is not behind much.
        if (warp == 0) {
            find_start<Config::kThreads / kWarp, true>(args, worker, shared);
            __syncwarp();
            device::named_barrier_arrive(kPieceBarrier, Config::kThreads);
        } else {
            if (warp >= kWarpgroup / kWarp && is_whole<Config>(args)) {
                Piece segment;
                const int32_t index = worker / args.schedule.segments_per_request;
                place_segment<true>(args, index, worker - index * args.schedule.segments_per_request, &segment);
                Consumer<Config>(args, shared).start_q(segment);
            }
            device::named_barrier(kPieceBarrier, Config::kThreads);
        }
    } else {
        if (warp == 0) find_start<Config::kThreads / kWarp, false>(args, worker, shared);
        __syncthreads();
    }

    if (warp < kWarpgroup / kWarp) {
        device::registers_shrink<Config::kProducerRegisters>();
        if (gathers(args)) {
            gather<Config>(args, shared);
        } else if (warp == 0) {
            produce<Config>(args, &k_map, &v_map, shared);
        } else if (warp == 1 && worker_rank<Config>() == 0 && !is_whole<Config>(args)) {
            write_pieces<Config>(args, shared);
        }
    } else {
        device::registers_grow<Config::kConsumerRegisters>();
        Consumer<Config>(args, shared).run();
    }
    // No CTA of a cluster leaves while another may still write to it.
    if (in_cluster) device::cluster_sync_relaxed();
}

}  // namespace mage::cuda
