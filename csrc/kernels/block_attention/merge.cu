#include "kernels/block_attention/partial_row.cuh"
#include "kernels/block_attention/pieces.cuh"
#include "kernels/block_attention/variants.h"

// Purpose   out and lse of the segments that the attention kernel left in pieces, zeros of empty ones; masses, or rows
//           of log-shares, from unit sums, whose last factor is the final lse: share[r, j] = 2^(unit[j, r] - log2
//           sum[r]).
// Schedule  grid (blocks, Hkv, B). The first merge_blocks blocks of a stream deal out its rows: merge_warps warps to a
//           row, each over its own pieces, kInFlight of them read at once; the first warp adds the others' results in
//           their order. The other blocks find the final sums of all rows, kParts threads to a row. Of packed sums,
//           they finish what one worker of the attention kernel has left, whatever streams that is of, so that they
//           have as much to do as one another: a warp has some units in a row, a lane eight rows of them. Of others, a
//           warp of theirs adds over the rows of one unit of the stream after the other.
// Memory    partial O as partial_row.cuh says; results of the warps of a row, the final sums, and of packed sums the
//           levels and the words at hand, in shared memory.
// Ceiling   reads all partial results and all unit sums once, from L2 where they fit.
namespace mage::cuda {

namespace {

constexpr int kMergeWarps = 16;
constexpr int kMergeThreads = kMergeWarps * kWarp;
constexpr int kInFlight = 8;      // pieces
constexpr int kParts = 2;         // threads that share the final sums of a row
constexpr int kSumsInFlight = 8;  // pieces of a thread among them
constexpr int kOwn = 4;           // elements of a lane
constexpr int kRecord = kOwn * kWarp + 3;
constexpr int kRows = 8;                // of a lane in the sum over rows that are read at once
constexpr int kLine = 128;              // bytes, of L2
static_assert(kInFlight * 3 <= kWarp);  // lines of pieces of 128 elements that are dropped at once

__device__ __forceinline__ uint32_t pack_as(float low, float high, bool is_half) {
    return is_half ? pack(low, high, __half()) : pack(low, high, __nv_bfloat16());
}

// A row's sums over several pieces, against a common reference: log2 of what they are of is reference + log2(sum).
struct Sums {
    float reference = -INFINITY, all = 0.0f, below = 0.0f;

    __device__ __forceinline__ Sums() {}
    __device__ __forceinline__ Sums(float r, float a, float b) : reference(r), all(a), below(b) {}

    // Moves to a larger reference; returns the base of exponents, and by what older results are scaled.
    __device__ __forceinline__ float rebase(float highest, float* scale) {
        const float next = fmaxf(reference, highest);
        const float base = next == -INFINITY ? 0.0f : next;
        *scale = device::exp2_fast(reference - base);
        reference = next;
        all *= *scale;
        below *= *scale;
        return base;
    }

    __device__ __forceinline__ float log2_all() const { return log2_of(all); }
    __device__ __forceinline__ float log2_below() const { return log2_of(below); }

    __device__ __forceinline__ float log2_of(float sum) const {
        return sum == 0.0f ? -INFINITY : reference + log2f(sum);
    }
};

struct Row {
    const AttentionArgs& args;
    core::Pieces pieces;
    int32_t tile_row;
    int32_t origin, step;  // of the row in all rows of slots: of the first piece's worker, from one piece to the next

    // Of an empty request it has no pieces.
    __device__ __forceinline__ Row(const AttentionArgs& a, int64_t stream, int32_t row, bool empty) : args(a) {
        const int32_t tile = a.row_tiles == 1 ? 0 : row / a.tile_rows;
        tile_row = row - tile * a.tile_rows;
        const int2 both = reinterpret_cast<const int2*>(a.pieces)[stream * a.row_tiles + tile];
        pieces = {empty ? 0 : both.x, both.y};
        step = a.schedule.fixed ? a.tile_rows : 2 * a.tile_rows;
        origin = pieces.first * step + tile_row;
    }

