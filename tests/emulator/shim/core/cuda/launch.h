#pragma once

#include <tuple>
#include <utility>

#include "core/cuda/cuda_check.h"
#include "emulator.h"
#include "mage/kernel_info.h"
#include "mage/stream.h"

// In place of csrc/core/cuda/launch.h: a launch in the emulator, or in the graph that is being captured.
namespace mage::core {

template <typename... ParamsT, typename... ArgsT>
void launch(const char*, void (*kernel)(ParamsT...), const LaunchPlan& plan, CudaStream stream, ArgsT&&... args) {
    if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return;
    emulator::LaunchShape shape;
    shape.grid = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
    shape.block = dim3(plan.block[0], plan.block[1], plan.block[2]);
    shape.shared_bytes = plan.shared_bytes;
    shape.cluster = plan.cluster;
    const std::tuple<std::decay_t<ParamsT>...> values(std::forward<ArgsT>(args)...);
    emulator::submit(stream, reinterpret_cast<const void*>(kernel), plan.overlap,
                     [=] { emulator::run_grid(shape, [&] { std::apply(kernel, values); }); });
}

}  // namespace mage::core
