#include <gtest/gtest.h>

#include <string>

#include "gpu.h"
#include "mage/error.h"
#include "merge_attention_cases.h"

namespace mage::test {
namespace {

// A case with its tensors on the device.
struct MergeOnDevice {
    MergeBuffers buffers;
    DeviceArray<char> outs;
    DeviceArray<float> lses;
    DeviceArray<char> out;
    DeviceArray<float> lse;

    explicit MergeOnDevice(const MergeCase& c)
        : buffers(c), outs(buffers.outs), lses(buffers.lses), out(buffers.out), lse(buffers.lse) {
        buffers.bind(outs.data(), lses.data(), out.data(), lse.data());
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::merge_attention(buffers.params, stream); },
                [this] {  // as they came
                    out.set(buffers.out);
                    lse.set(buffers.lse);
                },
                [this] { return bytes_in(out, lse); }};
    }
};

// Few parts and many, in vectors and one by one.
std::vector<MergeCase> cases_of_each_kernel() {
    std::vector<MergeCase> cases;
    for (const MergeCase& c : merge_cases()) {
        for (const char* name : {"BlockOf7B", "NinthPart", "OddDimInHalves", "OddDimOfManyParts", "Float"}) {
            if (c.name == name) cases.push_back(c);
        }
    }
    return cases;
}

class MergeAttentionCuda : public testing::TestWithParam<MergeCase> {};

TEST_P(MergeAttentionCuda, AgreesWithTheCpu) {
    MAGE_NEEDS_GPU();
    const MergeCase& c = GetParam();
    MergeBuffers buffers(c);
    const DeviceArray<char> outs(buffers.outs);
    const DeviceArray<float> lses(buffers.lses);
    DeviceArray<char> out(buffers.out);
    DeviceArray<float> lse(buffers.lse);
    const std::vector<char> poison = buffers.out;
    const std::vector<float> lse_poison = buffers.lse;
    buffers.bind(buffers.outs.data(), buffers.lses.data(), buffers.out.data(), buffers.lse.data());
    cpu::merge_attention(buffers.params);
    buffers.bind(outs.data(), lses.data(), out.data(), lse.data());
    cuda::merge_attention(buffers.params, nullptr);
    const std::vector<char> merged = out.get();
    const std::vector<float> merged_lse = lse.get();
    for (size_t i = 0; i < merged.size() / buffers.bytes; ++i) {
        ASSERT_NEAR(load_exact(c.dtype, merged.data() + i * buffers.bytes),
                    load_exact(c.dtype, buffers.out.data() + i * buffers.bytes), 2 * merge_tolerance(c.dtype))
            << i;
    }
    for (size_t i = 0; i < merged_lse.size(); ++i) {
        if (buffers.lse[i] == -INFINITY) {
            ASSERT_EQ(merged_lse[i], -INFINITY) << i;
        } else {
            ASSERT_NEAR(merged_lse[i], buffers.lse[i], 0x1p-18) << i;
        }
    }
    for (int run = 0; run < 3; ++run) {
        out.set(poison);
        lse.set(lse_poison);
        cuda::merge_attention(buffers.params, nullptr);
        EXPECT_EQ(out.get(), merged);
        EXPECT_EQ(std::memcmp(lse.get().data(), merged_lse.data(), merged_lse.size() * 4), 0);
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, MergeAttentionCuda, testing::ValuesIn(merge_cases()),
                         [](const auto& info) { return info.param.name; });

// A captured call keeps the addresses of its parts and follows what they hold when the graph runs.
TEST(MergeAttentionCudaGraph, ReplaysWithNewParts) {
    MAGE_NEEDS_GPU();
    const MergeCase c = merge_cases()[1];
    MergeBuffers buffers(c);
    const DeviceArray<char> outs(buffers.outs);
    DeviceArray<float> lses(buffers.lses);
    DeviceArray<char> out(buffers.out);
    const DeviceArray<float> lse(buffers.lse);
    const std::vector<char> poison = buffers.out;
    buffers.bind(outs.data(), lses.data(), out.data(), lse.data());
    cuda::merge_attention(buffers.params, nullptr);
    const std::vector<char> before = out.get();

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    cuda::merge_attention(buffers.params, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    const auto replay = [&](const std::vector<float>& new_lses) {
        lses.set(new_lses);
        out.set(poison);
        EXPECT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        return out.get();
    };
    EXPECT_EQ(replay(buffers.lses), before);
    const std::vector<char> silent = replay(std::vector<float>(buffers.lses.size(), -INFINITY));
    EXPECT_EQ(silent, std::vector<char>(silent.size(), 0));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

TEST(MergeAttentionCudaRuns, AreBitwiseEqual) {
    MAGE_NEEDS_GPU();
    for (const MergeCase& c : cases_of_each_kernel()) {
        SCOPED_TRACE(c.name);
        MergeOnDevice device(c);
        expect_equal_runs(device.call(), 100);
    }
}

TEST(MergeAttentionCudaStreams, RunAtOnce) {
    MAGE_NEEDS_GPU();
    const std::vector<MergeCase> cases = cases_of_each_kernel();
    MergeOnDevice first(cases[0]), second(cases[1]);
    expect_equal_at_once(first.call(), second.call());
}

// Every part may come from a kernel that lets this one start early.
TEST(MergeAttentionCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const MergeCase& c : cases_of_each_kernel()) {
        MergeOnDevice device(c);
        LateInputs late;
        late.add("outs", device.outs);
        late.add("lses", device.lses);
        SCOPED_TRACE(c.name);
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
    }
}

// What is written may still be read by a kernel that lets this one start early; of rows without any part too.
TEST(MergeAttentionCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (const MergeCase& c : cases_of_each_kernel()) {
        MergeOnDevice device(c);
        for (const bool silent : {false, true}) {
            if (silent) device.lses.set(std::vector<float>(device.buffers.lses.size(), -INFINITY));
            SCOPED_TRACE(c.name + (silent ? ", silent" : ""));
            LateReads late;
            late.add("out", device.out);
            late.add("lse", device.lse);
            late.expect_awaited(device.call());
            if (HasFatalFailure()) return;
        }
    }
}

TEST(MergeAttentionPlan, TakesVectorsWhereItCan) {
    MergeBuffers buffers(merge_cases()[1]);  // 32 x 28 rows of 256 bytes
    const auto at = [](int64_t address) { return reinterpret_cast<char*>(address); };
    buffers.bind(at(4096), nullptr, at(1 << 30), nullptr);
    EXPECT_EQ(cuda::merge_attention_plan(buffers.params).grid[0], 32u * 28 * 16 / 128);
    EXPECT_EQ(cuda::merge_attention_plan(buffers.params).block[0], 128u);
    buffers.bind(at(4096 + 2), nullptr, at(1 << 30), nullptr);
    EXPECT_EQ(cuda::merge_attention_plan(buffers.params).grid[0], 32u * 28 * 128 / 128);
    buffers.params.parts.resize(kMaxMergeParts + 1);
    try {
        cuda::merge_attention_plan(buffers.params);
        FAIL() << "must throw";
    } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()), "merge_attention: outs must hold at most 512 tensors on a GPU, got 513");
    }
}

}  // namespace
}  // namespace mage::test