    // core::slot_of_piece's, times the rows of a slot.
    __device__ __forceinline__ int32_t index(int32_t piece) const {
        return origin + piece * step + (piece == 0 ? step - args.tile_rows : 0);
    }

    __device__ __forceinline__ const float* stats(int32_t piece) const {
        return args.partial_rows + (int64_t{3} * index(piece) - 2 * tile_row);
    }
};

__device__ __forceinline__ int64_t wide_product(int32_t x, int32_t y) {
    int64_t product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
    return product;
}

// The rows of this block whose segments are in pieces or empty: out and lse.
__device__ __forceinline__ void merge_rows(const AttentionArgs& args, int64_t stream, bool empty, float* records) {
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t merge_warps = 1 << args.merge_shift;
    const int32_t group = warp >> args.merge_shift, part = warp & merge_warps - 1;
    const int32_t groups = kMergeWarps >> args.merge_shift;
    const int32_t request = blockIdx.z, kv_head = blockIdx.y;
    const bool owns = lane * kOwn < args.head_dim;
    // A stream of one segment that is whole has nothing to merge.
    if (args.row_tiles == 1 && Row(args, stream, 0, empty).pieces.count == 1) return;
    const uint8_t* own_upper = args.partial + 8 * lane;
    const uint8_t* own_bytes = args.partial + 2 * args.head_dim + 4 * lane;
    for (int32_t first = blockIdx.x; first < args.rows; first += args.merge_blocks * groups) {
        const int32_t index = first + group * args.merge_blocks;
        const bool there = index < args.rows;
        const Row row(args, stream, there ? index : first, empty);
        const bool merges = there && row.pieces.count != 1;
        const int32_t row_bytes = 3 * args.head_dim, distance = row_bytes * (row.step << args.merge_shift);
        // Nobody else reads them.
        const int32_t lines = row_bytes / kLine;
        const bool drops = row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(args.partial) % kLine == 0;
        Sums sums;
        float result[kOwn] = {};
        for (int32_t base = part; base < row.pieces.count && merges; base += kWarp << args.merge_shift) {
            // Of the next 32 pieces of this warp, one per lane.
            const int32_t own = base + (lane << args.merge_shift);
            const float* stats = row.stats(own);
            const float all = own < row.pieces.count ? stats[0] : -INFINITY;
            const float own_inverse = own < row.pieces.count ? stats[2 * args.tile_rows] : 0.0f;
            const int32_t count = min(kWarp, row.pieces.count - base + merge_warps - 1 >> args.merge_shift);
            const int32_t reads = owns ? count : 0;
            float weight = 0.0f;
            for (int32_t i = 0; i < count; i += kInFlight) {
                // Pieces of a warp are at even distances, but for the first of all.
                const int32_t piece = base + (i << args.merge_shift);
                const int64_t at = wide_product(row.origin + piece * row.step, row_bytes);
                const int64_t at_first = piece == 0 ? wide_product(row.index(0), row_bytes) : at;
                PackedElements elements[kInFlight];
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) {
                    const int64_t offset = j == 0 ? at_first : at + wide_product(j, distance);
                    elements[j].load_if(j < reads - i, own_upper + offset, own_bytes + offset);
                }
                if (i == 0) {
                    float scale;
                    const float from = sums.rebase(device::warp_max(all), &scale);
                    weight = device::exp2_fast(all - from);
                    sums.all += device::warp_sum(weight);
                    weight = all == -INFINITY ? 0.0f : weight * own_inverse;
#pragma unroll
                    for (int e = 0; e < kOwn; ++e) result[e] *= scale;
                }
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) {
                    elements[j].add_to(result, __shfl_sync(~0u, weight, (i + j) % kWarp));  // past them zeros
                }
                if (drops) {
                    const int32_t j = lane / lines;
                    __syncwarp();
                    if (j < min(kInFlight, count - i))
                        device::discard_line(args.partial + (j == 0 ? at_first : at + wide_product(j, distance)) +
                                             (lane - j * lines) * kLine);
                }
            }
        }
        if (merge_warps > 1) {
            float* own = records + warp * kRecord;
            __syncthreads();
            if (part > 0) {
#pragma unroll
                for (int e = 0; e < kOwn; ++e) own[e * kWarp + lane] = result[e];
                if (lane == 0) {
                    own[kOwn * kWarp] = sums.reference;
                    own[kOwn * kWarp + 1] = sums.all;
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int32_t i = 1; i < merge_warps && part == 0; ++i) {
                const float* other = own + i * kRecord;
                float scale;
                const float from = sums.rebase(other[kOwn * kWarp], &scale);
                const float share = device::exp2_fast(other[kOwn * kWarp] - from);
                sums.all += share * other[kOwn * kWarp + 1];
#pragma unroll
                for (int e = 0; e < kOwn; ++e) result[e] = result[e] * scale + share * other[e * kWarp + lane];
            }
        }
        if (!merges || part != 0) continue;
        const int32_t query = query_of(args, index);
        const int32_t head = kv_head * args.group + index - query * args.group;
        const float inverse = sums.all == 0.0f ? 0.0f : 1.0f / sums.all;  // NaN stays
        if (owns) {
            const int32_t column = packed_column(lane);
            uint32_t* out =
                static_cast<uint32_t*>(args.out) +
                (((int64_t{request} * args.num_queries + query) * args.num_heads + head) * args.head_dim + column) / 2;
            out[0] = pack_as(result[0] * inverse, result[1] * inverse, args.is_half);
            out[4] = pack_as(result[2] * inverse, result[3] * inverse, args.is_half);
        }
        if (lane == 0) {
            args.lse[(int64_t{request} * args.num_heads + head) * args.num_queries + query] = sums.log2_all() * kLn2;
        }
    }
}

// log2 of what every row's shares are divided by; -inf: the row does not count. Returns how many rows count.
__device__ __forceinline__ int32_t find_final_sums(const AttentionArgs& args, int32_t request, int64_t stream,
                                                   float* sums) {
    const int32_t part = threadIdx.x % kParts;
    int32_t kept = 0;
    for (int32_t base = 0; base < args.rows; base += kMergeThreads / kParts) {
        const int32_t index = base + threadIdx.x / kParts;
        bool counts = index < args.rows;
        if (counts && args.row_mask != nullptr)
            counts = args.row_mask[request * args.num_queries + query_of(args, index)];
        float2 found = make_float2(-INFINITY, -INFINITY);
        if (index < args.rows) {
            const Row row(args, stream, index, false);
            if (row.pieces.count == 1) {
                found = reinterpret_cast<const float2*>(args.row_stats)[stream * args.rows + index];
            } else {
                Sums own;
                for (int32_t first = part; first < row.pieces.count; first += kParts * kSumsInFlight) {
                    float all[kSumsInFlight], below[kSumsInFlight];
                    float highest = -INFINITY, scale;
#pragma unroll
                    for (int i = 0; i < kSumsInFlight; ++i) {
                        const int32_t piece = first + i * kParts;
                        const bool is_there = piece < row.pieces.count;
                        const float* stats = row.stats(piece);
                        all[i] = is_there ? stats[0] : -INFINITY;
                        below[i] = is_there && args.prefix_lens != nullptr ? stats[args.tile_rows] : -INFINITY;
                        highest = fmaxf(highest, all[i]);
                    }
                    const float from = own.rebase(highest, &scale);
#pragma unroll
                    for (int i = 0; i < kSumsInFlight; ++i) {
                        own.all += device::exp2_fast(all[i] - from);
                        own.below += device::exp2_fast(below[i] - from);
                    }
                }
                // The parts of a row are neighbours in a warp, and all of them are here or none.
                const uint32_t mask = ((1u << kParts) - 1) << (threadIdx.x % kWarp / kParts * kParts);
#pragma unroll
                for (int step = 1; step < kParts; step *= 2) {
                    const Sums other = {__shfl_xor_sync(mask, own.reference, step),
                                        __shfl_xor_sync(mask, own.all, step), __shfl_xor_sync(mask, own.below, step)};
                    float scale;
                    const float from = own.rebase(other.reference, &scale);
                    const float share = device::exp2_fast(other.reference - from);
                    own.all += share * other.all;
                    own.below += share * other.below;
                }
                found = make_float2(own.log2_all(), own.log2_below());
            }
            // A prefix below 2^-126 of the whole is as good as nothing.
            const float below = found.y - found.x < -126.0f ? -INFINITY : found.y;
            if (part == 0) sums[index] = !counts ? -INFINITY : args.prefix_lens == nullptr ? found.x : below;
        }
        kept += __syncthreads_count(counts && part == 0);
    }
    return kept;
}

// The sums of one unit that a warp reads at once, kRows per lane. Rows that are not there are -inf.
struct UnitSums {
    float values[kRows];

