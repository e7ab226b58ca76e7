#include "cpu/kernels/token_confidence.h"

#include "cpu/simd/exp.h"
#include "cpu/simd/simd.h"

namespace mage::cpu::MAGE_ISA_NAMESPACE {
namespace {

// Vectors that are added in float32 before the sum goes on in float64: long float32 sums were seen to err by 1.6e-6.
constexpr int64_t kRun = 64 * kWidth;

struct Sums {
    Float sum = zero();
    Float weighted = zero();

    MAGE_INLINE void add(Float x, Float max_of_all) {
        const Float below = max(x - max_of_all, set1(-100.0f));  // NaN and -inf: -100, where e^x is 0
        const Float weight = exp_or_zero(below);
        sum = sum + weight;
        weighted = fma(weight, below, weighted);
    }
};

template <typename T>
void piece_of(const T* logits, int64_t count, ConfidencePiece* piece) {
    const int64_t whole = count / kWidth * kWidth;
    float last[kWidth];
    for (int i = 0; i < kWidth; ++i) last[i] = whole + i < count ? to_float(logits[whole + i]) : -kInfinity;

    Float largest = max(load(last), set1(-kInfinity));  // max(NaN, b) is b
    for (int64_t i = 0; i < whole; i += kWidth) largest = max(load(logits + i), largest);
    piece->max = reduce_max(largest);
    piece->sum = 0.0;
    piece->weighted = 0.0;
    if (piece->max == -kInfinity) return;

    const Float top = set1(piece->max);
    for (int64_t begin = 0; begin < count; begin += kRun) {
        const int64_t end = begin + kRun < whole ? begin + kRun : whole;
        // Two chains of additions, so that one does not wait for the other.
        Sums even, odd;
        int64_t i = begin;
        for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
            even.add(load(logits + i), top);
            odd.add(load(logits + i + kWidth), top);
        }
        if (i < end) even.add(load(logits + i), top);
        if (whole < count && begin + kRun >= count) odd.add(load(last), top);
        piece->sum += reduce_add(even.sum + odd.sum);
        piece->weighted += reduce_add(even.weighted + odd.weighted);
    }
}

template <typename T>
int64_t find_in(const T* logits, int64_t count, float value, int64_t* equal) {
    int64_t first = count;
    *equal = 0;
    for (int64_t i = count - 1; i >= 0; --i) {
        const bool hit = to_float(logits[i]) == value;
        first = hit ? i : first;
        *equal += hit;
    }
    return first;
}

}  // namespace

void confidence_piece(const void* logits, DType dtype, int64_t count, ConfidencePiece* piece) {
    if (dtype == DType::kFloat32) return piece_of(static_cast<const float*>(logits), count, piece);
    if (dtype == DType::kBFloat16) return piece_of(static_cast<const BFloat16*>(logits), count, piece);
    piece_of(static_cast<const Float16*>(logits), count, piece);
}

int64_t find_logit(const void* logits, DType dtype, int64_t count, float value, int64_t* equal) {
    if (dtype == DType::kFloat32) return find_in(static_cast<const float*>(logits), count, value, equal);
    if (dtype == DType::kBFloat16) return find_in(static_cast<const BFloat16*>(logits), count, value, equal);
    return find_in(static_cast<const Float16*>(logits), count, value, equal);
}

}  // namespace mage::cpu::MAGE_ISA_NAMESPACE
