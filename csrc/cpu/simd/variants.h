#pragma once

#include "core/cpu_isa.h"

// Kernels in csrc/cpu/kernels/ are compiled once per instruction set and put their functions into namespace
// mage::cpu::MAGE_ISA_NAMESPACE. Their callers, compiled once for the baseline, declare all copies and pick one:
//
//     MAGE_CPU_VARIANTS(void attention_tiles(const AttentionItem& item))   // at file scope
//     const auto run = MAGE_CPU_PICK(attention_tiles);                     // function pointer
//
// NOTE: kernel files must not call inline functions of the standard library: the linker may keep the copy that was
// compiled for AVX-512 and hand it to baseline code.
#if defined(MAGE_ISA_X86)
#define MAGE_CPU_VARIANTS(...)          \
    namespace mage::cpu::isa_baseline { \
    __VA_ARGS__;                        \
    }                                   \
    namespace mage::cpu::isa_avx2 {     \
    __VA_ARGS__;                        \
    }                                   \
    namespace mage::cpu::isa_avx512 {   \
    __VA_ARGS__;                        \
    }
#define MAGE_CPU_PICK(function)                                                                       \
    ::mage::cpu::pick_variant(&::mage::cpu::isa_baseline::function, &::mage::cpu::isa_avx2::function, \
                              &::mage::cpu::isa_avx512::function)
#else
#define MAGE_CPU_VARIANTS(...)          \
    namespace mage::cpu::isa_baseline { \
    __VA_ARGS__;                        \
    }
#define MAGE_CPU_PICK(function) (&::mage::cpu::isa_baseline::function)
#endif

namespace mage::cpu {

template <typename Function>
Function pick_variant(Function baseline, Function avx2, Function avx512) {
    switch (core::cpu_isa()) {
        case core::CpuIsa::kAvx512:
            return avx512;
        case core::CpuIsa::kAvx2:
            return avx2;
        default:
            return baseline;
    }
}

}  // namespace mage::cpu
