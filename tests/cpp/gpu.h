#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
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

// What arrays hold, byte by byte, so that NaN and the signs of zeros count.
template <typename... T>
std::vector<char> bytes_in(const DeviceArray<T>&... arrays) {
    std::vector<char> all;
    const auto append = [&](const auto& host) {
        const char* bytes = reinterpret_cast<const char*>(host.data());
        all.insert(all.end(), bytes, bytes + host.size() * sizeof(host[0]));
    };
    (append(arrays.get()), ...);
    return all;
}

// Two streams and a graph, destroyed with it.
struct Streams {
    cudaStream_t first = nullptr, second = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    Streams() {
        MAGE_CUDA_CHECK("test", cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
        MAGE_CUDA_CHECK("test", cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    }
    ~Streams() {
        if (exec != nullptr) cudaGraphExecDestroy(exec);
        if (graph != nullptr) cudaGraphDestroy(graph);
        cudaStreamDestroy(first);
        cudaStreamDestroy(second);
    }
    Streams(const Streams&) = delete;
    Streams& operator=(const Streams&) = delete;

    template <typename Launch>
    void capture(const Launch& launch) {
        MAGE_CUDA_CHECK("test", cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal));
        launch(first);
        MAGE_CUDA_CHECK("test", cudaStreamEndCapture(first, &graph));
        MAGE_CUDA_CHECK("test", cudaGraphInstantiate(&exec, graph, 0));
    }
    void replay() {
        MAGE_CUDA_CHECK("test", cudaGraphLaunch(exec, first));
        MAGE_CUDA_CHECK("test", cudaStreamSynchronize(first));
    }
};

// A call of an op whose tensors are on the device.
struct DeviceCall {
    std::function<void(cudaStream_t)> launch;
    std::function<void()> poison;               // outputs and workspace
    std::function<std::vector<char>()> result;  // all bytes of the outputs

    std::vector<char> run() const {
        poison();
        launch(nullptr);
        MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
        return result();
    }
};

inline void expect_equal_runs(const DeviceCall& call, int runs) {
    const std::vector<char> first = call.run();
    for (int i = 1; i < runs; ++i) ASSERT_TRUE(call.run() == first) << "run " << i;
}

// On two streams at once, again and again, each of the calls gives what it gives alone.
inline void expect_equal_at_once(const DeviceCall& first, const DeviceCall& second) {
    const std::vector<char> of_first = first.run(), of_second = second.run();
    const Streams streams;
    first.poison();
    second.poison();
    for (int i = 0; i < 50; ++i) {
        first.launch(streams.first);
        second.launch(streams.second);
    }
    MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
    EXPECT_TRUE(first.result() == of_first);
    EXPECT_TRUE(second.result() == of_second);
}

// Where a kernel copies bytes from and to.
struct LateCopies {
    static constexpr int kMost = 12;
    const char* from[kMost];
    char* to[kMost];
    int64_t bytes[kMost];
};

// Lets its successor start at once, takes longer than most calls (0.1 ms), and copies then. A template, as it is in a
// header.
template <typename Copies>
__global__ void late_copy_kernel(const Copies copies) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const long long begin = clock64();
    while (clock64() - begin < 200000) {
    }
    for (int i = 0; i < Copies::kMost; ++i) {
        for (int64_t at = blockIdx.x * blockDim.x + threadIdx.x; at < copies.bytes[i]; at += gridDim.x * blockDim.x)
            copies.to[i][at] = copies.from[i][at];
    }
}

inline void launch_behind(const LateCopies& copies, const DeviceCall& call, cudaStream_t stream) {
    late_copy_kernel<<<8, 256, 0, stream>>>(copies);
    MAGE_CUDA_CHECK("test", cudaGetLastError());
    call.launch(stream);
}

// Inputs of a call that a kernel before it may write late.
class LateInputs {
public:
    // `array` holds what is to be read, and bytes `early` until it is written. These must be safe to read, and give
    // another result.
    template <typename T>
    void add(const char* name, const DeviceArray<T>& array, int early = 0xff) {
        const std::vector<char> bytes = bytes_in(array);
        if (bytes.empty()) return;
        inputs_.push_back({name, reinterpret_cast<char*>(array.data()), static_cast<int64_t>(bytes.size()), early,
                           std::make_unique<DeviceArray<char>>(bytes)});
    }

