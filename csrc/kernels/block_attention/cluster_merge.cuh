#pragma once

#include "kernels/block_attention/partial_row.cuh"
#include "kernels/block_attention/worker.cuh"

// Purpose   the end of a small call, in the attention kernel itself: the CTAs of a cluster share one segment, and merge
//           its pieces and finish its masses through distributed shared memory. No second launch.
// Schedule  a split of the cluster is a worker (one CTA, or several that share the rows) with one piece. Every CTA owns
//           `slice` of its worker's rows. A CTA writes its rows down in its own ring, which nothing reads any more, and
//           once every CTA has done so (ready) one bulk copy takes each slice to its owner (merged), which adds pieces
//           up in the order of the splits. With masses all CTAs get the sums of all their rows, and each finishes the
//           units of its own piece; of several CTAs that share rows, the others hand their part to the first (parts).
// Memory    in the ring: outgoing records of rows, incoming records [splits, slice], incoming sums [splits, rows of the
//           CTA], final sums, masses of the other CTAs. A record is O in 24 bits and 16 bytes: what
//           exponents are of, the sums of all and below P.
// Ceiling   distributed shared memory takes about 18 bytes a clock from each CTA, whatever instruction moves them.
namespace mage::cuda {

constexpr int kMaxSplits = 16;

template <typename Config>
struct ClusterMerge {
    static constexpr int kDim = Config::kDim;
    static constexpr int kRecord = 3 * kDim + 16;
    static constexpr int kRows = Config::kCtaRows;
    static constexpr int kWarps = Config::kConsumers / kWarp;
    static constexpr int kOwn = 4;  // elements of a lane
    static constexpr int kInFlight = 4;
    // Slices are rounded up: at most kMaxSplits - 1 rows more than there are.
    static constexpr int kIncoming = kRows * kRecord;
    static constexpr int kSums = kIncoming + (kRows + kMaxSplits) * kRecord;
    static constexpr int kFinal = kSums + kMaxSplits * kRows * 16;
    static constexpr int kMasses = kFinal + kRows * 4;
    static constexpr int kMostUnits = 64;  // of a piece
    static constexpr int kWeights = kMasses + 3 * kMostUnits * 4;
    static constexpr int kEnd = kWeights + (kRows / 2 + kMaxSplits) * kMaxSplits * 4;
    // Three warpgroups have no registers for it.
    static constexpr bool kServed = Config::kWarpgroups < 3 && kEnd <= 2 * Config::kStages * Config::kTileBytes;

    const AttentionArgs& args;
    AttentionShared<Config>& shared;
    const Piece& piece;
    const int32_t ctas, split, rank;
    const int32_t slice;      // rows of an owner
    const int32_t first_row;  // of this CTA, in the stream
    const int32_t valid;      // rows of this CTA that are rows of the stream

    __device__ __forceinline__ ClusterMerge(const AttentionArgs& a, AttentionShared<Config>& sh)
        : args(a),
          shared(sh),
          piece(sh.piece[threadIdx.x / kWarp]),
          ctas(worker_ctas<Config>(a)),
          split(static_cast<int32_t>(device::cluster_rank()) / ctas),
          rank(static_cast<int32_t>(device::cluster_rank()) - split * ctas),
          slice((kRows + max(a.splits, 1) - 1) / max(a.splits, 1)),
          first_row(piece.row_tile * tile_rows<Config>(a) + rank * kRows),
          valid(min(max(a.rows - first_row, 0), kRows)) {}

    __device__ __forceinline__ uint8_t* ring() const { return shared.k[0]; }
    __device__ __forceinline__ int32_t rows_of(int32_t owner) const {
        return min(max(valid - owner * slice, 0), slice);
    }
    __device__ __forceinline__ const float4& sums_in(int32_t from, int32_t row) const {
        return reinterpret_cast<const float4*>(ring() + kSums)[from * kRows + row];
    }
    __device__ __forceinline__ int32_t own_units() const {
        const int32_t tokens = piece.token_end - piece.token_begin;
        return (tokens + (1 << args.unit_shift) - 1) >> args.unit_shift;
    }

