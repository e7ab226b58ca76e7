// The CUDA runtime as far as the operators and their tests use it. The device's memory is the host's; streams run their
// work when it is submitted, one after the other, and graphs when they are launched.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "state.h"
#include "tensor_map.h"

namespace emulator {

namespace {

// Clusters of CTAs of about 227 KB that run at once: measured on an H100 SXM for 1, 2, 4, 8 and 16 CTAs, between them
// by proportion.
constexpr int kActiveClusters[kMaxCtas + 1] = {0, 132, 66, 42, 30, 24, 20, 18, 15, 0, 12, 0, 10, 0, 8, 0, 7};

struct Work {
    bool overlaps = false, is_late = false;
    std::function<void()> run;
};
using Graph = std::vector<Work>;

std::unique_ptr<Graph> captured;
cudaStream_t capturing_stream = nullptr;
std::function<void()> late;  // work that takes effect when its successor waits for it, or is done
std::map<const void*, int64_t> launch_counts;

void finish_late() {
    const std::function<void()> run = std::exchange(late, nullptr);
    if (run != nullptr) run();
}

void execute(const Work& work) {
    if (!work.overlaps) finish_late();
    if (work.is_late) {
        late = work.run;
        return;
    }
    work.run();
    finish_late();
}

void submit(cudaStream_t stream, Work work) {
    if (captured != nullptr && stream == capturing_stream) {
        captured->push_back(std::move(work));
    } else {
        execute(work);
    }
}

// The driver's function. What it refuses is in the manual of cuTensorMapEncodeTiled.
CUresult encode_tiled(CUtensorMap* encoded, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* /*steps*/, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    TensorMap map = {};
    map.data = static_cast<const char*>(data);
    map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    map.swizzles = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    bool is_possible = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[2] == 1 && box[3] == 1;
    for (int i = 0; i < 4; ++i) {
        map.sizes[i] = sizes[i];
        is_possible = is_possible && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256;
    }
    for (int i = 0; i < 3; ++i) {
        map.strides[i] = strides[i];
        is_possible = is_possible && strides[i] % 16 == 0 && strides[i] > 0 && strides[i] < uint64_t{1} << 40;
    }
    for (int i = 0; i < 2; ++i) map.box[i] = box[i];
    const uint32_t row_bytes = box[0] * map.element_bytes;
    if (!is_possible || row_bytes % 16 != 0 || (map.swizzles != 0 && row_bytes > 128)) return CUDA_ERROR_INVALID_VALUE;
    memcpy(encoded, &map, sizeof map);
    return CUDA_SUCCESS;
}

}  // namespace

void begin_test() {
    late = nullptr;
    captured = nullptr;
    restart_launch_numbers();
}

void submit(cudaStream_t stream, const void* kernel, bool overlaps, std::function<void()> run) {
    ++launch_counts[kernel];
    submit(stream, Work{overlaps, false, std::move(run)});
}

void submit_late(cudaStream_t stream, std::function<void()> run) { submit(stream, Work{false, true, std::move(run)}); }

void dependency_wait() { finish_late(); }

int64_t launches_of(const void* kernel) {
    const auto entry = launch_counts.find(kernel);
    return entry == launch_counts.end() ? 0 : entry->second;
}

}  // namespace emulator

using emulator::captured;
using emulator::finish_late;
using emulator::Graph;

extern "C" {

// --- Memory
// -----------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = bytes == 0 ? nullptr : aligned_alloc(256, (bytes + 255) / 256 * 256);
    return bytes > 0 && *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    finish_late();
    if (bytes > 0) memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    finish_late();
    if (bytes > 0) memset(to, value, bytes);
    return cudaSuccess;
}

// --- Streams and graphs
// -----------------------------------------------------------------------------------------------

cudaError_t cudaDeviceSynchronize() {
    finish_late();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = reinterpret_cast<cudaStream_t>(new char);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete reinterpret_cast<char*>(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    finish_late();
    captured = std::make_unique<Graph>();
    emulator::capturing_stream = stream;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = reinterpret_cast<cudaGraph_t>(captured.release());
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    for (const emulator::Work& work : *reinterpret_cast<Graph*>(executable)) emulator::execute(work);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete reinterpret_cast<Graph*>(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete reinterpret_cast<Graph*>(graph);
    return cudaSuccess;
}

// --- The device
// -------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated runtime"; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = emulator::options.multiprocessors;
            return cudaSuccess;
        default:
            return cudaErrorNotSupported;
    }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// There is no compiled kernel to ask.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaErrorNotSupported; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t) {
    return cudaErrorNotSupported;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
    *count = emulator::kActiveClusters[config->gridDim.x];
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    const bool is_known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
    *function = is_known ? reinterpret_cast<void*>(emulator::encode_tiled) : nullptr;
    *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
}
