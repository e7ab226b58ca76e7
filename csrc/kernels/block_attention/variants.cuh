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
template <typename T, int kDim, Serves kServes>
AttentionVariant first_variant(const char* name) {
    if constexpr (kServes == Serves::kLists) {
        return make_short_variant<ShortListConfig<T, kDim>>(name);
    } else {
        constexpr bool kPacked = kServes == Serves::kPacked;
        return make_variant<AttentionConfig<T, kDim, 1, 64, kDim == 64 ? 12 : 6, 1, false, kPacked>>(name);
    }
}

// The last has no packed unit sums.
template <typename T, int kDim, Serves kServes>
AttentionVariant last_variant(const char* name) {
    if constexpr (kServes == Serves::kPacked) {
        return {};
    } else {
        return make_variant<AttentionConfig<T, kDim, 2, 128, kDim == 64 ? 6 : 3, 2, kServes == Serves::kLists>>(name);
    }
}

// Stages fill the 227 KB of shared memory that a CTA may have.
template <typename T, int kDim, Serves kServes>
const AttentionVariant& variant_of(int row_shape, const char* const (&names)[4]) {
    constexpr int kDeep = kDim == 64 ? 2 : 1;
    constexpr bool kLists = kServes == Serves::kLists, kPacked = kServes == Serves::kPacked;
    static const AttentionVariant variants[core::kRowShapes] = {
        first_variant<T, kDim, kServes>(names[0]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 1, kLists, kPacked>>(names[1]),
        make_variant<AttentionConfig<T, kDim, 3, 64, 5 * kDeep, 1, kLists, kPacked>>(names[2]),
        last_variant<T, kDim, kServes>(names[3]),
    };
    return variants[row_shape];
}

#define MAGE_ATTENTION_NAMES(prefix) {prefix "_rows64", prefix "_rows128", prefix "_rows192", prefix "_rows256"}
#define MAGE_ATTENTION_VARIANTS(T, kDim, suffix)                                                                  \
    const AttentionVariant& attention_variant_##suffix(int row_shape, Serves serves) {                            \
        if (serves == Serves::kLists)                                                                             \
            return variant_of<T, kDim, Serves::kLists>(                                                           \
                row_shape, MAGE_ATTENTION_NAMES("mage_block_attention_list_kernel_" #suffix));                    \
        if (serves == Serves::kPacked)                                                                            \
            return variant_of<T, kDim, Serves::kPacked>(                                                          \
                row_shape, MAGE_ATTENTION_NAMES("mage_block_attention_packed_kernel_" #suffix));                  \
        return variant_of<T, kDim, Serves::kRange>(row_shape,                                                     \
                                                   MAGE_ATTENTION_NAMES("mage_block_attention_kernel_" #suffix)); \
    }

}  // namespace mage::cuda
