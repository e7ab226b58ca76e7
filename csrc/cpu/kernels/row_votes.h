#pragma once

#include <cstdint>

#include "cpu/simd/variants.h"

// Adds the shares e^(row_mass[u, r]) of `num_rows` rows over the units [0, num_units) to total[r] and, where
// in_union[u], to inside[r].
// row_mass: [num_units, stride_unit], the rows side by side. Float32 within 256 units, float64 between them, in order.
MAGE_CPU_VARIANTS(void add_row_shares(const float* row_mass, int64_t stride_unit, int64_t num_units, int64_t num_rows,
                                      const int32_t* in_union, double* total, double* inside))
