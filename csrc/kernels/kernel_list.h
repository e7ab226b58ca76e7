#pragma once

#include "mage/kernel_info.h"

namespace mage::cuda {

// One kernel as it is launched, for the report of kernel_infos().
struct KernelEntry {
    const char* name;
    const void* function;
    int threads;
    int dynamic_shared_bytes;
};

// One per kernel, defined beside it.
KernelEntry append_kv_kernel();

}  // namespace mage::cuda
