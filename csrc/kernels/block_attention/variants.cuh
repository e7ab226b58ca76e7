#pragma once

#include "kernels/block_attention/mainloop.cuh"
#include "kernels/block_attention/short_lists.cuh"
#include "kernels/block_attention/variants.h"

namespace mage::cuda {

template <typename Config>
AttentionVariant make_variant(const char* name) {
    static_assert(sizeof(AttentionShared<Config>) + 1024 <= 232448, "a CTA may have 227 KB");
    return {name,
            &mage_block_attention_kernel<Config>,
            Config::kThreads,
            static_cast<int>(sizeof(AttentionShared<Config>)) + 1024,
            Config::kCtaRows,
            Config::kCtas,
            Config::kKeys};
}

template <typename Config>
AttentionVariant make_short_variant(const char* name) {
    static_assert(sizeof(ShortListShared<Config>) + 1024 <= 232448, "a CTA may have 227 KB");
    return {name,
            &mage_block_attention_short_list_kernel<Config>,
            Config::kThreads,
            static_cast<int>(sizeof(ShortListShared<Config>)) + 1024,
            Config::kRows,
            0,
            Config::kKeys};
}

// The first of lists is the kernel of short ones, of any number of rows.
template <typename T, int kDim, bool kLists>
AttentionVariant first_variant(const char* name) {
    if constexpr (kLists) {
        return make_short_variant<ShortListConfig<T, kDim>>(name);
    } else {
        return make_variant<AttentionConfig<T, kDim, 1, 64, kDim == 64 ? 12 : 6, 1, false>>(name);
    }
}

// Stages fill the 227 KB of shared memory that a CTA may have.
template <typename T, int kDim, bool kLists>
const AttentionVariant& variant_of(int row_shape, const char* const (&names)[4]) {
    constexpr int kDeep = kDim == 64 ? 2 : 1;
    static const AttentionVariant variants[core::kRowShapes] = {
        first_variant<T, kDim, kLists>(names[0]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 1, kLists>>(names[1]),
        make_variant<AttentionConfig<T, kDim, 3, 64, 5 * kDeep, 1, kLists>>(names[2]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 2, kLists>>(names[3]),
    };
    return variants[row_shape];
}

#define MAGE_ATTENTION_NAMES(prefix) {prefix "_rows64", prefix "_rows128", prefix "_rows192", prefix "_rows256"}
#define MAGE_ATTENTION_VARIANTS(T, kDim, suffix)                                                                    \
    const AttentionVariant& attention_variant_##suffix(int row_shape, bool lists) {                                 \
        return lists ? variant_of<T, kDim, true>(row_shape,                                                         \
                                                 MAGE_ATTENTION_NAMES("mage_block_attention_list_kernel_" #suffix)) \
                     : variant_of<T, kDim, false>(row_shape,                                                        \
                                                  MAGE_ATTENTION_NAMES("mage_block_attention_kernel_" #suffix));    \
    }

}  // namespace mage::cuda
