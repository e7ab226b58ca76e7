// Purpose   the most probable token of each row of logits, its probability and the row's entropy; see
//           mage/token_confidence.h.
// Schedule  a row is 1 to 8 pieces by its length alone; a cluster of 1 to 8 CTAs has them, fewer where there are more
//           rows, so that a few rows fill the GPU and many are one wave of CTAs. A CTA's threads take batches of 4
//           vectors of 16 bytes, 256 apart, the next one loading while one is added. A batch is added with the largest
//           logit so far as reference, and what was added before is rescaled where that grew. A thread remembers the
//           vector in which its largest logit stood first; a warp reads the first one with its largest logit once more
//           to find the place, while its sums are joined. The parts of a piece's warps are joined, and those of the
//           row's pieces, which are sent to the cluster's first CTA. So the sums of a row have one order, whoever
//           computed its pieces.
//           Vectors are counted from the row's first logit and not from a boundary of memory: the order is the same for
//           every base and stride too. Where a row is not aligned to 16 bytes, a vector is shifted out of two aligned
//           ones (the second is the neighbour's and hits L1), and those at the ends are read logit by logit.
// Memory    registers; 64 parts of warps and 8 of pieces in shared memory. Nothing outside a row is read.
// Sync      one cluster barrier, of which the wait comes before the first store to another CTA; those stores count down
//           an mbarrier of the first CTA. Atomics on integers alone, no workspace.
// Ceiling   N * V * dtype_bytes read once. Of the issue slots about half are needed for bf16: 8 instructions a logit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "device/barrier.cuh"
#include "device/math.cuh"
#include "kernels/kernel_list.h"
#include "mage/token_confidence.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "token_confidence";
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;
constexpr int kBatch = 4;  // vectors that a thread reads at once
constexpr int kMaxPieces = 8;
constexpr int kPieceVectors = 2048;  // of a row: one more piece for so many, up to a power of two
constexpr int kCtasPerSm = 4;
constexpr int kHopperMultiprocessors = 132;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLeast = -100.0f;  // e^x is 0 there; NaN and -inf are taken for it
constexpr int32_t kNoToken = 0x7fffffff;
constexpr uint32_t kNoVector = 0xffffffff;

struct TokenConfidenceArgs {
    const char* logits;
    int64_t row_bytes;  // from row to row
    int64_t* token;
    float* prob;
    float* entropy;
    int32_t vocab_size;
    uint32_t vectors;        // of a row, the last one may be a part
    uint32_t pieces;         // of a row
    uint32_t piece_vectors;  // of a piece, the last ones may have fewer
    uint32_t own_pieces;     // of a CTA
    uint32_t cluster_log2;   // of the CTAs of a row
};

// What is known of a part of a row: sum of e^(x - top), of e^(x - top) (x - top), and where top stands first.
struct alignas(16) Part {
    double sum;
    double weighted;
    float top;
    int32_t token;
    int32_t unused[2];
};

template <typename T>
struct Logits {
    static constexpr int kElements = kVectorBytes / sizeof(T);
    static constexpr uint32_t kLowestBits = std::is_same_v<T, float>    ? 0xff800000u
                                            : std::is_same_v<T, __half> ? 0xfc00u
                                                                        : 0xff80u;  // of -inf

    static __device__ __forceinline__ void unpack(uint4 vector, float (&values)[kElements]) {
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (std::is_same_v<T, float>) {
                values[i] = __uint_as_float(words[i]);
            } else if constexpr (std::is_same_v<T, __half>) {
                const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
                values[2 * i] = pair.x;
                values[2 * i + 1] = pair.y;
            } else {
                values[2 * i] = __uint_as_float(words[i] << 16);
                values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
            }
        }
    }

    // The largest logit of a vector; NaN if it holds nothing else.
    static __device__ __forceinline__ float largest(uint4 vector) {
        if constexpr (std::is_same_v<T, float>) {
            return fmaxf(fmaxf(__uint_as_float(vector.x), __uint_as_float(vector.y)),
                         fmaxf(__uint_as_float(vector.z), __uint_as_float(vector.w)));
        } else {
            using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
            const auto pair = [](const uint32_t& word) { return *reinterpret_cast<const Pair*>(&word); };
            const Pair top = __hmax2(__hmax2(pair(vector.x), pair(vector.y)), __hmax2(pair(vector.z), pair(vector.w)));
            if constexpr (std::is_same_v<T, __half>) return fmaxf(__low2float(top), __high2float(top));
            const uint32_t word = *reinterpret_cast<const uint32_t*>(&top);
            return fmaxf(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
        }
    }
};

