#pragma once

#include "cpu/simd/variants.h"
#include "mage/types.h"

namespace mage::cpu {

// One piece of a row of logits, relative to its own largest logit. A piece of NaN and -inf alone has max -inf and sums
// 0; with max = +inf the sums mean nothing.
struct ConfidencePiece {
    float max;
    double sum;       // sum of e^(x - max)
    double weighted;  // sum of e^(x - max) * (x - max)
};

}  // namespace mage::cpu

// find_logit: index of the first logit equal to `value`, `count` if there is none; *equal is their number.
MAGE_CPU_VARIANTS(void confidence_piece(const void* logits, DType dtype, int64_t count, ConfidencePiece* piece);
                  int64_t find_logit(const void* logits, DType dtype, int64_t count, float value, int64_t* equal))
