#include <gtest/gtest.h>

#include <string>

#include "append_kv_cases.h"
#include "gpu.h"
#include "mage/error.h"

namespace mage::test {
namespace {

class AppendKvCuda : public testing::TestWithParam<AppendKvCase> {};

TEST_P(AppendKvCuda, WritesWhatTheContractSays) {
    MAGE_NEEDS_GPU();
    const AppendKvCase& c = GetParam();
    AppendKvBuffers buffers(c);
    const DeviceArray<unsigned char> input(buffers.input);
    const DeviceArray<unsigned char> pool(buffers.pool);
    const DeviceArray<int32_t> table(c.block_table);
    const DeviceArray<int32_t> start(c.start);
    buffers.bind(input.data(), pool.data(), table.data(), start.data());
    cuda::append_kv(buffers.params, nullptr);
    EXPECT_EQ(pool.get(), buffers.expected);
}

INSTANTIATE_TEST_SUITE_P(Cases, AppendKvCuda, testing::ValuesIn(append_kv_cases()),
                         [](const auto& info) { return info.param.name; });

// A captured launch follows the tables and starts that are in the buffers when the graph runs.
TEST(AppendKvCudaGraph, ReplaysWithNewStarts) {
    MAGE_NEEDS_GPU();
    const AppendKvCase captured = append_kv_cases()[1];
    AppendKvCase replayed = captured;
    replayed.start = {0, 17};
    AppendKvBuffers buffers(captured);
    const AppendKvBuffers other(replayed);
    const DeviceArray<unsigned char> input(buffers.input);
    DeviceArray<unsigned char> pool(buffers.pool);
    const DeviceArray<int32_t> table(captured.block_table);
    DeviceArray<int32_t> start(captured.start);
    buffers.bind(input.data(), pool.data(), table.data(), start.data());

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    cuda::append_kv(buffers.params, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    EXPECT_EQ(pool.get(), buffers.pool) << "capturing must not run the kernel";

    start.set(replayed.start);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(pool.get(), other.expected);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

TEST(AppendKvPlan, CoversEveryVectorOnce) {
    AppendKvParams params;
    params.num_requests = 3;
    params.num_rows = 33;
    params.num_kv_heads = 4;
    params.head_dim = 128;
    const LaunchPlan plan = cuda::append_kv_plan(params);  // 33 * 4 * 16 = 2112 vectors of a request
    EXPECT_EQ(plan.grid[0], 3u * 9u);
    EXPECT_EQ(plan.block[0], 256u);
    EXPECT_EQ(plan.shared_bytes, 0u);
    params.num_requests = 0;
    EXPECT_EQ(cuda::append_kv_plan(params).grid[0], 0u);
    params.num_requests = 1;
    params.num_rows = int64_t{1} << 40;
    try {
        cuda::append_kv_plan(params);
        FAIL() << "must throw";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("append_kv: k must have fewer than 2^35 bytes"), std::string::npos)
            << error.what();
    }
}

TEST(KernelInfos, NoKernelSpills) {
    MAGE_NEEDS_GPU();
    const auto infos = cuda::kernel_infos();
    ASSERT_EQ(infos.size(), cuda::kernel_names().size());
    for (const KernelInfo& info : infos) {
        EXPECT_EQ(info.local_bytes, 0) << info.name;
        EXPECT_GT(info.registers, 0) << info.name;
        EXPECT_GE(info.blocks_per_sm, 1) << info.name;
    }
}

}  // namespace
}  // namespace mage::test
