#pragma once

#include <vector>

#include "mage/kernel_info.h"

namespace mage::cuda {

// One kernel as it is launched, for the report of kernel_infos().
struct KernelEntry {
    const char* name;
    const void* function;
    int threads;
    int dynamic_shared_bytes;
};

// Defined beside the kernels.
KernelEntry append_kv_kernel();
std::vector<KernelEntry> block_attention_kernels();
std::vector<KernelEntry> merge_attention_kernels();
std::vector<KernelEntry> row_votes_kernels();
std::vector<KernelEntry> select_kv_kernels();
std::vector<KernelEntry> token_confidence_kernels();
std::vector<KernelEntry> token_mass_kernels();

}  // namespace mage::cuda
