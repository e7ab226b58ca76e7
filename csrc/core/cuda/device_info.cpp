#include "core/cuda/device_info.h"

#include <map>
#include <mutex>
#include <tuple>

#include "core/cuda/cuda_check.h"

namespace mage::core {

void require_hopper(const char* op) {
    int device = 0;
    int major = 0;
    int minor = 0;
    MAGE_CUDA_CHECK(op, cudaGetDevice(&device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    MAGE_CHECK(major == 9 && minor == 0, op, ": the GPU must be a Hopper (compute capability 9.0), got ", major, ".",
               minor);
}

int multiprocessors(const char* op) {
    int device = 0;
    int count = 0;
    MAGE_CUDA_CHECK(op, cudaGetDevice(&device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

void allow_shared_memory(const char* op, const void* kernel, int bytes) {
    MAGE_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

void allow_large_clusters(const char* op, const void* kernel) {
    MAGE_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

int active_clusters(const char* op, const void* kernel, int ctas, int threads, int bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, int>, int> known;
    int device = 0;
    MAGE_CUDA_CHECK(op, cudaGetDevice(&device));
    const std::lock_guard lock(mutex);
    const std::tuple key(kernel, device, ctas);
    if (const auto entry = known.find(key); entry != known.end()) return entry->second;
    allow_shared_memory(op, kernel, bytes);
    allow_large_clusters(op, kernel);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
        count = 0;
        cudaGetLastError();  // the size is not possible here, which is the answer
    }
    return known[key] = count;
}

}  // namespace mage::core