    __device__ __forceinline__ void load(const AttentionArgs& args, const float* unit, int32_t base, bool there) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int32_t row = base + i * kWarp;
            values[i] = row < args.rows && there ? unit[row] : -INFINITY;
        }
    }
};

// Masses, or the rows' log-shares, of the units of this block, a warp to a unit. The first sums are asked for before
// the final ones are found, which they are divided by, and those of the next unit before this one's are written.
__device__ __forceinline__ void finish_units(const AttentionArgs& args, int64_t stream, int32_t length, float* sums) {
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t used = (length + (1 << args.unit_shift) - 1) >> args.unit_shift;  // units that hold a token
    const int32_t step = (gridDim.x - args.merge_blocks) * kMergeWarps;
    int32_t unit = (blockIdx.x - args.merge_blocks) * kMergeWarps + warp;
    float* at = static_cast<float*>(args.units) + (stream * args.num_units + unit) * args.rows;
    UnitSums own;
    own.load(args, at, lane, args.mass != nullptr && unit < used);
    // A block without used units needs none.
    const bool has_units = unit - warp < used;
    const int32_t kept = has_units ? find_final_sums(args, blockIdx.z, stream, sums) : 0;
    float final_sums[kRows];  // of the lane's rows, or as many of them as are added at once
    const auto load_final_sums = [&](int32_t base) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int32_t row = base + i * kWarp;
            final_sums[i] = row < args.rows && has_units ? sums[row] : -INFINITY;
        }
    };
    if (args.mass != nullptr) load_final_sums(lane);
    const float factor = kept > 0 && args.score_max == 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
    for (; unit < args.num_units; unit += step, at += int64_t{step} * args.rows) {
        if (args.mass == nullptr) {
            for (int32_t row = lane; row < args.rows; row += kWarp)
                at[row] = unit < used && sums[row] != -INFINITY ? (at[row] - sums[row]) * kLn2 : -INFINITY;
            continue;
        }
        float mass = 0.0f;
        for (int32_t base = lane; base < args.rows && unit < used; base += kRows * kWarp) {
            if (base > lane) {
                own.load(args, at, base, unit < used);
                load_final_sums(base);
            }
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float sum = final_sums[i];
                const float share = sum == -INFINITY ? 0.0f : device::exp2_fast(own.values[i] - sum);
                mass = args.score_max != 0 ? device::max_or_nan(mass, share) : mass + share;
            }
        }
        if (args.rows > kRows * kWarp) load_final_sums(lane);
        __syncwarp();
        if (unit < used) device::discard_lines(at, args.rows * 4, lane);
        if (unit + step < used) own.load(args, at + int64_t{step} * args.rows, lane, true);
        mass = args.score_max != 0 ? device::warp_max_or_nan(mass) : device::warp_sum(mass);
        if (lane == 0) args.mass[stream * args.num_units + unit] = mass * factor;
    }
}

