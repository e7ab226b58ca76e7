// Purpose   out[r] = sum_i exp(lse_i[r] - lse[r]) out_i[r]; see mage/merge_attention.h.
// Schedule  one thread per 16-byte vector of a row (per element, where a base, a stride or the row is not a multiple of
//           16 bytes); consecutive threads take consecutive vectors, then heads, then queries. Every thread finds the
//           weights of its row by itself. All loads of up to eight parts, lse and out, are on their way before the
//           first is used: the call is one round trip to memory. Beyond eight, the other lse are walked once for the
//           largest.
// Memory    registers; the parts' addresses are kernel arguments, so that a graph keeps them and nothing is copied.
// Sync      none; waits for the kernel before it by itself (programmatic dependent launch).
// Ceiling   (N + 1) * B * Q * H * D * dtype_bytes bytes moved; launch bound below some MB.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "device/barrier.cuh"
#include "kernels/kernel_list.h"
#include "mage/merge_attention.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "merge_attention";
constexpr uint32_t kThreads = 128;  // blocks of a small call reach more SMs
constexpr int64_t kVectorBytes = 16;
constexpr float kLn2 = 0.693147180559945f;

// Two parts are the rule (a selection and the rest): a kernel of their own has a fraction of the instructions.
constexpr int kPair = 2;
// Parts whose loads are under way together, and with no more of them the arguments are small.
constexpr int kFewParts = 8;

// n / d for n below 2^31 by a multiplication. With 2^(s - 1) < d <= 2^s and m = ceil(2^(31 + s) / d), which has 32
// bits, n m / 2^(31 + s) is above n / d by less than 1 / d.
struct Divisor {
    uint32_t value, multiplier, shift;

    static Divisor of(uint32_t d) {
        uint32_t bits = 0;
        while (uint64_t{1} << bits < d) ++bits;
        const auto multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + d - 1) / std::max(d, 1u));
        return {d, multiplier, bits - 1};
    }
    __device__ __forceinline__ uint32_t divide(uint32_t n) const {
        return value == 1 ? n : __umulhi(n, multiplier) >> shift;
    }
};

// Strides in bytes.
struct PartArgs {
    const char* out;
    const float* lse;
    int64_t request, query, head;
};

template <int kParts>
struct MergeArgs {
    PartArgs parts[kParts];
    char* out;
    float* lse;
    uint32_t num_parts;
    Divisor num_queries, num_heads, row_vectors;
    uint32_t vectors;  // of all rows
    bool log2_in, log2_out;
};

