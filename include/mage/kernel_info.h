#pragma once

#include <cstdint>
#include <string>
#include <vector>

// What a kernel costs and how an op would be launched: for `_C`, benches and tests, not needed to run an op.
namespace mage {

// How one launch covers its work.
struct LaunchPlan {
    uint32_t grid[3] = {1, 1, 1};
    uint32_t block[3] = {1, 1, 1};
    uint32_t shared_bytes = 0;  // dynamic
    uint32_t cluster = 1;       // CTAs of a cluster, along x
    // The kernel may start while the one before it in the stream is running: it waits for it by itself (programmatic
    // dependent launch).
    bool overlap = false;
};

struct KernelInfo {
    std::string name;
    int registers = 0;            // per thread
    int local_bytes = 0;          // per thread; spills show here
    int static_shared_bytes = 0;  // per block
    int dynamic_shared_bytes = 0;
    int threads = 0;        // per block
    int blocks_per_sm = 0;  // resident at once
};

namespace cuda {

// The kernels that were compiled; needs no device.
std::vector<std::string> kernel_names();

// Every kernel of the library on the current device. Throws mage::Error without one that runs them.
std::vector<KernelInfo> kernel_infos();

}  // namespace cuda

}  // namespace mage