// A row's logits as vectors 0, 1, ...; what lies behind its last logit is -inf.
template <typename T, bool kAligned>
struct Row {
    static constexpr int kElements = Logits<T>::kElements;
    static constexpr uint32_t kLowestBits = Logits<T>::kLowestBits;

    const char* base;
    int32_t vocab_size;
    uint32_t whole;   // vectors before it may be read as such, but for the first one where there is an offset
    uint32_t offset;  // of the first logit behind a boundary of 16 bytes

    __device__ __forceinline__ Row(const TokenConfidenceArgs& args, int64_t row)
        : base(args.logits + row * args.row_bytes), vocab_size(args.vocab_size), offset(0) {
        if constexpr (!kAligned) offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(base) % kVectorBytes);
        // With an offset a vector needs the aligned one behind it too, which must end within the row.
        const int64_t bytes = int64_t{vocab_size} * static_cast<int64_t>(sizeof(T)) + offset;
        whole = static_cast<uint32_t>(bytes / kVectorBytes) - (offset != 0 ? 1 : 0);
    }

    __device__ __forceinline__ uint4 load(uint32_t vector) const {
        const char* const at = base + int64_t{vector} * kVectorBytes;
        // Signed: a short row with an offset has none.
        if (static_cast<int32_t>(vector) >= static_cast<int32_t>(whole)) return load_by_logit(vector);
        if constexpr (!kAligned) {
            if (offset != 0) {
                if (vector == 0) return load_by_logit(vector);
                const auto* const words = reinterpret_cast<const uint4*>(at - offset);
                return shifted(words[0], words[1]);
            }
        }
        return *reinterpret_cast<const uint4*>(at);
    }

    // NaN behind the last one.
    __device__ __forceinline__ float logit(int32_t index) const {
        if (index >= vocab_size) return NAN;
        const T value = reinterpret_cast<const T*>(base)[index];
        return static_cast<float>(value);
    }

private:
    // Rare, so a loop and no copies of its body: every logit pushes those before it down.
    __device__ __forceinline__ uint4 load_by_logit(uint32_t vector) const {
        uint4 words = {};
        const int64_t first = int64_t{vector} * kElements;
#pragma unroll 1
        for (int i = 0; i < kElements; ++i) {
            const bool is_there = first + i < vocab_size;
            if constexpr (sizeof(T) == 4) {
                const uint32_t bits = is_there ? reinterpret_cast<const uint32_t*>(base)[first + i] : kLowestBits;
                words = {words.y, words.z, words.w, bits};
            } else {
                const uint32_t bits = is_there ? reinterpret_cast<const uint16_t*>(base)[first + i] : kLowestBits;
                words = {__funnelshift_r(words.x, words.y, 16), __funnelshift_r(words.y, words.z, 16),
                         __funnelshift_r(words.z, words.w, 16), words.w >> 16 | bits << 16};
            }
        }
        return words;
    }

    // 16 bytes from `offset` on of the 32 in low and high.
    __device__ __forceinline__ uint4 shifted(uint4 low, uint4 high) const {
        uint32_t a[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        if (offset & 8) {
#pragma unroll
            for (int i = 0; i < 6; ++i) a[i] = a[i + 2];
        }
        if (offset & 4) {
#pragma unroll
            for (int i = 0; i < 5; ++i) a[i] = a[i + 1];
        }
        const uint32_t bits = offset % 4 * 8;
        return {__funnelshift_r(a[0], a[1], bits), __funnelshift_r(a[1], a[2], bits), __funnelshift_r(a[2], a[3], bits),
                __funnelshift_r(a[3], a[4], bits)};
    }
};

__device__ __forceinline__ float exp_of(float below) { return device::exp2_fast(below * kLog2E); }

// x - top, at least kLeast; for two that are -inf too.
__device__ __forceinline__ float below_of(float x, float top) { return fmaxf(x - top, kLeast); }

// A sum of many batches with what its rounding lost (Kahan 1965): V has up to 2^30 entries.
struct LongSum {
    float sum = 0.0f;
    float lost = 0.0f;

    __device__ __forceinline__ void add(float x) {
        const float y = x - lost;
        const float next = sum + y;
        lost = (next - sum) - y;
        sum = next;
    }
};

// The sums of a thread, a warp or a lane relative to `top`.
struct Sums {
    float top = -INFINITY;
    LongSum sum, weighted;