template <typename T>
__device__ __forceinline__ void unpack(uint32_t word, float* values) {
    if constexpr (sizeof(T) == 4) {
        values[0] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = *reinterpret_cast<const __half2*>(&word);
        values[0] = __low2float(pair);
        values[1] = __high2float(pair);
    } else {
        values[0] = __uint_as_float(word << 16);
        values[1] = __uint_as_float(word & 0xffff0000u);
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(const float* values) {
    if constexpr (sizeof(T) == 4) {
        return __float_as_uint(values[0]);
    } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[0], values[1]);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

// What one thread loads of a part at once: a vector, or one element.
template <typename T, int kElements>
using Vector = std::conditional_t<kElements == 1, T, uint4>;

template <typename T>
__device__ __forceinline__ void unpack(uint4 words, float* values) {
    constexpr int kPerWord = 4 / sizeof(T);
    unpack<T>(words.x, values);
    unpack<T>(words.y, values + kPerWord);
    unpack<T>(words.z, values + 2 * kPerWord);
    unpack<T>(words.w, values + 3 * kPerWord);
}

template <typename T, int kElements>
__device__ __forceinline__ void add(const Vector<T, kElements>& vector, float weight, float (&merged)[kElements]) {
    float values[kElements];
    if constexpr (kElements == 1) {
        values[0] = static_cast<float>(vector);
    } else {
        unpack<T>(vector, values);
    }
#pragma unroll
    for (int d = 0; d < kElements; ++d) merged[d] = fmaf(weight == 0.0f ? 0.0f : values[d], weight, merged[d]);
}

template <typename T, int kElements>
__device__ __forceinline__ void store(char* to, const float (&values)[kElements]) {
    if constexpr (kElements == 1) {
        *reinterpret_cast<T*>(to) = static_cast<T>(values[0]);
    } else {
        constexpr int kPerWord = 4 / sizeof(T);
        uint4 words;
        words.x = pack<T>(values);
        words.y = pack<T>(values + kPerWord);
        words.z = pack<T>(values + 2 * kPerWord);
        words.w = pack<T>(values + 3 * kPerWord);
        *reinterpret_cast<uint4*>(to) = words;
    }
}

template <typename T, int kElements, int kParts>
__global__ void __launch_bounds__(kThreads)
    mage_merge_attention_kernel(const __grid_constant__ MergeArgs<kParts> args) {
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
    const uint32_t row = args.row_vectors.divide(item);
    const uint32_t vector = item - row * args.row_vectors.value;
    const uint32_t position = args.num_heads.divide(row);
    const uint32_t head = row - position * args.num_heads.value;
    const uint32_t request = args.num_queries.divide(position);
    const uint32_t query = position - request * args.num_queries.value;
    const int64_t lse_at = (int64_t{request} * args.num_heads.value + head) * args.num_queries.value + query;
    const int64_t offset = int64_t{vector} * kElements * sizeof(T);
    device::dependency_wait();
    device::dependency_release();
    if (item >= args.vectors) return;

    constexpr int kGroup = kParts < kFewParts ? kParts : kFewParts;
    // A power of two that keeps the sum of weights at most 1, so that parts near the largest float do not overflow.
    constexpr float kShare = 1.0f / kParts;
    float highest = -INFINITY, sum = 0.0f;
    float merged[kElements] = {};
    const auto raise = [&](float lse) {  // NaN stays once it is met
        if (lse > highest || isnan(lse)) highest = lse;
    };
    const float unit = args.log2_in ? kLn2 : 1.0f;
    uint32_t first = 0;
    do {
        float lses[kGroup];
        Vector<T, kElements> vectors[kGroup] = {};
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            lses[i] = -INFINITY;
            if (first + i >= args.num_parts) continue;
            const PartArgs& part = args.parts[first + i];
            const char* out = part.out + request * part.request + query * part.query + head * part.head + offset;
            lses[i] = part.lse[lse_at];
            vectors[i] = *reinterpret_cast<const Vector<T, kElements>*>(out);
        }
#pragma unroll
        for (float& lse : lses) lse *= unit;
        if (first == 0) {
#pragma unroll
            for (float lse : lses) raise(lse);
            if constexpr (kParts > kGroup) {
#pragma unroll 8
                for (uint32_t i = kGroup; i < args.num_parts; ++i) raise(args.parts[i].lse[lse_at] * unit);
            }
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const float weight = lses[i] == -INFINITY ? 0.0f : kShare * expf(lses[i] - highest);
            sum += weight;
            add<T, kElements>(vectors[i], weight, merged);
        }
        first += kGroup;
    } while (kParts > kGroup && first < args.num_parts);

    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (float& value : merged) value *= scale;
    store<T>(args.out + int64_t{item} * kElements * sizeof(T), merged);
    if (vector == 0) {
        const float lse = sum == 0.0f ? -INFINITY : highest + logf(sum / kShare);
        args.lse[lse_at] = args.log2_out ? lse / kLn2 : lse;
    }
}

// Whether all that is read and written can be read and written in vectors.
bool has_vectors(const MergeAttentionParams& p) {
    const int64_t bytes = dtype_bytes(p.dtype);
    const auto whole = [](int64_t value) { return value % kVectorBytes == 0; };
    bool all = whole(p.head_dim * bytes) && whole(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.out)));
    for (const MergePart& part : p.parts) {
        all = all && whole(static_cast<int64_t>(reinterpret_cast<uintptr_t>(part.out))) &&
              whole(part.stride_request * bytes) && whole(part.stride_query * bytes) && whole(part.stride_head * bytes);
    }
    return all;
}

template <typename T, int kElements, int kParts>
void merge(const MergeAttentionParams& p, const LaunchPlan& plan, CudaStream stream) {
    MergeArgs<kParts> args = {};
    for (size_t i = 0; i < p.parts.size(); ++i) {
        const MergePart& part = p.parts[i];
        constexpr int64_t kBytes = sizeof(T);
        args.parts[i] = {static_cast<const char*>(part.out), part.lse, part.stride_request * kBytes,
                         part.stride_query * kBytes, part.stride_head * kBytes};
    }
    args.out = static_cast<char*>(p.out);
    args.lse = p.lse;
    args.num_parts = static_cast<uint32_t>(p.parts.size());
    args.num_queries = Divisor::of(static_cast<uint32_t>(p.num_queries));
    args.num_heads = Divisor::of(static_cast<uint32_t>(p.num_heads));
    args.row_vectors = Divisor::of(static_cast<uint32_t>(p.head_dim / kElements));
    args.vectors = static_cast<uint32_t>(p.num_requests * p.num_queries * p.num_heads * args.row_vectors.value);
    args.log2_in = p.log2_in;
    args.log2_out = p.log2_out;
    core::launch(kOp, mage_merge_attention_kernel<T, kElements, kParts>, plan, stream, args);
}