    // One thread, at the start.
    __device__ __forceinline__ void expect() const {
        const int32_t others = args.units == nullptr ? 0 : piece.pieces - (split < piece.pieces ? 1 : 0);
        device::mbarrier_arrive_expect(device::shared_address(&shared.merged),
                                       piece.pieces * rows_of(split) * kRecord + others * valid * 16);
        if (args.mass != nullptr) {
            const int32_t units = rank == 0 ? own_units() * (ctas - 1) : 0;
            device::mbarrier_arrive_expect(device::shared_address(&shared.parts), units * 4);
        }
    }

    // A warp has read its last tile, and those of its CTA too: the CTAs with the same rows may write to the ring.
    __device__ __forceinline__ void announce() const {
        const int32_t lane = threadIdx.x % kWarp;
        if (threadIdx.x / kWarp == kWarpgroup / kWarp && lane < args.splits)
            device::mbarrier_arrive_cluster(device::shared_address(&shared.ready), lane * ctas + rank);
    }

    // All consumers: O and sums of this thread's two rows, 8 apart, to their owners.
    __device__ __forceinline__ void send(const float (&o)[kDim / 2], int32_t row, const float (&reference)[2],
                                         const float (&all)[2], const float (&below)[2]) const {
        device::named_barrier(kTailBarrier, Config::kConsumers);
        announce();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint8_t* record = ring() + (row + 8 * r) * kRecord;
            pack_row<kDim>(o, r, record);
            if (threadIdx.x % 4 == 0)
                *reinterpret_cast<float4*>(record + 3 * kDim) = make_float4(reference[r], all[r], below[r], 0.0f);
            // Of all rows together, for all CTAs, where the sums that come from here will lie.
            if (threadIdx.x % 4 == 0 && args.units != nullptr)
                reinterpret_cast<float4*>(ring() + kSums)[split * kRows + row + 8 * r] =
                    make_float4(reference[r], all[r], below[r], 0.0f);
        }
        device::fence_async_shared();
        device::named_barrier(kTailBarrier, Config::kConsumers);
        const int32_t lane = threadIdx.x % kWarp;
        if (threadIdx.x / kWarp != kWarpgroup / kWarp || lane >= args.splits) return;
        device::mbarrier_wait(device::shared_address(&shared.ready), 0);
        const int32_t cta = lane * ctas + rank;
        const uint32_t from = device::shared_address(ring()), to = device::cluster_address(from, cta);
        const uint32_t merged = device::cluster_address(device::shared_address(&shared.merged), cta);
        if (rows_of(lane) > 0) {
            device::copy_cluster_async(to + kIncoming + split * slice * kRecord, from + lane * slice * kRecord,
                                       rows_of(lane) * kRecord, merged);
        }
        if (args.units == nullptr || valid == 0) return;
        const uint32_t sums = kSums + split * kRows * 16;
        if (lane != split) device::copy_cluster_async(to + sums, from + sums, valid * 16, merged);
    }

    // log2 of a row's sum.
    static __device__ __forceinline__ float log2_of(float base, float sum) {
        return sum == 0.0f ? -INFINITY : base + device::log2_fast(sum);
    }

    // A row's sums over all pieces, by the lanes of a quad: `sums_at(i)` of piece i.
    struct RowSums {
        float base, all, below;
    };
    template <typename SumsT>
    __device__ __forceinline__ RowSums add_sums(const SumsT& sums_at) const {
        const int32_t part = threadIdx.x % 4;
        float highest = -INFINITY;
        for (int32_t i = part; i < piece.pieces; i += 4) highest = fmaxf(highest, sums_at(i).x);
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        RowSums total = {highest == -INFINITY ? 0.0f : highest, 0.0f, 0.0f};
        for (int32_t i = part; i < piece.pieces; i += 4) {
            const float4 sums = sums_at(i);
            const float share = device::exp2_fast(sums.x - total.base);
            total.all += share * sums.y;
            total.below += share * sums.z;
        }
        total.all = device::quad_sum(total.all);
        total.below = device::quad_sum(total.below);
        return total;
    }

