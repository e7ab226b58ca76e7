#pragma once

#include <utility>

#include "core/cuda/cuda_check.h"
#include "mage/kernel_info.h"
#include "mage/stream.h"

namespace mage::core {

// The one way a kernel is started. Throws on a bad configuration; faults of the kernel itself show at the next
// synchronisation, as with any launch. An empty grid launches nothing.
template <typename... ParamsT, typename... ArgsT>
void launch(const char* op, void (*kernel)(ParamsT...), const LaunchPlan& plan, CudaStream stream, ArgsT&&... args) {
    if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
    config.blockDim = dim3(plan.block[0], plan.block[1], plan.block[2]);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    MAGE_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, std::forward<ArgsT>(args)...));
}

}  // namespace mage::core
