#pragma once

#include "kernels/block_attention/partial_row.cuh"
#include "kernels/block_attention/pieces.cuh"

// Purpose   the end of a small call over lists, in the attention kernel itself: the CTAs of a cluster share a segment
//           and merge its pieces through distributed shared memory. No second launch.
// Schedule  a split of the cluster is a worker (one CTA, or several that share the rows) with one piece. Every CTA owns
//           `slice` of its worker's rows. A CTA writes its rows down in its own ring, which nothing reads any more, and
//           once every CTA has done so (ready) one bulk copy takes each slice to its owner (merged), which adds pieces
//           up in the order of the splits.
// Memory    in the ring: outgoing records of rows, incoming records [splits, slice], what each counts. A record is O in
//           24 bits and 16 bytes: what exponents are of, and the sum.
// Ceiling   distributed shared memory takes about 18 bytes a clock from each CTA, whatever instruction moves them.
namespace mage::cuda {

constexpr int kMaxSplits = 16;

template <typename Config>
struct ClusterMerge {
    static constexpr int kDim = Config::kDim;
    static constexpr int kRecord = 3 * kDim + 16;
    static constexpr int kRows = Config::kCtaRows;
    static constexpr int kWarps = Config::kConsumers / kWarp;
    static constexpr int kOwn = 4;     // elements of a lane
    static constexpr int kAtOnce = 4;  // rows of a warp
    // Slices are rounded up: at most kMaxSplits - 1 rows more than there are.
    static constexpr int kIncoming = kRows * kRecord;
    static constexpr int kWeights = kIncoming + (kRows + kMaxSplits) * kRecord;
    static constexpr int kEnd = kWeights + (kRows / 2 + kMaxSplits) * kMaxSplits * 4;
    // Three warpgroups have no registers for it.
    static constexpr bool kServed =
        Config::kLists && Config::kWarpgroups < 3 && kEnd <= 2 * Config::kStages * Config::kTileBytes;

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
          slice((kRows + a.splits - 1) / a.splits),
          first_row(piece.row_tile * tile_rows<Config>(a) + rank * kRows),
          valid(min(max(a.rows - first_row, 0), kRows)) {}

    __device__ __forceinline__ uint8_t* ring() const { return shared.k[0]; }
    __device__ __forceinline__ int32_t rows_of(int32_t owner) const {
        return min(max(valid - owner * slice, 0), slice);
    }
    // One thread, at the start.
    __device__ __forceinline__ void expect() const {
        device::mbarrier_arrive_expect(device::shared_address(&shared.merged), piece.pieces * rows_of(split) * kRecord);
    }

    // A warp has read its last tile, and those of its CTA too: the CTAs with the same rows may write to the ring.
    __device__ __forceinline__ void announce() const {
        const int32_t lane = threadIdx.x % kWarp;
        if (threadIdx.x / kWarp == kWarpgroup / kWarp && lane < args.splits)
            device::mbarrier_arrive_cluster(device::shared_address(&shared.ready), lane * ctas + rank);
    }

    // All consumers: O and sums of this thread's two rows, 8 apart, to their owners.
    __device__ __forceinline__ void send(const float (&o)[kDim / 2], int32_t row, const float (&reference)[2],
                                         const float (&all)[2], const bool (&has)[2]) const {
        device::named_barrier(kTailBarrier, Config::kConsumers);
        announce();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!has[r]) continue;
            uint8_t* record = ring() + (row + 8 * r) * kRecord;
            pack_row<kDim>(o, r, record);
            if (threadIdx.x % 4 == 0)
                *reinterpret_cast<float4*>(record + 3 * kDim) = make_float4(reference[r], all[r], 0.0f, 0.0f);
        }
        device::fence_async_shared();
        device::named_barrier(kTailBarrier, Config::kConsumers);
        const int32_t lane = threadIdx.x % kWarp;
        if (threadIdx.x / kWarp != kWarpgroup / kWarp || lane >= args.splits || rows_of(lane) == 0) return;
        device::mbarrier_wait(device::shared_address(&shared.ready), 0);
        const int32_t cta = lane * ctas + rank;
        const uint32_t from = device::shared_address(ring());
        device::copy_cluster_async(device::cluster_address(from + kIncoming + split * slice * kRecord, cta),
                                   from + lane * slice * kRecord, rows_of(lane) * kRecord,
                                   device::cluster_address(device::shared_address(&shared.merged), cta));
    }

    // log2 of a row's sum.
    static __device__ __forceinline__ float log2_of(float base, float sum) {
        return sum == 0.0f ? -INFINITY : base + device::log2_fast(sum);
    }

    // All consumers: out and lse of this CTA's slice.
    __device__ __forceinline__ void finish() const {
        constexpr int kQuads = Config::kConsumers / 4;
        const int32_t thread = threadIdx.x - kWarpgroup, lane = thread % kWarp, warp = thread / kWarp;
        const int32_t stride = slice * kRecord, rows = rows_of(split);
        const uint8_t* records = ring() + kIncoming;
        auto* weights = reinterpret_cast<float*>(ring() + kWeights);
        device::mbarrier_wait(device::shared_address(&shared.merged), 0);
        // What every piece of a row counts, a quad to a row.
        for (int32_t base = 0; base < rows; base += kQuads) {
            const bool owns = base + thread / 4 < rows;
            const int32_t place = owns ? base + thread / 4 : rows - 1;
            const auto sums_of = [&](int32_t i) {
                return *reinterpret_cast<const float2*>(records + place * kRecord + i * stride + 3 * kDim);
            };
            float highest = -INFINITY, all = 0.0f;
            for (int32_t i = thread % 4; i < piece.pieces; i += 4) highest = fmaxf(highest, sums_of(i).x);
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float from = highest == -INFINITY ? 0.0f : highest;
            for (int32_t i = thread % 4; i < piece.pieces; i += 4)
                all += device::exp2_fast(sums_of(i).x - from) * sums_of(i).y;
            all = device::quad_sum(all);
            const float inverse = all == 0.0f ? 0.0f : __fdividef(1.0f, all);  // NaN stays
            for (int32_t i = thread % 4; i < piece.pieces && owns; i += 4)
                weights[place * kMaxSplits + i] = device::exp2_fast(sums_of(i).x - from) * inverse;
            if (thread % 4 == 0 && owns) write_lse(first_row + split * slice + place, log2_of(from, all));
        }
        device::named_barrier(kTailBarrier, Config::kConsumers);
        // Rows of a warp at once, so that what one waits for another has.
        for (int32_t base = warp; base < rows; base += kAtOnce * kWarps) {
            float result[kAtOnce][kOwn] = {};
            for (int32_t i = 0; i < piece.pieces; ++i) {
                PackedElements elements[kAtOnce];
                float share[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    const int32_t place = min(base + j * kWarps, rows - 1);
                    elements[j].load(records + place * kRecord + i * stride, kDim, lane % (kDim / kOwn));
                    share[j] = weights[place * kMaxSplits + i];
                }
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) elements[j].add_to(result[j], share[j]);
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                if (base + j * kWarps < rows) write_row(first_row + split * slice + base + j * kWarps, lane, result[j]);
            }
        }
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
};

}  // namespace mage::cuda
