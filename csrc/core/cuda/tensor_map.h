#pragma once

#include <cuda.h>

#include "mage/types.h"

namespace mage::core {

// Tensor map of a paged pool for the copy engine: dimensions (D, page, Hkv, pages), boxes of 64 elements x `box_tokens`
// in the 128-byte swizzle; what lies outside reads as zeros. 16-bit dtypes. Throws with the pool's name if the driver
// refuses it.
CUtensorMap paged_pool_map(const char* op, const char* name, const PagedPool& pool, const PageTable& pages,
                           int64_t num_kv_heads, int64_t head_dim, DType dtype, int32_t box_tokens);

}  // namespace mage::core