// What a block knows of the worker whose masses it finishes.
struct FinishShared {
    Share share;
    bool any;  // one piece more
    Piece piece[1];
    Walk walk[1];
    float sums[kMaxPackedRows];               // log2 of the final ones, then the factors of packed sums
    core::UnitLevels levels[kMaxPackedRows];  // then their factors in place of levels
    uint4 words[4][kMergeThreads];            // PackedUnits
};

// The packed sums of a few units that a warp has at once, in shared memory. 1 << shift lanes have a unit; a lane has
// eight rows, which it alone copies and reads.
struct PackedUnits {
    static constexpr int kAtOnce = 4;  // copies of a lane; the reduction is made for as many
    static constexpr int kRows = 8;    // of a copy

    __device__ __forceinline__ static int32_t units(int32_t shift) { return kAtOnce * kWarp >> shift; }

    // Of the i-th copy, from the first of all on.
    __device__ __forceinline__ static int32_t unit_of(int32_t i, int32_t shift) {
        return ((i * kWarp) + static_cast<int32_t>(threadIdx.x % kWarp)) >> shift;
    }

    __device__ __forceinline__ static void start(const AttentionArgs& args, FinishShared& shared, const uint16_t* own,
                                                 int32_t unit, int32_t end, int32_t shift) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int32_t at = unit + unit_of(i, shift);
            device::copy_16_bytes(device::shared_address(&shared.words[i][threadIdx.x]),
                                  own + (at < end ? int64_t{at} * args.unit_rows : 0), at < end ? 16 : 0);
        }
    }

    // Over the lane's rows of its unit of the i-th copy.
    template <bool kMax, typename FactorT>
    __device__ __forceinline__ static float add(const FinishShared& shared, int i, const FactorT& factor_of) {
        const uint4 words = shared.words[i][threadIdx.x];
        const uint32_t own[kRows / 2] = {words.x, words.y, words.z, words.w};
        float all = 0.0f;
#pragma unroll
        for (int e = 0; e < kRows; ++e) {
            const float sum = e % 2 == 0 ? core::PackedSum::low(own[e / 2]) : core::PackedSum::high(own[e / 2]);
            const float share = sum * factor_of(e);
            all = kMax ? device::max_or_nan(all, share) : all + share;
        }
        return all;
    }
};

