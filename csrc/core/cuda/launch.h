#pragma once

#include <tuple>
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
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (plan.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {plan.cluster, 1, 1};
    }
    if (plan.overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    std::tuple<ParamsT...> values(std::forward<ArgsT>(args)...);
    std::apply(
        [&](auto&... value) {
            void* addresses[] = {&value...};
            MAGE_CUDA_CHECK(op, cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses));
        },
        values);
}

}  // namespace mage::core
