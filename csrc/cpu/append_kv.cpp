#include "mage/append_kv.h"

#include <cstring>

#include "core/parallel.h"

namespace mage::cpu {

void append_kv(const AppendKvParams& p) {
    const int64_t bytes = dtype_bytes(p.dtype);
    const int64_t row_bytes = p.head_dim * bytes;
    const int64_t capacity = int64_t{p.pages.max_pages} * p.pages.page_size;
    const auto* k = static_cast<const char*>(p.k);
    const auto* v = static_cast<const char*>(p.v);
    auto* k_cache = static_cast<char*>(p.k_cache);
    auto* v_cache = static_cast<char*>(p.v_cache);

    const int64_t token_bytes = 2 * p.num_kv_heads * row_bytes;
    const int64_t grain = 1 + (int64_t{1} << 16) / (token_bytes + 1);  // about 64 KiB: below that a thread does not pay
    core::parallel_for(p.num_requests * p.num_rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / p.num_rows;
            const int64_t i = token % p.num_rows;
            const int64_t position = int64_t{p.start[b]} + i;
            if (position < 0 || position >= capacity) continue;
            const int64_t page = p.pages.block_table[b * p.pages.stride_request + position / p.pages.page_size];
            if (page < 0 || page >= p.pages.num_pages) continue;
            const int64_t slot = position % p.pages.page_size;
            for (int64_t h = 0; h < p.num_kv_heads; ++h) {
                const int64_t to_k =
                    page * p.stride_k_cache_page + slot * p.stride_k_cache_token + h * p.stride_k_cache_head;
                const int64_t to_v =
                    page * p.stride_v_cache_page + slot * p.stride_v_cache_token + h * p.stride_v_cache_head;
                const int64_t from_k = b * p.stride_k_request + i * p.stride_k_row + h * p.stride_k_head;
                const int64_t from_v = b * p.stride_v_request + i * p.stride_v_row + h * p.stride_v_head;
                std::memcpy(k_cache + to_k * bytes, k + from_k * bytes, row_bytes);
                std::memcpy(v_cache + to_v * bytes, v + from_v * bytes, row_bytes);
            }
        }
    });
}

}  // namespace mage::cpu
