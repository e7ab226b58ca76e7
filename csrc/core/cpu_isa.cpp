#include "core/cpu_isa.h"

#include <cstdlib>
#include <string>

#include "core/check.h"

namespace mage::core {

namespace {

CpuIsa best_isa() {
#if defined(MAGE_ISA_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            return CpuIsa::kAvx512;
        }
        return CpuIsa::kAvx2;
    }
#endif
    return CpuIsa::kBaseline;
}

CpuIsa chosen_isa() {
    const CpuIsa best = best_isa();
    const char* forced = std::getenv("MAGE_CPU_ISA");
    if (forced == nullptr || *forced == '\0') return best;
    for (const CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
        if (std::string(forced) != cpu_isa_name(isa)) continue;
        MAGE_CHECK(isa <= best, "MAGE_CPU_ISA: the instruction set must be one that this processor has (up to ",
                   cpu_isa_name(best), "), got ", forced);
        return isa;
    }
    throw_error("MAGE_CPU_ISA: the instruction set must be baseline, avx2 or avx512, got ", forced);
}

}  // namespace

CpuIsa cpu_isa() {
    static const CpuIsa isa = chosen_isa();
    return isa;
}

const char* cpu_isa_name(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::kAvx512:
            return "avx512";
        case CpuIsa::kAvx2:
            return "avx2";
        default:
            return "baseline";
    }
}

}  // namespace mage::core