// Adds, or takes the largest, of kAtOnce values over the 1 << shift lanes that have a unit, so that a lane ends with
// the value that its two upper bits among these lanes name.
template <bool kMax>
__device__ __forceinline__ float reduce_units(const float (&values)[PackedUnits::kAtOnce], int32_t shift) {
    const int32_t lane = threadIdx.x % kWarp;
    const int32_t half = 1 << shift >> 1, quarter = half >> 1;
    const auto join = [](float x, float y) { return kMax ? device::max_or_nan(x, y) : x + y; };
    const bool upper = (lane & half) != 0, second = (lane & quarter) != 0;
    const float first = join(upper ? values[2] : values[0], __shfl_xor_sync(~0u, upper ? values[0] : values[2], half));
    const float next = join(upper ? values[3] : values[1], __shfl_xor_sync(~0u, upper ? values[1] : values[3], half));
    float all = join(second ? next : first, __shfl_xor_sync(~0u, second ? first : next, quarter));
    for (int32_t step = quarter >> 1; step > 0; step >>= 1) all = join(all, __shfl_xor_sync(~0u, all, step));
    return all;
}

// The masses of the warp's units, [unit, end_of_warp), whose first words are on their way; a lane reads those before
// its own end, none if it has no row. `late`: of some rows the first units have another level, or none.
template <bool kMax>
__device__ __forceinline__ void finish_run(const AttentionArgs& args, FinishShared& shared, int64_t stream,
                                           const uint16_t* own, int32_t unit, int32_t end, int32_t end_of_warp,
                                           int32_t shift, bool late, float factor) {
    constexpr int kRows = PackedUnits::kRows;
    const int32_t lane = threadIdx.x % kWarp;
    const int32_t row = (lane & (1 << shift) - 1) * kRows;
    float factors[kRows];
#pragma unroll
    for (int e = 0; e < kRows; ++e) factors[e] = shared.sums[row + e];
    for (; unit < end_of_warp; unit += PackedUnits::units(shift)) {
        device::copies_wait();
        float values[PackedUnits::kAtOnce];
#pragma unroll
        for (int i = 0; i < PackedUnits::kAtOnce; ++i) {
            const int32_t token = unit + PackedUnits::unit_of(i, shift) << args.unit_shift;
            values[i] = late
                            ? PackedUnits::add<kMax>(
                                  shared, i, [&](int e) { return core::level_at(shared.levels[row + e], token, 0.0f); })
                            : PackedUnits::add<kMax>(shared, i, [&](int e) { return factors[e]; });
        }
        __syncwarp();
        device::discard_lines(own - row + int64_t{unit} * args.unit_rows,
                              2 * args.unit_rows * min(PackedUnits::units(shift), end_of_warp - unit), lane);
        PackedUnits::start(args, shared, own, unit + PackedUnits::units(shift), end, shift);
        const float mass = reduce_units<kMax>(values, shift);
        const int32_t quarter = 1 << shift >> 2, load = (lane & (1 << shift) - 1) / quarter;
        const int32_t at = unit + PackedUnits::unit_of(load, shift);
        if ((lane & quarter - 1) == 0 && at < end_of_warp) args.mass[stream * args.num_units + at] = mass * factor;
    }
}