    // All consumers: out and lse of this CTA's slice; then masses.
    __device__ __forceinline__ void finish() const {
        constexpr int kQuads = Config::kConsumers / 4;
        const int32_t thread = threadIdx.x - kWarpgroup, lane = thread % kWarp, warp = thread / kWarp;
        const bool emits = !Config::kLists && args.units != nullptr;
        UnitValues values;
        if (emits) values.load(*this, warp, lane);
        device::mbarrier_wait(device::shared_address(&shared.merged), 0);
        auto* weights = reinterpret_cast<float*>(ring() + kWeights);
        const uint8_t* records = ring() + kIncoming;
        const int32_t stride = slice * kRecord;
        // What every piece of a row counts, a quad to a row.
        for (int32_t base = 0; base < rows_of(split); base += kQuads) {
            const int32_t place = base + thread / 4;
            const auto sums_at = [&](int32_t i) {
                const uint8_t* record = records + min(place, slice - 1) * kRecord + i * stride;
                return *reinterpret_cast<const float4*>(record + 3 * kDim);
            };
            const RowSums total = add_sums(sums_at);
            if (place >= rows_of(split)) continue;
            const float inverse = total.all == 0.0f ? 0.0f : __fdividef(1.0f, total.all);  // NaN stays
            for (int32_t i = thread % 4; i < piece.pieces; i += 4)
                weights[place * kMaxSplits + i] = device::exp2_fast(sums_at(i).x - total.base) * inverse;
            if (thread % 4 == 0) write_lse(first_row + split * slice + place, log2_of(total.base, total.all));
        }
        if (emits) find_final_sums(thread);
        device::named_barrier(kTailBarrier, Config::kConsumers);
#pragma unroll 2
        for (int32_t place = warp; place < rows_of(split); place += kWarps) {
            float result[kOwn] = {};
            for (int32_t first = 0; first < piece.pieces; first += kInFlight) {
                PackedElements elements[kInFlight];
                float share[kInFlight];
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    share[i] = 0.0f;
                    if (first + i < piece.pieces && lane * kOwn < kDim) {
                        elements[i].load(records + place * kRecord + (first + i) * stride, kDim, lane);
                        share[i] = weights[place * kMaxSplits + first + i];
                    }
                }
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) elements[i].add_to(result, share[i]);
            }
            write_row(first_row + split * slice + place, lane, result);
        }
        if (emits) finish_units(thread, values);
    }

    // A row of out by a warp: elements kOwn * lane, ... in the order of pack_row.
    __device__ __forceinline__ void write_row(int32_t row, int32_t lane, const float (&result)[kOwn]) const {
        using T = typename Config::T;
        if (lane * kOwn >= kDim) return;
        const int32_t query = query_of(args, row);
        const int64_t head = piece.kv_head * args.group + row - query * args.group;
        uint32_t* out = static_cast<uint32_t*>(args.out) +
                        (((int64_t{piece.request} * args.num_queries + query) * args.num_heads + head) * kDim +
                         packed_column(lane)) /
                            2;
        out[0] = pack(result[0], result[1], T());
        out[4] = pack(result[2], result[3], T());
    }

    __device__ __forceinline__ void write_lse(int32_t row, float log2_all) const {
        const int32_t query = query_of(args, row);
        const int64_t head = piece.kv_head * args.group + row - query * args.group;
        args.lse[(int64_t{piece.request} * args.num_heads + head) * args.num_queries + query] = log2_all * kLn2;
    }

    __device__ __forceinline__ bool counts(int32_t query) const {
        return args.row_mask == nullptr || args.row_mask[piece.request * args.num_queries + query];
    }

    __device__ __forceinline__ float* final_sums() const { return reinterpret_cast<float*>(ring() + kFinal); }

    // What the shares of this CTA's rows are divided by, log2; -inf: a row does not count.
    __device__ __forceinline__ void find_final_sums(int32_t thread) const {
        for (int32_t base = 0; base < valid; base += Config::kConsumers / 4) {
            const int32_t row = base + thread / 4;
            const RowSums total = add_sums([&](int32_t i) { return sums_in(i, min(row, kRows - 1)); });
            if (row >= valid || thread % 4 != 0) continue;
            const float all = log2_of(total.base, total.all), below = log2_of(total.base, total.below);
            // A prefix below 2^-126 of the whole is as good as nothing.
            const float sum = args.prefix_lens == nullptr ? all : below - all < -126.0f ? -INFINITY : below;
            final_sums()[row] = counts(query_of(args, first_row + row)) ? sum : -INFINITY;
        }
    }

    // The sums of one unit over this CTA's rows, log2, kLoads per lane.
    static constexpr int kLoads = kRows / kWarp;
    struct UnitValues {
        float values[kLoads];

        __device__ __forceinline__ void load(const ClusterMerge& merge, int32_t unit, int32_t lane) {
            const AttentionArgs& args = merge.args;
            const int64_t stream = int64_t{merge.piece.request} * args.num_kv_heads + merge.piece.kv_head;
            const int64_t at = stream * args.num_units + (merge.piece.token_begin >> args.unit_shift) + unit;
            const float* own = args.units + at * args.rows + merge.first_row;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int32_t row = lane + i * kWarp;
                values[i] = row < merge.valid && unit < merge.own_units() ? own[row] : -INFINITY;
            }
        }
    };

    // Masses, or the rows' log-shares, of this piece's units, a warp to a unit; zeros of units that hold no token.
    __device__ __forceinline__ void finish_units(int32_t thread, UnitValues& unit_values) const {
        const int32_t lane = thread % kWarp, warp = thread / kWarp;
        const int64_t stream = int64_t{piece.request} * args.num_kv_heads + piece.kv_head;
        const int32_t first_unit = piece.token_begin >> args.unit_shift, num_own = own_units();
        const int32_t used = (clamped_length(args, piece.request) + (1 << args.unit_shift) - 1) >> args.unit_shift;
        float* units = args.units + stream * args.num_units * args.rows + first_row;
        const float (&values)[kLoads] = unit_values.values;
        float sums[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            sums[i] = lane + i * kWarp < valid ? final_sums()[lane + i * kWarp] : -INFINITY;
        if (args.mass == nullptr) {
            for (int32_t unit = warp; unit < num_own; unit += kWarps) {
                float* own = units + int64_t{first_unit + unit} * args.rows;
#pragma unroll
                for (int i = 0; i < kLoads; ++i) {
                    const int32_t row = lane + i * kWarp;
                    if (row < valid) own[row] = sums[i] == -INFINITY ? -INFINITY : (values[i] - sums[i]) * kLn2;
                }
                unit_values.load(*this, unit + kWarps, lane);
            }
            for (int32_t unit = used + split * kWarps + warp; unit < args.num_units; unit += args.splits * kWarps) {
                for (int32_t row = lane; row < valid; row += kWarp) units[int64_t{unit} * args.rows + row] = -INFINITY;
            }
            return;
        }
        const auto join = [&](float a, float b) { return args.score_max != 0 ? fmaxf(a, b) : a + b; };
        int32_t kept = 0;
        for (int32_t query = lane; query < args.num_queries; query += kWarp) kept += counts(query) ? args.group : 0;
        kept = __reduce_add_sync(~0u, kept);
        const float factor = kept > 0 && args.score_max == 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
        float* mass = args.mass + stream * args.num_units;
        const uint32_t parts = device::shared_address(&shared.parts);
        auto* others = reinterpret_cast<float*>(ring() + kMasses);  // [CTAs - 1, units]
        for (int32_t unit = warp; unit < num_own; unit += kWarps) {
            float value = 0.0f;
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                value = join(value, sums[i] == -INFINITY ? 0.0f : device::exp2_fast(values[i] - sums[i]));
            unit_values.load(*this, unit + kWarps, lane);
#pragma unroll
            for (int step = 16; step > 0; step /= 2) value = join(value, __shfl_xor_sync(~0u, value, step));
            if (rank == 0) {
                if (unit == warp && ctas > 1) device::mbarrier_wait(parts, 0);
                for (int32_t i = 0; i < ctas - 1; ++i) value = join(value, others[i * kMostUnits + unit]);
                if (lane == 0) mass[first_unit + unit] = value * factor;
            } else if (lane == 0) {
                const int32_t first = split * ctas;
                const uint32_t to = device::shared_address(&others[(rank - 1) * kMostUnits + unit]);
                device::store_cluster_async(device::cluster_address(to, first), __float_as_uint(value),
                                            device::cluster_address(parts, first));
            }
        }
        if (rank != 0) return;
        for (int32_t unit = used + split * Config::kConsumers + thread; unit < args.num_units;
             unit += args.splits * Config::kConsumers)
            mass[unit] = 0.0f;
    }
};

}  // namespace mage::cuda
