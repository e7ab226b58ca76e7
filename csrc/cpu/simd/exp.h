#pragma once

#include "cpu/simd/simd.h"

namespace mage::cpu::MAGE_ISA_NAMESPACE {

// e^x with a relative error below 3e-7, for x <= 88; 0 below -87, for -inf and for NaN.
// The argument is reduced in base e (ln 2 in two parts, the first with few enough bits that whole * part is exact), so
// the error does not grow with |x| as that of exp2(x * log2 e) does.
MAGE_INLINE Float exp_or_zero(Float x) {
    const Float bounded = max(x, set1(-100.0f));  // NaN: -100
    const Float whole = round_to_whole(bounded * set1(1.44269504f));
    const Float rest = fma(whole, set1(2.12194440e-4f), fma(whole, set1(-0.693359375f), bounded));
    return scale_by_power(exp2(rest * set1(1.44269504f)), whole, whole);
}

}  // namespace mage::cpu::MAGE_ISA_NAMESPACE