    // The same relative to a larger `next`.
    __device__ __forceinline__ void raise(float next) {
        const float below = below_of(top, next);
        const float scale = exp_of(below);
        weighted.sum = scale * fmaf(below, sum.sum, weighted.sum);
        weighted.lost = scale * fmaf(below, sum.lost, weighted.lost);
        sum.sum *= scale;
        sum.lost *= scale;
        top = next;
    }
};

template <int kLanes, typename T>
__device__ __forceinline__ T lanes_sum(T value) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

// What a thread holds of a batch: vectors first, first + kThreads, ... below `end`.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_batch(const Row<T, kAligned>& row, uint32_t first, uint32_t end,
                                           uint4 (&vectors)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        if (first + i * kThreads < end) vectors[i] = row.load(first + i * kThreads);
    }
}

// The largest logit of each vector of a batch.
template <typename T>
__device__ __forceinline__ void largest_of(const uint4 (&vectors)[kBatch], uint32_t first, uint32_t end,
                                           float (&tops)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        tops[i] = first + i * kThreads < end ? Logits<T>::largest(vectors[i]) : -INFINITY;
    }
}

template <typename T>
__device__ __forceinline__ void add_batch(const uint4 (&vectors)[kBatch], uint32_t first, uint32_t end, Sums* own) {
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        if (first + i * kThreads < end) {
            float values[Logits<T>::kElements];
            Logits<T>::unpack(vectors[i], values);
#pragma unroll
            for (int j = 0; j < Logits<T>::kElements; ++j) {
                const float below = below_of(values[j], own->top);
                const float weight = exp_of(below);
                sum += weight;
                weighted = fmaf(weight, below, weighted);
            }
        }
    }
    own->sum.add(sum);
    own->weighted.add(weighted);
}