    // The call gives what it gives alone if each input, and all of them, are written while it may have started: after
    // the kernel that writes them, and behind it in a graph that runs twice.
    void expect_awaited(const DeviceCall& call) const {
        const std::vector<char> expected = call.run();
        for (size_t i = 0; i <= inputs_.size(); ++i) {
            const bool all = i == inputs_.size();
            SCOPED_TRACE(all ? "all inputs" : inputs_[i].name);
            expect_awaited(call, expected, all ? 0 : i, all ? inputs_.size() : i + 1);
            if (testing::Test::HasFatalFailure()) return;
        }
    }

private:
    struct Input {
        const char* name;
        char* array;
        int64_t bytes;
        int early;
        std::unique_ptr<DeviceArray<char>> copy;
    };

    // Of inputs [begin, end).
    void expect_awaited(const DeviceCall& call, const std::vector<char>& expected, size_t begin, size_t end) const {
        LateCopies copies = {};
        ASSERT_LE(end - begin, static_cast<size_t>(LateCopies::kMost));
        for (size_t i = begin; i < end; ++i) {
            copies.from[i - begin] = inputs_[i].copy->data();
            copies.to[i - begin] = inputs_[i].array;
            copies.bytes[i - begin] = inputs_[i].bytes;
        }
        const auto forget = [&] {
            for (size_t i = begin; i < end; ++i)
                MAGE_CUDA_CHECK("test", cudaMemset(inputs_[i].array, inputs_[i].early, inputs_[i].bytes));
            call.poison();
            MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
        };
        const auto launch = [&](cudaStream_t stream) { launch_behind(copies, call, stream); };
        forget();
        ASSERT_FALSE(call.run() == expected) << "what is there early gives the same";
        Streams streams;
        forget();
        launch(streams.first);
        MAGE_CUDA_CHECK("test", cudaStreamSynchronize(streams.first));
        ASSERT_TRUE(call.result() == expected) << "on a stream";
        streams.capture(launch);
        for (int run = 0; run < 2; ++run) {
            forget();
            streams.replay();
            ASSERT_TRUE(call.result() == expected) << "run " << run << " of a graph";
        }
    }

    std::vector<Input> inputs_;
};

// What a call writes, its workspace included, and a kernel before it may still read.
class LateReads {
public:
    template <typename T>
    void add(const char* name, const DeviceArray<T>& array) {
        const std::vector<char> bytes = bytes_in(array);
        if (bytes.empty()) return;
        reads_.push_back({name, reinterpret_cast<const char*>(array.data()), static_cast<int64_t>(bytes.size()),
                          [&array] { return bytes_in(array); }, std::make_unique<DeviceArray<char>>(bytes)});
    }

    // The kernel finds what was there before the call, and the call gives what it gives alone: behind it, and behind it
    // in a graph that runs twice.
    void expect_awaited(const DeviceCall& call) const {
        const std::vector<char> expected = call.run();
        LateCopies copies = {};
        ASSERT_LE(reads_.size(), static_cast<size_t>(LateCopies::kMost));
        for (size_t i = 0; i < reads_.size(); ++i) {
            copies.from[i] = reads_[i].array;
            copies.to[i] = reads_[i].copy->data();
            copies.bytes[i] = reads_[i].bytes;
        }
        const auto launch = [&](cudaStream_t stream) { launch_behind(copies, call, stream); };
        Streams streams;
        for (int run = 0; run < 3; ++run) {
            SCOPED_TRACE(run == 0 ? "on a stream" : "run " + std::to_string(run - 1) + " of a graph");
            call.poison();
            ASSERT_FALSE(call.result() == expected) << "what is there before is the result";
            std::vector<std::vector<char>> before;
            for (const Read& read : reads_) {
                before.push_back(read.get());
                MAGE_CUDA_CHECK("test", cudaMemset(read.copy->data(), 0, read.bytes));
            }
            MAGE_CUDA_CHECK("test", cudaDeviceSynchronize());
            if (run == 1) streams.capture(launch);
            if (run > 0) {
                streams.replay();
            } else {
                launch(streams.first);
                MAGE_CUDA_CHECK("test", cudaStreamSynchronize(streams.first));
            }
            for (size_t i = 0; i < reads_.size(); ++i)
                ASSERT_TRUE(reads_[i].copy->get() == before[i]) << reads_[i].name << " is written too early";
            ASSERT_TRUE(call.result() == expected);
        }
    }

private:
    struct Read {
        const char* name;
        const char* array;
        int64_t bytes;
        std::function<std::vector<char>()> get;
        std::unique_ptr<DeviceArray<char>> copy;
    };

    std::vector<Read> reads_;
};

}  // namespace mage::test
