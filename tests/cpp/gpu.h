#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/cuda/cuda_check.h"

// First line of a test that needs a Hopper GPU: skips without one, or fails where MAGE_REQUIRE_GPU=1 says there is one.
#define MAGE_NEEDS_GPU()                                                                              \
    do {                                                                                              \
        if (!mage::test::has_hopper()) {                                                              \
            const char* mage_required = std::getenv("MAGE_REQUIRE_GPU");                              \
            if (mage_required != nullptr && std::strcmp(mage_required, "1") == 0) FAIL() << "no GPU"; \
            GTEST_SKIP() << "no Hopper GPU";                                                          \
        }                                                                                             \
    } while (0)

namespace mage::test {

inline bool has_hopper() {
    int devices = 0;
    int major = 0;
    const bool found = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
                       major == 9;
    if (!found) cudaGetLastError();  // a missing driver is an answer here, not an error to keep
    return found;
}

// A vector's copy on the device. No size is rounded up, so that compute-sanitizer sees every overrun.
template <typename T>
class DeviceArray {
public:
    explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
        MAGE_CUDA_CHECK("test", cudaMalloc(&data_, size_ * sizeof(T)));
        set(host);
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    T* data() const { return data_; }

    // Has arrived when this returns: a copy from pageable memory alone may still be on its way, and streams that do not
    // wait for the default one would overtake it.
    void set(const std::vector<T>& host) {
        MAGE_CUDA_CHECK("test", cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
        MAGE_CUDA_CHECK("test", cudaStreamSynchronize(cudaStreamLegacy));
    }

    std::vector<T> get() const {
        std::vector<T> host(size_);
        MAGE_CUDA_CHECK("test", cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }

private:
    T* data_ = nullptr;
    size_t size_;
};

}  // namespace mage::test