// The sum over kLanes neighbouring lanes of their parts, relative to the largest top among them; token is the least.
template <int kLanes>
__device__ __forceinline__ Part joined(Part part) {
    float top = part.top;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    const float below = below_of(part.top, top);
    const double scale = expf(below);
    part.weighted = lanes_sum<kLanes>(scale * (part.weighted + below * part.sum));
    part.sum = lanes_sum<kLanes>(scale * part.sum);
    part.top = top;
    return part;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    mage_token_confidence_kernel(const __grid_constant__ TokenConfidenceArgs args) {
    __shared__ Part warp_parts[kMaxPieces][kWarps];
    __shared__ Part pieces[kMaxPieces];          // of the cluster's first CTA: what all of them sent
    __shared__ alignas(8) uint64_t all_arrived;  // of it: the bytes of all pieces have come
    __shared__ int32_t shared_token, shared_ties;

    const bool in_cluster = args.cluster_log2 != 0;
    const uint32_t rank = in_cluster ? device::cluster_rank() : 0;
    const int64_t row_idx = blockIdx.x >> args.cluster_log2;
    const uint32_t own_pieces = args.own_pieces, first_piece = rank * own_pieces;
    const Row<T, kAligned> row(args, row_idx);
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t barrier = device::shared_address(&all_arrived);
    if (threadIdx.x == 0) {
        shared_token = kNoToken;
        shared_ties = 0;
        if (in_cluster) {
            device::mbarrier_init(barrier, 1);
            device::mbarrier_init_fence();
            if (rank == 0) device::mbarrier_arrive_expect(barrier, args.pieces * sizeof(Part));
        }
    }
    __syncthreads();  // whole warps arrive, so thread 0 is to be back with its own
    if (in_cluster) device::cluster_arrive_relaxed();
    device::dependency_wait();

    float best = -INFINITY;  // of all pieces of this CTA, and the vector that it came in first
    uint32_t best_vector = kNoVector;
    float warp_best = -INFINITY, logit = NAN;  // a lane's logit of the first vector that has the warp's best
    uint32_t vector = kNoVector;
    for (uint32_t piece = 0; piece < own_pieces; ++piece) {
        const uint32_t begin = min((first_piece + piece) * args.piece_vectors, args.vectors);
        const uint32_t end = min(begin + args.piece_vectors, args.vectors);
        Sums own;
        uint4 vectors[kBatch], next[kBatch];
        uint32_t first = begin + threadIdx.x;
        const auto add = [&](const uint4(&batch)[kBatch], uint32_t from) {
            float tops[kBatch];
            largest_of<T>(batch, from, end, tops);
            float top = own.top;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) top = fmaxf(top, tops[i]);
            if (top > best) {
                best = top;
                best_vector = from + (kBatch - 1) * kThreads;
#pragma unroll
                for (int i = kBatch - 2; i >= 0; --i) {
                    if (tops[i] == top) best_vector = from + i * kThreads;
                }
            }
            own.raise(top);
            add_batch<T>(batch, from, end, &own);
        };
        if constexpr (kAligned) {  // the next batch is on its way while one is added
            load_batch(row, first, end, vectors);
            while (first < end) {
                load_batch(row, first + kBatch * kThreads, end, next);
                add(vectors, first);
                first += kBatch * kThreads;
                if (first >= end) break;
                load_batch(row, first + kBatch * kThreads, end, vectors);
                add(next, first);
                first += kBatch * kThreads;
            }
        } else {
            for (; first < end; first += kBatch * kThreads) {
                load_batch(row, first, end, vectors);
                add(vectors, first);
            }
        }
        const float piece_top = device::warp_max(own.top);
        warp_best = fmaxf(warp_best, piece_top);
        if (piece + 1 == own_pieces) {  // it comes while the sums are joined
            vector = __reduce_min_sync(kAllLanes, best == warp_best ? best_vector : kNoVector);
            if (vector != kNoVector && lane < Row<T, kAligned>::kElements) {
                logit = row.logit(static_cast<int32_t>(vector * Row<T, kAligned>::kElements + lane));
            }
        }
        own.raise(piece_top);
        const float sum = lanes_sum<kWarp>(own.sum.sum - own.sum.lost);
        const float weighted = lanes_sum<kWarp>(own.weighted.sum - own.weighted.lost);
        if (lane == 0) warp_parts[piece][warp] = {sum, weighted, own.top, 0, {0, 0}};
    }
    device::dependency_release();

    // The pieces of this CTA, a warp to each, and the place of its largest logit.
    __syncthreads();
    float top = -INFINITY;
    for (uint32_t i = 0; i < own_pieces * kWarps; i += kWarp) {
        top = fmaxf(top, i + lane < own_pieces * kWarps ? warp_parts[0][i + lane].top : -INFINITY);
    }
    top = device::warp_max(top);
    Part whole = warp < own_pieces ? joined<kWarps>(warp_parts[warp][lane % kWarps]) : Part{};
    const uint32_t found = __ballot_sync(kAllLanes, logit == warp_best);
    if (lane == 0 && found != 0 && warp_best == top) {
        atomicMin(&shared_token, static_cast<int32_t>(vector * Row<T, kAligned>::kElements) + __ffs(found) - 1);
    }
    __syncthreads();
    // Every CTA of the cluster runs, and the first one's barrier is ready.
    if (in_cluster) device::cluster_wait();
    // The first of equal logits may lie in another piece of this CTA than the one that names it: the least token wins.
    whole.token = whole.top == top ? shared_token : kNoToken;
    if (lane == 0 && warp < own_pieces) {
        if (in_cluster) {
            const auto* const words = reinterpret_cast<const uint4*>(&whole);
            const uint32_t to = device::cluster_address(device::shared_address(&pieces[first_piece + warp]), 0);
            const uint32_t remote = device::cluster_address(barrier, 0);
            device::store_cluster_async(to, words[0], remote);
            device::store_cluster_async(to + sizeof(uint4), words[1], remote);
        } else {
            pieces[warp] = whole;
        }
    }
    if (rank != 0) return;
    if (in_cluster) {
        device::mbarrier_wait(barrier, 0);
    } else {
        __syncthreads();
    }

    // The row.
    Part part =
        lane % kMaxPieces < args.pieces ? pieces[lane % kMaxPieces] : Part{0.0, 0.0, -INFINITY, kNoToken, {0, 0}};
    const float part_top = part.top;
    part = joined<kMaxPieces>(part);
    if (part.top == INFINITY) {  // their number is all that matters, and the sums do not know it
        int32_t ties = 0;
        for (uint32_t vector = threadIdx.x; vector < args.vectors; vector += kThreads) {
            float values[Logits<T>::kElements];
            Logits<T>::unpack(row.load(vector), values);
#pragma unroll
            for (int j = 0; j < Logits<T>::kElements; ++j) ties += values[j] == INFINITY ? 1 : 0;
        }
        atomicAdd(&shared_ties, ties);
        __syncthreads();
        part.sum = shared_ties;
        part.weighted = 0.0;
    }
    if (warp != 0) return;
    const int32_t token = __reduce_min_sync(kAllLanes, part_top == part.top ? part.token : kNoToken);
    if (lane != 0) return;
    const bool has_token = part.top > -INFINITY;
    args.token[row_idx] = has_token ? token : 0;
    args.prob[row_idx] = has_token ? static_cast<float>(1.0 / part.sum) : 0.0f;
    args.entropy[row_idx] = has_token ? static_cast<float>(fmax(log(part.sum) - part.weighted / part.sum, 0.0)) : 0.0f;
}