// Masses of the units that a worker of the attention kernel has packed, piece by piece; finish_parts blocks share them.
// The first words are asked for before the final sums are found.
__device__ __forceinline__ void finish_packed(const AttentionArgs& args, int32_t part, FinishShared& shared) {
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int32_t lines = (args.rows + PackedUnits::kRows - 1) / PackedUnits::kRows;  // of eight rows
    const int32_t shift = max(2, kWarp - __clz(lines - 1));
    const int32_t line = lane & (1 << shift) - 1;
    while (shared.any) {
        const Piece& piece = shared.piece[0];
        const int64_t stream = int64_t{piece.request} * args.num_kv_heads + piece.kv_head;
        const int32_t first = piece.token_begin >> args.unit_shift;
        const int32_t last = (piece.token_end - 1 >> args.unit_shift) + 1;
        // Whole loads to a warp.
        const int32_t loads = (last - first << shift) + kWarp - 1 >> 5;
        const int32_t run = core::ceil_div(loads, kMergeWarps * args.finish_parts) * (kWarp >> shift);
        const int32_t unit = first + (part * kMergeWarps + warp) * run;
        const int32_t end = line < lines ? min(unit + run, last) : 0, end_of_warp = min(unit + run, last);
        const uint16_t* own = static_cast<const uint16_t*>(args.units) + stream * args.num_units * args.unit_rows +
                              line * PackedUnits::kRows;
        PackedUnits::start(args, shared, own, unit, end, shift);
        const int32_t row = threadIdx.x;
        if (row < args.rows) {
            const int64_t at = piece.slot < 0 ? args.slots + stream : int64_t{piece.slot};
            device::copy_16_bytes(device::shared_address(&shared.levels[row]),
                                  args.unit_levels + at * args.tile_rows + row, 16);
        }
        const int32_t kept = find_final_sums(args, piece.request, stream, shared.sums);
        device::copies_wait();
        __syncthreads();
        bool late = false;
        if (row < kMaxPackedRows) {
            const float sum = row < args.rows ? shared.sums[row] : -INFINITY;
            core::UnitLevels levels = row < args.rows ? shared.levels[row] : core::no_levels();
            const auto factor_of = [&](float level) {
                return sum == -INFINITY ? 0.0f : device::exp2_fast(level - sum);
            };
            late = sum != -INFINITY && levels.begin > piece.token_begin;
            levels.level = shared.sums[row] = factor_of(levels.level);
            levels.previous = factor_of(levels.previous);
            shared.levels[row] = levels;
        }
        late = __syncthreads_or(late) != 0;
        if (args.score_max != 0) {
            finish_run<true>(args, shared, stream, own, unit, end, end_of_warp, shift, late, 1.0f);
        } else {
            const float factor = kept > 0 ? 1.0f / static_cast<float>(kept) : 1.0f;
            finish_run<false>(args, shared, stream, own, unit, end, end_of_warp, shift, late, factor);
        }
        device::copies_wait();
        __syncthreads();
        if (warp == 0) {
            Walk walk = shared.walk[0];
            Piece next;
            const bool any = next_piece<false>(args, shared.share, &walk, &next);
            __syncwarp();
            if (lane == 0) {
                shared.any = any;
                shared.walk[0] = walk;
                if (any) shared.piece[0] = next;
            }
        }
        __syncthreads();
    }
}

