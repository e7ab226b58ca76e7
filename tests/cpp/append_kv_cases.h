#pragma once

#include <cstdint>
#include <cstring>
#include <ostream>
#include <string>
#include <vector>

#include "mage/append_kv.h"

// Cases of append_kv with the pool that each must leave behind, shared by the CPU and the CUDA test.
namespace mage::test {

enum class PoolLayout { kNhd, kHnd, kInterleaved };

struct AppendKvCase {
    std::string name;
    DType dtype;
    PoolLayout layout;
    int64_t requests, rows, kv_heads, head_dim, page, max_pages, pages;
    std::vector<int32_t> block_table;  // [requests, max_pages]
    std::vector<int32_t> start;        // [requests]
};

inline std::ostream& operator<<(std::ostream& out, const AppendKvCase& c) { return out << c.name; }

inline std::vector<AppendKvCase> append_kv_cases() {
    const auto bf16 = DType::kBFloat16;
    const auto f16 = DType::kFloat16;
    const auto f32 = DType::kFloat32;
    const auto nhd = PoolLayout::kNhd;
    const auto hnd = PoolLayout::kHnd;
    const auto both = PoolLayout::kInterleaved;
    return {
        {"one_row", bf16, nhd, 1, 1, 1, 8, 16, 1, 1, {0}, {0}},
        {"crosses_pages", bf16, nhd, 2, 33, 4, 128, 16, 4, 9, {3, 1, 8, 0, 2, 7, 4, 5}, {14, 31}},
        {"hnd", f16, hnd, 2, 32, 2, 64, 64, 2, 5, {4, 0, 1, 3}, {40, 96}},
        {"interleaved", f32, both, 2, 7, 3, 64, 32, 2, 4, {2, 3, 0, 1}, {30, 1}},
        {"page_of_one", bf16, nhd, 1, 6, 2, 64, 1, 8, 8, {7, 6, 5, 4, 3, 2, 1, 0}, {1}},
        {"page_256", bf16, both, 1, 64, 8, 256, 256, 1, 2, {1}, {192}},
        {"negative_start", f32, nhd, 2, 8, 2, 4, 16, 1, 2, {0, 1}, {-3, -2147483647}},
        {"past_the_table", bf16, nhd, 2, 32, 2, 8, 16, 2, 4, {0, 1, 2, 3}, {20, 2147483647}},
        {"bad_pages", bf16, hnd, 3, 32, 2, 8, 16, 2, 4, {-1, 1, 4, 0, 2147483647, 3}, {0, 0, 10}},
        {"many_blocks", bf16, nhd, 5, 64, 8, 128, 64, 2, 10, {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, {0, 1, 63, 64, 65}},
    };
}

// The buffers of a case on the host. k and v are strided views (a fused projection's output: a row holds K then V).
struct AppendKvBuffers {
    explicit AppendKvBuffers(const AppendKvCase& c) : bytes(dtype_bytes(c.dtype)) {
        const int64_t row = c.kv_heads * c.head_dim;
        input.resize(c.requests * c.rows * 2 * row * bytes);
        for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<unsigned char>((i * 2654435761u) >> 13);
        pool.assign(2 * c.pages * c.page * row * bytes, 0xFF);  // 0xFFFF.. is NaN in every dtype: poison

        params.num_requests = c.requests;
        params.num_rows = c.rows;
        params.num_kv_heads = c.kv_heads;
        params.head_dim = c.head_dim;
        params.dtype = c.dtype;
        params.stride_k_request = params.stride_v_request = c.rows * 2 * row;
        params.stride_k_row = params.stride_v_row = 2 * row;
        params.stride_k_head = params.stride_v_head = c.head_dim;
        v_input_offset = row;
        int64_t page, token, head;
        if (c.layout == PoolLayout::kHnd) {
            head = c.page * c.head_dim;
            token = c.head_dim;
            page = c.kv_heads * head;
            v_pool_offset = c.pages * page;
        } else if (c.layout == PoolLayout::kNhd) {
            head = c.head_dim;
            token = row;
            page = c.page * row;
            v_pool_offset = c.pages * page;
        } else {
            head = c.head_dim;
            token = row;
            page = 2 * c.page * row;
            v_pool_offset = c.page * row;
        }
        params.stride_k_cache_page = params.stride_v_cache_page = page;
        params.stride_k_cache_token = params.stride_v_cache_token = token;
        params.stride_k_cache_head = params.stride_v_cache_head = head;
        params.pages.stride_request = c.max_pages;
        params.pages.max_pages = static_cast<int32_t>(c.max_pages);
        params.pages.page_size = static_cast<int32_t>(c.page);
        params.pages.num_pages = c.pages;
        expect(c);
    }

    // Points params at buffers that hold `input`, `pool`, the table and the starts, on either side of the bus.
    void bind(const void* input_data, void* pool_data, const int32_t* block_table, const int32_t* start) {
        const auto* in = static_cast<const unsigned char*>(input_data);
        auto* out = static_cast<unsigned char*>(pool_data);
        params.k = in;
        params.v = in + v_input_offset * bytes;
        params.k_cache = out;
        params.v_cache = out + v_pool_offset * bytes;
        params.pages.block_table = block_table;
        params.start = start;
    }

    int64_t bytes;
    int64_t v_input_offset = 0, v_pool_offset = 0;  // elements
    std::vector<unsigned char> input, pool, expected;
    AppendKvParams params;

private:
    // Element by element, straight from the contract.
    void expect(const AppendKvCase& c) {
        expected = pool;
        const AppendKvParams& p = params;
        for (int64_t b = 0; b < c.requests; ++b) {
            for (int64_t i = 0; i < c.rows; ++i) {
                const int64_t position = int64_t{c.start[b]} + i;
                if (position < 0 || position / c.page >= c.max_pages) continue;
                const int64_t page = c.block_table[b * c.max_pages + position / c.page];
                if (page < 0 || page >= c.pages) continue;
                for (int64_t h = 0; h < c.kv_heads; ++h) {
                    for (int64_t d = 0; d < c.head_dim; ++d) {
                        const int64_t from = b * p.stride_k_request + i * p.stride_k_row + h * p.stride_k_head + d;
                        const int64_t to = page * p.stride_k_cache_page + position % c.page * p.stride_k_cache_token +
                                           h * p.stride_k_cache_head + d;
                        std::memcpy(&expected[to * bytes], &input[from * bytes], bytes);
                        std::memcpy(&expected[(to + v_pool_offset) * bytes], &input[(from + v_input_offset) * bytes],
                                    bytes);
                    }
                }
            }
        }
    }
};

}  // namespace mage::test