// The same for all rows of a vocabulary, so that a row's sums do not depend on the others.
uint32_t pieces_of(int64_t vectors) {
    uint32_t pieces = 1;
    while (pieces < kMaxPieces && vectors > int64_t{pieces} * kPieceVectors) pieces *= 2;
    return pieces;
}

// Of a power of two.
uint32_t log2_of(uint32_t value) {
    uint32_t log2 = 0;
    while (uint32_t{1} << log2 < value) ++log2;
    return log2;
}

int64_t vectors_of(const TokenConfidenceParams& p) {
    const int64_t elements = kVectorBytes / dtype_bytes(p.dtype);
    return (p.vocab_size + elements - 1) / elements;
}

template <typename T>
void confidence(const TokenConfidenceParams& p, const LaunchPlan& plan, CudaStream stream) {
    TokenConfidenceArgs args;
    args.logits = static_cast<const char*>(p.logits);
    args.row_bytes = p.stride_logits_row * static_cast<int64_t>(sizeof(T));
    args.token = p.token;
    args.prob = p.prob;
    args.entropy = p.entropy;
    args.vocab_size = static_cast<int32_t>(p.vocab_size);
    args.vectors = static_cast<uint32_t>(vectors_of(p));
    args.pieces = pieces_of(args.vectors);
    args.piece_vectors = (args.vectors + args.pieces - 1) / args.pieces;
    args.own_pieces = args.pieces / plan.cluster;
    args.cluster_log2 = log2_of(plan.cluster);
    const bool aligned =
        reinterpret_cast<uintptr_t>(p.logits) % kVectorBytes == 0 && args.row_bytes % kVectorBytes == 0;
    core::launch(kOp, aligned ? mage_token_confidence_kernel<T, true> : mage_token_confidence_kernel<T, false>, plan,
                 stream, args);
}

template <typename T>
void list_kernels(const char* const (&names)[2], std::vector<KernelEntry>* entries) {
    entries->push_back({names[0], reinterpret_cast<const void*>(&mage_token_confidence_kernel<T, true>), kThreads, 0});
    entries->push_back({names[1], reinterpret_cast<const void*>(&mage_token_confidence_kernel<T, false>), kThreads, 0});
}

}  // namespace

std::vector<KernelEntry> token_confidence_kernels() {
    std::vector<KernelEntry> entries;
    list_kernels<__nv_bfloat16>({"mage_token_confidence_bf16_kernel", "mage_token_confidence_bf16_odd_kernel"},
                                &entries);
    list_kernels<__half>({"mage_token_confidence_fp16_kernel", "mage_token_confidence_fp16_odd_kernel"}, &entries);
    list_kernels<float>({"mage_token_confidence_fp32_kernel", "mage_token_confidence_fp32_odd_kernel"}, &entries);
    return entries;
}

LaunchPlan token_confidence_plan(const TokenConfidenceParams& p) {
    check_token_confidence(p);
    // As many CTAs of a row as fit the GPU at once: no second wave, and few rows still fill it.
    const int64_t most = int64_t{kHopperMultiprocessors} * kCtasPerSm;
    const uint32_t pieces = pieces_of(vectors_of(p));
    LaunchPlan plan;
    while (plan.cluster < pieces && 2 * plan.cluster * p.num_rows <= most) plan.cluster *= 2;
    MAGE_CHECK(p.num_rows < int64_t{1} << 31, kOp, ": logits must have fewer than 2^31 rows on CUDA, got ", p.num_rows);
    plan.grid[0] = static_cast<uint32_t>(p.num_rows * plan.cluster);
    plan.block[0] = kThreads;
    plan.overlap = true;
    return plan;
}

void token_confidence(const TokenConfidenceParams& p, CudaStream stream) {
    core::require_hopper(kOp);
    const LaunchPlan plan = token_confidence_plan(p);
    if (plan.grid[0] == 0) return;
    MAGE_CHECK(p.logits && p.token && p.prob && p.entropy, kOp,
               ": logits and the outputs must be given, got a null pointer");
    switch (p.dtype) {
        case DType::kFloat32:
            return confidence<float>(p, plan, stream);
        case DType::kFloat16:
            return confidence<__half>(p, plan, stream);
        case DType::kBFloat16:
            return confidence<__nv_bfloat16>(p, plan, stream);
    }
}

}  // namespace mage::cuda
