#include "kernels/kernel_list.h"

#include "core/cuda/cuda_check.h"
#include "core/cuda/device_info.h"

namespace mage::cuda {

namespace {

// The hand-kept list, one line per op.
std::vector<KernelEntry> kernel_entries() {
    std::vector<KernelEntry> entries = {
        append_kv_kernel(),
    };
    for (const KernelEntry& entry : block_attention_kernels()) entries.push_back(entry);
    for (const KernelEntry& entry : merge_attention_kernels()) entries.push_back(entry);
    for (const KernelEntry& entry : row_votes_kernels()) entries.push_back(entry);
    for (const KernelEntry& entry : select_kv_kernels()) entries.push_back(entry);
    for (const KernelEntry& entry : token_confidence_kernels()) entries.push_back(entry);
    for (const KernelEntry& entry : token_mass_kernels()) entries.push_back(entry);
    return entries;
}

}  // namespace

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const KernelEntry& entry : kernel_entries()) names.emplace_back(entry.name);
    return names;
}

std::vector<KernelInfo> kernel_infos() {
    constexpr char kWho[] = "kernel_infos";
    core::require_hopper(kWho);
    std::vector<KernelInfo> infos;
    for (const KernelEntry& entry : kernel_entries()) {
        cudaFuncAttributes attributes;
        MAGE_CUDA_CHECK(kWho, cudaFuncGetAttributes(&attributes, entry.function));
        KernelInfo info;
        info.name = entry.name;
        info.registers = attributes.numRegs;
        info.local_bytes = static_cast<int>(attributes.localSizeBytes);
        info.static_shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
        info.dynamic_shared_bytes = entry.dynamic_shared_bytes;
        info.threads = entry.threads;
        core::allow_shared_memory(kWho, entry.function, entry.dynamic_shared_bytes);
        MAGE_CUDA_CHECK(kWho, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&info.blocks_per_sm, entry.function,
                                                                            entry.threads, entry.dynamic_shared_bytes));
        infos.push_back(info);
    }
    return infos;
}

}  // namespace mage::cuda