template <typename T, int kElements>
void merge_parts(const MergeAttentionParams& p, const LaunchPlan& plan, CudaStream stream) {
    if (p.parts.size() <= kPair) return merge<T, kElements, kPair>(p, plan, stream);
    if (p.parts.size() <= kFewParts) return merge<T, kElements, kFewParts>(p, plan, stream);
    merge<T, kElements, kMaxMergeParts>(p, plan, stream);
}

template <typename T>
void merge_dtype(const MergeAttentionParams& p, const LaunchPlan& plan, CudaStream stream) {
    constexpr int kElements = kVectorBytes / sizeof(T);
    has_vectors(p) ? merge_parts<T, kElements>(p, plan, stream) : merge_parts<T, 1>(p, plan, stream);
}

template <typename T>
void list_kernels(const char* const (&names)[6], std::vector<KernelEntry>* entries) {
    constexpr int kElements = kVectorBytes / sizeof(T);
    const void* kernels[] = {
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, kElements, kPair>),
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, kElements, kFewParts>),
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, kElements, kMaxMergeParts>),
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, 1, kPair>),
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, 1, kFewParts>),
        reinterpret_cast<const void*>(&mage_merge_attention_kernel<T, 1, kMaxMergeParts>),
    };
    for (int i = 0; i < 6; ++i) entries->push_back({names[i], kernels[i], kThreads, 0});
}

}  // namespace

std::vector<KernelEntry> merge_attention_kernels() {
    std::vector<KernelEntry> entries;
    list_kernels<__nv_bfloat16>({"mage_merge_attention_bf16_pair_kernel", "mage_merge_attention_bf16_kernel",
                                 "mage_merge_attention_bf16_many_kernel", "mage_merge_attention_bf16_odd_pair_kernel",
                                 "mage_merge_attention_bf16_odd_kernel", "mage_merge_attention_bf16_odd_many_kernel"},
                                &entries);
    list_kernels<__half>({"mage_merge_attention_fp16_pair_kernel", "mage_merge_attention_fp16_kernel",
                          "mage_merge_attention_fp16_many_kernel", "mage_merge_attention_fp16_odd_pair_kernel",
                          "mage_merge_attention_fp16_odd_kernel", "mage_merge_attention_fp16_odd_many_kernel"},
                         &entries);
    list_kernels<float>({"mage_merge_attention_fp32_pair_kernel", "mage_merge_attention_fp32_kernel",
                         "mage_merge_attention_fp32_many_kernel", "mage_merge_attention_fp32_odd_pair_kernel",
                         "mage_merge_attention_fp32_odd_kernel", "mage_merge_attention_fp32_odd_many_kernel"},
                        &entries);
    return entries;
}

LaunchPlan merge_attention_plan(const MergeAttentionParams& p) {
    check_merge_attention(p);
    MAGE_CHECK(p.parts.size() <= kMaxMergeParts, kOp, ": outs must hold at most ", kMaxMergeParts,
               " tensors on a GPU, got ", p.parts.size());
    const int64_t row_vectors = has_vectors(p) ? p.head_dim * dtype_bytes(p.dtype) / kVectorBytes : p.head_dim;
    const int64_t vectors = p.num_requests * p.num_queries * p.num_heads * row_vectors;
    MAGE_CHECK(vectors < (int64_t{1} << 31), kOp, ": outs must have fewer than 2^31 vectors, got ", vectors);
    LaunchPlan plan;
    plan.grid[0] = static_cast<uint32_t>((vectors + kThreads - 1) / kThreads);
    plan.block[0] = kThreads;
    plan.overlap = true;
    return plan;
}

void merge_attention(const MergeAttentionParams& p, CudaStream stream) {
    core::require_hopper(kOp);
    const LaunchPlan plan = merge_attention_plan(p);
    if (plan.grid[0] == 0) return;
    switch (p.dtype) {
        case DType::kFloat32:
            return merge_dtype<float>(p, plan, stream);
        case DType::kFloat16:
            return merge_dtype<__half>(p, plan, stream);
        case DType::kBFloat16:
            return merge_dtype<__nv_bfloat16>(p, plan, stream);
    }
}

}  // namespace mage::cuda
