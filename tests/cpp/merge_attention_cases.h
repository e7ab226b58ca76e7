#pragma once

#include <cmath>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "attention_cases.h"
#include "mage/merge_attention.h"

// Cases of merge_attention with its inputs, shared by the CPU and the CUDA test.
namespace mage::test {

struct MergeCase {
    std::string name;
    DType dtype;
    int64_t requests, queries, heads, head_dim;
    size_t parts;
    bool log2_in = false, log2_out = false;
    int64_t gap = 0;    // elements between rows of a part that belong to nobody
    int64_t shift = 0;  // elements before a part
};

inline std::ostream& operator<<(std::ostream& out, const MergeCase& c) { return out << c.name; }

inline std::vector<MergeCase> merge_cases() {
    constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16, kFp32 = DType::kFloat32;
    return {
        {"OneOfEach", kFp32, 1, 1, 1, 1, 1},
        {"BlockOf7B", kBf16, 1, 32, 28, 128, 2},
        {"BlockOf135M", kFp16, 2, 32, 9, 64, 3},
        {"Float", kFp32, 2, 5, 3, 64, 7},
        {"LargestHeadDim", kBf16, 1, 3, 2, 512, 8},
        {"NinthPart", kBf16, 2, 3, 5, 64, 9},
        {"OddDim", kFp32, 2, 3, 5, 37, 2, true, false},
        {"OddDimInHalves", kFp16, 2, 3, 5, 37, 5, false, true},
        {"OddDimOfManyParts", kBf16, 1, 3, 5, 9, 40, true, true},
        {"Gaps", kBf16, 2, 7, 3, 64, 3, false, false, 8},
        {"OddGaps", kFp32, 2, 7, 3, 64, 3, false, false, 3},
        {"Unaligned", kBf16, 2, 7, 3, 64, 3, false, false, 8, 1},
        {"MostParts", kFp32, 1, 2, 3, 8, kMaxMergeParts},
        {"NoRequests", kBf16, 0, 4, 2, 64, 2},
    };
}

// Random parts of which an eighth is silent (lse -inf, out NaN), and a row without any other.
struct MergeBuffers {
    explicit MergeBuffers(const MergeCase& c) : bytes(dtype_bytes(c.dtype)) {
        std::mt19937 random(5);
        const int64_t rows = c.requests * c.queries * c.heads, stride = c.head_dim + c.gap;
        params.num_requests = c.requests;
        params.num_queries = c.queries;
        params.num_heads = c.heads;
        params.head_dim = c.head_dim;
        params.dtype = c.dtype;
        params.log2_in = c.log2_in;
        params.log2_out = c.log2_out;
        part_offset = (c.shift + rows * stride + 7) / 8 * 8;
        outs.resize((c.parts * part_offset + c.shift) * bytes, static_cast<char>(0xff));  // NaN in every dtype
        lses.resize(c.parts * rows);
        shift = c.shift;
        for (size_t i = 0; i < c.parts; ++i) {
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t head = row % c.heads, query = row / c.heads % c.queries;
                const int64_t at = (row / c.heads / c.queries * c.heads + head) * c.queries + query;
                const bool is_silent = random() % 8 == 0 || row == 3;
                lses[i * rows + at] = is_silent ? -INFINITY : 3.0f * random_value(random);
                if (is_silent) continue;
                char* out = outs.data() + (c.shift + i * part_offset + row * stride) * bytes;
                for (int64_t d = 0; d < c.head_dim; ++d) store_exact(c.dtype, random_value(random), out + d * bytes);
            }
        }
        for (size_t i = 0; i < c.parts; ++i)
            params.parts.push_back({nullptr, c.queries * c.heads * stride, c.heads * stride, stride, nullptr});
        out.assign(rows * c.head_dim * bytes, static_cast<char>(0xff));
        lse.assign(rows, NAN);
    }

    // Points params at buffers like outs, lses, out and lse, on either side of the bus.
    void bind(const void* outs_data, const float* lses_data, void* out_data, float* lse_data) {
        for (size_t i = 0; i < params.parts.size(); ++i) {
            params.parts[i].out = static_cast<const char*>(outs_data) + (shift + i * part_offset) * bytes;
            params.parts[i].lse = lses_data + i * lse.size();
        }
        params.out = out_data;
        params.lse = lse_data;
    }

    int64_t bytes, part_offset = 0, shift = 0;
    std::vector<char> outs, out;
    std::vector<float> lses, lse;
    MergeAttentionParams params;
};

// Half a unit in the last place of the dtype at 2 (all values are at most 2), plus float32 sums and weights.
inline double merge_tolerance(DType dtype) {
    const double rounding = dtype == DType::kFloat32 ? 0.0 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    return rounding + 0x1p-18;
}

}  // namespace mage::test
