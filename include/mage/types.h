#pragma once

#include <cstddef>
#include <cstdint>

// Dimension letters, used everywhere (C++, Python, tests, benches):
//
//   B requests in a batch            S cached tokens of a request, its current block included
//   Q query rows per request, head   P prefix tokens before the current block
//   H query heads, Hkv KV heads      G = H / Hkv
//   R = G * Q rows that share one KV stream; row r = q * G + (head within the group)
//   D head dim                       g granularity of selection in tokens
//   n units of a mass buffer = ceil(max_seq_len / g)
//   K selected prefix tokens         L layers that select
namespace mage {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A paged K or V pool [pages, page, Hkv, D]. Strides are in elements; the stride of D is 1.
// NHD, HND and K|V-interleaved pools differ in strides only.
struct PagedPool {
    const void* data = nullptr;
    int64_t stride_page = 0;
    int64_t stride_token = 0;
    int64_t stride_head = 0;
};

// Which pages belong to which request, and how long each request is.
struct PageTable {
    const int32_t* block_table = nullptr;  // [B, max_pages], row stride below; page ids, invalid ones weigh 0
    int64_t stride_request = 0;            // elements between rows of block_table
    int32_t max_pages = 0;
    int32_t page_size = 0;  // tokens per page: 1, 16, 32, 64, 128 or 256
    int64_t num_pages = 0;  // pages in the pool
};

}  // namespace mage
