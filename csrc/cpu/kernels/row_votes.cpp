#include "cpu/kernels/row_votes.h"

#include "cpu/simd/exp.h"
#include "cpu/simd/simd.h"

namespace mage::cpu::MAGE_ISA_NAMESPACE {
namespace {

constexpr int64_t kUnitsPerFloat = 256;

void add_lanes(const float* row_mass, int64_t stride_unit, int64_t num_units, int lanes, const int32_t* in_union,
               double* total, double* inside) {
    for (int64_t begin = 0; begin < num_units; begin += kUnitsPerFloat) {
        const int64_t end = begin + kUnitsPerFloat < num_units ? begin + kUnitsPerFloat : num_units;
        Float all = zero(), listed = zero();
        for (int64_t unit = begin; unit < end; ++unit) {
            const float* shares = row_mass + unit * stride_unit;
            float padded[kWidth];
            if (lanes < kWidth) {
                for (int i = 0; i < kWidth; ++i) padded[i] = i < lanes ? shares[i] : -kInfinity;
                shares = padded;
            }
            const Float share = exp_or_zero(min(load(shares), zero()));  // min(NaN, 0) is 0: see below
            const Float counted = select(equal(load(shares), load(shares)), share, zero());
            all = all + counted;
            if (in_union[unit] > 0) listed = listed + counted;
        }
        float sums[kWidth];
        store(sums, all);
        for (int i = 0; i < lanes; ++i) total[i] += sums[i];
        store(sums, listed);
        for (int i = 0; i < lanes; ++i) inside[i] += sums[i];
    }
}

}  // namespace

void add_row_shares(const float* row_mass, int64_t stride_unit, int64_t num_units, int64_t num_rows,
                    const int32_t* in_union, double* total, double* inside) {
    for (int64_t row = 0; row < num_rows; row += kWidth) {
        const int lanes = static_cast<int>(row + kWidth < num_rows ? kWidth : num_rows - row);
        add_lanes(row_mass + row, stride_unit, num_units, lanes, in_union, total + row, inside + row);
    }
}

}  // namespace mage::cpu::MAGE_ISA_NAMESPACE
