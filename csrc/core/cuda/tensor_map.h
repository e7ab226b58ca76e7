#pragma once

#include <cuda.h>

#include "mage/types.h"

namespace mage::core {

// Tensor map of a paged pool for the copy engine: dimensions (D, page, Hkv, pages), boxes of 64 elements x `box_tokens`
// in the 128-byte swizzle; what lies outside reads as zeros. 16-bit dtypes. Throws with the pool's name if the driver
// refuses it.
CUtensorMap paged_pool_map(const char* op, const char* name, const PagedPool& pool, const PageTable& pages,
                           int64_t num_kv_heads, int64_t head_dim, DType dtype, int32_t box_tokens);

// Tensor map of contiguous float32 [outer, middle, units, rows]: boxes of `box_rows` x `box_units`, as they are; what
// lies outside reads as zeros. The data must be on 16 bytes and rows a multiple of 4. Throws with the tensor's name if
// the driver refuses it.
CUtensorMap row_mass_map(const char* op, const char* name, const float* data, const int64_t (&sizes)[4],
                         int32_t box_rows, int32_t box_units);

}  // namespace mage::core
