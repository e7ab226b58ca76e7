#pragma once

#include "kernels/block_attention/mainloop.cuh"
#include "kernels/block_attention/variants.h"

namespace mage::cuda {

template <typename Config>
AttentionVariant make_variant(const char* name) {
    static_assert(sizeof(AttentionShared<Config>) + 1024 <= 232448, "a CTA may have 227 KB");
    return {name,
            &mage_block_attention_kernel<Config>,
            Config::kThreads,
            static_cast<int>(sizeof(AttentionShared<Config>)) + 1024,
            Config::kTileRows,
            Config::kCtas,
            Config::kKeys};
}

// Stages fill the 227 KB of shared memory that a CTA may have.
template <typename T, int kDim>
const AttentionVariant& variant_of(int row_shape, const char* const (&names)[4]) {
    constexpr int kDeep = kDim == 64 ? 2 : 1;
    static const AttentionVariant variants[core::kRowShapes] = {
        make_variant<AttentionConfig<T, kDim, 1, 64, 6 * kDeep, 1>>(names[0]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 1>>(names[1]),
        make_variant<AttentionConfig<T, kDim, 3, 64, 5 * kDeep, 1>>(names[2]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 2>>(names[3]),
    };
    return variants[row_shape];
}

#define MAGE_ATTENTION_VARIANTS(T, kDim, suffix)                                                                     \
    const AttentionVariant& attention_variant_##suffix(int row_shape) {                                              \
        return variant_of<T, kDim>(                                                                                  \
            row_shape,                                                                                               \
            {"mage_block_attention_kernel_" #suffix "_rows64", "mage_block_attention_kernel_" #suffix "_rows128",    \
             "mage_block_attention_kernel_" #suffix "_rows192", "mage_block_attention_kernel_" #suffix "_rows256"}); \
    }

}  // namespace mage::cuda