// Past the last token there is no mass.
__device__ __forceinline__ void clear_unused(const AttentionArgs& args, int64_t stream, int32_t length) {
    const int32_t used = (length + (1 << args.unit_shift) - 1) >> args.unit_shift;
    for (int32_t i = used + blockIdx.x * kMergeThreads + threadIdx.x; i < args.num_units;
         i += args.merge_blocks * kMergeThreads)
        args.mass[stream * args.num_units + i] = 0.0f;
}

template <Finish kFinish>
__global__ void __launch_bounds__(kMergeThreads, 2)
    mage_block_attention_merge_kernel(const __grid_constant__ AttentionArgs args) {
    const int64_t stream = int64_t{blockIdx.z} * args.num_kv_heads + blockIdx.y;
    const bool merges = kFinish == Finish::kNothing || static_cast<int32_t>(blockIdx.x) < args.merge_blocks;
    // Lengths were there before the attention launch released this one: what follows from them alone is found before
    // the wait.
    const int32_t seq_len = __ldcg(args.seq_lens + blockIdx.z);
    if constexpr (kFinish == Finish::kPacked) {
        if (!merges) {
            __shared__ FinishShared finish;
            const int32_t blocks = gridDim.x - args.merge_blocks;
            const int32_t index = (blockIdx.z * gridDim.y + blockIdx.y) * blocks + (blockIdx.x - args.merge_blocks);
            if (threadIdx.x < kWarp) find_start<1, false>(args, index / args.finish_parts, finish);
            __syncthreads();
            device::dependency_wait();
            device::dependency_release();
            finish_packed(args, index % args.finish_parts, finish);
            return;
        }
    }
    device::dependency_wait();
    device::dependency_release();
    if (merges) {
        const int32_t length = args.indices == nullptr ? min(max(seq_len, 0), args.max_seq_len)
                                                       : stream_length<true>(args, blockIdx.z, blockIdx.y);
        __shared__ float records[kMergeWarps * kRecord];
        if constexpr (kFinish == Finish::kPacked) clear_unused(args, stream, length);
        merge_rows(args, stream, length == 0, records);
    } else if constexpr (kFinish == Finish::kUnits) {
        __shared__ float sums[kMaxUnitRows];
        finish_units(args, stream, min(max(seq_len, 0), args.max_seq_len), sums);
    }
}

}  // namespace

const MergeVariant& merge_variant(Finish finish) {
    static const MergeVariant variants[kFinishes] = {
        {"mage_block_attention_merge_kernel", &mage_block_attention_merge_kernel<Finish::kNothing>, kMergeThreads,
         kMergeWarps},
        {"mage_block_attention_merge_kernel_mass", &mage_block_attention_merge_kernel<Finish::kUnits>, kMergeThreads,
         kMergeWarps},
        {"mage_block_attention_merge_kernel_packed", &mage_block_attention_merge_kernel<Finish::kPacked>, kMergeThreads,
         kMergeWarps},
    };
    return variants[static_cast<int>(finish)];
}

}  // namespace mage::cuda
