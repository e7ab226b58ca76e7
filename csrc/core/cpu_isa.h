#pragma once

namespace mage::core {

// Instruction sets that CPU kernels are compiled for. kBaseline: SSE4.2 on x86-64, the compiler's default elsewhere.
enum class CpuIsa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The set that kernels run with: the best that this processor has, or the one that the environment variable
// MAGE_CPU_ISA (baseline, avx2, avx512) forces. Read once. Throws if the variable is unknown or the processor lacks it.
CpuIsa cpu_isa();

const char* cpu_isa_name(CpuIsa isa);

}  // namespace mage::core
